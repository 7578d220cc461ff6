# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU: CUDA graphs of calls on rotating inputs, systems that take turns, a check before every number.

A system is timed as replays of one graph that calls it on several sets of inputs in turn, together several times the
L2 cache, so that every call finds its inputs in memory, as in a model of many layers. What cannot be captured
(autograd, ``generate``) is timed between two events, or by a clock, as the whole of many calls. As on the CPU, systems
take turns, a ratio is the median of the ratios of single rounds, and its spread runs from the 20th to the 80th
percentile. A system whose result does not agree with the float32 reference is not timed.

With ``device="cpu"`` the same code runs tiny shapes by a clock: that is how it is tested without a GPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _harness import ratio, spread
from torch import Tensor

SETS_BYTES = 256 << 20
"""Of a system's input sets together: five times the L2 cache of an H100."""
MOST_SETS = 16
TURN = 2e-3
"""Seconds of a system's turn, about."""
SHORT = 50e-3
"""Of a turn: longer ones are not repeated, and no untimed one goes before."""


@dataclass
class System:
    """One way to do a case's work.

    Attributes:
        call: does it once, from what ``prepare`` made of a set of inputs, and returns what is checked.
        prepare: what is there before the clock starts, such as a cache that holds a copy of the prefix for each row.
        graph: whether a CUDA graph can hold the call.
    """

    call: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda inputs: inputs
    graph: bool = True


@dataclass
class Bar:
    """What the table asks for: a number that a case's row must reach."""

    text: str
    measure: Callable[[Row], float]
    at_least: float | None = None
    at_most: float | None = None

    def verdict(self, row: Row) -> dict[str, Any]:
        try:
            found = self.measure(row)
        except (KeyError, ZeroDivisionError):  # a system that could not run
            return {"bar": self.text, "found": None, "met": None}
        met = found >= self.at_least if self.at_least is not None else found <= (self.at_most or 0.0)
        return {"bar": self.text, "found": found, "met": bool(met)}


@dataclass
class Case:
    """One row of the table: inputs, ways to do the work, how right they must be and how fast.

    Attributes:
        make: one set of inputs, random.
        reference: float32 results that the systems' are compared with, None where they are compared with nothing.
        compare: cuts a result down to what ``reference`` gives, such as the first rows.
        seconds: that it may take; None: what is left to its group.
        backend: that "ours" asks for by name; None: what "auto" picks.
        tolerance: of ``|result - reference| / |reference|``, in the Euclidean norm.
    """

    name: str
    make: Callable[[], Any]
    systems: dict[str, System]
    flops: float = 0.0
    moved: float = 0.0
    reference: Callable[[Any], Any] | None = None
    compare: Callable[[Any], Any] = lambda result: result
    tolerance: float = 1e-2
    bars: list[Bar] = field(default_factory=list)
    seconds: float | None = None
    backend: str | None = None


@dataclass
class Row:
    """What came out of a case. ``samples``: seconds a call, one number a round."""

    case: Case
    ceilings: dict[str, float]
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def seconds(self, name: str = "ours") -> float:
        return statistics.median(self.samples[name])

    def fastest(self, *names: str) -> str:
        """Of the systems whose name begins with one of ``names`` (none: of all others than ours)."""
        others = [n for n in self.samples if n != "ours" and (not names or n.startswith(names))]
        if not others:
            raise KeyError(names)
        return min(others, key=self.seconds)

    def speedup(self, *names: str) -> float:
        return ratio(self.samples[self.fastest(*names)], self.samples["ours"])["median"]

    def as_dict(self) -> dict[str, Any]:
        case = self.case
        found: dict[str, Any] = {"case": case.name, "flops": case.flops, "bytes": case.moved}
        found["seconds"] = {name: spread(values) for name, values in self.samples.items()}
        if "ours" in self.samples:
            ours = self.samples["ours"]
            found["ratios"] = {name: ratio(x, ours) for name, x in self.samples.items() if name != "ours"}
            found["tflops_per_second"] = case.flops / self.seconds() / 1e12
            found["gigabytes_per_second"] = case.moved / self.seconds() / 1e9
        found |= {"errors": self.errors, "not_timed": self.missing}
        found["bars"] = [bar.verdict(self) for bar in case.bars]
        return found | {"samples": self.samples}


def tensors_of(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [t for value in values for t in tensors_of(value)]


def relative_error(found: Any, wanted: Any) -> float:
    """The largest over the results; NaN where a result holds one."""
    errors = []
    for x, y in zip(tensors_of(found), tensors_of(wanted), strict=True):
        x, y = x.detach().double(), y.detach().double()
        errors.append(((x - y).norm() / y.norm().clamp(min=1e-30)).item())
    return max(errors) if all(e == e for e in errors) else float("nan")


class Turn:
    """A system made ready: ``start()`` begins a turn, and after the device has finished ``seconds()`` is its time a
    call."""

    def __init__(self, system: System, sets: Sequence[Any], device: torch.device) -> None:
        self.system, self.sets, self.gpu = system, sets, device.type == "cuda"
        self.graph: Any = None
        self.repeats = 1
        self._whole_round()  # allocates, compiles
        if self.gpu and system.graph:
            self.graph = self._captured()
        self.warm = False
        taken = self._timed()
        if taken < SHORT:
            self.warm = True
            taken = min(self._timed() for _ in range(3))
            self.repeats = max(1, min(200, round(TURN / max(taken, 1e-7))))

    def _whole_round(self) -> None:
        for inputs in self.sets:
            self.system.call(inputs)

    def _captured(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._whole_round()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._whole_round()
        return graph

    def _run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self._whole_round()

    def _timed(self) -> float:
        self.start()
        if self.gpu:
            torch.cuda.synchronize()
        return self.seconds() * self.repeats * len(self.sets)

    def start(self) -> None:
        if not self.gpu:
            began = time.perf_counter()
            for _ in range(self.repeats):
                self._run()
            self.elapsed = time.perf_counter() - began
            return
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        if self.warm:
            self._run()  # untimed: the caches as this system leaves them
        self.events[0].record()
        for _ in range(self.repeats):
            self._run()
        self.events[1].record()

    def seconds(self) -> float:
        elapsed = self.events[0].elapsed_time(self.events[1]) / 1e3 if self.gpu else self.elapsed
        return elapsed / self.repeats / len(self.sets)


def works(device: torch.device) -> bool:
    """Whether this process can still use the device: after some errors nothing does any more."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run(
    case: Case,
    device: torch.device,
    ceilings: dict[str, float],
    *,
    budget: float,
    rounds: int = 25,
    begin: Callable[[str | None], None] = lambda system: None,
    without: Collection[str] = (),
) -> Row:
    """Check the systems, then time those that are right, for about ``budget`` seconds at most.

    Args:
        begin: is told which system comes next, and None when all of them are timed in turns.
        without: systems that took a process down.
    """
    row, started = Row(case, ceilings), time.perf_counter()
    inputs = case.make()
    wanted = None if case.reference is None else case.reference(inputs)
    turns: dict[str, Turn] = {}
    for name, system in case.systems.items():
        if name in without:
            row.missing[name] = "took its process down, or never ended"
            continue
        begin(name)
        try:
            prepared = system.prepare(inputs)
            if wanted is not None:
                error = relative_error(case.compare(system.call(prepared)), wanted)
                row.errors[name] = error
                if not error <= case.tolerance:
                    row.missing[name] = f"wrong: off by {error:.1e}, tolerance {case.tolerance:.0e}"
                    continue
            size = sum(x.numel() * x.element_size() for x in tensors_of(prepared))
            count = (
                1
                if device.type == "cpu" or not system.graph
                else max(1, min(MOST_SETS, -(-SETS_BYTES // max(size, 1))))
            )
            sets = [prepared, *(system.prepare(case.make()) for _ in range(count - 1))]
            turns[name] = Turn(system, sets, device)
        except Exception as error:  # a baseline that this version, or this GPU, does not have
            row.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            if not works(device):
                return row
        if time.perf_counter() - started > budget and "ours" in turns:
            tried = {*turns, *row.missing}
            row.missing |= dict.fromkeys((n for n in case.systems if n not in tried), "no time was left")
            break
    del wanted
    row.samples = {name: [] for name in turns}
    begin(None)
    for number in range(rounds):
        for name, turn in turns.items():
            turn.start()
            if device.type == "cuda":
                torch.cuda.synchronize()
            row.samples[name].append(turn.seconds())
        if number >= 2 and time.perf_counter() - started > budget:
            break
    del turns, inputs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def measure_ceilings(device: torch.device, smoke: bool) -> dict[str, float]:
    """What the machine does at best: bytes/s (read and written) of a copy, flops/s of a bf16 product."""
    size, copied = (64, 1 << 16) if smoke else (8192, 1 << 30)
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    source = torch.randint(-(2**31), 2**31 - 1, (copied // 4,), device=device, dtype=torch.int32)
    target = torch.empty_like(source)
    rates = {}
    works = (
        ("copy", 2 * copied, lambda _: target.copy_(source)),
        ("bf16 GEMM", 2 * size**3, lambda _: torch.mm(a, b)),
    )
    for name, work, call in works:
        turn = Turn(System(call), [None], device)
        samples = []
        for _ in range(3 if smoke else 15):
            turn.start()
            if device.type == "cuda":
                torch.cuda.synchronize()
            samples.append(turn.seconds())
        rates[name] = work / statistics.median(samples)
    return rates
