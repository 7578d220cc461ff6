# SPDX-License-Identifier: Apache-2.0
"""The suite behind ``softprompt-fast bench``: cases, the rows they give, and what must hold before a speed-up is one.

A case is one piece of work that several systems do; ``bench_<what>.py`` hold them. Preparing a case makes its inputs
and systems; measuring lets the systems take turns, compares their results in every round and gives one row for each
system and each thing timed. A row has a ratio only where

* the results agree: the worst error of any round is within the case's tolerance, and
* the tests of what is measured are green (`GATES`): they run first, once for all cases that need them.

The cases live outside the package so that they can time another revision of it (``PYTHONPATH`` decides), and because
a row is nothing without the tests and the commit that a checkout has.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from _gpu import System, relative_error, tensors_of
from _harness import ROOT, Machine, Repeated, Times, interval, ratio, setting, shown, spread
from rich.table import Table

from softprompt_fast import __version__

OURS = "ours"
SETS = ("op", "model", "train", "serve", "scaling")
SYSTEMS = {
    OURS: "this package",
    "sdpa": "PyTorch's attention over a cache with a copy of the prefix for every row",
    "sdpa-repeated": "the same, key/value heads repeated to all query heads beforehand",
    "flex": "FlexAttention, compiled, over such a cache",
    "flex-shared": "FlexAttention, compiled, with a mask by which all rows see one prefix",
    "hydragen": "shared-prefix attention in plain PyTorch: two attentions and a merge",
    "flashinfer": "FlashInfer's cascade attention",
    "pytorch": "the same in PyTorch's operators, one after the other",
    "autograd": "PyTorch's autograd through the torch backend",
    "peft": "PEFT, as its documentation has it",
    "peft-loop": "PEFT, every adapter loaded, a `set_adapter` and a call for each prompt",
    "expanded": "transformers, the prefix expanded into a cache for every row",
    "static-compiled": "the same with a static cache and torch.compile",
    "one-by-one": "this package, one prompt after another",
    "vllm": "vLLM with `prompt_embeds` and prefix caching",
    "vllm-shared": "vLLM with this package's attention",
}
"""What a system is, for a reader. A case may have others."""

QUICK_OP_TESTS = "(test_forward or test_gradients) and float32 and not triton"
GATES: dict[str, tuple[list[str], str]] = {
    **{
        op: ([f"tests/ops/test_{op}.py"], QUICK_OP_TESTS)
        for op in ("prefix_attention", "merge_states", "prompt_concat", "prompt_qkv")
    },
    "generate": (["tests/test_generate.py", "tests/test_fused_decoder.py"], "llama and not llama4"),
    "training": (["tests/test_training.py", "tests/test_fused_training.py"], "llama and not llama4"),
    "bank": (["tests/test_bank.py", "tests/test_generate.py"], "test_bank or test_greedy_with_a_prompt_a_row"),
}
"""What has to be green: test files and pytest's ``-k``. Seconds each, not the whole of an op's tests."""

Turn = Callable[[Any], tuple[Any, Times]]
"""From one round's inputs to a result, and the seconds that it took by what was timed."""


@dataclass
class Prepared:
    """A case made ready.

    Attributes:
        turns: ours first.
        errors: from the inputs and the results of one round to each system's error, NaN where there is a NaN.
        compared: what the error is.
        inputs: new ones at every call, from torch's seeded generator.
        calls: of short calls, one at a time.
        flops, moved: that the work needs: bytes with every input read and every result written once.
        skipped: systems that can't run here, and why.
        close: ends what must be ended.
    """

    turns: dict[str, Turn]
    errors: Callable[[Any, dict[str, Any]], dict[str, float]]
    compared: str
    tolerance: float
    inputs: Callable[[], Any] = lambda: None
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    flops: float = 0.0
    moved: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        work: shapes and data type, for people and for plots.
        systems: that exist, known without building any; ours first.
        prepare: builds the systems that it is given the names of.
        tests: keys of `GATES`.
        quick: whether it belongs to the quick run. slow: systems that do not.
        rounds: of the quick and of the full run. warmup: untimed ones before, in which ``cold`` systems take no part.
    """

    set: str
    name: str
    work: dict[str, Any]
    systems: tuple[str, ...]
    prepare: Callable[[frozenset[str]], Prepared]
    tests: tuple[str, ...]
    quick: bool = True
    slow: frozenset[str] = frozenset()
    rounds: tuple[int, int] = (9, 25)
    warmup: int = 1
    cold: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        return f"{self.set}/{self.name}"


@dataclass
class Row:
    """One system at one piece of work. README and docs/benchmarks.md are made of these.

    Attributes:
        id: ``set/case/system/what``, ``what`` being the thing timed.
        peer: what the system is, in words.
        seconds: median, p20 and p80 of ``samples``, one number a round.
        roofline: share of the machine's, measured in the same rounds: ``max(flops / rate, bytes / rate) / seconds``.
        rates: of that machine, by "flops" and "bytes", a second.
        ratio: this system's seconds over ours, round by round: median, p20, p80, and low and high, between which the
            median is with 95% confidence. So above 1 ours is faster. None for ours and where it is withheld.
        agreement: what was compared, the worst error over all rounds, and the tolerance.
        withheld: why there is no ratio though there are seconds.
        skipped: why there are no seconds.
        command: repeats just this row (and ours beside it).
    """

    id: str
    work: dict[str, Any]
    peer: str
    device: str
    versions: dict[str, str]
    commit: str | None
    command: str
    seconds: dict[str, float] | None = None
    samples: list[float] = field(default_factory=list)
    flops: float = 0.0
    bytes: float = 0.0
    roofline: dict[str, float] | None = None
    rates: dict[str, float] | None = None
    ratio: dict[str, float] | None = None
    agreement: dict[str, Any] | None = None
    withheld: str | None = None
    skipped: str | None = None

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Set, case, system and what was timed, "" where nothing was."""
        first, name, system, *what = self.id.split("/")
        return first, name, system, "".join(what)

    @property
    def set(self) -> str:
        return self.parts[0]

    @property
    def case(self) -> str:
        return self.parts[1]

    @property
    def system(self) -> str:
        return self.parts[2]

    @property
    def what(self) -> str:
        return self.parts[3]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# -- which cases ------------------------------------------------------------------------------------------------------


@cache
def cases() -> tuple[Case, ...]:
    """All of them; nothing is built."""
    import _scaling
    import bench_merge_states
    import bench_model
    import bench_prefix_attention
    import bench_prompt_concat
    import bench_prompt_qkv
    import bench_serve
    import bench_train

    homes = (
        *(bench_prefix_attention, bench_merge_states, bench_prompt_concat, bench_prompt_qkv),
        *(bench_model, bench_train, bench_serve, _scaling),
    )
    return tuple(case for home in homes for case in home.cases())


def select(
    given: Iterable[Case],
    *,
    sets: Collection[str] = (),
    only: Collection[str] = (),
    compare: Collection[str] = (),
    quick: bool = True,
) -> list[tuple[Case, frozenset[str]]]:
    """Cases and the systems of each, ours always among them.

    Args:
        only: ids of rows or cases, leading parts of such, or globs; then ``quick`` leaves nothing out.
        compare: systems; none: all.

    Raises:
        ValueError: a set, an id or a system that there is not; the message names those that there are.
    """
    given = list(given)
    if unknown := [name for name in sets if name not in SETS]:
        raise ValueError(f"unknown set {', '.join(unknown)}; there are {', '.join(SETS)}")
    known = {name for case in given for name in case.systems}
    if unknown := [name for name in compare if name not in known]:
        raise ValueError(f"unknown system {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    chosen: list[tuple[Case, frozenset[str]]] = []
    matched = set()
    for case in given:
        names = frozenset(case.systems if not compare else {OURS, *compare} & {*case.systems})
        if sets and case.set not in sets:
            continue
        if only:
            found = {pattern: _matching(case, pattern) for pattern in only}
            matched |= {pattern for pattern, systems in found.items() if systems}
            if not (wanted := frozenset().union(*found.values())):
                continue
            names &= wanted | {OURS}
        elif quick and not case.quick:
            continue
        if len(names) > 1 or not compare:
            chosen.append((case, names))
    if missing := [pattern for pattern in only if pattern not in matched]:
        near = sorted({case.id for case in given if not sets or case.set in sets})
        raise ValueError(f"no row is called {', '.join(missing)}; cases: {', '.join(near)}")
    return chosen


def _matching(case: Case, pattern: str) -> frozenset[str]:
    """Systems of a case that an id, a leading part of one or a glob names."""
    first, *rest = pattern.split("/")
    name, system, *_ = (*rest, "*", "*")
    if not (fnmatch.fnmatchcase(case.set, first) and fnmatch.fnmatchcase(case.name, name)):
        return frozenset()
    return frozenset(one for one in case.systems if fnmatch.fnmatchcase(one, system))


# -- short calls ------------------------------------------------------------------------------------------------------


def short_calls(
    systems: dict[str, System],
    make: Callable[[], Any],
    reference: Callable[[Any], Any],
    *,
    tolerance: float = 1e-5,
    cold: int = 0,
    grad: bool = False,
    **work: float,
) -> Prepared:
    """Systems whose calls are repeated within a turn, each compared with what `reference` gives for the same inputs.

    Args:
        make: one set of inputs. cold: a system has as many sets, in turn, as together hold so many bytes.
        grad: whether the calls run with autograd.
        work: ``flops`` and ``moved``.
    """
    given = make()
    wanted = reference(given)
    turns, calls, skipped = {}, {}, {}
    for name, system in systems.items():
        try:
            with torch.set_grad_enabled(grad):
                first = system.prepare(given)
                count = math.ceil(cold / sum(x.nbytes for x in tensors_of(first))) if cold else 1
                sets = [(first,), *((system.prepare(make()),) for _ in range(count - 1))]
                repeated = Repeated(system.call, sets)
        except Exception as error:  # a peer that this machine does not have
            if name == OURS:
                raise
            skipped[name] = reason(error)
            continue
        turns[name] = _as_turn(repeated, grad)
        calls[name] = torch.set_grad_enabled(grad)(partial(system.call, first))
    return Prepared(
        turns,
        lambda _, results: {name: relative_error(result, wanted) for name, result in results.items()},
        "relative error (Euclidean norm) against the float64 reference",
        tolerance,
        calls=calls,
        skipped=skipped,
        **work,
    )


def _as_turn(repeated: Repeated, grad: bool) -> Turn:
    def turn(_: Any) -> tuple[Any, Times]:
        with torch.set_grad_enabled(grad):
            result, seconds = repeated()
        return result, {"call": seconds}

    return turn


def reason(error: BaseException) -> str:
    """Why a system is not there, in a line."""
    said = str(error).strip().splitlines()
    return (f"{type(error).__name__}: {said[0]}" if said else type(error).__name__)[:300]


def pairs(given: Iterable[Case]) -> dict[str, Any]:
    """Every case with every system of it: what pytest's ``parametrize`` takes beside the names."""
    found = [(case, system) for case in given for system in case.systems]
    return {"argvalues": found, "ids": [f"{case.name}-{system}" for case, system in found]}


def one_system(benchmark: Any, case: Case, system: str) -> None:
    """A system alone, timed by pytest-benchmark after a check: quick, and with no ratio to trust.

    Args:
        benchmark: pytest-benchmark's fixture.
    """
    torch.manual_seed(0)
    prepared = case.prepare(frozenset({system}))
    if system in prepared.skipped:
        import pytest

        pytest.skip(prepared.skipped[system])
    turn, given = prepared.turns[system], prepared.inputs()
    error = prepared.errors(given, {system: turn(given)[0]})[system]
    assert error <= prepared.tolerance, f"{system}: {prepared.compared}: {error}"
    benchmark(prepared.calls[system])
    benchmark.extra_info.update(case.work, flops=prepared.flops, bytes=prepared.moved, error=error)


# -- the tests that come first ----------------------------------------------------------------------------------------


def red_tests(name: str) -> str | None:
    """Run one of `GATES`. None where all is green, else what pytest said last."""
    files, expression = GATES[name]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-x", "--tb=short", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["-m", "not slow and not real", "-k", expression]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said += (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest said nothing"])[-1:]
    return f"{' '.join(files)}: {said[0][:200]}"


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where rows are measured, the same for all rows of a run."""

    device: str
    versions: dict[str, str]
    commit: str | None

    @classmethod
    def here(cls) -> Place:
        facts = setting()
        device = f"{facts['cpu']}, {facts['threads']} threads, {facts['isa'] or 'no C++ kernels'}"
        return cls(device, {"softprompt_fast": __version__, **facts["packages"]}, facts["commit"])


def measure(
    case: Case,
    names: Collection[str],
    place: Place,
    *,
    quick: bool = True,
    red: Sequence[str] = (),
    rounds: int | None = None,
    machine: Machine | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Rows of one case.

    Args:
        red: what the tests said that failed; ratios are then withheld.
        rounds: other than the case's. machine: takes turns with the systems, for shares of the roofline.
        tick: called after every round.

    Raises:
        Exception: whatever ours raises. A peer that fails is skipped, with the reason.
    """
    torch.manual_seed(0)
    rounds = rounds or case.rounds[0 if quick else 1]
    left_out = {name: "takes too long for the quick run: --full" for name in case.slow & {*names} if quick}
    prepared = case.prepare(frozenset(names) - left_out.keys())
    skipped = {**prepared.skipped, **left_out}
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in prepared.turns}
    worst = dict.fromkeys(prepared.turns, 0.0)
    roof: dict[str, list[float]] = {}
    roofs = {} if machine is None or not prepared.flops + prepared.moved else machine.turns()
    try:
        for number in range(-case.warmup, rounds):
            given, results = prepared.inputs(), {}
            for name, turn in prepared.turns.items():
                if name in skipped or (number < 0 and name in case.cold):
                    continue
                try:
                    results[name], times = turn(given)
                except Exception as error:
                    if name == OURS:
                        raise
                    skipped[name] = reason(error)
                    continue
                if number >= 0:
                    for what, seconds in times.items():
                        samples[name].setdefault(what, []).append(seconds)
            for name, error in prepared.errors(given, results).items():
                worst[name] = error if not error <= worst[name] else worst[name]  # a NaN stays
            for name, one in roofs.items():
                if number >= 0:
                    roof.setdefault(name, []).append(one()[1])
            tick()
    finally:
        prepared.close()
    return _rows(case, names, place, prepared, samples, worst, skipped, (machine, roof), red, quick)


def _rows(
    case: Case,
    names: Collection[str],
    place: Place,
    prepared: Prepared,
    samples: dict[str, dict[str, list[float]]],
    worst: dict[str, float],
    skipped: dict[str, str],
    roofs: tuple[Machine | None, dict[str, list[float]]],
    red: Sequence[str],
    quick: bool,
) -> list[Row]:
    rows = []

    def row(system: str, what: str = "", **known: Any) -> None:
        identity = "/".join(filter(None, (case.id, system, what.replace(" ", "-"))))
        command = f"softprompt-fast bench --only {identity}{'' if quick else ' --full'}"
        known["work"] = case.work
        rows.append(Row(identity, peer=SYSTEMS.get(system, system), **asdict(place), command=command, **known))

    for name in (one for one in case.systems if one in names):
        if name in skipped:
            row(name, skipped=skipped[name])
            continue
        agreement = {"compared": prepared.compared, "error": worst[name], "tolerance": prepared.tolerance}
        why = _why_no_ratio(name, worst, prepared.tolerance, red)
        for what, seconds in samples[name].items():
            known: dict[str, Any] = {"flops": prepared.flops, "bytes": prepared.moved}
            machine, roof = roofs
            if roof and machine is not None and what in ("call", "total"):
                shares = machine.share_of_roofline(roof, seconds, prepared.flops, prepared.moved)
                gemm = min(shares, key=lambda name: shares[name]["median"])  # the one that is faster here
                known["roofline"] = shares[gemm]
                found = machine.rates(roof)
                known["rates"] = {"flops": 1e9 * found[gemm]["median"], "bytes": 1e9 * found["copy"]["median"]}
            if name != OURS and (ours := samples[OURS].get(what)):
                known["withheld"] = why
                if why is None:
                    known["ratio"] = compared(seconds, ours)
            row(name, what, seconds=spread(seconds), samples=seconds, agreement=agreement, **known)
    return rows


def compared(seconds: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """A row's ratio."""
    low, high = interval([a / b for a, b in zip(seconds, ours, strict=True)])
    return {**ratio(seconds, ours), "low": low, "high": high}


def _why_no_ratio(name: str, worst: dict[str, float], tolerance: float, red: Sequence[str]) -> str | None:
    if red:
        return f"tests are red: {'; '.join(red)}"
    wrong = [one for one in (OURS, name) if not worst[one] <= tolerance]
    if wrong:
        said = " and ".join(f"{one} is off by {worst[one]:.1e}" for one in wrong)
        return f"results do not agree: {said}, tolerance {tolerance:.0e}"
    return None


# -- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run gave. ``tests``: gate -> what was red, None where all was green."""

    rows: list[Row]
    tests: dict[str, str | None]
    seconds: float

    @property
    def well(self) -> bool:
        """Whether all tests were green and all results agreed."""
        return not any(self.tests.values()) and not any(row.withheld for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": setting(),
            "seconds": self.seconds,
            "tests": self.tests,
            "rows": [row.as_dict() for row in self.rows],
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")


def run(
    chosen: Sequence[tuple[Case, frozenset[str]]],
    *,
    quick: bool = True,
    begin: Callable[[str, int, int, int], Callable[[], None]] = lambda *unused: lambda: None,
) -> Outcome:
    """The tests, then every case.

    Args:
        begin: told what begins, in how many steps it ends, its number and of how many; gives what is called after
            each step.
    """
    started = time.perf_counter()
    gates = list(dict.fromkeys(name for case, _ in chosen for name in case.tests))
    count, tests = len(gates) + len(chosen), {}
    for number, name in enumerate(gates):
        tick = begin(f"tests of {name}", 1, number, count)
        tests[name] = red_tests(name)
        tick()
    place, machine, rows = Place.here(), Machine(1024, 64 << 20), []
    for number, (case, names) in enumerate(chosen, len(gates)):
        tick = begin(case.id, case.warmup + case.rounds[0 if quick else 1], number, count)
        red = [said for name in case.tests if (said := tests[name])]
        rows += measure(case, names, place, quick=quick, red=red, machine=machine, tick=tick)
    return Outcome(rows, tests, time.perf_counter() - started)


def tables(outcome: Outcome) -> Iterator[Table]:
    """A table for each set."""
    for name in SETS:
        rows = [row for row in outcome.rows if row.set == name]
        if not rows:
            continue
        table = Table(title=f"{name}: median (p20 to p80); ratios: how many times as long as ours")
        for column in ("case", "system", "what", "time", "ratio", "95% of the median", "of the roofline", "agreement"):
            table.add_column(column)
        before = ""
        for row in rows:
            between = f"{row.ratio['low']:.2f} to {row.ratio['high']:.2f}" if row.ratio else ""
            table.add_row(
                row.case if row.case != before else "",
                row.system,
                row.what,
                duration(row.seconds) if row.seconds else f"not run: {row.skipped}",
                shown(row.ratio) if row.ratio else f"none: {row.withheld}" if row.withheld else "",
                between,
                shown(row.roofline, "%") if row.roofline else "",
                f"{row.agreement['error']:.0e}" if row.agreement else "",
            )
            before = row.case
        yield table


def duration(seconds: dict[str, float]) -> str:
    """Such as "1.30 ms (1.28 to 1.35)"."""
    unit, scale = next(
        (u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if seconds["median"] * s >= 1 or s == 1e6
    )
    middle, low, high = (f"{seconds[name] * scale:.3g}" for name in ("median", "p20", "p80"))
    return f"{middle} {unit} ({low} to {high})"


def read_rows(path: Path) -> list[Row]:
    """Of a file that :meth:`Outcome.write` wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no result of softprompt-fast bench: {reason(error)}") from None
