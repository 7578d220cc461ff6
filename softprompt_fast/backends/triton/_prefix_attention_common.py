# SPDX-License-Identifier: Apache-2.0
"""What the kernels of prefix_attention share: a row's geometry, what its queries see, and how a score is made.

Kernel style: ``b_`` is a block in registers, ``p_`` a block of pointers, shapes stand in comments, element offsets are
int64 (a cache of a few thousand rows is past 2^31 elements). An index tensor that was not given is None, which Triton
knows at compile time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_fast.backends.triton import _runtime, _tuning

# Scores are kept in units of log 2, so that the softmax takes exp2, one instruction.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Sums of a position and a window are int32. A query may stand anywhere and a window be any size: both end here, where
# no own key is and all prefixes are past.
MAX_POSITION = tl.constexpr(1 << 29)
MAX_WINDOW = 1 << 30


@triton.jit
def row_prefix(row, prefix_offsets, prefix_index, packed):
    """First entry in the pack and number of entries of a row's prefix, both int32 scalars; 0 entries for none."""
    prefix = tl.full([], 0, tl.int32)
    if prefix_index is not None:
        prefix = tl.load(prefix_index + row).to(tl.int32)
    first, length = tl.full([], 0, tl.int32), packed
    if prefix_offsets is not None:
        n = tl.maximum(prefix, 0)
        first = tl.load(prefix_offsets + n).to(tl.int32)
        length = tl.load(prefix_offsets + n + 1).to(tl.int32) - first
    if prefix_index is not None:
        length = tl.where(prefix < 0, 0, length)
    return first, length


@triton.jit
def row_own(row, own_start, own_end, query_start, queries, own):
    """A row's range of own keys and the own position of its first query: int32 scalars (start, end, position)."""
    start, end, position = tl.full([], 0, tl.int32), own, own - queries
    if own_start is not None:
        start = tl.load(own_start + row).to(tl.int32)
    if own_end is not None:
        end = tl.load(own_end + row).to(tl.int32)
    if query_start is not None:
        position = tl.load(query_start + row)
        position = tl.minimum(tl.maximum(position, -MAX_POSITION), MAX_POSITION).to(tl.int32)
    return start, end, position


@triton.jit
def sees_own(position, key, start, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, window):
    """Which queries (own positions) see which own keys; position and key broadcast to the block of scores."""
    seen = (key >= start) & (key < end)
    if CAUSAL:
        seen = seen & (key <= position)
    if WINDOW:
        seen = seen & (position - key < window)
    return seen


@triton.jit
def sees_prefix(position, entry, start, length, WINDOW: tl.constexpr, window):
    """Which queries see which entries, counted from the first of the row's prefix. A query's place in "prefix, then
    own tokens" is ``length + position - start``."""
    seen = (entry >= 0) & (entry < length)
    if WINDOW:
        seen = seen & (length + position - start - entry < window)
    return seen


@triton.jit
def tanh(x):
    """tanh to a few units in the last place. Triton has none of its own outside libdevice, which its interpreter
    lacks; and (1 - e) / (1 + e) alone cancels near 0, where a softcap's scores lie."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    # The Taylor series; at 0.3 its next term is 5e-8 of x.
    near = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(b_score, softcap, SOFTCAP: tl.constexpr):
    """``softcap * tanh(score / softcap)``; scores in natural units."""
    return softcap * tanh(b_score / softcap) if SOFTCAP else b_score


def rows_by_prefix(prefix_index: Tensor) -> Tensor:
    """Row numbers, int32 ``[B]``, sorted by prefix and then by number; worked out on the device."""
    order = torch.empty_like(prefix_index, dtype=torch.int32, memory_format=torch.contiguous_format)
    config = _tuning.configuration("prefix_attention", "plan", "any", _runtime.places(prefix_index.device))
    batch = prefix_index.shape[0]
    _runtime.launch(_rank_rows, (triton.cdiv(batch, config["BLOCK"]),), prefix_index, order, batch, **config)
    return order


@triton.jit(do_not_specialize=["batch"])
def _rank_rows(prefix_index, order, batch, BLOCK: tl.constexpr):
    """order[rank] = row, rows ranked by prefix and then by number. Quadratic: 4096 rows are 16 M comparisons."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_mine = tl.load(prefix_index + row, mask=row < batch, other=0).to(tl.int32)
    b_rank = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, batch, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        b_theirs = tl.load(prefix_index + other, mask=other < batch, other=0).to(tl.int32)
        before = (b_theirs[None, :] == b_mine[:, None]) & (other[None, :] < row[:, None])
        before = (before | (b_theirs[None, :] < b_mine[:, None])) & (other < batch)[None, :]
        b_rank += tl.sum(before.to(tl.int32), 1)
    tl.store(order + b_rank, row, mask=row < batch)
