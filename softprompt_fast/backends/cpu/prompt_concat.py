# SPDX-License-Identifier: Apache-2.0
"""prompt_concat in C++: see ``csrc/cpu/prompt_concat_kernel.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.cpu import _tensors

_C = _tensors.extension()


def reasons(*args: Any) -> list[str]:
    tokens, table, prompt, out_dtype = args[0], args[1], args[2], args[9]
    why = _tensors.refusals(tokens if table is None else table, prompt)
    if not why and out_dtype not in _tensors.CODES:
        why = [f"it gives float32, bfloat16 and float16, found {str(out_dtype).removeprefix('torch.')}"]
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
    packed, width = prompt.shape
    out = prompt.new_empty(batch, prompt_length + own, width, dtype=out_dtype)
    if out.numel() == 0:
        return out
    rows = [_tensors.dense(x) for x in (prompt_offsets, prompt_index, own_start)]
    wrong = _C.prompt_concat(
        None if table is None else (tokens.data_ptr(), *tokens.stride()),
        _tensors.view(tokens) if table is None else None,
        None if table is None else _tensors.view(table),
        _tensors.view(prompt),
        _tensors.view(out),
        (batch, own, packed, prompt_length, width, 0 if table is None else table.shape[0]),
        tuple(_tensors.indexes(x) for x in rows),
        scale,
        prompt_scale,
        left,
        torch.get_num_threads(),
    )
    if wrong >= 0 and table is not None:
        row, column = divmod(wrong, own)
        raise IndexError(
            f"tokens: id {int(tokens[row, column])} in row {row}, column {column} is outside the vocabulary of "
            f"{table.shape[0]} tokens"
        )
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
    grad_prompt = prompt.new_empty(prompt.shape)
    grad_tokens = tokens.new_empty(tokens.shape) if tokens.is_floating_point() else None
    rows = [_tensors.dense(x) for x in (prompt_offsets, prompt_index, own_start)]
    _C.prompt_concat_backward(
        _tensors.view(grad_out),
        _tensors.view(grad_prompt),
        None if grad_tokens is None else _tensors.view(grad_tokens),
        (batch, own, prompt.shape[0], prompt_length, prompt.shape[1]),
        tuple(_tensors.indexes(x) for x in rows),
        scale,
        prompt_scale,
        left,
        torch.get_num_threads(),
    )
    return grad_prompt, grad_tokens
