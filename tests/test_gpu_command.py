# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` without a GPU: the same code at tiny sizes on a CPU, so that no typo ends its first real run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

import _gpu  # noqa: E402
import gpu  # noqa: E402
from _gpu_cases import CASES  # noqa: E402

from softprompt_fast.backends import native  # noqa: E402


def command(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(SCRIPT), "--device", "cpu", "--smoke", "--out", str(out), *options]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)


def rows_in(out: Path, group: str) -> list[dict[str, Any]]:
    return [row for row in json.loads((out / "gpu-benchmarks.json").read_text())["rows"] if row["group"] == group]


def test_every_test_file_runs_there_or_has_a_reason() -> None:
    assert all(gpu.not_run().values()), gpu.not_run()
    stages = [stage for stage in gpu.STAGES.values() if isinstance(stage, gpu.Tests)]
    assert all((ROOT / name).is_file() for stage in stages for name in stage.files)


def test_every_group_is_in_a_stage_and_the_first_ones_fit() -> None:
    stages = gpu.STAGES
    groups = [group for stage in stages.values() if isinstance(stage, gpu.Rows) for group in stage.groups]
    assert sorted(set(groups)) == sorted(gpu.GROUPS) == sorted(CASES)
    assert gpu.TOTAL <= 540
    first = [*stages.values()][: [*stages].index("ops") + 1]
    spent = gpu.BUILD + sum(stage.budget for stage in first if isinstance(stage, gpu.Tests))
    spent += sum(gpu.GROUPS[group] for stage in first if isinstance(stage, gpu.Rows) for group in stage.groups)
    assert spent <= gpu.TOTAL
    # And a second command of four minutes, which builds nothing, has time for what the first left out.
    assert sum(gpu.GROUPS[group] for name in ("generate", "whole") for group in stages[name].groups) <= 240


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    call = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "PyTorch finds no GPU here" in done.stderr and not list(tmp_path.iterdir())


def test_rows_are_checked_timed_and_written(tmp_path: Path) -> None:
    groups = ("decode", "prompts", "backward", "prompt_concat", "first_layer", "merge_states")
    done = command(tmp_path, "--only", *groups)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(rows_in(tmp_path, group)) for group in groups] == [5, 1, 1, 2, 2, 1]
    first, *_ = rows = [row for group in groups for row in rows_in(tmp_path, group)]
    assert native.load_cuda()[0] is None or first["backend"] == "cuda"
    for row in rows:
        assert len(row["samples"]["ours"]) == 3 and row["seconds"]["ours"]["median"] > 0
        assert row["errors"]["ours"] < 1e-2 and "ours" not in row["not_timed"]
    assert [bar["met"] for bar in first["bars"]] != [None, None]
    setting = json.loads((tmp_path / "gpu-benchmarks.json").read_text())["setting"]
    assert setting["packages"]["torch"] and "commit" in setting
    assert "== all ran well" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_generate(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done = command(tmp_path, "--only", "generate")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path, "generate")
    assert [len(row["samples"]) for row in rows] == [4, 4] and not any(row["not_timed"] for row in rows)
    assert all(bar["found"] > 0 for row in rows for bar in row["bars"])


@pytest.mark.slow
def test_models(tmp_path: Path) -> None:
    done = command(tmp_path, "--only", "models")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path, "models")
    assert len(rows) == 12 and all(row["samples"]["ours"] and not row["not_timed"] for row in rows)


def test_training(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done = command(tmp_path, "--only", "training")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path, "training")
    assert [len(row["samples"]) for row in rows] == [4, 4] and not any(row["not_timed"] for row in rows)
    assert all(bar["found"] > 0 for row in rows for bar in row["bars"])


def arguments(**changes: Any) -> argparse.Namespace:
    given = {"device": "cpu", "workers": 1, "tests": None, "smoke": True, "seconds": 500.0}
    return argparse.Namespace(**{**given, **changes})


def test_failures_are_kept_and_a_stage_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "test_one.py").write_text(
        "import pytest, time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'no'\n"
        "@pytest.mark.skip('why')\ndef test_skipped(): pass\n"
        "def test_long(): time.sleep(100)\n"
    )
    files = ["test_one.py", "test_missing.py"]
    result = gpu.run_tests("some", gpu.Tests(files, 60), 60, tmp_path, arguments(tests="not long"))
    assert [result[name] for name in ("status", "passed", "failed", "skipped")] == [1, 1, 1, 1]
    assert result["failures"][0]["test"].endswith("::test_bad") and "no" in result["failures"][0]["why"]
    result = gpu.run_tests("some", gpu.Tests(files, 60), 5, tmp_path, arguments())
    assert result["status"] is None and result["seconds"] < 25
    assert [failure["test"].rpartition("::")[2] for failure in result["failures"]] == ["test_bad"]


def test_a_process_that_dies_takes_one_system_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one goes on without that; where a group's own code fails, or for the fifth time, without the group."""
    seen = []

    def run(command: list[str], *unused: Any) -> int:
        state = gpu.read_state(tmp_path)
        for group in command[command.index("--measure") + 1 :]:
            seen.append((group, len(state["broken"])))
            if group == "prompts" or (group == "decode" and len(state["broken"]) < 2):
                gpu.write_state(tmp_path, {**state, "running": [group, f"system {len(state['broken'])}"]})
                return -11
            if group == "training":
                return 1
            state["finished"].append(group)
            gpu.write_state(tmp_path, state)
        return 0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "STARTED", gpu.time.perf_counter())
    ended = gpu.run_benchmarks(
        gpu.Rows(("decode", "prompts", "training", "backward")), tmp_path, arguments(smoke=False)
    )
    assert ended["decode"] == ended["backward"] == "ran"
    assert "status -11" in ended["prompts"] and "status 1" in ended["training"]
    assert seen[:3] == [("decode", 0), ("decode", 1), ("decode", 2)] and not [*tmp_path.iterdir()]
    assert [group for group, _ in seen].count("prompts") == 5 and ("backward", 7) in seen


def test_a_broken_system_is_left_out_and_rows_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process that goes on where one has died."""
    known = {"setting": {}, "ceilings": {"copy": 1e9, "bf16 GEMM": 1e9}, "rows": []}
    known["rows"].append({"group": "merge_states", "case": "there"})
    (tmp_path / "gpu-benchmarks.json").write_text(json.dumps(known))
    gpu.write_state(tmp_path, {"finished": [], "running": None, "broken": [["case", "bad"], ["worse", None]]})

    def cases(device: torch.device, smoke: bool) -> Iterator[_gpu.Case]:
        def never(x: Any) -> Any:
            raise AssertionError("it took a process down")

        for name in ("there", "worse"):
            yield _gpu.Case(name, lambda: torch.ones(2), {"ours": _gpu.System(never)})
        yield _gpu.Case(
            "case", lambda: torch.ones(2), {"ours": _gpu.System(lambda x: x + 1), "bad": _gpu.System(never)}
        )

    monkeypatch.setitem(CASES, "merge_states", cases)
    assert gpu.measure(["merge_states"], tmp_path, "cpu", True) == 0
    _, row = rows_in(tmp_path, "merge_states")
    assert row["samples"]["ours"] and row["not_timed"] == {"bad": "took its process down, or never ended"}
    assert gpu.read_state(tmp_path)["finished"] == ["merge_states"]


def test_a_device_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some errors nothing works in a process any more; the system that it was at is known."""
    states = iter([True, False, False])  # after each system, and once more
    monkeypatch.setattr(_gpu, "works", lambda device: next(states))

    def cases(device: torch.device, smoke: bool) -> Iterator[_gpu.Case]:
        systems = {"ours": _gpu.System(lambda x: x.no_such_method()), "bad": _gpu.System(lambda x: x.neither())}
        yield _gpu.Case("case", lambda: torch.ones(2), systems)

    monkeypatch.setitem(CASES, "merge_states", cases)
    assert gpu.measure(["merge_states"], tmp_path, "cpu", True) == 3
    assert gpu.read_state(tmp_path)["running"] == ["case", "bad"]


def test_the_summary_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "case": "a case of many words " * 3, "backend": "cuda", "tflops_per_second": 1.0, "gigabytes_per_second": 2.0,
        "seconds": {"ours": {"median": 1e-5}}, "ratios": {f"system {n}": {"median": 2.0} for n in range(12)},
        "not_timed": {"Triton": "why " * 30}, "bars": [{"bar": "x of it", "found": 1.5, "met": True}] * 5,
    }  # fmt: skip
    (tmp_path / "gpu-benchmarks.json").write_text(json.dumps({"rows": [row] * 40}))
    failures = [{"test": "a test's long name " * 9, "why": "because " * 40}] * 50
    stages = [{"stage": f"stage {n}", "status": 1, "failures": failures, "passed": 3} for n in range(6)]
    assert not gpu.report(tmp_path, stages, {"decode": "ran", "models": "no time was left"}, "loaded")
    said = capsys.readouterr().out
    assert len(said) <= gpu.SUMMARY and said.count("a case of many words") >= 40
    assert "models: no time was left" in said and said.splitlines()[-1].startswith("== NOT all ran well")
    capsys.readouterr()
    (tmp_path / "gpu-benchmarks.json").write_text(json.dumps({"rows": [row]}))
    assert gpu.report(tmp_path, [], {"decode": "ran"}, "loaded")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("a case")]
    assert "on cuda: 10.0 us (1, 2); 2.00 system 0" in line and "Triton NOT TIMED (why" in line
    assert line.endswith("x of it 1.50 met")


def test_settings_are_read_by_a_process_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command(tmp_path, "--stages", "tiles-of-64", "192-prefix-blocks", "never-together")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [row["case"].partition(", ")[2] for row in rows_in(tmp_path, "settings")]
    assert names == ["tiles of 64"] * 3 + ["prefix blocks 192"] * 3 + ["together up to 0"] * 3


def test_what_there_was_no_time_for_is_said(tmp_path: Path) -> None:
    done = command(tmp_path, "--stages", "CUDA-kernels", "rows", "more", "--seconds", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("CUDA-kernels", "decode", "backward", "more"):
        assert f"\n{name}: no time was left\n" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-tests.json"]


def test_findings_of_the_sanitizer_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: list[str], budget: float, log: Path, environment: dict[str, str]) -> int:
        seen.append(command[2])
        wrong = command[2] == "racecheck"
        found = "========= Error: Race reported between Write access\n" if wrong else ""
        log.write_text(f"========= COMPUTE-SANITIZER\n{found}========= ERROR SUMMARY: {int(wrong)} errors\n")
        return 86 if wrong else 0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "compute-sanitizer")
    good, bad = gpu.sanitize(tmp_path, 30, arguments(device="cuda"))
    assert sorted(seen) == ["memcheck", "racecheck"] and good["status"] == 0 and not good["failures"]
    assert bad["failures"] == [{"test": "racecheck", "why": "Error: Race reported between Write access"}]
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.sanitize(tmp_path, 30, arguments(device="cuda")) == []


def test_a_wrong_system_is_not_timed() -> None:
    case = _gpu.Case(
        "case",
        lambda: torch.randn(4),
        {
            "ours": _gpu.System(lambda x: x * 2),
            "wrong": _gpu.System(lambda x: x * 2.1),
            "nan": _gpu.System(lambda x: x * float("nan")),
            "absent": _gpu.System(lambda x: x.no_such_method()),
        },
        reference=lambda x: x * 2,
        bars=[_gpu.Bar("x of wrong", lambda row: row.speedup("wrong"), at_least=1.0)],
    )
    row = _gpu.run(case, torch.device("cpu"), {}, budget=5, rounds=3)
    assert list(row.samples) == ["ours"] and set(row.missing) == {"wrong", "nan", "absent"}
    found = row.as_dict()
    assert found["bars"] == [{"bar": "x of wrong", "found": None, "met": None}]
    assert "MISSED" not in gpu.shown_row({"backend": None, **found})
