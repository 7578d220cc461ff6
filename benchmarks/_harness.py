# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: systems that take turns, ratios with their spread, and the machine's own rates.

A machine slows down and speeds up while a benchmark runs. So the systems take turns (A B C, A B C, ...), a ratio is
the median of the ratios of single rounds, and its spread runs from their 20th to their 80th percentile.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from softprompt_fast import info
from softprompt_fast.backends import heuristics, native
from softprompt_fast.backends._registry import available_backends

ROOT = Path(__file__).resolve().parents[1]

Systems = dict[str, Callable[[], Any]]
Samples = dict[str, list[float]]
Times = dict[str, float]
Turns = dict[str, Callable[[Tensor], tuple[Tensor, Times]]]
"""Each from inputs to a result to compare, and the seconds that it took, by what was timed."""


def backends(op: str) -> list[str]:
    """Backends that can run an op here, in the order in which "auto" tries them."""
    reasons = available_backends(op)
    return [name for name in heuristics.backend_order("cpu") if not reasons[name]]


class Repeated:
    """A system whose turn lasts about ``turn`` seconds: short calls are repeated, as one of them is below what a clock
    and a scheduler resolve, after one untimed call that finds the caches as the system before left them.

    Args:
        system: called with one of `sets` at a time, in turn. The result that a turn gives is that of the first set.
    """

    def __init__(self, system: Callable[..., Any], sets: Sequence[tuple] = ((),), turn: float = 2e-3) -> None:
        self.system, self.first, self.sets = system, sets[0], itertools.cycle(sets)
        system(*self.first)  # allocates, compiles
        self.calls = max(1, round(turn / min(self._seconds(1)[1] for _ in range(3))))
        self.untimed = self.calls > 1 or len(sets) > 1

    def _seconds(self, calls: int) -> tuple[Any, float]:
        started = time.perf_counter()
        for _ in range(calls):
            result = self.system(*next(self.sets))
        return result, (time.perf_counter() - started) / calls

    def __call__(self) -> tuple[Any, float]:
        """A result, and seconds a call."""
        found = self.system(*self.first) if self.untimed else None
        result, seconds = self._seconds(self.calls)
        return (found if self.untimed else result), seconds


def interleave(systems: Systems, rounds: int, *, turn: float = 2e-3) -> Samples:
    """Seconds a call, one number a round. Turns are those of :class:`Repeated`."""
    turns = {name: Repeated(system, turn=turn) for name, system in systems.items()}
    samples: Samples = {name: [] for name in systems}
    for _ in range(rounds):
        for name, one in turns.items():
            samples[name].append(one()[1])
    return samples


def take_turns(
    systems: Turns, inputs: Callable[[], Tensor], rounds: int, warmup: int = 1, *, cold: Collection[str] = ()
) -> tuple[dict[str, Samples], dict[str, list[Tensor]]]:
    """Seconds and results of every system, one a round, for calls that last: new inputs in every round, no call twice.
    ``cold``: systems that take no part in the rounds of warm-up, which are not timed."""
    samples: dict[str, Samples] = {name: {} for name in systems}
    results: dict[str, list[Tensor]] = {name: [] for name in systems}
    for number in range(-warmup, rounds):
        given = inputs()
        for name, system in systems.items():
            if number < 0 and name in cold:
                continue
            result, times = system(given)
            if number >= 0:
                results[name].append(result)
                for what, seconds in times.items():
                    samples[name].setdefault(what, []).append(seconds)
            print(f"round {number}: {name} {times}", file=sys.stderr, flush=True)
    return samples, results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    low, high = values[0], values[-1]
    if len(values) > 1:
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": low, "p80": high}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """At least 95% confidence for the median, whatever the distribution: the widest-apart order statistics that a
    binomial leaves inside (all of fewer than six values, whose confidence is then less)."""
    ordered, count = sorted(values), len(values)
    cut, below = 0, 0.5**count
    while 2 * below <= 0.05:
        cut += 1
        below += math.comb(count, cut) * 0.5**count
    return ordered[max(0, cut - 1)], ordered[count - max(1, cut)]


STUDENT = {2: 12.71, 3: 4.303, 4: 3.182}
"""By the number of values, the 97.5th percentile of Student's t."""


def interval_of_processes(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% confidence for the median over all processes, which may differ by more than their rounds do: Student's, of
    the logarithms of these processes' medians. It holds the median of all values, which lies between the
    processes' own. Of a single process: :func:`interval`.

    Example: processes that find 1.9, 2.0 and 2.1 give 1.76 to 2.26.
    """
    if len(values) == 1:
        return interval(values[0])
    logs = [math.log(statistics.median(one)) for one in values]
    middle, half = statistics.fmean(logs), STUDENT[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle - half), math.exp(middle + half)


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of single rounds; ``over``: the other system's seconds, ``under``: ours."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def compared(over: Sequence[Sequence[float]], under: Sequence[Sequence[float]]) -> dict[str, float]:
    """The same with "low" and "high", between which the median is with 95% confidence; seconds by process."""
    ratios = [[a / b for a, b in zip(x, y, strict=True)] for x, y in zip(over, under, strict=True)]
    low, high = interval_of_processes(ratios)
    return {**spread(flat(ratios)), "low": low, "high": high}


def flat(values: Sequence[Sequence[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(values))


def fastest(samples: Samples, names: Sequence[str]) -> str:
    return min(names, key=lambda name: statistics.median(samples[name]))


@dataclass(frozen=True)
class Machine:
    """What this machine does at best: fp32 products, by MKL and by oneDNN with packed weights, and copies.

    ``turns`` take part in the rounds of a benchmark; :meth:`rates` turns their samples into rates.

    Attributes:
        size: of the square matrices.
        copied: bytes, far more than the last level of cache holds.
    """

    size: int
    copied: int

    @property
    def flops(self) -> int:
        return 2 * self.size**3

    @property
    def bytes(self) -> int:
        """A copy reads and writes."""
        return 2 * self.copied

    def turns(self) -> dict[str, Repeated]:
        x, weight, out = torch.randn(3, self.size, self.size)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, self.size)
        source, target = torch.randn(2, self.copied // 4)
        systems: Systems = {
            "GEMM, MKL": lambda: torch.mm(x, weight, out=out),
            "GEMM, oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
            "copy": lambda: target.copy_(source),
        }
        torch.testing.assert_close(systems["GEMM, oneDNN"](), F.linear(x, weight), rtol=1e-4, atol=1e-3)
        return {name: Repeated(system) for name, system in systems.items()}

    def rates(self, samples: Samples) -> dict[str, dict[str, float]]:
        """GFLOP/s and GB/s."""
        work = {"GEMM, MKL": self.flops, "GEMM, oneDNN": self.flops, "copy": self.bytes}
        return {name: spread([amount / s / 1e9 for s in samples[name]]) for name, amount in work.items()}

    def share_of_roofline(self, samples: Samples, of: Sequence[float], flops: float, moved: float) -> dict[str, Any]:
        """For each GEMM, the spread of ``max(flops / GEMM rate, bytes / copy rate) / seconds`` over the rounds."""
        return {
            gemm: spread(
                [
                    max(flops * g / self.flops, moved * c / self.bytes) / seconds
                    for g, c, seconds in zip(samples[gemm], samples["copy"], of, strict=True)
                ]
            )
            for gemm in ("GEMM, MKL", "GEMM, oneDNN")
        }


MACHINE = Machine(1024, 64 << 20)
"""For the rounds of a case: milliseconds."""


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def gpu() -> dict[str, Any] | None:
    """The GPU that torch would use, and its driver."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "processors": facts.multi_processor_count,
        "memory": facts.total_memory,
        "driver": driver.strip() or None,
        "cuda": torch.version.cuda,
    }


def setting() -> dict[str, Any]:
    """Where, with what and how a result was obtained."""
    facts = info.collect()
    extension, _ = native.load()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    # A result is no place for the paths of the machine that measured it.
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    script = Path(sys.argv[0])
    installed = script.name in ("softprompt-fast", "__main__.py")
    program = ["softprompt-fast"] if installed else ["python", f"{script.parent.name}/{script.name}"]
    return {
        "gpu": gpu(),
        "cpu": cpu_name(),
        "isa": None if extension is None else extension.isa(),
        "threads": torch.get_num_threads(),
        "torch_capability": facts["torch"]["cpu_capability"],
        "extension": facts["extension"],
        "packages": {name: version for name, version in facts["packages"].items() if version},
        # A copy of the tree without its history: whoever copied it may say which commit it is.
        "commit": done.stdout.strip() or os.environ.get("SOFTPROMPT_FAST_COMMIT"),
        "command": shlex.join([*program, *arguments]),
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setting": setting(), **result}, indent=1) + "\n", encoding="utf-8")


def show(table: Table) -> None:
    """Print a table; wide, where no terminal says how wide."""
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def shown(values: dict[str, float], unit: str = "x") -> str:
    """Such as "3.14x (3.02 to 3.20)"; unit "%": of ratios."""
    scale = 100 if unit == "%" else 1
    digits = 0 if unit == "%" else 2
    median, low, high = (f"{scale * values[name]:.{digits}f}" for name in ("median", "p20", "p80"))
    return f"{median}{unit} ({low} to {high})"


def milliseconds(seconds: Sequence[float]) -> str:
    values = spread(seconds)
    return f"{1e3 * values['median']:.3f} ({1e3 * values['p20']:.3f} to {1e3 * values['p80']:.3f})"


def markdown_setting(setting: dict[str, Any]) -> str:
    """The machine, the versions and the commit of a result, in one line."""
    packages = ", ".join(f"{name} {setting['packages'][name]}" for name in ("torch", "transformers", "peft"))
    where = f"{setting['cpu']}, {setting['threads']} threads, {setting['isa']}"
    return f"{where}; {packages}; commit {(setting['commit'] or 'unknown')[:10]}"
