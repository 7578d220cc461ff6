# SPDX-License-Identifier: Apache-2.0
"""prefix_attention on the CPU against PyTorch's own attention over the expanded prefix, fp32.

    softprompt-fast bench --only 'op/prefix_attention*'
    python benchmarks/bench_prefix_attention.py             # 240 shapes: does "auto" ever pick a slower backend?
    python -m pytest benchmarks/bench_prefix_attention.py   # one system after the other

"Warm": the same inputs again and again, as far as they fit in the caches. "Cold": as in a model of many layers, every
call finds inputs that the caches no longer hold.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _gpu import System
from _harness import Systems, backends, fastest, interleave, ratio, show, shown, write_json
from _peers import SLOW, attention_peers, sdpa, with_mask
from _peers import expanded as expand
from _suite import Case, Prepared, one_system, pairs, short_calls
from rich.table import Table
from torch import Tensor

from softprompt_fast import ops

OP = "prefix_attention"
COLD_BYTES = 128 << 20
"""A system's inputs together, where they are to be cold: several times a last-level cache."""


@dataclass(frozen=True)
class Shape:
    batch: int
    queries: int
    own: int
    prefix: int
    q_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return (
            f"B{self.batch} S{self.queries} T{self.own} P{self.prefix} Hq{self.q_heads} Hkv{self.kv_heads} "
            f"D{self.head_dim}"
        )

    @property
    def work(self) -> dict[str, Any]:
        """For a row of the suite."""
        sizes = {"B": self.batch, "S": self.queries, "T": self.own, "P": self.prefix}
        heads = {"Hq": self.q_heads, "Hkv": self.kv_heads, "D": self.head_dim}
        return {**sizes, **heads, "dtype": "float32"}

    @property
    def flops(self) -> float:
        """Of the two products, over the keys that causality leaves visible."""
        keys = self.prefix + self.own - (self.queries - 1) / 2
        return 4 * self.batch * self.q_heads * self.queries * keys * self.head_dim

    @property
    def moved(self) -> int:
        """Bytes, every input read and the result written once."""
        keys = self.kv_heads * (self.prefix + self.batch * self.own)
        return 4 * 2 * self.head_dim * (keys + self.batch * self.q_heads * self.queries)

    @property
    def expanded_bytes(self) -> int:
        """Of the cache that holds a copy of the prefix for every row."""
        return 4 * 2 * self.head_dim * self.batch * self.kv_heads * (self.prefix + self.own)

    @property
    def reference_bytes(self) -> int:
        """What the reference holds at a time, about: keys and values repeated to all heads, and a few times the
        scores."""
        columns = self.batch * self.q_heads * (self.prefix + self.own)
        return 4 * columns * (3 * self.head_dim + 4 * self.queries)


# SmolLM2-135M's heads, then those of an 8B Llama or Mistral.
SMALL = {"q_heads": 9, "kv_heads": 3, "head_dim": 64}
LARGE = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
WORKLOADS = {
    "decode": [Shape(batch=32, queries=1, own=32, prefix=p, **SMALL) for p in (128, 512, 2048)],
    "decode1": [Shape(batch=1, queries=1, own=32, prefix=p, **LARGE) for p in (512, 4096)],
    "prefill": [Shape(batch=8, queries=128, own=128, prefix=512, **LARGE)],
    "backward": [Shape(batch=8, queries=128, own=128, prefix=512, **LARGE)],
}


def make_inputs(shape: Shape) -> tuple[Tensor, ...]:
    """Query, key, value, prefix_key and prefix_value, laid out as the model hands them over."""
    query = torch.randn(shape.batch, shape.queries, shape.q_heads, shape.head_dim).transpose(1, 2)
    capacity = 2 * shape.own  # the own cache's buffer doubles when it is full
    own = torch.randn(2, shape.batch, shape.kv_heads, capacity, shape.head_dim)[:, :, :, : shape.own]
    return query, *own, *torch.randn(2, shape.kv_heads, shape.prefix, shape.head_dim)


def forward_systems() -> dict[str, System]:
    return {"ours": System(lambda x: ops.prefix_attention(*x)), **attention_peers()}


def prepare_forward(shape: Shape, cold: bool, names: frozenset[str]) -> Prepared:
    """The reference is exact, so its tolerance holds for every system: rounding of float32, some thousand keys."""
    return short_calls(
        {name: system for name, system in forward_systems().items() if name in names},
        lambda: make_inputs(shape),
        lambda x: ops.prefix_attention(*(t.double() for t in x), backend="reference"),
        cold=COLD_BYTES if cold else 0,
        flops=shape.flops,
        moved=shape.moved,
    )


def prepare_backward(shape: Shape, names: frozenset[str]) -> Prepared:
    """The backward pass alone, all five gradients: of ours, and of autograd through the torch backend."""
    grad = torch.randn(shape.batch, shape.queries, shape.q_heads, shape.head_dim).transpose(1, 2)

    def make() -> list[Tensor]:
        return [x.requires_grad_() for x in make_inputs(shape)]

    def system(backend: str | None) -> System:
        def recorded(inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            return ops.prefix_attention(*inputs, backend=backend), inputs

        return System(lambda x: torch.autograd.grad(*x, grad, retain_graph=True), recorded)

    def reference(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        exact = [x.detach().double().requires_grad_() for x in inputs]
        return torch.autograd.grad(ops.prefix_attention(*exact, backend="reference"), exact, grad.double())

    systems = {"ours": system(None), "autograd": system("torch")}
    # Five products where the forward has two; all inputs, the result and its gradient read, all gradients written.
    return short_calls(
        {name: one for name, one in systems.items() if name in names},
        make,
        reference,
        grad=True,
        flops=2.5 * shape.flops,
        moved=2 * shape.moved,
    )


def cases() -> Iterator[Case]:
    for workload, shape in itertools.chain(*([(name, s) for s in shapes] for name, shapes in WORKLOADS.items())):
        name = f"{OP}-{workload}-b{shape.batch}-p{shape.prefix}"
        if workload == "backward":
            systems, prepare = ("ours", "autograd"), partial(prepare_backward, shape)
            yield Case("op", name, shape.work, systems, prepare, (OP,), rounds=(3, 9))
            continue
        # A prefill works on what it has just read: where its inputs come from makes no difference.
        for cold in (False, True) if shape.queries == 1 else (False,):
            yield Case(
                "op",
                f"{name}-cold" if cold else name,
                {**shape.work, "inputs": "cold" if cold else "warm"},
                tuple(forward_systems()),
                partial(prepare_forward, shape, cold),
                (OP,),
                quick=shape.prefix == 512,
                slow=SLOW & attention_peers().keys(),
                rounds=(3, 9) if shape.queries > 1 else (5, 9),
            )


SWEEP_SHAPES = 240
SWEEP_BYTES = 384 << 20  # of the expanded cache; with everything that is held beside it under 1 GB
SWEEP_FLOPS = 1.5e10  # a tenth of a second or less
REFERENCE_BYTES = 512 << 20
CLOSE = 1.05


def sweep_shapes() -> list[Shape]:
    """A fixed list: half of it decoding, half prefill after 0 to 512 cached tokens."""
    draw = random.Random(0)
    shapes: dict[Shape, None] = {}
    while len(shapes) < SWEEP_SHAPES:
        decode = len(shapes) % 2 == 0
        queries = 1 if decode else draw.choice((2, 3, 5, 8, 16, 17, 32, 63, 64, 128, 200, 256, 512))
        kv_heads = draw.choice((1, 2, 3, 4, 8))
        shape = Shape(
            batch=draw.choice((1, 1, 2, 3, 4, 7, 8, 16, 24, 32, 48, 64)),
            queries=queries,
            own=queries + draw.choice((0, 7, 31, 100, 512) if decode else (0, 0, 0, 33, 512)),
            prefix=draw.choice((0, 8, 20, 64, 100, 128, 257, 512, 1000, 1024, 2048, 4096)),
            q_heads=kv_heads * draw.choice((1, 2, 3, 4, 6, 7, 8)),
            kv_heads=kv_heads,
            head_dim=draw.choice((64, 64, 72, 80, 96, 128, 128, 160, 192, 256)),
        )
        if shape.expanded_bytes <= SWEEP_BYTES and shape.flops <= SWEEP_FLOPS:
            shapes[shape] = None
    return list(shapes)


def sweep_one(shape: Shape, backend: str | None) -> dict[str, Any]:
    """Time "auto" against every backend that it passes over; SDPA over a cache expanded beforehand is shown beside."""
    inputs = make_inputs(shape)
    expanded = with_mask(expand(inputs))
    baseline = sdpa(expanded)
    systems: Systems = {"ours": lambda: ops.prefix_attention(*inputs, backend=backend)}
    for name in backends("prefix_attention")[1:]:
        if name != "reference" or shape.reference_bytes <= REFERENCE_BYTES:
            systems[name] = lambda name=name: ops.prefix_attention(*inputs, backend=name)
    for name, system in systems.items():
        torch.testing.assert_close(system(), baseline, msg=lambda text, name=name: f"{shape}, {name}: {text}")
    others = [name for name in systems if name != "ours"]
    row: dict[str, Any] = {"shape": asdict(shape), "remeasured": False}
    if not others:
        return row
    samples = interleave(systems | {"SDPA": lambda: sdpa(expanded)}, 5, turn=1e-3)
    best = fastest(samples, others)
    if ratio(samples[best], samples["ours"])["median"] < CLOSE:
        # As many rounds as two seconds hold, of the close ones alone.
        row["remeasured"] = True
        medians = {name: statistics.median(samples[name]) for name in systems}
        close = {name: systems[name] for name in systems if medians[name] <= 1.2 * medians[best] or name == "ours"}
        rounds = int(2 / sum(max(4e-3, medians[name]) for name in close))
        samples |= interleave(close, min(max(rounds, 7), 51), turn=4e-3)
        best = fastest(samples, [name for name in close if name != "ours"])
    row |= {"best_other": best, "ratio": ratio(samples[best], samples["ours"])}
    row["seconds"] = {name: statistics.median(values) for name, values in samples.items()}
    row["samples"] = samples
    return row


def run_sweep(args: argparse.Namespace) -> dict[str, Any]:
    first, *others = backends("prefix_attention")
    print(f'"auto" tries {first} first; the others here: {", ".join(others)}')
    rows, started = [], time.perf_counter()
    with torch.no_grad():
        for number, shape in enumerate(sweep_shapes()):
            rows.append(sweep_one(shape, args.backend))
            if number % 20 == 19:
                print(f"{number + 1} shapes, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    timed = sorted((row for row in rows if "ratio" in row), key=lambda row: row["ratio"]["median"])
    table = Table(title=f"the 20 worst of {len(timed)} shapes, {torch.get_num_threads()} threads")
    for column in ("shape", "auto, ms", "the best other", "its ms", "auto is faster by", "SDPA, expanded, ms"):
        table.add_column(column)
    for row in timed[:20]:
        seconds, best = row["seconds"], row["best_other"]
        cells = [f"{1e3 * seconds[name]:.3f}" for name in ("ours", best, "SDPA")]
        table.add_row(str(Shape(**row["shape"])), cells[0], best, cells[1], shown(row["ratio"]), cells[2])
    show(table)
    below = sum(row["ratio"]["median"] < 0.95 for row in timed)
    print(f"below 0.95: {below} of {len(timed)}; without a rival: {len(rows) - len(timed)}")
    return {"rows": rows, "below_0.95": below}


@pytest.mark.parametrize(("case", "system"), **pairs(cases()))
def test_prefix_attention(benchmark, case: Case, system: str) -> None:
    one_system(benchmark, case, system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help='the backend to time as "ours"; default: auto')
    parser.add_argument("--json", type=Path, help="write the samples, ratios and the setting here")
    args = parser.parse_args()
    torch.manual_seed(0)
    result = run_sweep(args)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
