# SPDX-License-Identifier: Apache-2.0
"""Oracle of :func:`softprompt_fast.ops.merge_states`."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(out_a.dtype, torch.float32)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    # Where neither side saw a key both LSEs are -inf and their difference is NaN: compute there with 0, then mask.
    empty = torch.isneginf(lse_a) & torch.isneginf(lse_b)
    lse_a, lse_b = lse_a.masked_fill(empty, 0.0), lse_b.masked_fill(empty, 0.0)
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp().unsqueeze(-1), (lse_b - lse).exp().unsqueeze(-1)
    out = weight_a * out_a.to(dtype) + weight_b * out_b.to(dtype)
    return out.masked_fill(empty.unsqueeze(-1), 0.0).to(out_a.dtype), lse.masked_fill(empty, float("-inf"))
