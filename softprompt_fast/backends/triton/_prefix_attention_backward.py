# SPDX-License-Identifier: Apache-2.0
"""Gradients of prefix_attention.

The weights are computed again from the LSE (FlashAttention, Dao et al., 2022): with ``p = exp(score - lse)`` and
``delta = grad_out . out - grad_lse``, the gradient of a score is ``p (grad_out . value - delta)``, whichever keys it
is with. So each kernel walks what its gradient is a sum over, and every sum has one order:

* ``_row_sums``: delta, and the LSE in the form the others want it. A query that does not exist or saw nothing has an
  infinite one, hence weights of zero: no other kernel asks again.
* ``_query_gradient``: a block of queries walks the row's prefix, then its own keys, as the forward does.
* ``_own_gradient``: a block of a row's own keys walks the queries of its group's heads that see it.
* ``_prefix_gradient``: a block of a prefix's entries walks the queries of *all rows that use it*, with the sum in
  registers: no copy a row of the gradient exists, and nothing is added atomically. Where such blocks are fewer than
  multiprocessors each block's rows are shared out, and ``_add_up`` adds the few partial sums
  (``heuristics.prefix_splits``). With several prefixes a block lies within one of them, and ``rows_by_prefix`` lists
  the rows by prefix beforehand: a program meets only rows that see its whole block, and masks no score.

dQ in a kernel of its own costs two more products for every five. Adding it up from the other kernels would take either
atomics, whose sums differ from run to run, or partial sums of dQ in memory, which cost more than those products.

Where keys are walked over, scores are held ``[queries, keys]``, where queries are, ``[keys, queries]``: the weights
are then the left operand of the product that sums over them, and no way through shared memory transposes them. Keys
outside a row's range need no mask where queries are walked over, for each key's gradient is a sum of its own: it is
dropped at the end. Queries count as the op's contract has it; where they are padding (outside ``[own_start,
own_end)``), what comes out is as unspecified as their output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_fast.backends.heuristics import prefix_splits
from softprompt_fast.backends.triton import _runtime, _tuning
from softprompt_fast.backends.triton._prefix_attention_common import (
    LOG2E,
    MAX_WINDOW,
    row_own,
    row_prefix,
    rows_by_prefix,
    tanh,
)
from softprompt_fast.backends.triton.merge_states import tuning_key

OP = "prefix_attention"
KERNELS = ("sums", "query", "own", "prefix")


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
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
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    batch, q_heads, queries, head_dim = query.shape
    (_, kv_heads, own, v_dim), packed, device = value.shape, prefix_key.shape[1], query.device
    prefix_offsets, prefix_index, own_start, own_end, query_start, sinks = _runtime.dense(
        prefix_offsets, prefix_index, own_start, own_end, query_start, sinks
    )
    if sliding_window is not None:
        sliding_window = min(sliding_window, MAX_WINDOW)
    whole = head_dim == _runtime.block(head_dim) and v_dim == _runtime.block(v_dim)
    plain = sliding_window is None and softcap is None and bias is None
    keys = tuning_keys(max(head_dim, v_dim), query.element_size(), whole, plain)
    sums_config, query_config, own_config, prefix_config = (
        _tuning.configuration(OP, f"backward_{kernel}", key, _runtime.places(device))
        for kernel, key in zip(KERNELS, keys, strict=True)
    )
    grad_query = query.new_empty(batch, queries, q_heads, head_dim).transpose(1, 2)
    grad_key, grad_value, grad_prefix_key, grad_prefix_value = (
        x.new_empty(x.shape) for x in (key, value, prefix_key, prefix_value)
    )

    # Queries are counted in whole blocks of every kernel, so that none masks what it loads of the row sums.
    longest_block = max(c["BLOCK_M"] for c in (sums_config, query_config, own_config, prefix_config))
    padded = triton.cdiv(queries, longest_block) * longest_block
    row_sums = query.new_empty(2, batch * q_heads, padded, dtype=torch.float32)  # the LSE in log 2, and delta
    sums_blocks = padded // sums_config["BLOCK_M"]
    sink_sums = None if sinks is None else query.new_empty(batch * sums_blocks, q_heads, dtype=torch.float32)
    _runtime.launch(
        _row_sums, (sums_blocks * batch * q_heads,),
        grad_out, grad_out.stride(), out, out.stride(), lse, lse.stride(),
        grad_lse, (0, 0, 0) if grad_lse is None else grad_lse.stride(), sinks,
        row_sums[0], row_sums[1], sink_sums, q_heads, queries, padded,
        V_DIM=v_dim, BLOCK_V=_runtime.block(v_dim), **sums_config,
    )  # fmt: skip
    grad_sinks = None
    if sinks is not None and sink_sums is not None:
        grad_sinks = torch.empty_like(sinks)
        _add_up_parts(sink_sums, grad_sinks)

    queries_side = (
        query, query.stride(), grad_out, grad_out.stride(), row_sums[0], row_sums[1],
        bias, (0, 0, 0, 0) if bias is None else _runtime.broadcast_strides(bias), own_start, own_end, query_start,
    )  # fmt: skip
    columns = 0 if bias is None else bias.shape[3] - own
    sizes = (batch, queries, own, packed, padded, columns)
    options = (scale, sliding_window, softcap)
    constants = {
        "HEAD_DIM": head_dim, "V_DIM": v_dim, "BLOCK_D": _runtime.block(head_dim), "BLOCK_V": _runtime.block(v_dim),
        "Q_HEADS": q_heads, "GROUPS": q_heads // kv_heads, "CAUSAL": causal,
        "PRECISION": _runtime.dot_precision(query.dtype),
    }  # fmt: skip
    _runtime.launch(
        _query_gradient, (triton.cdiv(queries, query_config["BLOCK_M"]) * batch * q_heads,),
        *queries_side, key, key.stride(), value, value.stride(),
        prefix_key, prefix_key.stride(), prefix_value, prefix_value.stride(), prefix_offsets, prefix_index,
        grad_query, grad_query.stride(), *sizes, *options, **constants, **query_config,
    )  # fmt: skip
    _runtime.launch(
        _own_gradient, (triton.cdiv(own, own_config["BLOCK_N"]) * batch * kv_heads,),
        *queries_side, key, key.stride(), value, value.stride(),
        grad_key, grad_key.stride(), grad_value, grad_value.stride(), *sizes, *options, **constants, **own_config,
    )  # fmt: skip
    if packed == 0:
        return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_sinks

    order = None if prefix_index is None else rows_by_prefix(prefix_index)
    # Blocks if prefixes are cut one by one: each, and what lies before the first and behind the last, may end in a
    # broken one.
    prefixes = 0 if prefix_offsets is None else prefix_offsets.shape[0] - 1
    whole = triton.cdiv(packed, prefix_config["BLOCK_N"])
    blocks = whole if prefix_offsets is None else whole + prefixes + 1
    splits = prefix_splits(whole * kv_heads, batch, _runtime.processors(device))
    parts_key, parts_value = grad_prefix_key[None], grad_prefix_value[None]
    if splits > 1:
        parts_key, parts_value = (
            x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (grad_prefix_key, grad_prefix_value)
        )
    _runtime.launch(
        _prefix_gradient, (blocks * kv_heads * splits,),
        *queries_side, prefix_key, prefix_key.stride(), prefix_value, prefix_value.stride(),
        prefix_offsets, prefix_index, order,
        parts_key, parts_key.stride(), parts_value, parts_value.stride(), prefixes, blocks, splits,
        *sizes, *options, **constants, **prefix_config,
    )  # fmt: skip
    if splits > 1:
        _add_up_parts(parts_key, grad_prefix_key)
        _add_up_parts(parts_value, grad_prefix_value)
    return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_sinks


def tuning_keys(head_dim: int, element_size: int, whole: bool, plain: bool) -> tuple[str, ...]:
    """A key for each of KERNELS. Windows, softcaps and biases take registers, and so do heads that fill no block (not
    ``whole``): their blocks have to be smaller.

    Example: heads of 128 in bfloat16 with a softcap: ``("d128-16bit", *3 * ("d128-16bit-options",))``.
    """
    key = tuning_key(head_dim, element_size)
    return (key, *3 * (key if whole and plain else f"{key}-options" if whole else f"{key}-odd",))


def _add_up_parts(parts: Tensor, total: Tensor) -> None:
    """``total = parts.sum(0)``, in an order that never changes; both dense."""
    count, size = parts.shape[0], total.numel()
    block, block_parts = (1024, 1) if size >= 1024 else (16, 64)
    _runtime.launch(
        _add_up, (triton.cdiv(size, block),), parts, total, count, size,
        BLOCK=block, BLOCK_PARTS=block_parts, num_warps=4,
    )  # fmt: skip


# Lengths never make a kernel compile anew: neither a value of 1 nor a multiple of 16 is told apart.
_LENGTHS = ["batch", "queries", "own", "packed", "bias_columns", "window", "prefixes", "blocks", "splits"]


@triton.jit
def _load(
    matrix, row, end, row_stride, column_stride,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [R] of a matrix, [R, BLOCK]: zeros beyond its columns and, where MASKED, from row ``end`` on."""
    column = tl.arange(0, BLOCK)[None, :]
    pointers = matrix + row[:, None].to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    if MASKED:
        mask = row[:, None] < end
        if COLUMNS != BLOCK:
            mask = mask & (column < COLUMNS)
        block = tl.load(pointers, mask=mask, other=0.0)
    elif COLUMNS != BLOCK:
        block = tl.load(pointers, mask=column < COLUMNS, other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def _store(matrix, row, end, row_stride, column_stride, block, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    pointers = matrix + row[:, None].to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    mask = (row[:, None] < end) & (column < COLUMNS)
    tl.store(pointers, block.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def _weights(b_dot, b_lse, b_bias, b_seen, scale, softcap):
    """Weights from products, and weights times the slope of the cap. None: no bias, nothing hidden, no softcap."""
    if softcap is not None:
        b_tanh = tanh(b_dot * (scale / softcap))
        b_score = b_tanh * (softcap * LOG2E)
    else:
        b_score = b_dot * (scale * LOG2E)
    if b_bias is not None:
        b_score += b_bias * LOG2E
    if b_seen is not None:
        b_score = tl.where(b_seen, b_score, float("-inf"))
    b_weight = tl.exp2(b_score - b_lse)
    b_slope = b_weight
    if softcap is not None:
        b_slope = b_weight * (1.0 - b_tanh * b_tanh)
    return b_weight, b_slope


@triton.jit(do_not_specialize=_LENGTHS)
def _row_sums(
    grad_out, grad_out_strides, out, out_strides, lse, lse_strides, grad_lse, grad_lse_strides, sinks,
    lse2, delta, sink_sums, q_heads, queries, padded,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """lse2 and delta, [B * Hq, padded]: +inf and 0 for a query that saw nothing, or is none."""
    blocks = padded // BLOCK_M
    block = tl.program_id(0) % blocks
    row_head = (tl.program_id(0) // blocks).to(tl.int64)
    row, head = row_head // q_heads, row_head % q_heads
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    b_grad_out = _load(
        grad_out + row * grad_out_strides[0] + head * grad_out_strides[1],
        query, queries, grad_out_strides[2], grad_out_strides[3], V_DIM, BLOCK_V, True,
    )  # fmt: skip
    b_out = _load(
        out + row * out_strides[0] + head * out_strides[1],
        query, queries, out_strides[2], out_strides[3], V_DIM, BLOCK_V, True,
    )  # fmt: skip
    b_delta = tl.sum(b_grad_out.to(tl.float32) * b_out.to(tl.float32), 1)  # [BLOCK_M]
    exists = query < queries
    query64 = query.to(tl.int64)
    p_lse = lse + row * lse_strides[0] + head * lse_strides[1] + query64 * lse_strides[2]
    b_lse = tl.load(p_lse, mask=exists, other=float("-inf"))
    if grad_lse is not None:
        p_grad_lse = grad_lse + row * grad_lse_strides[0] + head * grad_lse_strides[1] + query64 * grad_lse_strides[2]
        b_delta -= tl.load(p_grad_lse, mask=exists, other=0.0)
    empty = b_lse == float("-inf")
    b_lse2 = tl.where(empty, float("inf"), b_lse * LOG2E)
    b_delta = tl.where(empty, 0.0, b_delta)
    tl.store(lse2 + row_head * padded + query, b_lse2)
    tl.store(delta + row_head * padded + query, b_delta)
    if sinks is not None:
        # A sink's weight is exp(sink - lse), its value zero: only -delta is left of its score's gradient.
        # The difference first: its rounding is the smaller one.
        b_weight = tl.exp2((tl.load(sinks + head).to(tl.float32) - tl.where(empty, float("inf"), b_lse)) * LOG2E)
        tl.store(sink_sums + (row * blocks + block) * q_heads + head, -tl.sum(b_weight * b_delta, 0))


@triton.jit
def _walk_keys(
    b_grad_query, b_query, b_grad_out, b_lse, b_delta, query, queries, place,
    key, key_row, key_column, value, value_row, value_column, bias, bias_row, bias_column,
    begin, end, scale, window, softcap,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to a block of queries' gradient what keys [begin, end) of one matrix give. ``place [BLOCK_M]`` is where the
    queries stand among these keys. Not MASKED: whole blocks, all of which every query sees."""
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        b_key = _load(key, keys, end, key_row, key_column, HEAD_DIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        b_value = _load(value, keys, end, value_row, value_column, V_DIM, BLOCK_V, MASKED)  # [BLOCK_N, BLOCK_V]
        b_dot = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        b_bias = None
        if bias is not None:
            pointers = bias + query[:, None].to(tl.int64) * bias_row + keys[None, :].to(tl.int64) * bias_column
            b_bias = tl.load(pointers, mask=(query[:, None] < queries) & (keys[None, :] < end), other=0.0)
            b_bias = b_bias.to(tl.float32)
        b_seen = None
        if MASKED:
            b_seen = keys[None, :] < end
            if CAUSAL:
                b_seen = keys[None, :] <= tl.minimum(place, end - 1)[:, None]
            if window is not None:
                b_seen = b_seen & (keys[None, :] > place[:, None] - window)
        _, b_slope = _weights(b_dot, b_lse[:, None], b_bias, b_seen, scale, softcap)
        b_grad_weight = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION)
        b_grad_score = b_slope * (b_grad_weight - b_delta[:, None])
        b_grad_query = tl.dot(b_grad_score.to(b_key.dtype), b_key, b_grad_query, input_precision=PRECISION)
    return b_grad_query


@triton.jit(do_not_specialize=_LENGTHS)
def _query_gradient(
    query, query_strides, grad_out, grad_out_strides, lse2, delta, bias, bias_strides,
    own_start, own_end, query_start, key, key_strides, value, value_strides,
    prefix_key, prefix_key_strides, prefix_value, prefix_value_strides, prefix_offsets, prefix_index,
    grad_query, grad_query_strides,
    batch, queries, own, packed, padded, bias_columns, scale, window, softcap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    Q_HEADS: tl.constexpr, GROUPS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Programs side by side share a row's keys; the last queries of a row, which see the most, come first.
    blocks = tl.cdiv(queries, BLOCK_M)
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row_head = (tl.program_id(0) // blocks).to(tl.int64)
    row, head = row_head // Q_HEADS, row_head % Q_HEADS
    kv_head = head // GROUPS
    start, end, position = row_own(row, own_start, own_end, query_start, queries, own)
    first, length = row_prefix(row, prefix_offsets, prefix_index, packed)
    first_place = position + first_query  # of the block, among the own keys
    last_place = position + tl.minimum(first_query + BLOCK_M, queries) - 1

    m = first_query + tl.arange(0, BLOCK_M)
    b_query = _load(
        query + row * query_strides[0] + head * query_strides[1],
        m, queries, query_strides[2], query_strides[3], HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    b_grad_out = _load(
        grad_out + row * grad_out_strides[0] + head * grad_out_strides[1],
        m, queries, grad_out_strides[2], grad_out_strides[3], V_DIM, BLOCK_V, True,
    )  # fmt: skip
    b_lse = tl.load(lse2 + row_head * padded + m)
    b_delta = tl.load(delta + row_head * padded + m)
    p_bias, p_bias_own = None, None
    if bias is not None:
        p_bias = bias + row * bias_strides[0] + head * bias_strides[1]
        p_bias_own = p_bias + tl.cast(bias_columns, tl.int64) * bias_strides[3]
    b_grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # The prefix: [begin, middle) in whole blocks that all see, then up to its length.
    p_key = prefix_key + kv_head * prefix_key_strides[0] + tl.cast(first, tl.int64) * prefix_key_strides[1]
    p_value = prefix_value + kv_head * prefix_value_strides[0] + tl.cast(first, tl.int64) * prefix_value_strides[1]
    place = length - start + position + m  # among "prefix, then own tokens from own_start"
    begin = 0
    middle = length // BLOCK_N * BLOCK_N
    if window is not None:
        begin = tl.maximum(length - start + first_place - window + 1, 0)
        middle = begin
    else:
        b_grad_query = _walk_keys(
            b_grad_query, b_query, b_grad_out, b_lse, b_delta, m, queries, place,
            p_key, prefix_key_strides[1], prefix_key_strides[2],
            p_value, prefix_value_strides[1], prefix_value_strides[2], p_bias, bias_strides[2], bias_strides[3],
            begin, middle, scale, window, softcap,
            False, False, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
        )  # fmt: skip
    b_grad_query = _walk_keys(
        b_grad_query, b_query, b_grad_out, b_lse, b_delta, m, queries, place,
        p_key, prefix_key_strides[1], prefix_key_strides[2],
        p_value, prefix_value_strides[1], prefix_value_strides[2], p_bias, bias_strides[2], bias_strides[3],
        middle, length, scale, window, softcap,
        False, True, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip

    # The row's own keys. Masked throughout: that is one comparison a score, and a loop less to compile.
    p_key = key + row * key_strides[0] + kv_head * key_strides[1]
    p_value = value + row * value_strides[0] + kv_head * value_strides[1]
    if CAUSAL:
        end = tl.minimum(end, last_place + 1)
    if window is not None:
        start = tl.maximum(start, first_place - window + 1)
    b_grad_query = _walk_keys(
        b_grad_query, b_query, b_grad_out, b_lse, b_delta, m, queries, position + m,
        p_key, key_strides[2], key_strides[3], p_value, value_strides[2], value_strides[3],
        p_bias_own, bias_strides[2], bias_strides[3], start, end, scale, window, softcap,
        CAUSAL, True, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip
    _store(
        grad_query + row * grad_query_strides[0] + head * grad_query_strides[1],
        m, queries, grad_query_strides[2], grad_query_strides[3], b_grad_query * scale, HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _walk_queries(
    b_grad_key, b_grad_value, b_key, b_value, keys, key_end,
    query, query_strides, grad_out, grad_out_strides, lse2, delta, bias, bias_strides, bias_column,
    order, first_row, rows, kv_head, first_block, last_block, first_place, queries, padded, scale, window, softcap,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, Q_HEADS: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to a block of keys' gradients what query blocks [first_block, last_block) of every head of the group, of
    ``rows`` rows, give: one loop over all of them, so that the loads of a row's last step and of the next row's first
    overlap. ``first_place`` is where the (one) row's first query stands among these keys; not MASKED: all queries see
    them."""
    place, head, block = first_row, kv_head * GROUPS, first_block
    row = place
    if order is not None:
        row = tl.load(order + place, mask=rows > 0, other=0)
    for _ in range(0, rows * GROUPS * tl.maximum(last_block - first_block, 0)):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row64, head64 = tl.cast(row, tl.int64), tl.cast(head, tl.int64)
        b_query = _load(
            query + row64 * query_strides[0] + head64 * query_strides[1],
            m, queries, query_strides[2], query_strides[3], HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip
        b_grad_out = _load(
            grad_out + row64 * grad_out_strides[0] + head64 * grad_out_strides[1],
            m, queries, grad_out_strides[2], grad_out_strides[3], V_DIM, BLOCK_V, True,
        )  # fmt: skip
        b_dot = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        b_bias = None
        if bias is not None:
            pointers = (
                bias + row64 * bias_strides[0] + head64 * bias_strides[1] + m[None, :].to(tl.int64) * bias_strides[2]
                + (bias_column + keys[:, None]).to(tl.int64) * bias_strides[3]
            )  # fmt: skip
            b_bias = tl.load(pointers, mask=(m[None, :] < queries) & (keys[:, None] < key_end), other=0.0)
            b_bias = b_bias.to(tl.float32)
        b_seen = None
        if MASKED:
            ahead = keys[:, None] - (first_place + m)[None, :]
            if CAUSAL:
                b_seen = ahead <= 0
            if window is not None:
                near = ahead > -window
                b_seen = b_seen & near if CAUSAL else near
        # Loaded, used and done with one after the other: a thread has a value of the LSE and of delta for each of its
        # columns, and no registers for both.
        b_lse = tl.load(lse2 + (row64 * Q_HEADS + head) * padded + m)
        b_weight, b_slope = _weights(b_dot, b_lse[None, :], b_bias, b_seen, scale, softcap)
        b_grad_value = tl.dot(b_weight.to(b_grad_out.dtype), b_grad_out, b_grad_value, input_precision=PRECISION)
        b_grad_weight = tl.dot(b_value, tl.trans(b_grad_out), input_precision=PRECISION)
        b_delta = tl.load(delta + (row64 * Q_HEADS + head) * padded + m)
        b_grad_score = b_slope * (b_grad_weight - b_delta[None, :])
        b_grad_key = tl.dot(b_grad_score.to(b_query.dtype), b_query, b_grad_key, input_precision=PRECISION)
        block += 1
        head += tl.where(block == last_block, 1, 0)
        block = tl.where(block == last_block, first_block, block)
        place += tl.where(head == (kv_head + 1) * GROUPS, 1, 0)
        head = tl.where(head == (kv_head + 1) * GROUPS, kv_head * GROUPS, head)
        row = place
        if order is not None:
            # A step ahead: an address loaded where it is used would take a stage of the pipeline.
            row = tl.load(order + place, mask=place < first_row + rows, other=0)
    return b_grad_key, b_grad_value


@triton.jit(do_not_specialize=_LENGTHS)
def _own_gradient(
    query, query_strides, grad_out, grad_out_strides, lse2, delta, bias, bias_strides,
    own_start, own_end, query_start, key, key_strides, value, value_strides,
    grad_key, grad_key_strides, grad_value, grad_value_strides,
    batch, queries, own, packed, padded, bias_columns, scale, window, softcap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    Q_HEADS: tl.constexpr, GROUPS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Programs side by side share a row's queries; its first keys, which the most queries see, come first.
    key_blocks = tl.cdiv(own, BLOCK_N)
    first_key = tl.program_id(0) % key_blocks * BLOCK_N
    kv_heads = Q_HEADS // GROUPS
    row_head = tl.program_id(0) // key_blocks
    row, kv_head = row_head // kv_heads, row_head % kv_heads
    row64, kv_head64 = row.to(tl.int64), kv_head.to(tl.int64)
    start, end, position = row_own(row, own_start, own_end, query_start, queries, own)

    n = first_key + tl.arange(0, BLOCK_N)
    p_key = key + row64 * key_strides[0] + kv_head64 * key_strides[1]
    p_value = value + row64 * value_strides[0] + kv_head64 * value_strides[1]
    b_key = _load(p_key, n, own, key_strides[2], key_strides[3], HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    b_value = _load(p_value, n, own, value_strides[2], value_strides[3], V_DIM, BLOCK_V, True)  # [BLOCK_N, BLOCK_V]
    b_grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    # Queries [first_query, last_query) see some of the block's visible keys [first_seen, last_seen].
    first_seen, last_seen = tl.maximum(first_key, start), tl.minimum(first_key + BLOCK_N, end) - 1
    first_query, last_query = 0, queries
    if CAUSAL:
        first_query = tl.maximum(first_seen - position, 0)
    if window is not None:
        last_query = tl.minimum(queries, tl.maximum(last_seen + window - position, 0))
    first_block, last_block = first_query // BLOCK_M, tl.cdiv(last_query, BLOCK_M)
    if first_seen > last_seen:
        last_block = first_block
    b_grad_key, b_grad_value = _walk_queries(
        b_grad_key, b_grad_value, b_key, b_value, n, own,
        query, query_strides, grad_out, grad_out_strides, lse2, delta, bias, bias_strides, bias_columns,
        None, row, 1, kv_head, first_block, last_block, position, queries, padded, scale, window, softcap,
        CAUSAL, CAUSAL, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_M, Q_HEADS, GROUPS, PRECISION,
    )  # fmt: skip
    seen = ((n >= start) & (n < end))[:, None]
    b_grad_key = tl.where(seen, b_grad_key * scale, 0.0)
    b_grad_value = tl.where(seen, b_grad_value, 0.0)
    p_grad_key = grad_key + row64 * grad_key_strides[0] + kv_head64 * grad_key_strides[1]
    p_grad_value = grad_value + row64 * grad_value_strides[0] + kv_head64 * grad_value_strides[1]
    _store(p_grad_key, n, own, grad_key_strides[2], grad_key_strides[3], b_grad_key, HEAD_DIM, BLOCK_D)
    _store(p_grad_value, n, own, grad_value_strides[2], grad_value_strides[3], b_grad_value, V_DIM, BLOCK_V)


@triton.jit
def _block_of_pack(index, prefix_offsets, prefixes, packed, BLOCK_N: tl.constexpr):
    """Where the index-th block lies if every prefix, and the unused entries at both ends of the pack, are cut into
    blocks one by one: (prefix or -1, first entry of it in the pack, its length, first entry of the block in it). A
    length of 0: there are fewer blocks."""
    prefix, first, length, entry = 0, 0, packed, index * BLOCK_N
    if prefix_offsets is not None:
        prefix, length, before = -1, 0, 0
        for chunk in range(0, prefixes + 2, 128):
            piece = chunk + tl.arange(0, 128)  # 0: what lies before the first prefix
            exists = piece < prefixes + 2
            p_offset = prefix_offsets + piece
            b_first = tl.load(p_offset - 1, mask=exists & (piece > 0), other=0).to(tl.int32)
            b_end = tl.load(p_offset, mask=piece <= prefixes, other=packed).to(tl.int32)
            b_length = tl.where(exists, b_end - b_first, 0)
            b_blocks = tl.cdiv(b_length, BLOCK_N)
            b_before = before + tl.cumsum(b_blocks, 0) - b_blocks
            here = (b_before <= index) & (index < b_before + b_blocks)  # of one piece at most
            prefix += tl.sum(tl.where(here & (piece <= prefixes), piece, 0), 0)
            first += tl.sum(tl.where(here, b_first, 0), 0)
            length += tl.sum(tl.where(here, b_length, 0), 0)
            entry -= tl.sum(tl.where(here, b_before, 0), 0) * BLOCK_N
            before += tl.sum(b_blocks, 0)
    return prefix, first, length, entry


@triton.jit
def _rows_of_prefix(prefix, prefix_index, batch):
    """A prefix's rows among all rows sorted by prefix: (place of the first, number of them)."""
    first, count = 0, batch
    if prefix_index is not None:
        count = 0
        for chunk in range(0, batch, 128):
            row = chunk + tl.arange(0, 128)
            exists = row < batch
            b_prefix = tl.load(prefix_index + row, mask=exists, other=0).to(tl.int32)
            first += tl.sum((exists & (b_prefix < prefix)).to(tl.int32), 0)
            count += tl.sum((exists & (b_prefix == prefix)).to(tl.int32), 0)
        count = tl.where(prefix < 0, 0, count)
    else:
        count = tl.where(prefix == 0, batch, 0)
    return first, count


@triton.jit(do_not_specialize=_LENGTHS)
def _prefix_gradient(
    query, query_strides, grad_out, grad_out_strides, lse2, delta, bias, bias_strides,
    own_start, own_end, query_start, key, key_strides, value, value_strides, prefix_offsets, prefix_index, order,
    grad_key, grad_key_strides, grad_value, grad_value_strides, prefixes, blocks, splits,
    batch, queries, own, packed, padded, bias_columns, scale, window, softcap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    Q_HEADS: tl.constexpr, GROUPS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The split-th part of the gradients, [splits, Hkv, L, ...]."""
    kv_heads = Q_HEADS // GROUPS
    kv_head = tl.program_id(0) // blocks % kv_heads
    split = tl.program_id(0) // blocks // kv_heads
    prefix, first, length, first_entry = _block_of_pack(
        tl.program_id(0) % blocks, prefix_offsets, prefixes, packed, BLOCK_N
    )
    first_row, count = _rows_of_prefix(prefix, prefix_index, batch)
    begin, end = count * split // splits, count * (split + 1) // splits

    n = first_entry + tl.arange(0, BLOCK_N)
    first64, kv_head64 = tl.cast(first, tl.int64), kv_head.to(tl.int64)
    p_key = key + kv_head64 * key_strides[0] + first64 * key_strides[1]
    p_value = value + kv_head64 * value_strides[0] + first64 * value_strides[1]
    b_key = _load(p_key, n, length, key_strides[1], key_strides[2], HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    b_value = _load(p_value, n, length, value_strides[1], value_strides[2], V_DIM, BLOCK_V, True)
    b_grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if window is None:
        b_grad_key, b_grad_value = _walk_queries(
            b_grad_key, b_grad_value, b_key, b_value, n, length,
            query, query_strides, grad_out, grad_out_strides, lse2, delta, bias, bias_strides, 0,
            order, first_row + begin, end - begin, kv_head, 0, tl.cdiv(queries, BLOCK_M), 0,
            queries, padded, scale, window, softcap,
            False, False, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_M, Q_HEADS, GROUPS, PRECISION,
        )  # fmt: skip
    else:
        # Each row has a window of its own.
        for place in range(first_row + begin, first_row + end):
            row = place
            if order is not None:
                row = tl.load(order + place)
            start, _, position = row_own(row, own_start, own_end, query_start, queries, own)
            first_place = length - start + position
            last_query = tl.minimum(first_entry + BLOCK_N, length) - 1 + window - first_place
            last_query = tl.minimum(tl.maximum(last_query, 0), queries)
            b_grad_key, b_grad_value = _walk_queries(
                b_grad_key, b_grad_value, b_key, b_value, n, length,
                query, query_strides, grad_out, grad_out_strides, lse2, delta, bias, bias_strides, 0,
                None, row, 1, kv_head, 0, tl.cdiv(last_query, BLOCK_M), first_place,
                queries, padded, scale, window, softcap,
                False, True, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_M, Q_HEADS, GROUPS, PRECISION,
            )  # fmt: skip
    split64 = split.to(tl.int64)
    p_grad_key = grad_key + split64 * grad_key_strides[0] + kv_head64 * grad_key_strides[1]
    p_grad_value = grad_value + split64 * grad_value_strides[0] + kv_head64 * grad_value_strides[1]
    p_grad_key += first64 * grad_key_strides[2]
    p_grad_value += first64 * grad_value_strides[2]
    _store(p_grad_key, n, length, grad_key_strides[2], grad_key_strides[3], b_grad_key * scale, HEAD_DIM, BLOCK_D)
    _store(p_grad_value, n, length, grad_value_strides[2], grad_value_strides[3], b_grad_value, V_DIM, BLOCK_V)


@triton.jit(do_not_specialize=["count", "size"])
def _add_up(parts, total, count, size, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Each element's sum over ``parts [count, size]``."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        mask = (part < count) & (element < size)
        b_sum += tl.sum(tl.load(parts + part.to(tl.int64) * size + element, mask=mask, other=0.0), 0)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + element, b_sum.to(total.dtype.element_ty), mask=element < size)
