# SPDX-License-Identifier: Apache-2.0
"""prefix_attention against PyTorch's attention over the expanded prefix, on the CPU. Run it with

    python -m pytest benchmarks/bench_prefix_attention.py --benchmark-group-by=param:shape

A shape is timed only after its result was checked. Each row carries the bytes that have to move once, the arithmetic,
and how much of both a second of the median got through.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from softprompt_fast import ops
from softprompt_fast.testing import AttentionInputs, attention_inputs

# SmolLM2-135M's attention: 9 query heads over 3 key/value heads of 64.
HEADS = {"q_heads": 9, "kv_heads": 3, "head_dim": 64}
SHAPES = {
    "decode B32 P512 T48": {"batch": 32, "queries": 1, "own": 48, "prefix": 512},
    "decode B32 P2048 T48": {"batch": 32, "queries": 1, "own": 48, "prefix": 2048},
    "decode B1 P100 T16": {"batch": 1, "queries": 1, "own": 16, "prefix": 100},
    "prefill B32 P512 S16": {"batch": 32, "queries": 16, "own": 16, "prefix": 512},
    "training B16 P100 S32": {"batch": 16, "queries": 32, "own": 32, "prefix": 100},
}


def expanded(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values as a cache with the prefix expanded holds them, and the mask that prefill needs."""
    batch, _, queries, _ = inputs.query.shape
    key = torch.cat([inputs.prefix_key.expand(batch, -1, -1, -1), inputs.key], 2)
    value = torch.cat([inputs.prefix_value.expand(batch, -1, -1, -1), inputs.value], 2)
    mask = torch.ones(queries, key.shape[2], dtype=torch.bool).tril(key.shape[2] - queries) if queries > 1 else None
    return key, value, mask


@pytest.mark.parametrize("system", ["softprompt_fast", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefix_attention(benchmark, shape: str, system: str) -> None:
    inputs = attention_inputs(**HEADS, **SHAPES[shape])
    train = shape.startswith("training")
    if train:
        inputs.requires_grad_()
    key, value, mask = expanded(inputs)

    def ours() -> torch.Tensor:
        return ops.prefix_attention(*inputs.tensors)

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(inputs.query, key, value, attn_mask=mask, enable_gqa=True)

    torch.testing.assert_close(ours(), sdpa())
    attend = ours if system == "softprompt_fast" else sdpa
    of = inputs.tensors if system == "softprompt_fast" else (inputs.query, key, value)

    def step() -> None:
        if train:
            torch.autograd.grad(attend().sum(), of, retain_graph=True)
        else:
            with torch.no_grad():
                attend()

    benchmark(step)
    s = SHAPES[shape]
    batch, queries, own, prefix = s["batch"], s["queries"], s["own"], s["prefix"]
    keys = prefix + (own if queries == 1 else (own + 1) / 2)
    flops = 4 * batch * HEADS["q_heads"] * queries * keys * HEADS["head_dim"] * (3.5 if train else 1)
    moved = (
        4
        * HEADS["head_dim"]
        * (2 * HEADS["kv_heads"] * (prefix + batch * own) + 2 * HEADS["q_heads"] * batch * queries)
    )
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        bytes=moved,
        flops=flops,
        gigabytes_per_second=round(moved / seconds / 1e9, 2),
        gigaflops_per_second=round(flops / seconds / 1e9, 1),
    )
