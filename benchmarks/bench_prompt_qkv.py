# SPDX-License-Identifier: Apache-2.0
"""prompt_qkv against its reference, which is one operator after the other, on the CPU. Run it with

python -m pytest benchmarks/bench_prompt_qkv.py --benchmark-group-by=param:shape
"""

from __future__ import annotations

import pytest
import torch
from _harness import backends

from softprompt_fast import ops

# Rows, own tokens, virtual tokens (0: plain hidden states); SmolLM2-135M's layer.
SHAPES = {"compile P512": (1, 0, 512), "training B16 S32 P100": (16, 32, 100), "decode B32": (32, 1, 0)}
WIDTH, VOCABULARY, Q_HEADS, KV_HEADS, HEAD_DIM = 576, 49152, 9, 3, 64


@pytest.mark.parametrize("backend", backends("prompt_qkv"))
@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_qkv(benchmark, shape: str, backend: str) -> None:
    batch, own, virtual = SHAPES[shape]
    rows = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
    angles = torch.randn(1, virtual + own, HEAD_DIM)
    call = {
        "tokens": torch.randint(0, VOCABULARY, (batch, own)) if virtual else torch.randn(batch, own, WIDTH),
        "weight": torch.randn(rows, WIDTH) / WIDTH**0.5,
        "q_heads": Q_HEADS,
        "kv_heads": KV_HEADS,
        "norm_weight": torch.randn(WIDTH),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    if virtual:
        call |= {"table": torch.randn(VOCABULARY, WIDTH), "prompt": torch.randn(virtual, WIDTH)}
    results = (ops.prompt_qkv(**call, backend=name) for name in (backend, "reference"))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        benchmark(ops.prompt_qkv, **call, backend=backend)
    tokens = batch * (own + virtual)
    flops = 2 * tokens * rows * WIDTH
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        bytes=4 * (rows * WIDTH + tokens * (2 * WIDTH + rows)),
        flops=flops,
        gigaflops_per_second=round(flops / seconds / 1e9, 1),
    )
