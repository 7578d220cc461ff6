# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast bench``: which cases, when a ratio is withheld, what is written, and that the page is its rows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _harness  # noqa: E402
import _memory  # noqa: E402
import _plots  # noqa: E402
import _report  # noqa: E402
import _results  # noqa: E402
import _run  # noqa: E402
import _scaling  # noqa: E402
import _suite  # noqa: E402
import _worker  # noqa: E402
import bench_model  # noqa: E402
import bench_prefix_attention  # noqa: E402
import bench_serve  # noqa: E402
import bench_train  # noqa: E402
from _gpu import System  # noqa: E402
from _processes import Process, ProcessError  # noqa: E402
from _suite import Case, Prepared, Row, select, short_calls  # noqa: E402

from softprompt_fast.backends._registry import OPS  # noqa: E402
from softprompt_fast.cli import bench as command  # noqa: E402
from softprompt_fast.cli.app import app  # noqa: E402

PLACE = _run.Place("a CPU", {"torch": "1", "transformers": "2", "peft": "3"}, "0123456789abcdef", "a policy")


def doubling(names: frozenset[str], **others: Any) -> Prepared:
    """Ours doubles a vector; so do others, or not."""
    systems = {"ours": System(lambda x: x * 2), "pytorch": System(lambda x: x + x), **others}
    chosen = {name: system for name, system in systems.items() if name in names}
    return short_calls(chosen, lambda: torch.randn(8), lambda x: x.double() * 2, flops=8.0, moved=64.0)


def case(name: str = "doubling", set_: str = "op", **changes: Any) -> Case:
    systems = ("ours", "pytorch", *(changes.get("others") or {}))
    prepare = partial(doubling, **changes.pop("others", {}))
    known = {"rounds": (3, 6), **changes}
    return Case(set_, name, {"B": 8, "P": 32, "dtype": "float32"}, systems, prepare, ("doubling",), **known)


class Here:
    """A process that measures, but this one. ``lost``: requests, of a system or of none, that end it."""

    def __init__(self, *cases: Case, lost: tuple[tuple[str, str | None], ...] = ()) -> None:
        self.worker, self.lost, self.closed = _worker.Worker(), lost, False
        self.worker.cases = {case.id: case for case in cases}

    def ask(self, request: str, /, *, limit: float | None = None, **arguments: Any) -> dict[str, Any]:
        assert limit == _run.LIMIT and not self.closed
        if (request, arguments.get("system")) in self.lost:
            raise ProcessError("the measuring process: took longer than 900 s")
        return json.loads(json.dumps(self.worker.answer({request: arguments})))

    def close(self) -> None:
        self.closed = True
        self.worker.close()


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """For shares of a roofline that nobody reads."""
    for module in (_run, _worker):
        monkeypatch.setattr(module, "MACHINE", _harness.Machine(16, 1 << 12))


def measure(case: Case, names: Collection[str], *, quick: bool = True, processes: int = 1, **how: Any) -> list[Row]:
    """As a run would, in as many processes as are asked for."""
    measured = _run.Measured.of(case, names, quick)
    for number in range(processes):
        process = measured.measure(lambda: Here(case, **how), None, number, lambda: None)
        if process is not None:
            process.close()
    return measured.rows(PLACE, (), quick)


def rows_of(found: list[Row]) -> dict[str, Row]:
    return {row.system: row for row in found}


# -- the cases --------------------------------------------------------------------------------------------------------


def test_cases_are_complete() -> None:
    found = _suite.cases()
    assert not [name for name, count in Counter(one.id for one in found).items() if count > 1]
    assert {one.set for one in found if one.quick} == set(_suite.SETS)
    assert {op for op in OPS if any(one.name.startswith(op) for one in found)} == set(OPS)
    for one in found:
        assert one.systems[0] == "ours" and one.tests and one.work["dtype"], one.id
        assert one.slow <= {*one.systems} and "ours" not in one.slow and min(one.rounds) >= 1
        assert not re.search(r"[/\s*?\[]", one.name), "ids are split at slashes, and globs match them"
        assert {*one.tests} <= _suite.GATES.keys()
    for files, _ in _suite.GATES.values():
        assert all((ROOT / file).is_file() for file in files)


def test_what_is_selected() -> None:
    given = [case("one"), case("two", quick=False), case("three", "model")]

    def ids(**how: Any) -> list[str]:
        return [one.id for one, _ in select(given, **how)]

    assert ids() == ["op/one", "model/three"] and ids(quick=False) == ["op/one", "op/two", "model/three"]
    assert ids(sets=["op"]) == ["op/one"] and ids(only=["op/two"]) == ["op/two"]  # though it is not quick
    assert ids(only=["op"]) == ["op/one", "op/two"] and ids(only=["*/t*"]) == ["op/two", "model/three"]
    ((_, names),) = select(given, only=["op/one/ours/call"])
    assert names == {"ours"}
    ((_, names),) = select(given, only=["op/one/pytorch/call"])
    assert names == {"ours", "pytorch"}
    assert all(names == {"ours", "pytorch"} for _, names in select(given, compare=["pytorch"]))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"sets": ["opp"]}, "unknown set opp; there are op, model, train, serve, scaling"),
        ({"compare": ["ours", "sdpaa"]}, "unknown system sdpaa; there are ours, pytorch"),
        ({"only": ["op/one", "op/four"]}, "no row is called op/four; cases: op/one"),
        ({"only": ["op/one/nobody"]}, "no row is called op/one/nobody"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        select([case("one")], **how)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_says_what_it_is_and_how_to_repeat_it() -> None:
    ours, other = measure(case(), ("ours", "pytorch"))
    assert [ours.id, other.id] == ["op/doubling/ours/call", "op/doubling/pytorch/call"]
    assert other.command == "softprompt-fast bench --only op/doubling/pytorch/call"
    place = (other.device, other.commit, other.allocator)
    assert place == (PLACE.device, PLACE.commit, PLACE.allocator) and other.flops == 8 and other.bytes == 64
    assert [len(one) for one in other.samples] == [3] and other.seconds == _harness.spread(other.samples[0])
    assert ours.ratio is None and ours.withheld is None and other.agreement is not None and other.roofline
    assert other.ratio == _harness.compared(other.samples, ours.samples)
    assert other.ratio["low"] <= other.ratio["median"] <= other.ratio["high"]
    assert len(measure(case(), ("ours",), quick=False)[0].samples[0]) == 6
    ((chosen, names),) = select([case()], only=[other.id])
    assert names == {"ours", "pytorch"} and chosen.id == "op/doubling"


def test_samples_say_which_process_they_are_of() -> None:
    ours, other = measure(case(), ("ours", "pytorch"), processes=3)
    assert [len(one) for one in other.samples] == [3, 3, 3] and other.ratio is not None
    assert other.ratio == _harness.compared(other.samples, ours.samples)
    assert other.seconds == _harness.spread(_harness.flat(other.samples))


def test_processes_get_other_inputs() -> None:
    seen: list[Any] = []

    def prepare(names: frozenset[str]) -> Prepared:
        torch.manual_seed(7)  # as loading a model does
        turns = {"ours": lambda x: (seen.append(x), {"total": 1.0})}
        return Prepared(turns, lambda _, results: dict.fromkeys(results, 0.0), "", 0.0, lambda: float(torch.rand(())))

    measure(Case("model", "one", {}, ("ours",), prepare, (), rounds=(1, 1), warmup=0), ("ours",), processes=3)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("wrong", [lambda x: x * 2.001, lambda x: x * float("nan")], ids=["off", "NaN"])
def test_no_ratio_over_another_result(wrong: Any) -> None:
    one = case(others={"sdpa": System(wrong)})
    found = rows_of(measure(one, one.systems))
    assert found["sdpa"].seconds and found["sdpa"].ratio is None
    assert found["sdpa"].withheld and "sdpa is off by" in found["sdpa"].withheld
    assert found["pytorch"].ratio and found["pytorch"].withheld is None
    ours = case(others={"ours": System(wrong)})
    found = rows_of(measure(ours, ("ours", "pytorch")))
    assert (
        found["pytorch"].ratio is None and found["pytorch"].withheld and "ours is off by" in found["pytorch"].withheld
    )


def test_a_result_that_is_wrong_in_one_round_is_wrong() -> None:
    calls = []

    def sometimes(ids: Any) -> tuple[torch.Tensor, dict[str, float]]:
        calls.append(ids)
        return torch.tensor(float(len(calls) == 2)), {"total": 1.0}

    def prepare(names: frozenset[str]) -> Prepared:
        turns = {"ours": lambda ids: (torch.tensor(0.0), {"total": 0.5}), "peft": sometimes}
        return Prepared(turns, lambda _, results: {n: float(x) for n, x in results.items()}, "value", 0.1)

    one = Case("model", "one", {"dtype": "float32"}, ("ours", "peft"), prepare, (), rounds=(3, 3), warmup=0)
    found = rows_of(measure(one, one.systems))["peft"]
    assert len(calls) == 3 and found.ratio is None and found.agreement is not None and found.agreement["error"] == 1.0


def test_a_peer_that_is_not_here_is_skipped_with_the_reason_and_ours_is_not() -> None:
    def absent(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("needs a GPU\nand more")

    one = case(others={"flashinfer": System(absent), "flex": System(lambda x: x * 2)}, slow=frozenset({"flex"}))
    found = rows_of(measure(one, one.systems))
    assert found["flashinfer"].skipped == "RuntimeError: needs a GPU" and found["flashinfer"].seconds is None
    assert found["flex"].skipped and "--full" in found["flex"].skipped and found["pytorch"].ratio
    assert rows_of(measure(one, one.systems, quick=False))["flex"].ratio
    found = rows_of(measure(case(others={"ours": System(absent)}), ("ours", "pytorch")))
    assert found["ours"].skipped == "RuntimeError: needs a GPU" and found["ours"].seconds is None
    assert found["pytorch"].skipped == "ours could not run: RuntimeError: needs a GPU"
    assert not _run.Outcome({}, [*found.values()], {}, 1.0).well


@pytest.mark.parametrize("first", [0, 1])
def test_a_peer_that_fails_or_hangs_does_not_take_the_others_along(first: int) -> None:
    """In its turn, of the first process or of a later one."""
    turns: list[int] = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        turns.append(1)
        if len(turns) > 20 * first + 5:
            raise ValueError("out of luck")
        return x * 2

    one = case(others={"peft": System(fails)})
    found = rows_of(measure(one, one.systems, processes=3))
    assert found["peft"].skipped == "ValueError: out of luck" and found["peft"].seconds is None
    assert found["pytorch"].ratio and [len(x) for x in found["pytorch"].samples] == [3, 3, 3]
    found = rows_of(measure(case(), ("ours", "pytorch"), processes=3, lost=(("turn", "pytorch"),)))
    assert found["pytorch"].skipped and "took longer than 900 s" in found["pytorch"].skipped
    assert [len(x) for x in found["ours"].samples] == [3, 3, 3]
    found = rows_of(measure(case(), ("ours", "pytorch"), lost=(("prepare", None),)))
    assert all(row.skipped and row.seconds is None for row in found.values())


def taking(megabytes: int, times: int = 3) -> Callable[[Any], Any]:
    def turn(_: Any) -> tuple[float, dict[str, float]]:
        for _ in range(times):
            torch.ones(megabytes << 18)
        return 0.0, {"total": 1.0}

    return turn


def cases() -> Iterator[Case]:
    """For a worker that has this file in the place of the suite."""
    turns = {"ours": taking(40), "peft": taking(120), "vllm": taking(8)}
    no_errors = lambda _, results: dict.fromkeys(results, 0.0)  # noqa: E731
    prepare = lambda names: Prepared(turns, no_errors, "", 0.0, elsewhere={"vllm": "apart"})  # noqa: E731
    yield Case("model", "taking", {}, ("ours", "peft", "vllm"), prepare, (), rounds=(1, 1), memory=True)


def test_memory_is_a_row_of_its_own(tmp_path: Path) -> None:
    (one,) = cases()
    code = "import test_bench_command, _worker; _worker.cases = test_bench_command.cases; _worker.main()"
    paths = f"import sys; sys.path[:0] = {[str(ROOT / 'benchmarks'), str(ROOT / 'tests')]!r}; "
    (tmp_path / "_worker.py").write_text(paths + code)
    measured = _run.Measured.of(one, one.systems, True)
    measured.measure(lambda: Here(one), None, 0, lambda: None)
    process = Process("one", ROOT, tmp_path, tmp_path / "log", [_memory.GIVE_BACK])
    process.wait()
    try:
        assert measured.remember(lambda: process, None, lambda: None) is process
    finally:
        process.close()
    found = {row.id: row for row in measured.rows(PLACE, (), True)}
    assert len(found) == 6 and not any(row.withheld for row in found.values())
    ours, peft, vllm = (found[f"model/taking/{name}/memory"] for name in one.systems)
    assert vllm.skipped == "Unavailable: apart" and vllm.memory is None
    assert ours.seconds is None and ours.ratio is None and peft.ratio is None
    if ours.skipped:
        pytest.skip(ours.skipped)
    assert ours.memory and ours.memory["bytes"] == pytest.approx(40 << 20, rel=0.1) and "ratio" not in ours.memory
    assert peft.memory and peft.memory["ratio"] == pytest.approx(3, rel=0.1)
    table = _report.table([*found.values()], "model")
    assert "| 3.0" in table and "not measured: Unavailable: apart" in table and "| memory |" not in table


def test_memory_that_is_not_known_costs_no_time_its_row() -> None:
    for lost, said in ((("memory", "pytorch"), "took longer"), (("prepare", None), "took longer")):
        measured = _run.Measured.of(case(), ("ours", "pytorch"), True)
        measured.measure(lambda: Here(case()), None, 0, lambda: None)
        assert measured.remember(lambda lost=lost: Here(case(), lost=(lost,)), None, lambda: None) is None
        found = {row.id: row for row in measured.rows(PLACE, (), True)}
        assert found["op/doubling/pytorch/call"].ratio and said in str(found["op/doubling/pytorch/memory"].skipped)


def test_intervals_hold_the_median() -> None:
    assert _harness.interval([3.0]) == (3.0, 3.0) and _harness.interval([5.0, 1.0, 3.0]) == (1.0, 5.0)
    # Of 25, the 8th and the 18th: the binomial leaves 4.3% outside.
    assert _harness.interval([float(x) for x in range(1, 26)]) == (8.0, 18.0)


def test_the_interval_is_that_of_processes_and_not_of_their_rounds() -> None:
    assert _harness.interval_of_processes([[1.9] * 9, [2.0] * 9, [2.1] * 9]) == pytest.approx((1.76, 2.26), abs=5e-3)
    assert _harness.interval_of_processes([[1.0, 2.0, 3.0]]) == _harness.interval([1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    for count in _harness.STUDENT:
        held = 0
        for _ in range(2000):
            # A process's luck moves all of its rounds, by more than they differ.
            luck = torch.randn(count, 1, generator=generator) + 0.1 * torch.randn(count, 5, generator=generator)
            values = torch.exp(luck).tolist()
            low, high = _harness.interval_of_processes(values)
            assert low <= _harness.spread(_harness.flat(values))["median"] <= high
            held += low <= 1 <= high
        assert held / 2000 == pytest.approx(0.95, abs=0.02), count


def test_freed_memory_is_kept() -> None:
    """Counted in page faults, which depend on no clock."""
    code = """
import resource, sys, torch, _memory
def faults(count=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count
given_back = faults()
try:
    _memory.keep_freed_memory()
except _memory.Unavailable as error:
    sys.exit(f"unavailable: {error}")
faults()
print(given_back, faults())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    if "unavailable" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    given_back, kept = map(float, done.stdout.split())
    assert given_back > 100 > kept


def test_a_process_that_is_too_slow_is_ended(tmp_path: Path) -> None:
    package = ROOT / "softprompt_fast" / "__init__.py"
    code = f"import time\nprint({json.dumps({'package': str(package)})!r}, flush=True)\ninput()\ntime.sleep(1000)"
    (tmp_path / "_worker.py").write_text(code)
    process = Process("one", ROOT, tmp_path, tmp_path / "log")
    process.wait()
    with pytest.raises(ProcessError, match="one: took longer than 0 s"):
        process.ask("turn", limit=0.3)
    process.close()
    assert process.process.returncode


def test_a_turn_gives_the_result_of_its_first_inputs_and_uses_all() -> None:
    seen: list[int] = []
    turn = _harness.Repeated(lambda x: (seen.append(x), x)[1], [(1,), (2,), (3,)], turn=1e-4)
    seen.clear()
    results = {turn()[0] for _ in range(4)}
    assert results == {1} and set(seen) == {1, 2, 3} and turn.calls > 1


def test_what_a_run_is_expected_to_take() -> None:
    rows = [
        row("op/doubling/ours/call", 2.0),
        row("model/one/ours/total", 10.0),
        row("model/one/ours/first-token", 1.0),
    ]
    names = frozenset({"ours", "pytorch"})
    assert _run.expected([(case(), names)], rows, True) == (_run.PROCESSES * (2.0 + 3 * 2.0), 1)
    remembered = case("one", "model", memory=True, slow=frozenset({"pytorch"}))
    assert _run.expected([(remembered, names)], rows, True) == (_run.PROCESSES * (1.0 + 3 * 10.0) + 11.0, 0)
    assert _run.expected([(remembered, names)], rows, False)[1] == 1


# -- the tests that come first ----------------------------------------------------------------------------------------


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, green: bool) -> None:
    file = tmp_path / "test_planted.py"
    file.write_text(f"def test_double():\n    assert {green}\n")
    monkeypatch.setitem(_suite.GATES, "doubling", ([str(file)], "double"))


def test_red_tests_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tmp_path, monkeypatch, green=True)
    assert _run.red_tests("doubling") is None
    planted(tmp_path, monkeypatch, green=False)
    said = _run.red_tests("doubling")
    assert said is not None and "test_double" in said
    monkeypatch.setitem(_suite.GATES, "doubling", ([str(tmp_path / "test_planted.py")], "nothing"))
    assert _run.red_tests("doubling") is not None  # no test is no green test


@pytest.fixture
def two_cases(monkeypatch: pytest.MonkeyPatch) -> tuple[Case, Case]:
    """The suite, and this process as the one that measures it."""
    found = (case(), case("decode-b1-p32", "scaling"))

    @contextmanager
    def processes(*unused: str) -> Iterator[Callable[[], Here]]:
        yield lambda: Here(*found)

    monkeypatch.setattr(_suite, "cases", lambda: found)
    monkeypatch.setattr(_run, "processes", processes)
    return found


@pytest.mark.parametrize("green", [True, False], ids=["green", "red"])
def test_the_command(
    green: bool, two_cases: tuple[Case, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path, monkeypatch, green=green)
    files = {name: tmp_path / "out" / name for name in ("rows.json", "page.md")}
    arguments = ["bench", "--json", str(files["rows.json"]), "--report", str(files["page.md"])]
    done = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "out")])
    assert done.exit_code == (0 if green else 1), done.output
    assert ("x (" in done.stdout) == green
    rows = _suite.read_rows(files["rows.json"])
    assert len(rows) == 4 and [row.ratio is not None for row in rows if row.system != "ours"] == [green, green]
    result = json.loads(files["rows.json"].read_text())
    assert result["setting"]["packages"]["torch"] and (result["tests"]["doubling"] is None) == green
    page = files["page.md"].read_text()
    assert "`doubling`: B 8, P 32" in page and ("x (" in page) == green
    assert (tmp_path / "out" / "roofline.svg").is_file()
    assert all([len(one) for one in row.samples] == [3] * _run.PROCESSES for row in rows)
    if not green:
        assert "tests are red" in page and "NO SPEED-UP" in done.stderr
        assert "test_double" in done.stderr.replace("\n", "")


def test_a_run_that_is_ended_leaves_what_it_has(
    two_cases: tuple[Case, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path, monkeypatch, green=True)
    ask, last = Here.ask, {"case": two_cases[1].id, "systems": ["ours", "pytorch"], "seed": 1}

    def ended(self: Here, request: str, /, **arguments: Any) -> dict[str, Any]:
        if request == "prepare" and last.items() <= arguments.items():
            raise KeyboardInterrupt
        return ask(self, request, **arguments)

    monkeypatch.setattr(Here, "ask", ended)
    file = tmp_path / "rows.json"
    assert CliRunner().invoke(app, ["bench", "--json", str(file)]).exit_code != 0
    processes = {row.id: len(row.samples) for row in _suite.read_rows(file) if row.system == "ours"}
    assert processes == {"op/doubling/ours/call": 2, "scaling/decode-b1-p32/ours/call": 1}
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nothing"], 3, "unknown set nothing; there are op,"),
        (["--compare", "nobody"], 3, "unknown system nobody; there are"),
        (["--only", "op/nothing"], 3, "no row is called op/nothing; cases: "),
        (["--turns"], 2, "No such option"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], status: int, said: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == status and said in done.stderr


def test_list_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "run", None)
    done = CliRunner().invoke(app, ["bench", "op", "--compare", "pytorch", "--list"])
    assert done.exit_code == 0 and "op/merge_states-decode-b32  ours, pytorch" in done.stdout
    assert "scaling/" not in done.stdout and "prefill" not in done.stdout


def test_without_a_checkout_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PACKAGE", tmp_path / "softprompt_fast")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "--list"])
    assert done.exit_code == 4 and "no checkout here" in done.stderr


# -- real cases at tiny sizes -----------------------------------------------------------------------------------------

TINY_CASES = {
    "generate": (("ours", "expanded", "peft"), partial(bench_model.prepare, "tiny", bench_model.Shape(2, 4, 3, 3))),
    "train": (("ours", "peft"), partial(bench_train.prepare, bench_train.Shape(4, 6, 5), "tiny", 2)),
    "serve": (
        ("ours", "one-by-one", "peft-loop", "expanded"),
        partial(bench_serve.prepare, "tiny", 4, (3, 5), 4, 3),
    ),
    "prompts": (
        ("ours", "sdpa"),
        partial(_scaling.prepare_prompts, bench_prefix_attention.Shape(4, 1, 3, 5, 4, 2, 8), 2),
    ),
    "decode, cold": (
        ("ours", "sdpa", "hydragen"),
        partial(bench_prefix_attention.prepare_forward, bench_prefix_attention.Shape(2, 1, 3, 5, 4, 2, 8), False),
    ),
    "backward": (
        ("ours", "autograd"),
        partial(bench_prefix_attention.prepare_backward, bench_prefix_attention.Shape(2, 3, 3, 5, 4, 2, 8)),
    ),
}


@pytest.mark.parametrize("name", TINY_CASES)
def test_systems_agree(name: str) -> None:
    systems, prepare = TINY_CASES[name]
    one = Case("model", "tiny", {"dtype": "float32"}, systems, prepare, (), rounds=(2, 2))
    found = measure(one, systems)
    assert {row.system for row in found} == set(systems) and not [row for row in found if row.skipped or row.withheld]
    assert all(row.ratio for row in found if row.system != "ours")
    assert all(row.flops >= 0 and [len(one) for one in row.samples] == [2] for row in found)
    if name == "generate":
        assert {row.what for row in found} == {"first-token", "token", "total"}


def test_a_model_that_says_something_else_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_model.generation_peers
    wrong = lambda base, prefix, new: {  # noqa: E731
        name: (lambda ids, turn=turn: (turn(ids)[0].flip(1) + 1, turn(ids)[1]))
        for name, turn in real(base, prefix, new).items()
    }
    monkeypatch.setattr(bench_model, "generation_peers", wrong)
    systems, prepare = TINY_CASES["generate"]
    one = Case("model", "tiny", {"dtype": "float32"}, systems, prepare, (), rounds=(1, 1))
    found = measure(one, systems)
    assert all(row.withheld and row.ratio is None for row in found if row.system == "expanded")
    assert all(row.ratio for row in found if row.system == "peft")


def test_texts_differ_up_to_their_first_difference() -> None:
    expected = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert bench_model.differing(expected, expected) == 0.0
    assert bench_model.differing(torch.tensor([[1, 9, 8, 7], [1, 2, 3, 4]]), expected) == pytest.approx(1 / 6)
    assert bench_model.differing(torch.tensor([[9, 9, 9, 9], [9, 2, 3, 4]]), expected) == 1.0


# -- the report -------------------------------------------------------------------------------------------------------


def row(identity: str, median: float, ratio: float | None = None, **work: Any) -> Row:
    """A row as a run would give it."""
    between = {"median": median, "p20": 0.9 * median, "p80": 1.1 * median}
    over = None if ratio is None else {"median": ratio, "p20": 0.9 * ratio, "p80": 1.1 * ratio}
    if over:
        over |= {"low": 0.95 * over["median"], "high": 1.05 * over["median"]}
    rates = {"flops": 1e11, "bytes": 2e10}
    return Row(
        identity, {"dtype": "float32", **work}, "a peer", "a CPU", dict(PLACE.versions), PLACE.commit, "command",
        seconds=between, samples=[[median]], flops=1e6, bytes=1e5, ratio=over, rates=rates,
    )  # fmt: skip


def scaling_rows() -> list[Row]:
    found = []
    for batch in (1, 8, 32):
        for prefix in (32, 512):
            at = {"B": batch, "P": prefix, "S": 1}
            name = f"scaling/decode-b{batch}-p{prefix}"
            found.append(row(f"{name}/ours/call", 1e-4 * batch, **at))
            found.append(row(f"{name}/sdpa/call", 2e-4 * batch, 0.8 if batch == 1 else batch * 0.7, **at))
            found.append(row(f"{name}/hydragen/call", 3e-4 * batch, 2.0 * batch, **at))
    return found


def test_losses_are_listed_with_their_reason() -> None:
    text = _report.losses(scaling_rows(), {"scaling/decode-b1-p32/*": "nothing to share"})
    lines = text.splitlines()[2:]
    assert len(lines) == 2 and all("`scaling/decode-b1-p" in line and "0.80x" in line for line in lines)
    assert (
        sum("nothing to share" in line for line in lines) == 1 and sum("not explained" in line for line in lines) == 1
    )
    assert _report.losses([row("op/a/ours/call", 1.0)], {}) == "In no row of these."
    assert "may be noise" in _report.losses([row("op/a/sdpa/call", 1.0, 0.99)], {})


def test_two_runs_agree_where_their_intervals_overlap() -> None:
    first = [row("op/a/sdpa/call", 1.0, 2.0), row("op/b/sdpa/call", 1.0, 2.0), row("op/c/sdpa/call", 1.0, 2.0)]
    second = [row("op/a/sdpa/call", 1.0, 2.1), row("op/b/sdpa/call", 1.0, 3.0), row("op/b/ours/call", 1.0)]
    count, said = _report.disagreeing(first, second)
    assert count == 2 and len(said) == 1 and said[0].startswith("op/b/sdpa/call: 2.00x") and "3.00x" in said[0]


def test_plots_are_the_same_twice(tmp_path: Path) -> None:
    rows = [*scaling_rows(), row("op/x/ours/call", 1e-3, B=1), row("op/x/sdpa/call", 2e-3, 2.0, B=1)]
    first, second = (_plots.draw(rows, tmp_path / name) for name in "ab")
    assert [path.name for path, _ in first] == ["heat-decode.svg", "scaling.svg", "roofline.svg"]
    for (one, _), (other, _) in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and str(tmp_path) not in one.read_text()
    heat = first[0][0].read_text()
    assert "0.80x" in heat and "5.60x" in heat and "64.00x" not in heat  # the fastest peer's, not the slowest's
    assert _plots.draw([], tmp_path) == []


def test_parts_stand_between_their_marks() -> None:
    text = f"before\n{_report.begin('a')}\nold\n{_report.end('a')}\nafter"
    filled = _report.fill(text, {"a": "new"})
    assert filled == f"before\n{_report.begin('a')}\nnew\n{_report.end('a')}\nafter"
    assert _report.fill(filled, {"a": "new"}) == filled
    with pytest.raises(ValueError, match="no part is called a; there are b"):
        _report.fill(text, {"b": ""})
    with pytest.raises(ValueError, match="expected the line"):
        _report.fill(_report.begin("a"), {"a": ""})


def test_the_pages_are_what_the_results_say(tmp_path: Path) -> None:
    rows = _results.load()
    pictures = [(_results.RESULTS / path.name, caption) for path, caption in _plots.draw(rows, tmp_path)]
    assert pictures and all(path.is_file() for path, _ in pictures)
    for path, text in _report.pages(rows, pictures).items():
        assert path.read_text() == text, f"{path.name} and benchmarks/results disagree: python benchmarks/report.py"


def test_older_results_keep_their_ratios() -> None:
    """Their rows are computed again from their samples."""
    for file in sorted(_results.RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        if _results.is_suite(result) or "ratios" not in result:
            continue
        found = [row for row in _results.older_rows(result) if row.ratio]
        known = [ratio["median"] for ratio in result["ratios"].values()]
        assert sorted(row.ratio["median"] for row in found if row.ratio) == pytest.approx(sorted(known)), file.name
    ids = [row.id for row in _results.load()]
    assert len(ids) == len(set(ids)) > 50


def test_results_of_a_gpu_are_rows_too() -> None:
    found = {
        "case": "decode B64 S1 T256 P2048", "group": "decode", "flops": 1e9, "bytes": 1e6,
        "samples": {"ours": [1e-4, 1e-4], "flash, all heads": [3e-4, 3e-4]}, "errors": {"ours": 1e-3},
        "not_timed": {"cuDNN": "RuntimeError: no"},
    }  # fmt: skip
    setting = {"gpu": {"name": "a GPU"}, "cpu": "a CPU", "threads": 2, "isa": None, "packages": {}, "commit": "0123"}
    ceilings = {"copy": 3e12, "bf16 GEMM": 8e14}
    result = {"setting": setting | {"command": "gpu.py"}, "ceilings": ceilings, "rows": [found]}
    ours, flash, cudnn = _results.older_rows(result)
    assert flash.id == "op/gpu-decode-b64-s1-t256-p2048/flash-all-heads/call" and flash.device == "a GPU"
    assert flash.ratio and flash.ratio["median"] == pytest.approx(3.0) and cudnn.skipped == "RuntimeError: no"
    assert ours.roofline and ours.roofline["median"] == pytest.approx(1e9 / 8e14 / 1e-4)
    parts = _report.parts([ours, flash, cudnn])
    assert "3.00x" in parts["op"] and "cudnn" in parts["op"] and _report.headline([flash])


def test_a_row_that_one_file_skips_and_another_has_is_there_once(tmp_path: Path) -> None:
    skipped = row("model/a/peft", 1.0)
    skipped.seconds, skipped.skipped = None, "takes too long"
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    contents = [row("model/a/ours/total", 1.0), skipped], [row("model/a/peft/total", 2.0)]
    for file, rows in zip(files, contents, strict=True):
        file.write_text(json.dumps({"rows": [one.as_dict() for one in rows]}))
    assert {one.id for one in _results.load(files)} == {"model/a/ours/total", "model/a/peft/total"}
    assert {one.id for one in _results.load(files[:1])} == {"model/a/ours/total", "model/a/peft"}


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for text in ("{}", "[", '{"rows": [{"id": "a"}]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"rows\.json: no result of softprompt-fast bench"):
            _suite.read_rows(file)


NUMBER = re.compile(r"\b\d[\d.,]*\s?(?:x|×|%|ms|us|µs|s|seconds|minutes|[KMGT]i?B|tokens/s|times)(?!\w)")


def test_no_number_of_the_readme_is_written_by_hand() -> None:
    text = re.sub(r"<!-- generated: (\S+) -->.*?<!-- end: \1 -->", "", _report.README.read_text(), flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert NUMBER.findall("it is 3.1x, or 20 % in 5 ms") == ["3.1x", "20 %", "5 ms"]
    assert not NUMBER.findall(text)


def test_an_op_file_runs_under_pytest_benchmark() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_merge_states.py", "-q", "--benchmark-disable"]
    done = subprocess.run(
        [*command, "-k", "decode", "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ("/somewhere/bin/softprompt-fast", "softprompt-fast"),
        ("/somewhere/softprompt_fast/cli/__main__.py", "softprompt-fast"),
        ("/somewhere/benchmarks/bench_train.py", "python benchmarks/bench_train.py"),
    ],
)
def test_a_result_says_the_command_that_repeats_it(script: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "bench", "--json", "/elsewhere/rows.json"])
    assert _harness.setting()["command"] == f"{program} bench --json rows.json"
