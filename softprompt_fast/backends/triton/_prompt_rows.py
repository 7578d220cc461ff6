# SPDX-License-Identifier: Apache-2.0
"""Where a row of "virtual tokens, then own tokens" comes from: what the kernels of prompt_concat and prompt_qkv share.

A *slot* is a place in a row of the result ``[B, slots, H]``. It holds a virtual token, an own token or zeros.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_fast.backends.triton import _runtime

# Arguments of `sources` that follow lengths: a kernel that took them for constants, or asked whether 16 divides them,
# would be compiled anew as they change. Each is an argument of its own, for within a tuple Triton asks regardless.
LENGTHS = ("ids_row", "ids_step", "vocabulary", "packed", "prompt_length", "own", "rows")


def sources(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    left: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The run-time and compile-time arguments of a kernel that calls :func:`locate` and :func:`load_rows`."""
    batch, own = tokens.shape[:2]
    source = tokens if table is None else table
    # A table's rows are picked by id alone, embeddings by row of the batch and place in it.
    strides = tokens.stride() if table is None else (0, *table.stride())
    arguments = (
        source, strides, None if table is None else tokens, *((0, 0) if table is None else tokens.stride()),
        0 if table is None else table.shape[0],
        prompt, (0, 0) if prompt is None else prompt.stride(), 0 if prompt is None else prompt.shape[0],
        *_runtime.dense(prompt_offsets, prompt_index, own_start),
        prompt_length, own, batch * (prompt_length + own), scale, prompt_scale,
    )  # fmt: skip
    flags = {
        "SCALED": scale != 1.0 or prompt_scale != 1.0,
        # One load serves both kinds of rows where only the pointer differs.
        "JOINED": prompt is None or (prompt.dtype == source.dtype and prompt.stride(-1) == source.stride(-1)),
        "ALIGNED": all(aligned(x) for x in (source, prompt) if x is not None),
        "LEFT": left,
    }
    return arguments, flags


def aligned(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes. Kernels that select between two pointers are told, for
    Triton 3.9 then forgets what it knew of either and would load element by element."""
    return (x.data_ptr() | x.element_size() * math.gcd(*x.stride()[:-1])) % 16 == 0


def assertions(table: Tensor | None) -> dict[str, bool]:
    """Launch options under which ``tl.device_assert`` on the ids is compiled in, and nothing else of debug mode."""
    return {"debug": table is not None, "sanitize_overflow": False}


def width_key(width: int, element_size: int) -> str:
    """Example: rows of 4096 elements in bfloat16 are tuned as "h4096-16bit", and so are rows of 3000."""
    return f"h{min(max(256, triton.next_power_of_2(width)), 16384)}-{8 * element_size}bit"


def bits(dtype: torch.dtype) -> str:
    return f"{8 * dtype.itemsize}bit"


@triton.jit
def row_layout(b, mask, offsets, index, start, packed, prompt_length, LEFT: tl.constexpr):
    """Of rows ``b`` of the batch: the first of their virtual tokens in the pack, how many there are, where their own
    tokens start, and the slot of the first virtual token."""
    which = b * 0
    first = b * 0
    length = first + packed
    begin = b * 0
    if index is not None:
        which = tl.load(index + b, mask=mask, other=-1).to(tl.int32)
    if offsets is not None:
        p_offsets = offsets + tl.maximum(which, 0)
        first = tl.load(p_offsets, mask=mask, other=0).to(tl.int32)
        length = tl.load(p_offsets + 1, mask=mask, other=0).to(tl.int32) - first
    length = tl.where(which >= 0, length, 0)
    if start is not None:
        begin = tl.load(start + b, mask=mask, other=0).to(tl.int32)
    lead = begin
    if LEFT:
        lead += prompt_length - length
    return first, length, begin, lead


@triton.jit
def locate(
    row,
    source, source_strides, ids, ids_row, ids_step, vocabulary,
    prompt, prompt_strides, packed, offsets, index, start, prompt_length, own, rows,
    LEFT: tl.constexpr,
):  # fmt: skip
    """Pointers to where rows (counted over batch and slots) begin, ``[BLOCK]`` each: in the prompt, among the own
    tokens; and which of the two a row is. Both masks False: it is zero."""
    slots = prompt_length + own
    exists = row < rows
    b = row // slots
    slot = row % slots
    token = slot
    from_prompt = row < 0
    from_own = exists
    p_prompt = source
    if prompt is not None:
        first, length, begin, lead = row_layout(b, exists, offsets, index, start, packed, prompt_length, LEFT)
        place = slot - lead
        entry = first + place
        token = place - length + begin
        # The comparison with the pack keeps offsets that promise too much from being followed.
        from_prompt = exists & (place >= 0) & (place < length) & (entry >= 0) & (entry < packed)
        from_own = exists & (place >= length) & (token < own)
        p_prompt = prompt + entry.to(tl.int64) * prompt_strides[0]
    which = token.to(tl.int64)
    if ids is not None:
        p_ids = ids + b.to(tl.int64) * ids_row + which * ids_step
        which = tl.load(p_ids, mask=from_own, other=0)
        known = (which >= 0) & (which < vocabulary)
        tl.device_assert(known, "prompt_concat: a token id is outside the table", mask=from_own)
        from_own = from_own & known
    p_own = source + b.to(tl.int64) * source_strides[0] + which * source_strides[1]
    return p_prompt, p_own, from_prompt, from_own


@triton.jit
def load_rows(
    p_prompt, prompt_step, p_own, own_step, from_prompt, from_own, column, inside, scale, prompt_scale, dtype,
    SCALED: tl.constexpr, JOINED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Columns of the rows that :func:`locate` found, scaled and rounded to ``dtype``: ``[BLOCK, BLOCK_COLUMNS]``.
    ``column`` and ``inside`` are ``[1, BLOCK_COLUMNS]``."""
    if JOINED:
        p_row = tl.where(from_prompt, p_prompt, p_own)
        if ALIGNED:
            p_row = tl.multiple_of(p_row, [16])
        b_x = tl.load(
            p_row[:, None] + column.to(tl.int64) * own_step, mask=(from_prompt | from_own)[:, None] & inside, other=0.0
        )
    else:
        # Masks over rows as numbers: Triton 3.6 does not compile _one_kernel with the booleans themselves.
        is_virtual, is_own = from_prompt.to(tl.int8)[:, None] != 0, from_own.to(tl.int8)[:, None] != 0
        p_virtual = p_prompt[:, None] + column.to(tl.int64) * prompt_step
        p_token = p_own[:, None] + column.to(tl.int64) * own_step
        b_virtual = tl.load(p_virtual, mask=is_virtual & inside, other=0.0)
        b_own = tl.load(p_token, mask=is_own & inside, other=0.0)
        b_x = tl.where(is_virtual, b_virtual.to(tl.float32), b_own.to(tl.float32))
    if SCALED:
        b_x = b_x.to(tl.float32) * tl.where(from_prompt, prompt_scale, scale)[:, None]
    return b_x.to(dtype)
