# SPDX-License-Identifier: Apache-2.0
"""prompt_concat in CUDA C++: see ``csrc/cuda/prompt_concat.cuh``. A token id outside the table ends in a device-side
assertion, as in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.cuda import _runtime
from softprompt_fast.backends.cuda._runtime import indexes, view

_cuda = _runtime._cuda


def reasons(*args: Any) -> list[str]:
    tokens, table, prompt, out_dtype = args[0], args[1], args[2], args[9]
    why = _runtime.refusals(tokens if table is None else table, prompt)
    if out_dtype not in _runtime.FLOATING:
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
    packed, width = prompt.shape
    out = prompt.new_empty(batch, prompt_length + own, width, dtype=out_dtype)
    if out.numel() == 0:
        return out
    rows = _runtime.dense(prompt_offsets, prompt_index, own_start)
    _cuda.prompt_concat(
        None if table is None else (tokens.data_ptr(), *tokens.stride()),
        view(tokens, 3) if table is None else None,
        None if table is None else view(table, 2),
        view(prompt, 2),
        view(out, 3),
        (batch, own, packed, prompt_length, width, 0 if table is None else table.shape[0]),
        tuple(indexes(x) for x in rows),
        scale,
        prompt_scale,
        left,
        _runtime.queue(prompt),
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
    grad_prompt = prompt.new_empty(prompt.shape)
    grad_tokens = tokens.new_empty(tokens.shape) if tokens.is_floating_point() else None
    rows = _runtime.dense(prompt_offsets, prompt_index, own_start)
    _cuda.prompt_concat_backward(
        view(grad_out, 3),
        view(grad_prompt, 2),
        None if grad_tokens is None else view(grad_tokens, 3),
        (*tokens.shape[:2], prompt.shape[0], prompt_length, prompt.shape[1]),
        tuple(indexes(x) for x in rows),
        scale,
        prompt_scale,
        left,
        _runtime.queue(prompt),
    )
    return grad_prompt, grad_tokens
