# SPDX-License-Identifier: Apache-2.0
"""Keys and values in int8: symmetric, one float32 scale per head and block of tokens.

Entry t of head h stands for ``int8[h, t] * scale[h, t // block]``. A block's largest magnitude becomes 127, so a value
is off by at most half its block's scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Floating ``[H, L, D]`` as int8 ``[H, L, D]`` and its scales, float32 ``[H, ceil(L / block)]``.

    A block of zeros has scale 0. The values have to be finite.
    """
    heads, length, dim = x.shape
    blocks = -(-length // block)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = F.pad(wide, (0, 0, 0, blocks * block - length)).view(heads, blocks, block, dim)
    scale = (parts.abs().amax((2, 3)) / 127).to(torch.float32)
    step = scale.where(scale > 0, 1.0)[..., None, None]
    # Clamped: a scale that rounds down, as far as to a denormal's half, would push its largest value over the edge.
    entries = (parts / step).round_().clamp_(-127, 127).to(torch.int8)
    return entries.view(heads, blocks * block, dim)[:, :length].contiguous(), scale


def dequantize(x: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """What int8 ``[H, L, D]`` stands for, rounded once, to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    per_entry = scale.to(wide).repeat_interleave(block, dim=1)[:, : x.shape[1], None]
    return (x.to(wide) * per_entry).to(dtype)
