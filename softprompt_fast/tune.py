# SPDX-License-Identifier: Apache-2.0
"""Measure the Triton kernels' configurations on the GPU at hand and keep the best: ``softprompt-fast tune``.

A candidate must first give the results of the configuration that ships; then all are timed in interleaved rounds, so
that a clock that drifts drifts for all of them. What ships stays unless a candidate is faster by more than `MARGIN`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from softprompt_fast._io import atomic_write_bytes, make_directory
from softprompt_fast.backends import _registry
from softprompt_fast.testing import poisoned_memory

MARGIN = 0.02
ROUNDS = 30
# Rounds after which what is this much slower than the best is timed no more.
TRIAL, TOO_SLOW = 3, 1.25

# Takes a call, gives a function that runs it once more and says how many milliseconds the device took.
Timer = Callable[[Callable[[], object]], Callable[[], float]]


class NoDeviceError(RuntimeError):
    """There is no GPU to tune for."""


@dataclass(frozen=True)
class Result:
    """One key of one kernel. ``config`` is the faster of what ships and the candidates, times are medians."""

    op: str
    kernel: str
    key: str
    config: dict[str, Any]
    milliseconds: float
    shipped: dict[str, Any]
    shipped_milliseconds: float
    timed: int
    skipped: dict[str, int]  # why -> how many candidates

    @property
    def improved(self) -> bool:
        return self.config != self.shipped

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    ops: Sequence[str],
    kernels: Sequence[str],
    keys: Sequence[str],
    output: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tune every key of every kernel asked for (none named: all), on the current GPU, and write the tables.

    Raises:
        NoDeviceError: there is none, or Triton is missing.
        ValueError: an op, a kernel or a key is unknown.
    """
    chosen = tunables(ops, kernels, keys)
    from softprompt_fast.backends.triton import _runtime, _tuning

    if not torch.cuda.is_available():
        raise NoDeviceError("tune measures on the GPU at hand, and PyTorch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    if why := _runtime.refusals(torch.empty(0, device=device)):
        raise NoDeviceError("; ".join(why))
    folder, place = output or _tuning.user_folder(), _runtime.places(device)[0]
    say(f"{torch.cuda.get_device_name(device)}: tables go to {folder / place}")
    timer = cuda_timer()
    results = []
    for op, tunable in chosen:
        found = []
        for key in (key for key in tunable.keys if not keys or key in keys):
            found.append(tune(op, tunable, key, device, timer))
            say(describe(found[-1]))
        write(folder, place, op, found)  # an interrupted run keeps what is done
        results += found
    return {"device": place, "folder": str(folder / place), "results": [result.to_dict() for result in results]}


def tunables(ops: Sequence[str], kernels: Sequence[str], keys: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """(op, Tunable) of every kernel asked for that has one of the keys; an empty list asks for all.

    Raises:
        NoDeviceError: Triton is missing.
        ValueError: there is no such op, kernel or key; the message lists those there are.
    """
    found: list[tuple[str, Any]] = []
    missing = {op: _registry.available_backends(op)["triton"] for op in _registry.OPS}
    here = [op for op, why in missing.items() if not why]
    if here:
        from softprompt_fast.backends.triton._tunables import TUNABLES

        found = [(op, tunable) for op in here for tunable in TUNABLES[op].values()]
    if not found:
        raise NoDeviceError("; ".join(dict.fromkeys(reason for why in missing.values() for reason in why)))

    def narrowed(what: str, asked: Sequence[str], names: Callable[[str, Any], Sequence[str]]) -> None:
        nonlocal found
        known = dict.fromkeys(name for op, tunable in found for name in names(op, tunable))
        if unknown := sorted(set(asked) - set(known)):
            raise ValueError(f"{what}: expected {', '.join(known)}, found {', '.join(unknown)}")
        if asked:
            found = [(op, tunable) for op, tunable in found if set(asked) & set(names(op, tunable))]

    narrowed("op", ops, lambda op, tunable: [op])
    narrowed("kernel", kernels, lambda op, tunable: [tunable.kernel])
    narrowed("key", keys, lambda op, tunable: tunable.keys)
    return found


def tune(op: str, tunable: Any, key: str, device: torch.device, timer: Timer, rounds: int = ROUNDS) -> Result:
    from softprompt_fast.backends.triton import _runtime, _tuning

    shipped = _tuning.shipped(op, tunable.kernel, key, _runtime.places(device))
    call = tunable.problem(key, device)

    def configured(config: dict[str, Any]) -> Callable[[], Sequence[Tensor]]:
        def run() -> Sequence[Tensor]:
            with _tuning.overridden(op, tunable.kernel, config):
                return call()

        return run

    with poisoned_memory():
        expected = [x.clone() for x in configured(shipped)()]
    configs, measures = [shipped], [timer(configured(shipped))]
    skipped: Counter[str] = Counter()
    for config in tunable.candidates(key):
        if config == shipped:
            continue
        try:
            with poisoned_memory():
                right = _agree(configured(config)(), expected)
            if right:
                configs.append(config)
                measures.append(timer(configured(config)))
            else:
                skipped["other results"] += 1
        except Exception as error:  # out of resources, a failed compile: each version of Triton has its own
            skipped[type(error).__name__] += 1
    times = _interleaved(measures, rounds)
    finished = [i for i, x in enumerate(times) if len(x) == rounds]
    ratios = {i: median(x / y for x, y in zip(times[i], times[0], strict=True)) for i in finished}
    best = min(ratios, key=lambda i: ratios[i])
    if ratios[best] > 1 - MARGIN:
        best = 0
    return Result(
        op,
        tunable.kernel,
        key,
        configs[best],
        median(times[best]),
        shipped,
        median(times[0]),
        len(configs),
        dict(skipped),
    )


def write(folder: Path, place: str, op: str, results: Sequence[Result]) -> None:
    """Put what is better than what ships into a table of the user's own; what is not leaves it."""
    from softprompt_fast.backends.triton import _tuning

    table = _tuning.table(folder, place, op)
    for result in results:
        keys = table.setdefault(result.kernel, {})
        keys.pop(result.key, None)
        if result.improved:
            keys[result.key] = result.config
    table = {kernel: keys for kernel, keys in table.items() if keys}
    path = folder / place / f"{op}.json"
    if table or path.is_file():
        make_directory(path.parent)
        atomic_write_bytes(path, _tuning.dump(table).encode())


def describe(result: Result) -> str:
    skipped = "".join(f", {count} {why}" for why, count in result.skipped.items())
    verdict = f"{result.config}" if result.improved else "what ships stays"
    return (
        f"{result.op} {result.kernel} {result.key}: {result.shipped_milliseconds:.4f} ms ->"
        f" {result.milliseconds:.4f} ms ({result.timed} timed{skipped}): {verdict}"
    )


def cuda_timer() -> Timer:
    """Times replays of a CUDA graph, so that a short kernel's launch from Python does not count; a graph holds as many
    calls as take half a millisecond."""
    pool = torch.cuda.graph_pool_handle()  # one for all: results are not looked at, so they may share memory

    def capture(call: Callable[[], object], calls: int) -> Callable[[], float]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(calls):
                call()

        def measure() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls

        return measure

    def timer(call: Callable[[], object]) -> Callable[[], float]:
        call()  # compiles
        once = capture(call, 1)
        once()
        calls = int(min(max(0.5 / max(once(), 1e-3), 1), 50))
        return capture(call, calls) if calls > 1 else once

    return timer


def _interleaved(measures: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Times of each by round. The first is timed in every round, others until they are seen to be slow."""
    times: list[list[float]] = [[] for _ in measures]
    running = list(range(len(measures)))
    for round_ in range(rounds):
        if round_ == TRIAL:
            limit = TOO_SLOW * min(median(x) for x in times)
            running = [i for i in running if i == 0 or median(times[i]) <= limit]
        for i in _from(running, round_):
            times[i].append(measures[i]())
    return times


def _from(items: Sequence[int], start: int) -> Iterator[int]:
    """In a circle: none comes always after the same other."""
    return (items[(start + i) % len(items)] for i in range(len(items)))


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two configurations' results are one up to rounding. Not bit for bit: they add in another order."""
    for x, y in zip(found, expected, strict=True):
        finite = y.isfinite()
        if not torch.equal(x[~finite], y[~finite]):
            return False
        error = torch.linalg.vector_norm((x - y)[finite].float())
        limit = torch.linalg.vector_norm(y[finite].float()) * (1e-4 if x.element_size() >= 4 else 2e-2)
        if not error <= limit:  # a NaN has to fail
            return False
    return True
