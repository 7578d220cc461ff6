# SPDX-License-Identifier: Apache-2.0
"""merge_states on the CPU: ``softprompt-fast bench --only 'op/merge_states*'``, or alone, one system after the other:

python -m pytest benchmarks/bench_merge_states.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from _gpu import System
from _suite import Case, Prepared, one_system, pairs, short_calls
from torch import Tensor

from softprompt_fast import ops

OP = "merge_states"
SHAPES = {"decode-b32": (32, 9, 1), "prefill-b32-s16": (32, 9, 16), "b1-s2048": (1, 9, 2048)}
HEAD_DIM = 64


def plain(states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """As PyTorch's user would write it; without the contract for rows that see nothing."""
    out_a, lse_a, out_b, lse_b = states
    weight = torch.sigmoid(lse_a - lse_b)[..., None]
    return out_a * weight + out_b * (1 - weight), torch.logaddexp(lse_a, lse_b)


def prepare(shape: tuple[int, ...], names: frozenset[str]) -> Prepared:
    def make() -> tuple[Tensor, ...]:
        out_a, out_b = torch.randn(2, *shape, HEAD_DIM)
        lse_a, lse_b = torch.randn(2, *shape)
        return out_a, lse_a, out_b, lse_b

    systems = {"ours": System(lambda x: ops.merge_states(*x)), "pytorch": System(plain)}
    return short_calls(
        {name: system for name, system in systems.items() if name in names},
        make,
        lambda x: ops.merge_states(*(t.double() for t in x), backend="reference"),
        moved=4 * 3 * (HEAD_DIM + 1) * math.prod(shape),
    )


def cases() -> Iterator[Case]:
    for name, shape in SHAPES.items():
        batch, heads, queries = shape
        work = {"B": batch, "S": queries, "Hq": heads, "D": HEAD_DIM, "dtype": "float32"}
        quick = name != "prefill-b32-s16"
        yield Case("op", f"{OP}-{name}", work, ("ours", "pytorch"), partial(prepare, shape), (OP,), quick=quick)


@pytest.mark.parametrize(("case", "system"), **pairs(cases()))
def test_merge_states(benchmark, case: Case, system: str) -> None:
    one_system(benchmark, case, system)
