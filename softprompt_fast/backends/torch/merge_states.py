# SPDX-License-Identifier: Apache-2.0
"""merge_states in pure PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reasons(*args: Any) -> list[str]:
    return []


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b, out=torch.empty_like(lse_a))
    # Two empty states: lse is -inf, and (-inf) - (-inf) would be NaN. Against a finite stand-in both weights are
    # exp(-inf) = 0.
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)
    weight_a, weight_b = (lse_a - finite).exp_().unsqueeze(-1), (lse_b - finite).exp_().unsqueeze(-1)
    return torch.addcmul(weight_a * out_a, weight_b, out_b, out=torch.empty_like(out_a)), lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With w_x = exp(lse_x - lse): d out / d out_x = w_x, d lse / d lse_x = w_x, d out / d lse_a = w_a (out_a - out).
    That is w_a w_b (out_a - out_b), written so because out may be rounded to 16 bits; for lse_b it is the opposite."""
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)
    weight_a, weight_b = (lse_a - finite).exp_(), (lse_b - finite).exp_()
    along = (grad_out * (out_a.to(lse.dtype) - out_b)).sum(-1) * (weight_a * weight_b)
    grad_lse_a, grad_lse_b = along, -along
    if grad_lse is not None:
        grad_lse_a, grad_lse_b = grad_lse_a + weight_a * grad_lse, grad_lse_b + weight_b * grad_lse
    grad_a, grad_b = ((weight.unsqueeze(-1) * grad_out).to(out_a.dtype) for weight in (weight_a, weight_b))
    return grad_a, grad_lse_a, grad_b, grad_lse_b
