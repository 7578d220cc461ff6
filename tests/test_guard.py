# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast bench --against``: two trees are built and served as they are, and only what noise does not
explain is called slower. No assertion here depends on a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from softprompt_fast.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _guard  # noqa: E402
import _processes  # noqa: E402
import _suite  # noqa: E402
import bench_merge_states  # noqa: E402
from _guard import GuardError, Row  # noqa: E402

CASE = _suite.Case("op", "merge_states-decode-b32", {}, ("ours",), None, ())  # type: ignore[arg-type]


# -- verdicts ---------------------------------------------------------------------------------------------------------


class Side:
    """A process that answers from lists: seconds by round, and a result."""

    def __init__(self, name: str, seconds: list[float], result: torch.Tensor | None = None, error: str = "") -> None:
        self.name, self.seconds, self.result, self.error = name, iter(seconds), result, error

    def ask(self, request: str, /, **arguments: Any) -> dict[str, Any]:
        if self.error:
            return {"error": self.error}
        if request == "record":
            torch.save([torch.ones(3) if self.result is None else self.result], arguments["file"])
        answers = {"prepare": {"tolerance": 1e-5}, "record": {"backends": {"merge_states": ["cpu"]}}, "inputs": {}}
        return answers[request] if request in answers else {"times": {"first token": next(self.seconds)}}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_guard, "PAUSE", 0.0)


def measured(folder: Path, **sides: Side) -> Row:
    found = {side: Side("REV", [1.0 + i / 1000 for i in range(9)]) for side in _guard.SIDES} | sides
    (row,) = _guard.measure(CASE, found, folder, 9, lambda: None)
    return row


@pytest.mark.parametrize(
    "head, again, verdict",
    [
        (1.3, 1.0, "slower"),
        (0.7, 1.0, "faster"),
        (1.0, 1.0, ""),
        # Processes of one and the same revision differ as much, in this direction or in the other.
        (1.3, 1.4, ""),
        (1.3, 0.7, ""),
    ],
)
def test_only_what_noise_does_not_explain_is_flagged(head: float, again: float, verdict: str, tmp_path: Path) -> None:
    sides = {"head": Side("this tree", [head] * 9), "again": Side("REV", [again] * 9)}
    row = measured(tmp_path, **sides)
    assert row.id == f"{CASE.id}/first-token" and row.is_of(CASE) and row.verdict == verdict
    assert row.ratio is not None and row.ratio["median"] == pytest.approx(1 / head, rel=0.01)
    assert row.noise is not None and row.noise["low"] <= 1 <= row.noise["high"]
    assert row.noise["high"] == pytest.approx(max(again, 1 / again), rel=0.02)


def test_a_noisy_row_is_not_flagged(tmp_path: Path) -> None:
    seconds = [1.0, 3.0, 0.5, 2.0, 1.5, 0.7, 4.0, 1.1, 0.9]
    row = measured(tmp_path, head=Side("this tree", seconds))
    assert row.verdict == "" and row.samples["head"] == seconds


def test_another_result_has_no_ratio(tmp_path: Path) -> None:
    row = measured(tmp_path, head=Side("this tree", [], torch.full((3,), 1.001)))
    assert row.verdict == "differs" and row.ratio is None and not row.samples
    assert row.why is not None and "differ by 1.0e-03, tolerance 1e-05" in row.why


def test_what_one_side_cannot_run_has_the_reason(tmp_path: Path) -> None:
    row = measured(tmp_path, head=Side("this tree", [], error="ValueError: no"))
    assert (row.verdict, row.why, row.is_of(CASE)) == ("fails", "this tree: ValueError: no", True)
    row = measured(tmp_path, base=Side("v1", [], error="AttributeError: new"), head=Side("this tree", [], error="x"))
    assert (row.verdict, row.why) == ("", "v1: AttributeError: new")


def test_differences_of_results() -> None:
    ones = torch.ones(4)
    assert _guard.difference([ones], [ones]) == 0.0
    assert _guard.difference([torch.tensor([1, 2, 3, 4])], [torch.tensor([1, 2, 3, 5])]) == 0.25
    assert _guard.difference([ones], [torch.ones(3)]) == _guard.difference([ones], []) == float("inf")
    nan = _guard.difference([ones * float("nan"), ones], [ones, ones])
    assert nan != nan


def timed(verdict: str, ratio: tuple[float, float], noise: tuple[float, float]) -> Row:
    low, high = ({"low": x[0], "high": x[1]} for x in (ratio, noise))
    return Row("op/a/call", verdict, {}, low, high)


def test_a_verdict_has_to_stand_twice() -> None:
    first = timed("slower", (0.80, 0.85), (0.97, 1.03))
    assert _guard.agreed(first, timed("slower", (0.82, 0.86), (0.99, 1.01))).verdict == "slower"
    assert _guard.agreed(first, timed("", (0.98, 1.02), (0.99, 1.01))).verdict == ""
    assert _guard.agreed(first, timed("faster", (1.1, 1.2), (0.99, 1.01))).verdict == ""
    # Outside its own noise, but not outside that of the first measurement.
    both = _guard.agreed(first, timed("slower", (0.95, 0.975), (0.99, 1.01)))
    assert both.verdict == "" and both.noise == {"low": 0.97, "high": 1.03}
    kept = Row("op/b", "differs", why="x")
    assert _guard.agreed(kept, None) is kept and _guard.agreed(first, None) is first


# -- trees ------------------------------------------------------------------------------------------------------------

SETUP = """
import os, pathlib, sys
if os.environ.get("SOFTPROMPT_FAST_BUILD") != "0":
    source = pathlib.Path("csrc/one.cpp").read_text()
    if "wrong" in source:
        sys.exit("one.cpp:1: error: wrong")
    pathlib.Path("softprompt_fast/_C.abi.so").write_text("built from " + source)
    with open(os.environ["BUILDS"], "a") as log:
        log.write(os.getcwd() + "\\n")
"""


def git(at: Path, *arguments: str) -> None:
    name = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(at), *name, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a commit and an extension of one file, which a stand-in for setup.py builds."""
    root = tmp_path / "root"
    files = {
        "setup.py": SETUP, "softprompt_fast/_version.py": "", "softprompt_fast/gone.py": "", "csrc/one.cpp": "old",
        ".gitignore": "*.so\n",
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "one")
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    monkeypatch.delenv(_guard.MODE, raising=False)
    return root


def test_a_tree_is_taken_as_it_is(repository: Path, tmp_path: Path) -> None:
    (repository / "csrc" / "one.cpp").write_text("new")
    (repository / "csrc" / "two.cpp").write_text("not known to git")
    (repository / "softprompt_fast" / "gone.py").unlink()
    (repository / "softprompt_fast" / "_C.abi.so").write_text("stale")
    _guard.copy_tree(repository, tmp_path / "copy")
    found = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert found == {"setup.py", "softprompt_fast/_version.py", "csrc/one.cpp", "csrc/two.cpp", ".gitignore"}
    assert (tmp_path / "copy" / "csrc" / "one.cpp").read_text() == "new"


@pytest.mark.parametrize("changed", [False, True])
def test_each_tree_is_built_from_its_own_sources(changed: bool, repository: Path, tmp_path: Path) -> None:
    if changed:
        (repository / "csrc" / "one.cpp").write_text("new")
    base, head = tmp_path / "base", tmp_path / "head"
    commit = _guard.commit_of("HEAD", repository)
    with _guard.worktree(commit, base, repository):
        _guard.copy_tree(repository, head)
        _guard.build(base, "HEAD")
        _guard.build(head, "this tree", like=base)
        assert (base / "softprompt_fast" / "_C.abi.so").read_text() == "built from old"
        assert (head / "softprompt_fast" / "_C.abi.so").read_text() == f"built from {'new' if changed else 'old'}"
        # The same sources are built once.
        assert len((tmp_path / "builds").read_text().splitlines()) == 1 + changed
    assert not base.exists() and str(base) not in _guard.git("worktree", "list", at=repository)
    assert not list((repository / "softprompt_fast").glob("*.so"))


def test_what_cannot_be_compared_is_refused(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GuardError, match="--against v9: git knows no such revision"):
        _guard.run("v9", [], root=repository)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(GuardError, match="needs a git checkout"):
        _guard.run("HEAD", [], root=tmp_path / "elsewhere")
    with pytest.raises(GuardError, match="a folder of another"):
        _guard.run("HEAD", [], root=repository / "csrc")
    (repository / "csrc" / "one.cpp").write_text("wrong")
    with pytest.raises(GuardError, match=r"this tree: the C\+\+ extension can't be built:\none.cpp:1: error: wrong"):
        _guard.run("HEAD", [], root=repository)
    assert len(_guard.git("worktree", "list", at=repository).splitlines()) == 1
    monkeypatch.setenv("PATH", "")
    with pytest.raises(GuardError, match="git: "):
        _guard.run("HEAD", [], root=repository)


def test_a_process_that_ends_says_why(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "_worker.py").write_text("raise SystemExit('no such module')")
    process = _processes.Process("v1", repository, tmp_path, tmp_path / "log")
    with pytest.raises(_processes.ProcessError, match="v1: its process has ended:\nno such module"):
        process.wait()
    process.close()
    (tmp_path / "_worker.py").write_text("""print('{"package": "/elsewhere/__init__.py"}')""")
    process = _processes.Process("v1", repository, tmp_path, tmp_path / "log")
    with pytest.raises(_processes.ProcessError, match=r"v1: expected the package of .*, found .elsewhere"):
        process.wait()
    process.close()


def test_a_process_that_does_not_end_is_ended(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = repository / "softprompt_fast" / "__init__.py"
    code = f"import time\nprint({json.dumps({'package': str(package)})!r}, flush=True)\ntime.sleep(1000)"
    (tmp_path / "_worker.py").write_text(code)
    process = _processes.Process("v1", repository, tmp_path, tmp_path / "log")
    process.wait()
    monkeypatch.setattr(_processes, "LAST", 0.1)
    process.close()
    assert process.process.returncode


# -- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.parametrize("verdict, fail, code", [("slower", True, 1), ("slower", False, 0), ("faster", True, 0)])
def test_the_exit_status_is_that_of_a_regression(
    verdict: str, fail: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def run(revision: str, chosen: list[_suite.Case], *, begin: Any, **given: Any) -> _guard.Report:
        asked.extend((revision, [case.id for case in chosen], given))
        begin("building", 2, 0, 3)()
        limits = {"median": 0.5, "p20": 0.4, "p80": 0.6, "low": 0.4, "high": 0.6}
        samples = {side: [1.0, 1.0] for side in _guard.SIDES}
        rows = [Row("op/a/call", verdict, samples, limits, limits), Row("op/b", why="v1: new")]
        return _guard.Report(revision, "0" * 40, given["environment"], rows)

    monkeypatch.setattr(_guard, "run", run)
    options = ["--only", CASE.id, "--against", "v1", "--set", "A=b=c", "--set", "D=", "--rounds", "7"]
    done = command(*options, "--json", str(tmp_path / "r.json"), *(["--fail"] if fail else []))
    assert done.exit_code == code, done.output
    assert asked == ["v1", [CASE.id], {"environment": {"A": "b=c", "D": ""}, "quick": True, "rounds": 7}]
    assert "v1: new" in done.output and f"2 rows: 1 {verdict}, 1 no ratio" in done.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["against"]["revision"] == "v1" and found["rows"][0]["verdict"] == verdict


def test_a_wrong_command_line_says_what_is_wrong() -> None:
    for arguments in (["--fail"], ["--set", "A=b"], ["--against", "HEAD", "--set", "A"]):
        assert command(*arguments).exit_code == 2
    assert command("--against", "HEAD", "--compare", "peft").exit_code == 2
    done = command("--against", "no such revision", "--only", CASE.id)
    assert done.exit_code == 3 and "--against" in done.output


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kernel_turned_off_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides run their own copy of this package without its extension; one is told to use the reference."""
    root = tmp_path / "root"
    for name in ("softprompt_fast", "benchmarks", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "*.so")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copy(ROOT / "setup.py", root)
    with (root / "benchmarks" / "_suite.py").open("a") as suite:  # no other library need be imported
        suite.write("\n\ndef cases():\n    import bench_merge_states as one\n    return tuple(one.cases())\n")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "one")
    (root / "softprompt_fast" / "new.py").write_text("")
    for name, value in ((_guard.MODE, "0"), ("SOFTPROMPT_FAST_BACKEND", "auto"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setitem(os.environ, name, value)
    chosen = [case for case in bench_merge_states.cases() if "b32" in case.name]
    begun = []
    report = _guard.run(
        "HEAD",
        chosen,
        environment={"SOFTPROMPT_FAST_BACKEND": "reference"},
        rounds=6,
        begin=lambda text, *_: begun.append(text) or (lambda: None),
        root=root,
    )
    assert begun[:2] == ["building HEAD", "building this tree"] and len(begun) >= 2 + len(chosen)
    rows = {row.id: row for row in report.rows}
    assert len(rows) == len(chosen) and not any(row.why for row in report.rows)
    row = rows[f"{CASE.id}/call"]
    assert row.backends == {"base": {"merge_states": ["torch"]}, "head": {"merge_states": ["reference"]}}
    assert {side: len(values) for side, values in row.samples.items()} == dict.fromkeys(_guard.SIDES, 6)
    found = report.as_dict()
    assert found["environment"] == {"SOFTPROMPT_FAST_BACKEND": "reference"} and len(found["rows"]) == len(rows)
    assert report.table().row_count == len(rows)
    assert len(_guard.git("worktree", "list", at=root).splitlines()) == 1
