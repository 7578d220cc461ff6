# SPDX-License-Identifier: Apache-2.0
"""Oracle of :func:`softprompt_fast.ops.prompt_concat`: every row is put together from its pieces."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_concat(
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
    width = prompt.shape[-1]
    compute = torch.promote_types(out_dtype, torch.float32)
    offsets = [0, prompt.shape[0]] if prompt_offsets is None else prompt_offsets.tolist()
    index = [0] * batch if prompt_index is None else prompt_index.tolist()
    start = [0] * batch if own_start is None else own_start.tolist()
    pieces = [prompt[:0].to(compute)]  # so that there is something to join without rows too
    for row in range(batch):
        own_tokens = tokens[row, start[row] :]
        embeds = own_tokens if table is None else table[own_tokens]  # [S - start, H]
        virtual = prompt[:0] if index[row] < 0 else prompt[offsets[index[row]] : offsets[index[row] + 1]]  # [P, H]
        ragged = prompt.new_zeros(prompt_length - len(virtual), width, dtype=compute)
        padding = prompt.new_zeros(start[row], width, dtype=compute)
        joined = [padding, virtual.to(compute) * prompt_scale, embeds.to(compute) * scale]
        pieces += [ragged, *joined] if left else [*joined, ragged]
    return torch.cat(pieces).view(batch, prompt_length + own, width).to(out_dtype)
