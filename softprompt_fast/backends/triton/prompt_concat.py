# SPDX-License-Identifier: Apache-2.0
"""prompt_concat in Triton: one pass at the speed of a copy; the gradient of the prompt without an atomic.

A token id outside the table is not followed: its row reads as zeros and ``tl.device_assert`` stops the kernel.
PyTorch then reports "device-side assert triggered" at the next call that waits for the device, as it does for its own
embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_fast.backends.triton import _prompt_rows, _runtime, _tuning
from softprompt_fast.backends.triton._prompt_rows import load_rows, locate, row_layout

OP = "prompt_concat"


def reasons(*args: Any) -> list[str]:
    tokens, table, prompt, out_dtype = args[0], args[1], args[2], args[9]
    why = _runtime.refusals(tokens if table is None else table, prompt)
    if out_dtype not in _runtime.DTYPES:
        why.append(f"it gives float32, bfloat16 and float16, found {str(out_dtype).removeprefix('torch.')}")
    if table is not None and table.requires_grad and torch.is_grad_enabled():
        why.append("it gives no gradient for table")
    return why


def forward(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    out_dtype: torch.dtype,
    left: bool,
) -> Tensor:
    batch, own = tokens.shape[:2]
    width = prompt.shape[1]
    out = prompt.new_empty(batch, prompt_length + own, width, dtype=out_dtype)
    if out.numel() == 0:
        return out
    rows = (prompt_offsets, prompt_index, own_start)
    arguments, flags = _prompt_rows.sources(tokens, table, prompt, *rows, prompt_length, scale, prompt_scale, left)
    config = _configuration("forward", out, width)
    grid = _grid(out.shape[0] * out.shape[1], width, config)
    flags |= _prompt_rows.assertions(table)
    _runtime.launch(_forward, grid, out, *arguments, width, **flags, **config)
    return out


def backward(
    grad_out: Tensor,
    tokens: Tensor,
    prompt: Tensor,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    left: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of prompt, summed over the rows, and of tokens where they are embeddings."""
    batch, own = tokens.shape[:2]
    width = prompt.shape[1]
    offsets, index, start = _runtime.dense(prompt_offsets, prompt_index, own_start)
    rows = offsets, index, start
    grad_prompt = prompt.new_empty(prompt.shape)
    parts = _parts(grad_out, grad_prompt, batch)
    if parts == 1:
        _sum_over_rows(grad_out, grad_prompt, *rows, prompt_length, prompt_scale, left, parts)
    else:
        # Rows add up in a few independent parts, and those, like rows of a batch, in a second launch.
        partial = grad_prompt.new_empty(parts, *grad_prompt.shape, dtype=torch.float32)
        _sum_over_rows(grad_out, partial, *rows, prompt_length, 1.0, left, parts)
        _sum_over_rows(partial, grad_prompt, None, None, None, prompt.shape[0], prompt_scale, left, 1)
    if not tokens.is_floating_point():
        return grad_prompt, None
    grad_tokens = tokens.new_empty(tokens.shape)  # dense, whatever the strides of tokens
    if grad_tokens.numel():
        config = _configuration("backward_tokens", grad_tokens, width)
        grid = _grid(batch * own, width, config)
        arguments = (*rows, prompt.shape[0], prompt_length, own, batch * own, width, scale)
        _runtime.launch(
            _backward_tokens, grid, grad_tokens, grad_out, grad_out.stride(), *arguments, LEFT=left, **config
        )
    return grad_prompt, grad_tokens


def _sum_over_rows(
    grad_out: Tensor,
    grad_prompt: Tensor,
    offsets: Tensor | None,
    index: Tensor | None,
    start: Tensor | None,
    prompt_length: int,
    scale: float,
    left: bool,
    parts: int,
) -> None:
    """``grad_prompt``: ``[L, H]``, or ``[parts, L, H]`` with a share of the rows each."""
    packed, width = grad_prompt.shape[-2:]
    config = _configuration("backward_prompt", grad_out, width)
    grid = (parts * packed * triton.cdiv(width, config["BLOCK_COLUMNS"]),)
    batch = grad_out.shape[0]
    arguments = (offsets, index, start, packed, prompt_length, batch, triton.cdiv(batch, parts), width, scale)
    strides = grad_out.stride()
    _runtime.launch(_backward_prompt, grid, grad_prompt, grad_out, strides, *arguments, LEFT=left, **config)


def _parts(grad_out: Tensor, grad_prompt: Tensor, batch: int) -> int:
    """Into how many parts the rows of the batch are split, so that a short prompt's gradient keeps the device busy.

    Example: 8 virtual tokens of 2048 in bfloat16 are 32 programs; on 132 processors the rows come in 9 parts of 288
    programs together, if there are rows enough for every part to fill a block.
    """
    packed, width = grad_prompt.shape
    config = _configuration("backward_prompt", grad_out, width)
    programs = max(1, packed * triton.cdiv(width, config["BLOCK_COLUMNS"]))
    wanted = triton.cdiv(2 * _runtime.processors(grad_out.device), programs)
    return max(1, min(wanted, batch // config["BLOCK_ROWS"]))


def _configuration(kernel: str, x: Tensor, width: int) -> dict[str, Any]:
    config = _tuning.configuration(OP, kernel, _prompt_rows.bits(x.dtype), _runtime.places(x.device))
    return {**config, "BLOCK_COLUMNS": min(config["BLOCK_COLUMNS"], triton.next_power_of_2(max(1, width)))}


def _grid(rows: int, width: int, config: dict[str, Any]) -> tuple[int]:
    # One dimension: the others end at 65535.
    return (triton.cdiv(rows, config["BLOCK_ROWS"]) * triton.cdiv(width, config["BLOCK_COLUMNS"]),)


@triton.jit
def _tile(rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """This program's rows ``[BLOCK_ROWS]`` and columns ``[1, BLOCK_COLUMNS]``; neighbours share rows, so that what is
    read of one is contiguous."""
    blocks = tl.cdiv(width, BLOCK_COLUMNS)
    row = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return row, column


@triton.jit(do_not_specialize=_prompt_rows.LENGTHS)
def _forward(
    out,
    source, source_strides, ids, ids_row, ids_step, vocabulary,
    prompt, prompt_strides, packed, offsets, index, start, prompt_length, own, rows, scale, prompt_scale,
    width,
    SCALED: tl.constexpr, JOINED: tl.constexpr, ALIGNED: tl.constexpr, LEFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = _tile(rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = column < width
    p_prompt, p_own, from_prompt, from_own = locate(
        row,
        source, source_strides, ids, ids_row, ids_step, vocabulary,
        prompt, prompt_strides, packed, offsets, index, start, prompt_length, own, rows, LEFT,
    )  # fmt: skip
    b_x = load_rows(
        p_prompt, prompt_strides[1], p_own, source_strides[2], from_prompt, from_own, column, inside,
        scale, prompt_scale, out.dtype.element_ty, SCALED, JOINED, ALIGNED,
    )  # fmt: skip
    p_out = out + row.to(tl.int64)[:, None] * width + column
    tl.store(p_out, b_x, mask=(row < rows)[:, None] & inside)


@triton.jit(do_not_specialize=["packed", "prompt_length", "batch", "rows_a_part"])
def _backward_prompt(
    grad_prompt, grad_out, grad_out_strides,
    offsets, index, start, packed, prompt_length, batch, rows_a_part, width, scale,
    LEFT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program owns one virtual token's columns and walks the rows of the batch that use it: the order of additions is
    # fixed, and BLOCK_ROWS rows are in flight at a time.
    target, column = _tile(0, width, 1, BLOCK_COLUMNS)
    target = tl.sum(target)  # a scalar: part * packed + entry
    entry = target % packed
    part = target // packed
    inside = column < width
    end = tl.minimum((part + 1) * rows_a_part, batch)
    b_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for b_first in range(part * rows_a_part, end, BLOCK_ROWS):
        b = b_first + tl.arange(0, BLOCK_ROWS)
        exists = b < end
        first, length, _, lead = row_layout(b, exists, offsets, index, start, packed, prompt_length, LEFT)
        place = entry - first
        uses = exists & (place >= 0) & (place < length)
        p_row = grad_out + b.to(tl.int64) * grad_out_strides[0] + (lead + place).to(tl.int64) * grad_out_strides[1]
        p_grad = p_row[:, None] + column.to(tl.int64) * grad_out_strides[2]
        b_sum += tl.load(p_grad, mask=uses[:, None] & inside, other=0.0).to(tl.float32)
    b_grad = tl.sum(b_sum, 0, keep_dims=True) * scale
    p_out = grad_prompt + target.to(tl.int64) * width + column
    tl.store(p_out, b_grad.to(grad_prompt.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["packed", "prompt_length", "own", "rows"])
def _backward_tokens(
    grad_tokens, grad_out, grad_out_strides,
    offsets, index, start, packed, prompt_length, own, rows, width, scale,
    LEFT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = _tile(rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    exists = row < rows
    inside = column < width
    b = row // own
    token = row % own
    _, length, begin, lead = row_layout(b, exists, offsets, index, start, packed, prompt_length, LEFT)
    slot = lead + length + token - begin
    p_row = grad_out + b.to(tl.int64) * grad_out_strides[0] + slot.to(tl.int64) * grad_out_strides[1]
    p_grad = p_row[:, None] + column.to(tl.int64) * grad_out_strides[2]
    b_grad = tl.load(p_grad, mask=(exists & (token >= begin))[:, None] & inside, other=0.0).to(tl.float32) * scale
    p_out = grad_tokens + row.to(tl.int64)[:, None] * width + column
    tl.store(p_out, b_grad.to(grad_tokens.dtype.element_ty), mask=exists[:, None] & inside)
