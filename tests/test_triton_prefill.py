# SPDX-License-Identifier: Apache-2.0
"""The prefill kernel of prefix_attention beyond tests/ops/test_prefix_attention.py: its two ways to read keys, its
tiles, and numbers and strides at the ends of their ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from softprompt_fast import ops
from softprompt_fast.backends.triton import _prefix_attention_prefill as prefill
from softprompt_fast.backends.triton import _tuning
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import AttentionInputs, attention_inputs, rows_of

# Both places, a whole block and edges in each, more than one tile of queries.
HEADS = {"q_heads": 2, "kv_heads": 1}
SPANNING: dict[str, dict[str, Any]] = {
    "causal": {**HEADS, "queries": 33, "own": 40, "prefix": 37},
    "window": {**HEADS, "queries": 33, "own": 40, "prefix": 53, "sliding_window": 35, "own_start": [0, 3, 9]},
    "packed": {
        **HEADS, "queries": 20, "own": 37, "prefix": 60, "prefix_offsets": [2, 21, 21, 58], "prefix_index": [2, -1, 0],
        "own_end": [37, 30, 5],
    },
    "bidirectional": {**HEADS, "queries": 18, "own": 35, "prefix": 16, "causal": False},
}  # fmt: skip


def run(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    o = inputs.options
    rows = (o.get(n) for n in ("prefix_offsets", "prefix_index", "own_start", "own_end", "query_start"))
    scale = o.get("scale", inputs.query.shape[-1] ** -0.5)
    rest = (o.get("sliding_window"), o.get("softcap"), o.get("sinks"), o.get("bias"))
    return prefill.forward(*inputs.tensors, *rows, scale, o.get("causal", True), *rest)


def check(inputs: AttentionInputs, tolerance: float = 1e-5) -> None:
    exact = inputs.to(torch.float64)
    real = inputs.real_queries()
    for x, y in zip(run(inputs), reference(*exact.tensors, **exact.options), strict=True):
        shown = real if x.dim() == 4 else real[..., 0]
        torch.testing.assert_close(x.double().where(shown, 0.0), y.where(shown, 0.0), rtol=tolerance, atol=tolerance)


def tiles(block_m: int, block_n: int, descriptors: bool) -> Any:
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "DESCRIPTORS": descriptors, "num_warps": 4, "num_stages": 2}
    return _tuning.overridden("prefix_attention", "prefill", config)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", SPANNING)
def test_tiles(name: str, descriptors: bool) -> None:
    for block_m, block_n in ((16, 32), (32, 16)):
        with tiles(block_m, block_n, descriptors):
            check(attention_inputs(**SPANNING[name]))


@pytest.mark.parametrize("name", SPANNING)
def test_both_ways_to_read_give_the_same_bits(name: str) -> None:
    inputs = attention_inputs(dtype=torch.float16, **SPANNING[name])
    with tiles(16, 16, True):
        found = run(inputs)
    with tiles(16, 16, False):
        for x, y in zip(found, run(inputs), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[..., :5].contiguous(),  # rows of 20 bytes
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2).repeat_interleave(2, -1)[..., ::2],
        lambda x: x[:, :1].expand(x.shape),
        lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape),  # 4 bytes behind an aligned address
        lambda x: x[:, :, :0],
    ],
    ids=["stride", "features apart", "expanded", "address", "empty"],
)
def test_what_descriptors_cannot_describe(spoil: Any) -> None:
    x = torch.randn(2, 2, 4, 8)
    assert prefill._descriptor(x, 16) is not None
    assert prefill._descriptor(x[0], 16) is not None
    assert prefill._descriptor(spoil(x), 16) is None


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30])
def test_scales(scale: float) -> None:
    for options in ({}, {"softcap": 2.0}, {"sliding_window": 9}, {"own_start": [0, 20, 20], "prefix": 0}):
        inputs = attention_inputs(**{"queries": 20, "own": 20, "prefix": 20, **options})
        inputs.options["scale"] = scale
        check(inputs)


@pytest.mark.parametrize("position", [-(2**31), 2**31 - 1, 2**63 - 1])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 2**31 - 1}, {"sliding_window": 9}], ids=str)
@pytest.mark.parametrize("queries", [3, 20], ids=["decode", "prefill"])
def test_positions_far_out(queries: int, options: dict[str, Any], position: int) -> None:
    """query_start is not bounded by the op: a query may stand anywhere, and sees all own keys or none. Whatever it is,
    nothing beside the keys is read."""
    inputs = attention_inputs(batch=1, **HEADS, queries=queries, own=37, own_start=[5], **options).requires_grad_()
    inputs.options["query_start"] = torch.tensor([position])
    out, lse = ops.prefix_attention(*inputs.tensors, **inputs.options, return_lse=True, backend="triton")
    if options.get("sliding_window") == 9:
        assert torch.isneginf(lse).all() == (position > 0)
    else:
        near = {**inputs.options, "query_start": torch.tensor([60 if position > 0 else -60])}
        assert torch.equal(out, ops.prefix_attention(*inputs.tensors, **near, backend="triton"))
    for x in torch.autograd.grad((out, lse), inputs.tensors, (torch.ones_like(out), torch.ones_like(lse))):
        assert x.isfinite().all()


def test_a_negative_scale_in_bfloat16() -> None:
    inputs = attention_inputs(dtype=torch.bfloat16, queries=20, own=20, prefix=20, scale=-0.3)
    check(inputs, 2e-2)


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"softcap": 3.0}], ids=str)
def test_extreme_scores(options: dict[str, Any]) -> None:
    """Scores of some 1e5: one key takes all the weight, which exp alone would overflow on."""
    inputs = attention_inputs(queries=20, own=20, prefix=20, **options)
    inputs.query.mul_(3e4)
    out, lse = run(inputs)
    exact = inputs.to(torch.float64)
    want, want_lse = reference(*exact.tensors, **exact.options)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-3)
    assert out.isfinite().all() and (out - want).abs().median() < 1e-3


def test_a_bias_may_hide_whole_blocks() -> None:
    inputs = attention_inputs(queries=20, own=40, prefix=40, bias=(1, 4, 20, 80))
    inputs.options["bias"][..., :36] = -math.inf
    inputs.options["bias"][:, :, 3] = -math.inf
    out, lse = run(inputs)
    assert not out[:, :, 3].any() and torch.isneginf(lse[:, :, 3]).all()
    check(inputs)


@pytest.mark.parametrize("name", SPANNING)
def test_other_rows_change_no_bit(name: str) -> None:
    inputs = attention_inputs(dtype=torch.bfloat16, **SPANNING[name])
    out, lse = run(inputs)
    for rows in ([2, 0, 1], [1], [0, 0, 2]):
        some_out, some_lse = run(rows_of(inputs, rows))
        assert torch.equal(some_out, out[rows]) and torch.equal(some_lse, lse[rows])


def test_indexes_and_sinks_of_any_stride() -> None:
    inputs = attention_inputs(**SPANNING["packed"], sinks=True)
    apart = {
        name: torch.stack([x, torch.full_like(x, 1)], -1)[:, 0] if isinstance(x, torch.Tensor) else x
        for name, x in inputs.options.items()
    }
    for x, y in zip(run(AttentionInputs(*inputs.tensors, apart)), run(inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["row", "head", "key"])
def test_offsets_of_64_bits(dim: int, descriptors: bool) -> None:
    """Keys and values further apart than 2^31 elements. Only the pages that are used take memory."""
    inputs = attention_inputs(batch=2, queries=17, own=17, prefix=5, dtype=torch.float16)
    dense, far = inputs.tensors, [*inputs.tensors]
    for i in (1, 2):
        shape = list(dense[i].shape)
        strides = [2 * 17 * 16, 17 * 16, 16, 1]
        strides[dim] = (1 << 31) // (shape[dim] - 1) // 16 * 16 + 16
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        far[i] = torch.empty(span, dtype=torch.float16).as_strided(shape, strides).copy_(dense[i])
    with tiles(16, 16, descriptors):
        want = run(inputs)
        found = run(AttentionInputs(*far, inputs.options))
    for x, y in zip(found, want, strict=True):
        assert torch.equal(x, y)
