# SPDX-License-Identifier: Apache-2.0
"""Keys and values in 8 bits: symmetric, one float32 scale per head and block of tokens.

Entry t of head h stands for ``x[h, t] * scale[h, t // block]``, with x int8 or float8 (e4m3: 4 bits of exponent, 3 of
mantissa, no infinity). A block's largest magnitude becomes the largest number of the kind. An int8 value is then off
by at most half its block's scale, an e4m3 value by at most a sixteenth of itself or 2^-10 of the scale: int8 is the
more exact where a block's values are of one size, e4m3 where they differ a hundredfold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: The kinds, and the largest number of each.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(x: Tensor, block: int, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Floating ``[H, L, D]`` as `dtype` ``[H, L, D]`` and its scales, float32 ``[H, ceil(L / block)]``.

    A block of zeros has scale 0. The values have to be finite.
    """
    heads, length, dim = x.shape
    largest = LARGEST[dtype]
    blocks = -(-length // block)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = F.pad(wide, (0, 0, 0, blocks * block - length)).view(heads, blocks, block, dim)
    scale = (parts.abs().amax((2, 3)) / largest).to(torch.float32)
    step = scale.where(scale > 0, 1.0)[..., None, None]
    # Clamped: a scale that rounds down, as far as to a denormal's half, would push its largest value over the edge.
    entries = (parts / step).clamp_(-largest, largest)
    if not dtype.is_floating_point:
        entries.round_()
    return entries.to(dtype).view(heads, blocks * block, dim)[:, :length].contiguous(), scale


def dequantize(x: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """What 8-bit ``[H, L, D]`` stands for, rounded once, to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    per_entry = scale.to(wide).repeat_interleave(block, dim=1)[:, : x.shape[1], None]
    return (x.to(wide) * per_entry).to(dtype)
