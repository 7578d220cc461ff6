# SPDX-License-Identifier: Apache-2.0
"""prefix_attention for few queries a row: those of all rows stacked against the one prefix, and keys split.

Two launches. ``_decode`` has two kinds of program in one grid, so that one kind's arithmetic runs beside the other
kind's loads:

* a prefix program takes BLOCK_M stacked queries of a key/value head (those of all grouped heads and of all rows)
  against a share of the prefix. The prefix is read once for BLOCK_M queries and not once a row, and its products are
  as tall as tensor cores want them. They come first in the grid, for they take longest.
* an own program takes one row's queries of a key/value head (its G heads share every key they load) against a share
  of the row's own keys.

Each writes its normalised share of the result in float32, and its LSE, to a workspace that stays in L2: a few
partials a query. ``_combine`` merges a query's partials, and its sink, as merge_states would. Without a prefix, and
with own keys that need no split, ``_decode`` writes the result itself and nothing is merged.

What a query sees is an interval of its row's prefix and an interval of its own keys, whatever the options: so a
program carries two vectors, and a block of keys that lies in all intervals needs no mask. Where a share of the keys
begins and ends is worked out on the device from the row's geometry: with a static cache shares follow the filled part
and not the capacity, and a program beyond it has nothing to do. The number of shares is the host's choice
(:func:`splits`), from shapes and, where it knows that, the longest prefix's length.

Many prefixes: ``rows_by_prefix`` ranks the rows by prefix, on the device. A tile takes consecutive queries in that
order and walks each prefix that one of them uses, with the others masked: N prefixes cost at most N - 1 more walks of
a share, and no row is padded. A batch that fits one tile needs no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_fast.backends.triton import _runtime, _tuning
from softprompt_fast.backends.triton._prefix_attention_common import (
    LN2,
    LOG2E,
    MAX_WINDOW,
    capped,
    row_own,
    row_prefix,
    rows_by_prefix,
)

OP = "prefix_attention"
MAX_SPLITS = 64  # of the prefix, and of the own keys; _combine holds the LSEs of both in registers
MAX_PARTIALS = tl.constexpr(2 * MAX_SPLITS)
NO_PREFIX = tl.constexpr(2**31 - 1)


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
    max_prefix_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    batch, q_heads, queries, head_dim = query.shape
    kv_heads, own, v_dim = value.shape[1:]
    packed = prefix_key.shape[1]
    groups = q_heads // kv_heads
    out = query.new_empty(batch, queries, q_heads, v_dim).transpose(1, 2)
    lse = query.new_empty(batch, q_heads, queries, dtype=torch.float32)
    if query.numel() == 0:
        return out, lse

    prefix_offsets, prefix_index, own_start, own_end, query_start = _runtime.dense(
        prefix_offsets, prefix_index, own_start, own_end, query_start
    )
    places = _runtime.places(query.device)
    prefixes = 1 if prefix_offsets is None else max(1, prefix_offsets.shape[0] - 1)
    stacked = batch * groups * queries
    plain = prefix_index is None and prefix_key_scale is None and softcap is None and bias is None
    plain = plain and {head_dim, v_dim} == {_runtime.block(max(head_dim, v_dim))}
    used = prefixes_in_use(prefixes, batch, packed, max_prefix_length)
    key_of_config = tuning_key(head_dim, v_dim, query.element_size(), stacked // used, plain)
    config = dict(_tuning.configuration(OP, "decode", key_of_config, places))
    if torch.version.hip is not None:
        config.pop("maxnreg", None)  # not an option there
    block_own = own_rows(groups * queries, config["BLOCK_M"])
    prefix_tiles, own_tiles = triton.cdiv(stacked, config["BLOCK_M"]), triton.cdiv(groups * queries, block_own)
    least, processors = config.pop("MIN_KEYS"), _runtime.processors(query.device)
    prefix_splits = splits(
        prefix_tiles * kv_heads,
        prefix_keys(packed, prefixes, max_prefix_length),
        config.pop("PREFIX_PROGRAMS") * processors,
        least,
    )
    own_splits = splits(batch * own_tiles * kv_heads, own, config.pop("OWN_PROGRAMS") * processors, least)

    order = None
    if prefix_index is not None and prefix_tiles > 1 and packed > 0:
        order = rows_by_prefix(prefix_index)

    # Own keys alone, not split, give the result itself. Else states go to a workspace [Hkv, B, G, S, partials, Dv].
    single = prefix_splits == 0 and own_splits == 1
    rows, partials = batch * q_heads * queries, prefix_splits + own_splits
    states, state_lse = out, lse
    if not single:
        states = query.new_empty(rows, partials, v_dim, dtype=torch.float32)
        state_lse = query.new_empty(rows, partials, dtype=torch.float32)
    index = (prefix_offsets, prefix_index, order, own_start, own_end, query_start)
    _runtime.launch(
        _decode, (prefix_tiles * kv_heads * prefix_splits + batch * own_tiles * kv_heads * own_splits,),
        query, query.stride(), key, key.stride(), value, value.stride(),
        prefix_key, prefix_key.stride(), prefix_value, prefix_value.stride(),
        prefix_key_scale, None if prefix_key_scale is None else prefix_key_scale.stride(),
        prefix_value_scale, None if prefix_value_scale is None else prefix_value_scale.stride(), prefix_scale_block,
        *index, sinks if single else None, sinks.stride(0) if single and sinks is not None else None,
        bias, None if bias is None else _runtime.broadcast_strides(bias), 0 if bias is None else bias.shape[3] - own,
        states, state_lse, partials, out.stride(),
        batch, kv_heads, queries, own, packed, scale, softcap,
        0 if sliding_window is None else min(sliding_window, MAX_WINDOW),
        prefix_tiles, prefix_splits, own_tiles, own_splits,
        GROUPS=groups, HEAD_DIM=head_dim, V_DIM=v_dim, BLOCK_D=_runtime.block(head_dim), BLOCK_V=_runtime.block(v_dim),
        CAUSAL=causal, WINDOW=sliding_window is not None, SCALE_LAST=softcap is None and bias is None and scale > 0,
        PARTIAL=not single, PRECISION=_runtime.dot_precision(query.dtype), BLOCK_OWN=block_own, **config,
    )  # fmt: skip
    if not single:
        config = _tuning.configuration(OP, "combine", f"d{_runtime.block(v_dim)}", places)
        _runtime.launch(
            _combine, (triton.cdiv(rows, config["BLOCK_ROWS"]),),
            states, state_lse, partials, sinks, None if sinks is None else sinks.stride(0),
            out, out.stride(), lse, rows, batch, queries,
            GROUPS=groups, V_DIM=v_dim, BLOCK_V=_runtime.block(v_dim), **config,
        )  # fmt: skip
    return out, lse


def tuning_key(head_dim: int, v_dim: int, element_size: int, stacked: int, plain: bool) -> str:
    """``stacked``: queries of a key/value head that share a prefix, over all rows. ``plain``: one prefix in
    the queries' dtype, no softcap, no bias, and heads that fill their blocks; the others need more registers, so
    smaller tiles.

    Example: 64 rows with one prefix, 4 grouped heads of 128 in bfloat16: 256 queries are tuned as "d128-16bit-m128",
    and as "d128-16bit-m128-general" where each row has a prefix of its choice.
    """
    rows = min(128, _runtime.block(stacked))
    return f"d{_runtime.block(max(head_dim, v_dim))}-{8 * element_size}bit-m{rows}{'' if plain else '-general'}"


def own_rows(queries: int, block: int) -> int:
    """Queries in a tile of an own program, for a row that has ``queries`` of them on a key/value head.

    At least 16, the least a product takes; at most a prefix tile's, whose registers are known to suffice.

    Example: 4 grouped heads, one token each: 16. 4 grouped heads of 8 tokens: 32, if ``block`` is 32 or more.
    """
    return min(block, _runtime.block(queries))


def splits(programs: int, keys: int, wanted: int, least: int) -> int:
    """Into how many shares the keys of ``programs`` programs are split, so that there are ``wanted`` of them.

    Each share costs a partial result that is written and read again, so it gets at least ``least`` keys, and no more
    shares are made than there are multiprocessors to run them side by side.

    Example: 64 rows of 4 grouped heads on 8 key/value heads: 2 tiles of 128 queries on each head, 16 programs. 132
    multiprocessors and 8192 prefix entries: ``132 // 16 = 8`` shares of 1024; 1024 entries, at least 256 each: 4. The
    512 own programs (64 rows, 8 heads) are not split.
    """
    if keys == 0:
        return 0
    return max(1, min(wanted // programs, triton.cdiv(keys, least), MAX_SPLITS))


def prefix_keys(packed: int, prefixes: int, longest: int | None) -> int:
    """Keys by which the shares of a prefix are counted, out of ``packed`` entries: a hint may be wrong, and then costs
    time only, so no prefix is left out for it.

    Args:
        longest: of the batch's prefixes, where the host knows; None: their mean, which in an arena counts free room.

    Example: 2 prefixes of 100 and 60 in an arena of 4096 entries, 4 places with the gaps: 100, and 1024 unknown.
    """
    if longest is None:
        return triton.cdiv(packed, prefixes)
    return min(packed, max(longest, 1))


def prefixes_in_use(places: int, batch: int, packed: int, longest: int | None) -> int:
    """Among how many prefixes the rows are shared out, as far as sizes tell. Rows name at most one each, and more
    entries than that many of the longest have are an arena's, of whose places every other one is a gap.

    Example: 63 places of 8192 entries, the longest prefix in use of 100, 256 rows: 32. With 3 rows 3, and of 6000
    entries, which they may fill, 63.
    """
    if longest is not None and packed > places * longest:
        places = (places + 1) // 2
    return max(1, min(places, batch))


# Lengths, batch sizes and what follows from them: not worth a kernel of their own.
_VARYING = (
    "batch", "queries", "own", "packed", "window", "prefix_tiles", "prefix_splits", "own_tiles", "own_splits",
    "bias_strides", "bias_width", "partials", "kv_heads", "key_scale_strides", "value_scale_strides",
    "scale_block", "sinks_stride",
)  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _decode(
    query, query_strides, key, key_strides, value, value_strides,
    prefix_key, prefix_key_strides, prefix_value, prefix_value_strides,
    key_scale, key_scale_strides, value_scale, value_scale_strides, scale_block,
    prefix_offsets, prefix_index, order, own_start, own_end, query_start,
    sinks, sinks_stride, bias, bias_strides, bias_width,
    states, state_lse, partials, out_strides,
    batch, kv_heads, queries, own, packed, scale, softcap, window,
    prefix_tiles, prefix_splits, own_tiles, own_splits,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SCALE_LAST: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    prefix_programs = prefix_tiles * kv_heads * prefix_splits
    if program < prefix_programs:
        if PARTIAL:
            _attend_prefix(
                program, query, query_strides, prefix_key, prefix_key_strides, prefix_value, prefix_value_strides,
                key_scale, key_scale_strides, value_scale, value_scale_strides, scale_block,
                prefix_offsets, prefix_index, order, own_start, own_end, query_start, bias, bias_strides,
                states, state_lse, partials, batch, kv_heads, queries, own, packed, scale, softcap, window,
                prefix_tiles, prefix_splits, GROUPS, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, WINDOW, SCALE_LAST, PRECISION,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        _attend_own(
            program - prefix_programs, query, query_strides, key, key_strides, value, value_strides,
            own_start, own_end, query_start, sinks, sinks_stride, bias, bias_strides, bias_width,
            states, state_lse, partials, out_strides, batch, kv_heads, queries, own, scale, softcap, window,
            prefix_splits, own_tiles, own_splits, GROUPS, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, CAUSAL, WINDOW,
            SCALE_LAST, PARTIAL, PRECISION, BLOCK_OWN, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _attend_prefix(
    program, query, query_strides, prefix_key, prefix_key_strides, prefix_value, prefix_value_strides,
    key_scale, key_scale_strides, value_scale, value_scale_strides, scale_block,
    prefix_offsets, prefix_index, order, own_start, own_end, query_start, bias, bias_strides,
    states, state_lse, partials, batch, kv_heads, queries, own, packed, scale, softcap, window,
    prefix_tiles, prefix_splits,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WINDOW: tl.constexpr, SCALE_LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of stacked queries against a share of the prefix, or of each prefix that occurs in the tile."""
    per_row = GROUPS * queries
    # Tiles that read the same keys stand next to one another: what one loads, the next finds in L2.
    tile = program % prefix_tiles
    kv_head = program // prefix_tiles % kv_heads
    split = program // prefix_tiles // kv_heads
    b_stack = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Beyond the last query the last one stands again: no load needs a mask for it, and it is not written.
    b_stack = tl.minimum(b_stack, batch * per_row - 1)
    b_row = b_stack // per_row
    if order is not None:
        b_row = tl.load(order + b_row)
    b_head, b_i = kv_head * GROUPS + b_stack % per_row // queries, b_stack % queries
    b_q = _load_queries(query, query_strides, b_row, b_head, b_i, HEAD_DIM, BLOCK_D)
    p_bias = None
    if bias is not None:
        p_bias = _bias_rows(bias, bias_strides, b_row, b_head, b_i)
    b_first, b_length = row_prefix(b_row, prefix_offsets, prefix_index, packed)
    b_length = b_length + tl.zeros_like(b_row)
    b_low = tl.zeros_like(b_row)
    if WINDOW:
        start, _, position = row_own(b_row, own_start, own_end, query_start, queries, own)
        b_low = tl.maximum(b_low, b_length + position + b_i - start - window + 1)
    head = kv_head.to(tl.int64)
    p_key, p_value = prefix_key + head * prefix_key_strides[0], prefix_value + head * prefix_value_strides[0]
    p_key_scale, p_value_scale = key_scale, value_scale
    if key_scale is not None:
        p_key_scale, p_value_scale = (
            key_scale + head * key_scale_strides[0],
            value_scale + head * value_scale_strides[0],
        )
    b_acc, b_top, b_sum = _empty_state(BLOCK_M, BLOCK_V)
    if prefix_index is None:
        first = 0
        if prefix_offsets is not None:
            first = tl.load(prefix_offsets).to(tl.int32)
        b_acc, b_top, b_sum = _walk_share(
            b_acc, b_top, b_sum, b_q, b_low, b_length, split, prefix_splits,
            p_key, prefix_key_strides[1], prefix_key_strides[2],
            p_value, prefix_value_strides[1], prefix_value_strides[2],
            p_key_scale, key_scale_strides, p_value_scale, value_scale_strides, scale_block, first,
            p_bias, bias_strides, scale, softcap,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, not WINDOW, SCALE_LAST, PRECISION,
        )  # fmt: skip
    else:
        # A row without a prefix stands for one beyond all, which is never reached.
        b_prefix = tl.load(prefix_index + b_row).to(tl.int32)
        b_prefix = tl.where(b_prefix < 0, NO_PREFIX, b_prefix)
        prefix = tl.min(b_prefix, 0)
        while prefix < NO_PREFIX:
            b_mine = b_prefix == prefix
            b_near = tl.where(b_mine, b_low, NO_PREFIX) if WINDOW else b_low
            b_acc, b_top, b_sum = _walk_share(
                b_acc, b_top, b_sum, b_q, b_near, tl.where(b_mine, b_length, 0), split, prefix_splits,
                p_key, prefix_key_strides[1], prefix_key_strides[2],
                p_value, prefix_value_strides[1], prefix_value_strides[2],
                p_key_scale, key_scale_strides, p_value_scale, value_scale_strides, scale_block,
                tl.max(tl.where(b_mine, b_first, 0), 0),
                p_bias, bias_strides, scale, softcap,
                HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, not WINDOW, SCALE_LAST, PRECISION,
            )  # fmt: skip
            prefix = tl.min(tl.where(b_prefix > prefix, b_prefix, NO_PREFIX), 0)
    # Where the states go is worked out from the tile again: kept from above it would hold registers all along.
    b_at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    b_exists = b_at < batch * per_row
    if order is not None:
        b_at = tl.load(order + b_at // per_row, mask=b_exists, other=0) * per_row + b_at % per_row
    b_at = head * batch * per_row + b_at
    _store_states(b_acc, b_top, b_sum, states, state_lse, b_at, split, partials, b_exists, V_DIM, BLOCK_V)


@triton.jit
def _attend_own(
    program, query, query_strides, key, key_strides, value, value_strides,
    own_start, own_end, query_start, sinks, sinks_stride, bias, bias_strides, bias_width,
    states, state_lse, partials, out_strides, batch, kv_heads, queries, own, scale, softcap, window,
    prefix_splits, own_tiles, own_splits,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SCALE_LAST: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row's queries of one key/value head against a share of the row's own keys."""
    per_row = GROUPS * queries
    split = program % own_splits
    tile = program // own_splits % own_tiles
    kv_head = program // own_splits // own_tiles % kv_heads
    row = program // own_splits // own_tiles // kv_heads
    b_stack = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    b_exists = b_stack < per_row
    b_stack = tl.minimum(b_stack, per_row - 1)
    b_head, b_i = kv_head * GROUPS + b_stack // queries, b_stack % queries
    b_row = tl.zeros_like(b_i) + row
    b_q = _load_queries(query, query_strides, b_row, b_head, b_i, HEAD_DIM, BLOCK_D)
    p_bias = None
    if bias is not None:
        p_bias = _bias_rows(bias, bias_strides, b_row, b_head, b_i) + tl.cast(bias_width, tl.int64) * bias_strides[3]
    start, end, position = row_own(row, own_start, own_end, query_start, queries, own)
    b_low, b_high = tl.zeros_like(b_i) + start, tl.zeros_like(b_i) + end
    if CAUSAL:
        b_high = tl.minimum(b_high, position + b_i + 1)
    if WINDOW:
        b_low = tl.maximum(b_low, position + b_i - window + 1)
    p_key = key + row.to(tl.int64) * key_strides[0] + kv_head.to(tl.int64) * key_strides[1]
    p_value = value + row.to(tl.int64) * value_strides[0] + kv_head.to(tl.int64) * value_strides[1]
    b_acc, b_top, b_sum = _empty_state(BLOCK_OWN, BLOCK_V)
    b_acc, b_top, b_sum = _walk_share(
        b_acc, b_top, b_sum, b_q, b_low, b_high, split, own_splits,
        p_key, key_strides[2], key_strides[3], p_value, value_strides[2], value_strides[3],
        None, None, None, None, None, 0, p_bias, bias_strides, scale, softcap,
        HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, SCALE_LAST, PRECISION,
    )  # fmt: skip
    if PARTIAL:
        b_at = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
        b_exists = b_at < per_row
        b_at = (kv_head.to(tl.int64) * batch + row) * per_row + b_at
        partial = prefix_splits + split
        _store_states(b_acc, b_top, b_sum, states, state_lse, b_at, partial, partials, b_exists, V_DIM, BLOCK_V)
    else:
        if sinks is not None:
            b_sink = tl.load(sinks + b_head * sinks_stride).to(tl.float32) * LOG2E
            b_top, b_sum, b_fade = _with_sink(b_top, b_sum, b_sink)
            b_acc *= b_fade[:, None]
        p_lse = state_lse + (b_row.to(tl.int64) * GROUPS * kv_heads + b_head) * queries + b_i
        tl.store(p_lse, _natural_lse(b_top, b_sum), mask=b_exists)
        b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        _store_rows(states, out_strides, b_out, b_row, b_head, b_i, b_exists, V_DIM, BLOCK_V)


@triton.jit
def _load_queries(query, strides, b_row, b_head, b_i, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    p_query = query + (b_row.to(tl.int64) * strides[0] + b_head.to(tl.int64) * strides[1])[:, None]
    p_query += b_i.to(tl.int64)[:, None] * strides[2] + d.to(tl.int64) * strides[3]
    if HEAD_DIM == BLOCK_D:
        return tl.load(p_query)  # [M, BLOCK_D]
    return tl.load(p_query, mask=d < HEAD_DIM, other=0.0)


@triton.jit
def _bias_rows(bias, strides, b_row, b_head, b_i):
    return bias + b_row.to(tl.int64) * strides[0] + b_head.to(tl.int64) * strides[1] + b_i.to(tl.int64) * strides[2]


@triton.jit
def _empty_state(BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """Weighted sum of values; largest score, in units of log 2; sum of weights 2^(score - largest)."""
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return tl.zeros([BLOCK_M, BLOCK_V], tl.float32), b_top, tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def _walk_share(
    b_acc, b_top, b_sum, b_q, b_low, b_high, split, splits,
    key, key_stride, key_dim_stride, value, value_stride, value_dim_stride,
    key_scale, key_scale_strides, value_scale, value_scale_strides, scale_block, first,
    p_bias, bias_strides, scale, softcap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, OPEN: tl.constexpr, SCALE_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of ``splits`` equal shares of the keys that some query sees; queries see keys ``[b_low, b_high)``, counted
    from entry ``first`` of ``key`` and ``value``. OPEN: a loop without masks takes the blocks that all queries see,
    which is worth its code where all begin at the same key and most blocks are such."""
    low, high = tl.min(b_low, 0), tl.max(b_high, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), BLOCK_N) * BLOCK_N
    low += split * share
    high = tl.minimum(low + share, high)
    if OPEN:
        for_all = tl.minimum(tl.min(b_high, 0), high)
        masked = low + tl.maximum(for_all - low, 0) // BLOCK_N * BLOCK_N
        b_acc, b_top, b_sum = _walk(
            b_acc, b_top, b_sum, b_q, b_low, b_high, low, masked,
            key, key_stride, key_dim_stride, value, value_stride, value_dim_stride,
            key_scale, key_scale_strides, value_scale, value_scale_strides, scale_block, first,
            p_bias, bias_strides, scale, softcap,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, False, SCALE_LAST, PRECISION,
        )  # fmt: skip
        low = masked
    return _walk(
        b_acc, b_top, b_sum, b_q, b_low, b_high, low, high,
        key, key_stride, key_dim_stride, value, value_stride, value_dim_stride,
        key_scale, key_scale_strides, value_scale, value_scale_strides, scale_block, first,
        p_bias, bias_strides, scale, softcap,
        HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, BLOCK_N, True, SCALE_LAST, PRECISION,
    )  # fmt: skip


@triton.jit
def _walk(
    b_acc, b_top, b_sum, b_q, b_low, b_high, low, high,
    key, key_stride, key_dim_stride, value, value_stride, value_dim_stride,
    key_scale, key_scale_strides, value_scale, value_scale_strides, scale_block, first,
    p_bias, bias_strides, scale, softcap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, SCALE_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys ``[low, high)``."""
    n = tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for begin in range(low, high, BLOCK_N):
        j = begin + n
        entry = (first + j).to(tl.int64)
        p_key = key + entry[None, :] * key_stride + d.to(tl.int64)[:, None] * key_dim_stride
        if MASKED:
            b_k = tl.load(p_key, mask=(j < high)[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        elif HEAD_DIM != BLOCK_D:
            b_k = tl.load(p_key, mask=(d < HEAD_DIM)[:, None], other=0.0)
        else:
            b_k = tl.load(p_key)
        b_s = tl.dot(b_q, _widened(b_k, b_q.dtype), input_precision=PRECISION)  # [M, BLOCK_N]
        if key_scale is not None:
            p_scale = key_scale + entry // scale_block * key_scale_strides[1]
            b_s *= tl.load(p_scale, mask=j < high, other=0.0)[None, :]
        # Scores in units of log 2. Without a softcap or bias their scale goes into the exponent: one multiply-add.
        factor = scale * LOG2E
        if not SCALE_LAST:
            b_s = capped(b_s * scale, softcap, softcap is not None)
            if p_bias is not None:
                p_b = p_bias[:, None] + j.to(tl.int64)[None, :] * bias_strides[3]
                if MASKED:
                    seen = (j[None, :] >= b_low[:, None]) & (j[None, :] < b_high[:, None])
                    b_s += tl.load(p_b, mask=seen & (j < high)[None, :], other=0.0).to(tl.float32)
                else:
                    b_s += tl.load(p_b).to(tl.float32)
            factor = LOG2E
        if MASKED:
            seen = (j[None, :] >= b_low[:, None]) & (j[None, :] < tl.minimum(b_high, high)[:, None])
            b_s = tl.where(seen, b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1) * factor)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # (-inf) - (-inf) would be NaN
        b_p = tl.exp2(b_s * factor - b_shift[:, None])
        b_fade = tl.exp2(b_top - b_shift)
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        b_acc *= b_fade[:, None]
        p_value = value + entry[:, None] * value_stride + dv.to(tl.int64)[None, :] * value_dim_stride
        if MASKED:
            b_v = tl.load(p_value, mask=(j < high)[:, None] & (dv < V_DIM)[None, :], other=0.0)
        elif V_DIM != BLOCK_V:
            b_v = tl.load(p_value, mask=(dv < V_DIM)[None, :], other=0.0)
        else:
            b_v = tl.load(p_value)
        if value_scale is not None:
            p_scale = value_scale + entry // scale_block * value_scale_strides[1]
            b_scale = tl.load(p_scale, mask=j < high, other=0.0)
            if b_q.dtype == tl.float16:
                # A probability times a small scale would be below float16's range; the value itself is not.
                b_v = (b_v.to(tl.float32) * b_scale[:, None]).to(tl.float16)
            else:
                b_p *= b_scale[None, :]
        b_acc = tl.dot(b_p.to(b_q.dtype), _widened(b_v, b_q.dtype), b_acc, input_precision=PRECISION)
        b_top = b_new
    return b_acc, b_top, b_sum


@triton.jit
def _widened(b_x, dtype: tl.constexpr):
    """Entries of 8 bits, exactly; others are of the query's dtype."""
    return b_x if b_x.dtype == dtype else b_x.to(tl.float32).to(dtype)


@triton.jit
def _with_sink(b_top, b_sum, b_sink):
    """The state with one more logit, in units of log 2, and what the weighted sum of values is multiplied by."""
    b_new = tl.maximum(b_top, b_sink)
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_fade = tl.exp2(b_top - b_shift)
    return b_new, b_sum * b_fade + tl.exp2(b_sink - b_shift), b_fade


@triton.jit
def _natural_lse(b_top, b_sum):
    return tl.where(b_sum == 0.0, float("-inf"), (b_top + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum))) * LN2)


@triton.jit
def _store_states(
    b_acc, b_top, b_sum, states, state_lse, b_at, partial, partials, b_exists,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Partial results of the queries ``b_at`` of the workspace. _combine reads no state whose LSE is -inf, so that of
    a query that sees nothing is not written."""
    b_at = b_at.to(tl.int64) * partials + partial
    tl.store(state_lse + b_at, _natural_lse(b_top, b_sum), mask=b_exists)
    dv = tl.arange(0, BLOCK_V)[None, :]
    seen = b_exists & (b_sum != 0.0)
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(states + b_at[:, None] * V_DIM + dv, b_out, mask=seen[:, None] & (dv < V_DIM))


@triton.jit
def _store_rows(out, strides, b_out, b_row, b_head, b_i, b_exists, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    dv = tl.arange(0, BLOCK_V)[None, :]
    p_out = out + b_row.to(tl.int64) * strides[0] + b_head.to(tl.int64) * strides[1] + b_i.to(tl.int64) * strides[2]
    tl.store(p_out[:, None] + dv, b_out.to(out.dtype.element_ty), mask=b_exists[:, None] & (dv < V_DIM))


@triton.jit(do_not_specialize=["partials", "sinks_stride", "rows", "batch", "queries"])
def _combine(
    states, state_lse, partials, sinks, sinks_stride, out, out_strides, lse, rows, batch, queries,
    GROUPS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
):  # fmt: skip
    """A query's partials into its result. The LSEs come first, all at once: they say which states count, and the
    loads of BLOCK_PARTIALS states then wait for nothing."""
    b_at = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b_exists = b_at < rows
    per_row = GROUPS * queries
    b_row = b_at // per_row % batch
    b_head = b_at // per_row // batch * GROUPS + b_at % per_row // queries
    b_i = b_at % queries
    every = tl.arange(0, MAX_PARTIALS)[None, :]
    p_lse = state_lse + b_at[:, None] * partials
    b_lse = tl.load(p_lse + every, mask=b_exists[:, None] & (every < partials), other=float("-inf")) * LOG2E
    b_top = tl.max(b_lse, 1)
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.sum(tl.exp2(b_lse - b_shift[:, None]), 1)
    if sinks is not None:
        b_sink = tl.load(sinks + b_head * sinks_stride, mask=b_exists, other=float("-inf")).to(tl.float32) * LOG2E
        b_top, b_sum, _ = _with_sink(b_top, b_sum, b_sink)
        b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    q_heads = rows // batch // queries
    tl.store(lse + (b_row * q_heads + b_head) * queries + b_i, _natural_lse(b_top, b_sum), mask=b_exists)
    b_norm = tl.where(b_sum == 0.0, 1.0, b_sum)
    dv = tl.arange(0, BLOCK_V)
    b_out = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
    for begin in range(0, partials, BLOCK_PARTIALS):
        some = begin + tl.arange(0, BLOCK_PARTIALS)[None, :]
        b_some = tl.load(p_lse + some, mask=b_exists[:, None] & (some < partials), other=float("-inf")) * LOG2E
        b_weight = tl.exp2(b_some - b_shift[:, None]) / b_norm[:, None]  # [BLOCK_ROWS, BLOCK_PARTIALS]
        p_state = states + ((b_at[:, None] * partials + some) * V_DIM)[:, :, None] + dv[None, None, :]
        # Not "> 0": a NaN has to get through.
        b_state = tl.load(p_state, mask=(b_weight != 0.0)[:, :, None] & (dv < V_DIM)[None, None, :], other=0.0)
        b_out += tl.sum(b_weight[:, :, None] * b_state, 1)
    _store_rows(out, out_strides, b_out, b_row, b_head, b_i, b_exists, V_DIM, BLOCK_V)
