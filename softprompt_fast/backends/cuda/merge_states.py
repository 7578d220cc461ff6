# SPDX-License-Identifier: Apache-2.0
"""merge_states in CUDA C++: see ``csrc/cuda/merge_states.cuh``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.cuda import _runtime
from softprompt_fast.backends.cuda._runtime import view

_cuda = _runtime._cuda


def reasons(*args: Any) -> list[str]:
    why = _runtime.refusals(*args)
    if args[0].dim() > 4:
        why.append(f"it takes at most 4 dimensions, found {args[0].dim()}")
    return why


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    states = (view(out_a, 4), view(lse_a, 3), view(out_b, 4), view(lse_b, 3), view(out, 4), view(lse, 3))
    _cuda.merge_states(_sizes(out_a), *states, _runtime.queue(out_a))
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (out_a, lse_a, out_b, lse_b)
    grads = tuple(torch.empty_like(x) for x in inputs)
    upstream = view(grad_out, 4), None if grad_lse is None else view(grad_lse, 3)
    states = [view(x, 4 - i % 2) for tensors in (inputs, grads) for i, x in enumerate(tensors)]
    _cuda.merge_states_backward(_sizes(out_a), *upstream, *states, _runtime.queue(out_a))
    return grads[0], grads[1], grads[2], grads[3]


def _sizes(out: Tensor) -> tuple[int, ...]:
    return (*(1,) * (4 - out.dim()), *out.shape)
