# SPDX-License-Identifier: Apache-2.0
"""merge_states in pure PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reasons(*args: Any) -> list[str]:
    return []


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    # Two empty states: lse is -inf, and (-inf) - (-inf) would be NaN. Against a finite stand-in both weights are
    # exp(-inf) = 0.
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)
    weight_a, weight_b = (lse_a - finite).exp_().unsqueeze(-1), (lse_b - finite).exp_().unsqueeze(-1)
    return torch.addcmul(weight_a * out_a, weight_b, out_b).to(out_a.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With w = exp(lse_x - lse): d out / d out_x = w, d out / d lse_x = w (out_x - out), d lse / d lse_x = w."""
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)
    grads_out, grads_lse = [], []
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        weight = (lse_x - finite).exp_()
        along = (grad_out * (out_x.to(lse.dtype) - out)).sum(-1)
        grads_out.append((weight.unsqueeze(-1) * grad_out).to(out_x.dtype))
        grads_lse.append(weight * (along if grad_lse is None else along + grad_lse))
    return grads_out[0], grads_lse[0], grads_out[1], grads_lse[1]
