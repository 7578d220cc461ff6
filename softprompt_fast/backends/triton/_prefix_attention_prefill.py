# SPDX-License-Identifier: Apache-2.0
"""Forward of prefix_attention for many queries a row: prefix and own keys in one launch, with one running softmax.

A program owns BLOCK_M queries of one row and head. Keys lie in two places, the prefix's pack and the row's own, but a
softmax does not care for their order: all blocks that every query sees, of both places, are walked first in one
loop without a mask, then the few blocks at the edges (the causal diagonal, ends, the window's border) in another. So
the software pipeline fills twice a program and not once for each place and kind. Blocks that nobody sees are never
visited.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from softprompt_fast.backends import heuristics
from softprompt_fast.backends.triton import _runtime, _tuning
from softprompt_fast.backends.triton._prefix_attention_common import (
    LN2,
    LOG2E,
    MAX_WINDOW,
    capped,
    row_own,
    row_prefix,
)

OP = "prefix_attention"
# Stands for a scale of 0, by which a hidden score of -inf must not be multiplied.
SMALLEST_SCALE = 1e-37


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_offsets: Tensor | None,
    prefix_index: Tensor | None,
    own_start: Tensor | None,
    own_end: Tensor | None,
    query_start: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    prefix_key_scale: Tensor | None = None,
    prefix_value_scale: Tensor | None = None,
    prefix_scale_block: int | None = None,
    max_prefix_length: int | None = None,  # it splits no prefix
) -> tuple[Tensor, Tensor]:
    batch, q_heads, queries, head_dim = query.shape
    kv_heads, own, v_dim = value.shape[1:]
    packed = prefix_key.shape[1]
    prefix_offsets, prefix_index, own_start, own_end, query_start, sinks = _runtime.dense(
        prefix_offsets, prefix_index, own_start, own_end, query_start, sinks
    )
    # What the output projection reads next: [B, S, Hq, Dv].
    out = query.new_empty(batch, queries, q_heads, v_dim)
    lse = query.new_empty(batch, q_heads, queries, dtype=torch.float32)
    plain = bias is None and {head_dim, v_dim} == {_runtime.block(max(head_dim, v_dim))}
    tuned = tuning_key(max(head_dim, v_dim), query.element_size(), prefix_key_scale is not None, plain)
    config = _tuning.configuration(OP, "prefill", tuned, _runtime.places(query.device))
    keys: tuple[Any, ...] = (key, value, prefix_key, prefix_value)
    if config["DESCRIPTORS"]:
        descriptors = [_descriptor(x, config["BLOCK_N"]) for x in keys]
        if None not in descriptors:
            keys = tuple(descriptors)
        else:  # reading by pointers takes more registers, so the tiles have to be others
            config = {**_tuning.configuration(OP, "prefill", tuned, ("default",)), "DESCRIPTORS": False}
    pairs = batch * kv_heads
    section = heuristics.l2_section(pairs, own * (head_dim + v_dim) * query.element_size())
    blocks = triton.cdiv(queries, config["BLOCK_M"])
    _runtime.launch(
        _prefill, (blocks * q_heads * batch,),
        query, query.stride(), keys[0], key.stride(), keys[1], value.stride(),
        keys[2], prefix_key.stride(), keys[3], prefix_value.stride(),
        out, lse, prefix_offsets, prefix_index, own_start, own_end, query_start,
        max(abs(scale), SMALLEST_SCALE),
        None if sliding_window is None else min(sliding_window, MAX_WINDOW),
        softcap, sinks,
        bias, None if bias is None else _runtime.broadcast_strides(bias),
        prefix_key_scale, None if prefix_key_scale is None else prefix_key_scale.stride(),
        prefix_value_scale, None if prefix_value_scale is None else prefix_value_scale.stride(), prefix_scale_block,
        queries, own, packed, pairs, section, 0 if bias is None else bias.shape[3] - own,
        KV_HEADS=kv_heads, GROUPS=q_heads // kv_heads, HEAD_DIM=head_dim, V_DIM=v_dim,
        BLOCK_D=_runtime.block(head_dim), BLOCK_DV=_runtime.block(v_dim),
        NEGATIVE=scale < 0, CAUSAL=causal, PRECISION=_runtime.dot_precision(query.dtype), **config,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def tuning_key(head_dim: int, element_size: int, quantized: bool, plain: bool) -> str:
    """``plain``: no bias, whose tiles take room beside the others, and heads that fill their blocks.

    Example: heads of 128 in bfloat16 are tuned as "d128-16bit", on an 8-bit prefix as "d128-16bit-prefix8bit"; with a
    bias, and heads of 100, as "d128-16bit-general"."""
    kind = "-general" if not plain else "-prefix8bit" if quantized else ""
    return f"d{_runtime.block(head_dim)}-{8 * element_size}bit{kind}"


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor | None:
    """Of keys or values ``[(B,) Hkv, T, D]``, for tiles of ``rows`` of one head; None where the GPU's copy engine
    cannot read them: it wants 16-byte addresses and strides, and dense rows."""
    x = x if x.dim() == 4 else x[None]
    unit = 16 // x.element_size()
    # The stride of a dimension of size 1 is never used, and may be anything.
    strides = [stride if size > 1 else unit for size, stride in zip(x.shape[:3], x.stride(), strict=False)]
    if x.numel() == 0 or x.stride(3) != 1 or x.data_ptr() % 16 or any(s % unit or s <= 0 for s in strides):
        return None
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, _runtime.block(x.shape[3])])


@triton.jit
def _blocks(lo, all_lo, all_hi, hi, BLOCK_N: tl.constexpr):
    """Blocks of the keys [lo, hi), which some query of a tile sees; all of its queries see [all_lo, all_hi). Returns
    how many blocks that need a mask come first, how many whole ones follow, and how many there are in all."""
    count = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N)
    front = tl.minimum(tl.cdiv(tl.maximum(all_lo - lo, 0), BLOCK_N), count)
    whole = tl.maximum(tl.minimum(all_hi, hi) - lo, 0) // BLOCK_N - front
    return front, tl.maximum(whole, 0), count


@triton.jit
def _tile(p_first, stride_n, stride_d, offs_n, offs_d, keys, dims, MASK_N: tl.constexpr, MASK_D: tl.constexpr):
    """Keys or values ``offs_n`` behind ``p_first``, zeros from ``keys`` and ``dims`` on: [BLOCK_N, BLOCK_D]."""
    p_tile = p_first + offs_n.to(tl.int64)[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d
    if MASK_N and MASK_D:
        return tl.load(p_tile, mask=(offs_n < keys)[:, None] & (offs_d < dims)[None, :], other=0.0)
    elif MASK_N:
        return tl.load(p_tile, mask=(offs_n < keys)[:, None], other=0.0)
    elif MASK_D:
        return tl.load(p_tile, mask=(offs_d < dims)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def _at(in_prefix, prefix, own, PLACE: tl.constexpr):
    """What the loop reads where it has come to: the prefix's, the own keys', or either."""
    if PLACE == 1:
        return prefix
    elif PLACE == 2:
        return own
    else:
        return tl.where(in_prefix, prefix, own)


@triton.jit
def _descriptor_at(in_prefix, prefix, own, PLACE: tl.constexpr):
    if PLACE == 1:
        return prefix
    elif PLACE == 2:
        return own
    else:
        if in_prefix:  # noqa: SIM108 - Triton's conditional expression takes no descriptors, nor does tl.where
            chosen = prefix
        else:
            chosen = own
        return chosen


# Only what changes from call to call, so that a new length compiles nothing new.
@triton.jit(do_not_specialize=["window", "scale_block", "queries", "packed", "own", "pairs", "section", "bias_prefix"])
def _prefill(
    query, query_strides, key, key_strides, value, value_strides,
    prefix_key, prefix_key_strides, prefix_value, prefix_value_strides,
    out, lse, prefix_offsets, prefix_index, own_start, own_end, query_start,
    scale, window, softcap, sinks, bias, bias_strides,
    key_scale, key_scale_strides, value_scale, value_scale_strides, scale_block,
    queries, own, packed, pairs, section, bias_prefix,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, NEGATIVE: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """``pairs`` of a row and a key head, worked on ``section`` at a time (see heuristics.l2_section); within a section
    the last queries first, which see the most keys, and the query heads that share keys side by side."""
    blocks = tl.cdiv(queries, BLOCK_M)
    number = tl.program_id(0) // (section * GROUPS * blocks)
    rank = tl.program_id(0) % (section * GROUPS * blocks)
    width = tl.minimum(section, pairs - number * section) * GROUPS
    first = (blocks - 1 - rank // width) * BLOCK_M
    pair = number * section + rank % width // GROUPS
    row, kv_head = pair // KV_HEADS, pair % KV_HEADS
    q_head = kv_head * GROUPS + rank % width % GROUPS
    row64, kv_head64, q_head64 = row.to(tl.int64), kv_head.to(tl.int64), q_head.to(tl.int64)

    offs_m, offs_n = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_d, offs_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_q = _tile(
        query + row64 * query_strides[0] + q_head64 * query_strides[1],
        query_strides[2], query_strides[3], offs_m, offs_d, queries, HEAD_DIM, True, HEAD_DIM < BLOCK_D,
    )  # fmt: skip
    # Maxima are taken before the scale is applied, so the scale is positive.
    if NEGATIVE:
        b_q = -b_q

    # Which keys the tile's queries see, in each place: [lo, hi) by some, [all_lo, all_hi) by all.
    entry, length = row_prefix(row, prefix_offsets, prefix_index, packed)
    start, end, position = row_own(row, own_start, own_end, query_start, queries, own)
    nearest, farthest = position + first, position + tl.minimum(first + BLOCK_M, queries) - 1
    own_lo, own_all_lo, own_hi, own_all_hi = start, start, end, end
    prefix_lo, prefix_all_lo = 0, 0
    if CAUSAL:
        own_hi, own_all_hi = tl.minimum(end, farthest + 1), tl.minimum(end, nearest + 1)
    if window is not None:
        own_lo, own_all_lo = tl.maximum(start, nearest - window + 1), tl.maximum(start, farthest - window + 1)
        prefix_lo = tl.maximum(0, length - start + nearest - window + 1)
        prefix_all_lo = tl.maximum(0, length - start + farthest - window + 1)
    prefix_front, prefix_whole, prefix_count = _blocks(prefix_lo, prefix_all_lo, length, length, BLOCK_N)
    own_front, own_whole, own_count = _blocks(own_lo, own_all_lo, own_all_hi, own_hi, BLOCK_N)

    if not DESCRIPTORS:
        p_prefix_k = prefix_key + kv_head64 * prefix_key_strides[0] + entry.to(tl.int64) * prefix_key_strides[1]
        p_prefix_v = prefix_value + kv_head64 * prefix_value_strides[0] + entry.to(tl.int64) * prefix_value_strides[1]
        p_own_k = key + row64 * key_strides[0] + kv_head64 * key_strides[1]
        p_own_v = value + row64 * value_strides[0] + kv_head64 * value_strides[1]
    if bias is not None:
        p_bias = bias + row64 * bias_strides[0] + q_head64 * bias_strides[1]
        p_bias += (offs_m.to(tl.int64) * bias_strides[2])[:, None]  # [BLOCK_M, 1]

    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sinks is None:
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
    else:  # one more key, already seen, whose value is zero
        b_max = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + q_head).to(tl.float32) * LOG2E
        b_sum = tl.full([BLOCK_M], 1.0, tl.float32)

    # 0: both places, 1: the prefix, 2: own keys. An 8-bit prefix is another kind of memory than the own keys are: it
    # is walked before them and not in one loop.
    FIRST: tl.constexpr = 0 if key_scale is None else 1
    for PLACE in tl.static_range(FIRST, 2 * FIRST + 1):
        for EDGES in tl.static_range(2):
            prefix_steps = (prefix_count - prefix_whole if EDGES else prefix_whole) if PLACE != 2 else 0
            own_steps = (own_count - own_whole if EDGES else own_whole) if PLACE != 1 else 0
            for i in range(0, prefix_steps + own_steps):
                in_prefix = i < prefix_steps
                front = _at(in_prefix, prefix_front, own_front, PLACE)
                block = i - tl.where(in_prefix, 0, prefix_steps)
                if EDGES:
                    block += tl.where(block < front, 0, _at(in_prefix, prefix_whole, own_whole, PLACE))
                else:
                    block += front
                n = _at(in_prefix, prefix_lo, own_lo, PLACE) + block * BLOCK_N  # its first key
                keys = _at(in_prefix, length, own_hi, PLACE) - n

                if DESCRIPTORS:
                    # A copy engine reads the tile. What lies behind the keys seen is finite, and zero behind the last.
                    tile = [_at(in_prefix, 0, row, PLACE), kv_head, _at(in_prefix, entry, 0, PLACE) + n, 0]
                    b_k = _descriptor_at(in_prefix, prefix_key, key, PLACE).load(tile).reshape(BLOCK_N, BLOCK_D)
                else:
                    stride_k = _at(in_prefix, prefix_key_strides[1], key_strides[2], PLACE)
                    stride_d = _at(in_prefix, prefix_key_strides[2], key_strides[3], PLACE)
                    p_k = _at(in_prefix, p_prefix_k, p_own_k, PLACE) + n.to(tl.int64) * stride_k
                    b_k = _tile(p_k, stride_k, stride_d, offs_n, offs_d, keys, HEAD_DIM, EDGES, HEAD_DIM < BLOCK_D)
                b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

                # Scores in units of log 2. Where nothing else is done to them, the scale goes into the exponent.
                b_scale = scale * LOG2E
                if softcap is not None or bias is not None or PLACE == 1:
                    if PLACE == 1:
                        p_scale = (entry + n + offs_n) // scale_block
                        b_key_scale = tl.load(
                            key_scale + kv_head64 * key_scale_strides[0] + p_scale * key_scale_strides[1],
                            mask=offs_n < keys, other=0.0,
                        )  # fmt: skip
                        b_s *= b_key_scale[None, :]
                    b_s = capped(b_s * scale, softcap, softcap is not None) * LOG2E
                    if bias is not None:
                        columns = (n + offs_n + _at(in_prefix, 0, bias_prefix, PLACE)).to(tl.int64)[None, :]
                        seen = (offs_m < queries)[:, None] & (offs_n < keys)[None, :]
                        b_bias = tl.load(p_bias + columns * bias_strides[3], mask=seen, other=0.0)
                        b_s += b_bias.to(tl.float32) * LOG2E
                    b_scale = 1.0
                if EDGES:
                    # Counted as the place's keys are, from this block's first, a query stands here:
                    b_place = position + _at(in_prefix, length - start, 0, PLACE) + offs_m - n  # [BLOCK_M]
                    b_end = tl.full([BLOCK_M], 0, tl.int32) + keys
                    if CAUSAL:
                        b_end = tl.where(in_prefix, b_end, tl.minimum(b_end, b_place + 1))
                    seen = offs_n[None, :] < b_end[:, None]
                    if window is not None:
                        seen &= offs_n[None, :] > (b_place - window)[:, None]
                    b_s = tl.where(seen, b_s, float("-inf"))

                b_new = tl.maximum(b_max, tl.max(b_s, 1) * b_scale)
                b_pivot = b_new
                if EDGES or bias is not None:
                    # (-inf) - (-inf) would be NaN; against any finite pivot the weights are 0.
                    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp2(b_s * b_scale - b_pivot[:, None])
                b_shrink = tl.exp2(b_max - b_pivot)
                b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
                b_acc *= b_shrink[:, None]
                b_max = b_new

                if DESCRIPTORS:
                    b_v = _descriptor_at(in_prefix, prefix_value, value, PLACE).load(tile).reshape(BLOCK_N, BLOCK_DV)
                else:
                    stride_v = _at(in_prefix, prefix_value_strides[1], value_strides[2], PLACE)
                    stride_d = _at(in_prefix, prefix_value_strides[2], value_strides[3], PLACE)
                    p_v = _at(in_prefix, p_prefix_v, p_own_v, PLACE) + n.to(tl.int64) * stride_v
                    b_v = _tile(p_v, stride_v, stride_d, offs_n, offs_v, keys, V_DIM, EDGES, V_DIM < BLOCK_DV)
                if PLACE == 1:
                    b_value_scale = tl.load(
                        value_scale + kv_head64 * value_scale_strides[0] + p_scale * value_scale_strides[1],
                        mask=offs_n < keys, other=0.0,
                    )  # fmt: skip
                    if b_q.dtype == tl.float16:  # a weight times a small scale would leave its range
                        b_v = b_v.to(tl.float32) * b_value_scale[:, None]
                    else:
                        b_p *= b_value_scale[None, :]
                b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_acc, input_precision=PRECISION)

    # A query that saw nothing: zeros over 1, and lse = -inf.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_acc / b_sum[:, None]
    p_out = out + ((row64 * queries + offs_m) * (KV_HEADS * GROUPS) + q_head)[:, None] * V_DIM + offs_v[None, :]
    real = offs_m < queries
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=real[:, None] & (offs_v < V_DIM)[None, :])
    b_lse = (b_max + tl.log2(b_sum)) * LN2
    tl.store(lse + (row64 * (KV_HEADS * GROUPS) + q_head) * queries + offs_m, b_lse, mask=real)
