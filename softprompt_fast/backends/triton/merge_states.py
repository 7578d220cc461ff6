# SPDX-License-Identifier: Apache-2.0
"""merge_states in Triton: one pass over both states, a tile of rows a program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softprompt_fast.backends.triton import _runtime, _tuning

OP = "merge_states"


def reasons(*args: Any) -> list[str]:
    why = _runtime.refusals(*args)
    if args[0].dim() > 4:
        why.append(f"it takes at most 4 dimensions, found {args[0].dim()}")
    return why


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    states = (out_a, lse_a, out_b, lse_b, out, lse)
    _launch(_forward, "forward", out_a, states)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_a, grad_lse_a, grad_b, grad_lse_b = (torch.empty_like(x) for x in (out_a, lse_a, out_b, lse_b))
    # Without a gradient of the LSE its place holds another tensor that no thread reads.
    upstream = (grad_out, lse_a if grad_lse is None else grad_lse)
    states = (*upstream, out_a, lse_a, out_b, lse_b, grad_a, grad_lse_a, grad_b, grad_lse_b)
    _launch(_backward, "backward", out_a, states, HAS_GRAD_LSE=grad_lse is not None)
    return grad_a, grad_lse_a, grad_b, grad_lse_b


def tuning_key(head_dim: int, element_size: int) -> str:
    """Example: heads of 100 in bfloat16 are tuned as "d128-16bit"."""
    return f"d{_runtime.block(head_dim)}-{8 * element_size}bit"


def _launch(kernel: Any, name: str, out: Tensor, states: tuple[Tensor, ...], **flags: Any) -> None:
    """``states``: outputs ``[..., D]`` and LSEs ``[...]`` in turn, each followed by its strides in the launch."""
    head_dim = out.shape[-1]
    rows = states[1].numel()
    if rows == 0:
        return
    key = tuning_key(min(head_dim, 256), out.element_size())
    config = _tuning.configuration(OP, name, key, _runtime.places(out.device))
    sizes = (*(1,) * (4 - out.dim()), *out.shape[:-1])
    arguments = [y for x in states for y in (x, _strides(x, 4 if x.dim() == out.dim() else 3))]
    grid = (triton.cdiv(rows, config["BLOCK_ROWS"]),)
    block = max(1, triton.next_power_of_2(head_dim))  # states without a column have an LSE all the same
    _runtime.launch(kernel, grid, *arguments, rows, sizes[1], sizes[2], head_dim, BLOCK_D=block, **flags, **config)


def _strides(x: Tensor, dimensions: int) -> tuple[int, ...]:
    return (*(0,) * (dimensions - x.dim()), *x.stride())


@triton.jit
def _offsets(row, strides, n1, n2):
    """Element offsets, int64, of rows counted over three leading dimensions [n0, n1, n2]."""
    i2 = row % n2
    i1 = row // n2 % n1
    i0 = row // n2 // n1
    return i0.to(tl.int64) * strides[0] + i1.to(tl.int64) * strides[1] + i2.to(tl.int64) * strides[2]


@triton.jit
def _weights(lse_a, lse_b):
    """e^(lse_x - lse) of each side, and lse. The larger side's share is 1 / (1 + e^-|lse_a - lse_b|): the difference
    is taken before anything is rounded. Two empty states weigh nothing, and their lse stays -inf."""
    empty = (lse_a == float("-inf")) & (lse_b == float("-inf"))
    difference = tl.where(empty, 0.0, lse_a - lse_b)
    ratio = tl.exp(-tl.abs(difference))
    larger = tl.where(empty, 0.0, 1.0 / (1.0 + ratio))
    smaller = larger * ratio
    # A NaN on either side is in the difference; tl.maximum would hide it.
    lse = tl.where(empty, lse_a, tl.maximum(lse_a, lse_b) + tl.log(1.0 + ratio))
    return tl.where(difference >= 0, larger, smaller), tl.where(difference >= 0, smaller, larger), lse


@triton.jit
def _forward(
    out_a, out_a_strides, lse_a, lse_a_strides,
    out_b, out_b_strides, lse_b, lse_b_strides,
    out, out_strides, lse, lse_strides,
    rows, n1, n2, head_dim,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    exists = row < rows
    mask = exists[:, None] & (column < head_dim)
    b_lse_a = tl.load(lse_a + _offsets(row, lse_a_strides, n1, n2), mask=exists, other=0.0)
    b_lse_b = tl.load(lse_b + _offsets(row, lse_b_strides, n1, n2), mask=exists, other=0.0)
    weight_a, weight_b, b_lse = _weights(b_lse_a, b_lse_b)
    p_a = out_a + _offsets(row, out_a_strides, n1, n2)[:, None] + column.to(tl.int64) * out_a_strides[3]
    p_b = out_b + _offsets(row, out_b_strides, n1, n2)[:, None] + column.to(tl.int64) * out_b_strides[3]
    b_a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_D]
    b_b = tl.load(p_b, mask=mask, other=0.0).to(tl.float32)
    b_out = weight_a[:, None] * b_a + weight_b[:, None] * b_b
    p_out = out + _offsets(row, out_strides, n1, n2)[:, None] + column.to(tl.int64) * out_strides[3]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + _offsets(row, lse_strides, n1, n2), b_lse, mask=exists)


@triton.jit
def _backward(
    grad_out, grad_out_strides, grad_lse, grad_lse_strides,
    out_a, out_a_strides, lse_a, lse_a_strides,
    out_b, out_b_strides, lse_b, lse_b_strides,
    grad_a, grad_a_strides, grad_lse_a, grad_lse_a_strides,
    grad_b, grad_b_strides, grad_lse_b, grad_lse_b_strides,
    rows, n1, n2, head_dim,
    HAS_GRAD_LSE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # d out / d lse_a = w_a (out_a - out) = w_a w_b (out_a - out_b): out itself may be rounded to 16 bits.
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    exists = row < rows
    mask = exists[:, None] & (column < head_dim)
    b_lse_a = tl.load(lse_a + _offsets(row, lse_a_strides, n1, n2), mask=exists, other=0.0)
    b_lse_b = tl.load(lse_b + _offsets(row, lse_b_strides, n1, n2), mask=exists, other=0.0)
    weight_a, weight_b, _ = _weights(b_lse_a, b_lse_b)
    p_grad = grad_out + _offsets(row, grad_out_strides, n1, n2)[:, None] + column.to(tl.int64) * grad_out_strides[3]
    p_a = out_a + _offsets(row, out_a_strides, n1, n2)[:, None] + column.to(tl.int64) * out_a_strides[3]
    p_b = out_b + _offsets(row, out_b_strides, n1, n2)[:, None] + column.to(tl.int64) * out_b_strides[3]
    b_grad = tl.load(p_grad, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_D]
    b_a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_b, mask=mask, other=0.0).to(tl.float32)
    along = tl.sum(b_grad * (b_a - b_b), 1) * weight_a * weight_b
    b_grad_lse_a, b_grad_lse_b = along, -along
    if HAS_GRAD_LSE:
        b_grad_lse = tl.load(grad_lse + _offsets(row, grad_lse_strides, n1, n2), mask=exists, other=0.0)
        b_grad_lse_a += weight_a * b_grad_lse
        b_grad_lse_b += weight_b * b_grad_lse
    p_grad_a = grad_a + _offsets(row, grad_a_strides, n1, n2)[:, None] + column.to(tl.int64) * grad_a_strides[3]
    p_grad_b = grad_b + _offsets(row, grad_b_strides, n1, n2)[:, None] + column.to(tl.int64) * grad_b_strides[3]
    tl.store(p_grad_a, (weight_a[:, None] * b_grad).to(grad_a.dtype.element_ty), mask=mask)
    tl.store(p_grad_b, (weight_b[:, None] * b_grad).to(grad_b.dtype.element_ty), mask=mask)
    tl.store(grad_lse_a + _offsets(row, grad_lse_a_strides, n1, n2), b_grad_lse_a, mask=exists)
    tl.store(grad_lse_b + _offsets(row, grad_lse_b_strides, n1, n2), b_grad_lse_b, mask=exists)
