# SPDX-License-Identifier: Apache-2.0
"""merge_states in C++: see ``csrc/cpu/merge_states_kernel.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.cpu import _tensors

_C = _tensors.extension()


def reasons(*args: Any) -> list[str]:
    why = _tensors.refusals(*args)
    if args[0].dim() > 4:
        why.append(f"it takes at most 4 dimensions, found {args[0].dim()}")
    return why


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    _C.merge_states(
        _sizes(out_a),
        _view(out_a, 4),
        _view(lse_a, 3),
        _view(out_b, 4),
        _view(lse_b, 3),
        _view(out, 4),
        _view(lse, 3),
        torch.get_num_threads(),
    )
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_a, grad_lse_a, grad_b, grad_lse_b = (torch.empty_like(x) for x in (out_a, lse_a, out_b, lse_b))
    _C.merge_states_backward(
        _sizes(out_a),
        _view(grad_out, 4),
        None if grad_lse is None else _view(grad_lse, 3),
        _view(out_a, 4),
        _view(lse_a, 3),
        _view(out_b, 4),
        _view(lse_b, 3),
        _view(grad_a, 4),
        _view(grad_lse_a, 3),
        _view(grad_b, 4),
        _view(grad_lse_b, 3),
        torch.get_num_threads(),
    )
    return grad_a, grad_lse_a, grad_b, grad_lse_b


def _sizes(out: Tensor) -> tuple[int, ...]:
    return (*(1,) * (4 - out.dim()), *out.shape)


def _view(x: Tensor, dimensions: int) -> tuple[int, ...]:
    """Pointer, dtype code and strides, with further dimensions of size 1 in front."""
    return (x.data_ptr(), _tensors.CODES[x.dtype], *(0,) * (dimensions - x.dim()), *x.stride())
