# SPDX-License-Identifier: Apache-2.0
"""The suite behind ``softprompt-fast bench``: what cases are, which there are, and the rows that ``_run.py`` makes of
them.

A case is one piece of work that several systems do; ``bench_<what>.py`` hold them. Preparing a case makes its inputs
and systems. They live outside the package so that they can time another revision of it (``PYTHONPATH`` decides), and
because a row is nothing without the tests and the commit that a checkout has.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from _gpu import System, relative_error, tensors_of
from _harness import Repeated, Times

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
        warm: shorter turns, after which a system's whole ones, which are long, find memory and code warm.
        skipped: systems that can't run here, and why.
        elsewhere: systems whose memory is not this process's, and why.
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
    warm: dict[str, Turn] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
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
        rounds: of each process, in the quick and in the full run. warmup: untimed ones before.
        memory: whether what a turn takes at its peak is measured as well.
    """

    set: str
    name: str
    work: dict[str, Any]
    systems: tuple[str, ...]
    prepare: Callable[[frozenset[str]], Prepared]
    tests: tuple[str, ...]
    quick: bool = True
    slow: frozenset[str] = frozenset()
    rounds: tuple[int, int] = (5, 9)
    warmup: int = 1
    memory: bool = False

    @property
    def id(self) -> str:
        return f"{self.set}/{self.name}"


@dataclass
class Row:
    """One system at one piece of work. README and docs/benchmarks.md are made of these.

    Attributes:
        id: ``set/case/system/what``, ``what`` being the thing timed, or "memory".
        peer: what the system is, in words.
        allocator: of the processes that measured, and its policy.
        seconds: median, p20 and p80 of ``samples``, a list for each process, one number a round.
        roofline: share of the machine's, measured in the same rounds: ``max(flops / rate, bytes / rate) / seconds``.
        rates: of that machine, by "flops" and "bytes", a second.
        ratio: this system's seconds over ours, round by round: median, p20, p80, and low and high, between which the
            median is with 95% confidence. So above 1 ours is faster. None for ours and where it is withheld.
        memory: of a row whose ``what`` is "memory", which has no seconds: the "bytes" that a turn takes at its peak
            beyond what is resident before it, and of a peer its "ratio", these bytes over ours.
        agreement: what was compared, the worst error over all rounds, and the tolerance.
        withheld: why there is no ratio though there are seconds.
        skipped: why there is nothing.
        command: repeats just this row (and ours beside it).
    """

    id: str
    work: dict[str, Any]
    peer: str
    device: str
    versions: dict[str, str]
    commit: str | None
    command: str
    allocator: str = ""
    seconds: dict[str, float] | None = None
    samples: list[list[float]] = field(default_factory=list)
    flops: float = 0.0
    bytes: float = 0.0
    roofline: dict[str, float] | None = None
    rates: dict[str, float] | None = None
    ratio: dict[str, float] | None = None
    memory: dict[str, float] | None = None
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


# -- rows, in words and from files ------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Of memory, such as "1.24 GB"."""
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if count >= s or s == 1)
    return f"{count / scale:.3g} {unit}"


def duration(seconds: dict[str, float]) -> str:
    """Such as "1.30 ms (1.28 to 1.35)"."""
    unit, scale = next(
        (u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if seconds["median"] * s >= 1 or s == 1e6
    )
    middle, low, high = (f"{seconds[name] * scale:.3g}" for name in ("median", "p20", "p80"))
    return f"{middle} {unit} ({low} to {high})"


def read_rows(path: Path) -> list[Row]:
    """Of a file that a run wrote; samples of older ones are of a single process.

    Raises:
        ValueError: it is none.
    """
    try:
        rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no result of softprompt-fast bench: {reason(error)}") from None
    for row in rows:
        if row.samples and not isinstance(row.samples[0], list):
            row.samples = [row.samples]
    return rows
