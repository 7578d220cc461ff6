# SPDX-License-Identifier: Apache-2.0
"""merge_states on the CPU. Run it with

python -m pytest benchmarks/bench_merge_states.py --benchmark-group-by=param:shape
"""

from __future__ import annotations

import pytest
import torch
from _harness import backends

from softprompt_fast import ops

SHAPES = {"decode B32": (32, 9, 1), "prefill B32 S16": (32, 9, 16), "B1 S2048": (1, 9, 2048)}


@pytest.mark.parametrize("backend", backends("merge_states"))
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_states(benchmark, shape: str, backend: str) -> None:
    out_a, out_b = torch.randn(2, *SHAPES[shape], 64)
    lse_a, lse_b = torch.randn(2, *SHAPES[shape])
    want = ops.merge_states(out_a, lse_a, out_b, lse_b, backend="reference")
    for found, expected in zip(ops.merge_states(out_a, lse_a, out_b, lse_b, backend=backend), want, strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        benchmark(ops.merge_states, out_a, lse_a, out_b, lse_b, backend=backend)
    moved = 4 * (3 * out_a.numel() + 3 * lse_a.numel())
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        bytes=moved,
        gigabytes_per_second=round(moved / benchmark.stats.stats.median / 1e9, 2),
    )
