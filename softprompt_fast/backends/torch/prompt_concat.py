# SPDX-License-Identifier: Apache-2.0
"""prompt_concat in pure PyTorch: slices where all rows look alike, one gather from each source where they differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reasons(*args: Any) -> list[str]:
    table = args[1]
    if table is not None and table.requires_grad and torch.is_grad_enabled():
        return ["it gives no gradient for table"]
    return []


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
    out = prompt.new_empty(batch, prompt_length + own, prompt.shape[-1], dtype=out_dtype)
    if out.numel() == 0:
        return out
    if prompt_offsets is None and prompt_index is None and own_start is None:
        out[:, :prompt_length] = _scaled(prompt, prompt_scale)
        out[:, prompt_length:] = _scaled(tokens if table is None else torch.embedding(table, tokens), scale)
        return out
    from_prompt, from_tokens, entry, token = _slots(
        batch, own, prompt, prompt_offsets, prompt_index, own_start, prompt_length, left
    )
    out.zero_()
    if prompt.shape[0]:
        torch.where(from_prompt, _scaled(prompt[entry], prompt_scale).to(out_dtype), out, out=out)
    if own:
        row = torch.arange(batch, device=tokens.device)[:, None]
        if table is None:
            embeds = tokens[row, token]
        else:
            embeds = torch.embedding(table, tokens[row, token].where(from_tokens[..., 0], 0))
        torch.where(from_tokens, _scaled(embeds, scale).to(out_dtype), out, out=out)
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
    dtype = torch.promote_types(grad_out.dtype, torch.float32)  # many rows add up: not in 16 bits
    embeds = tokens.is_floating_point()
    if prompt_offsets is None and prompt_index is None and own_start is None:
        grad_prompt = grad_out[:, :prompt_length].sum(0, dtype=dtype).mul_(prompt_scale)
        grad_tokens = (grad_out[:, prompt_length:].to(dtype) * scale).to(tokens.dtype) if embeds else None
        return grad_prompt.to(prompt.dtype), grad_tokens
    from_prompt, from_tokens, entry, token = _slots(
        batch, own, prompt, prompt_offsets, prompt_index, own_start, prompt_length, left
    )
    # Slots that hold no virtual token add to one spare entry behind the last: no boolean index, so no wait for the
    # device.
    spare = torch.where(from_prompt[..., 0], entry, prompt.shape[0]).flatten()
    grad_prompt = torch.zeros(prompt.shape[0] + 1, prompt.shape[1], dtype=dtype, device=prompt.device)
    grad_prompt = grad_prompt.index_add_(0, spare, grad_out.to(dtype).flatten(0, 1))[:-1].mul_(prompt_scale)
    grad_tokens = None
    if embeds:
        spare = torch.where(from_tokens[..., 0], token, own)[..., None].expand_as(grad_out)
        grad_tokens = torch.zeros(batch, own + 1, prompt.shape[1], dtype=dtype, device=prompt.device)
        grad_tokens = grad_tokens.scatter_add_(1, spare, grad_out.to(dtype))[:, :-1].mul_(scale).to(tokens.dtype)
    return grad_prompt.to(prompt.dtype), grad_tokens


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.to(torch.promote_types(x.dtype, torch.float32)) * scale


def _slots(
    batch: int,
    own: int,
    prompt: Tensor,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every slot of ``[B, prompt_length + S]`` holds: masks ``[..., 1]`` for "virtual token" and "own token", and
    the index of each into ``prompt`` and into the row's tokens (in range everywhere, meaningful under its mask)."""
    device = prompt.device
    zero = torch.zeros(batch, dtype=torch.int64, device=device)
    index = zero if prompt_index is None else prompt_index.to(torch.int64)
    start = zero if own_start is None else own_start.to(torch.int64)
    if prompt_offsets is None:
        first, length = zero, torch.full_like(zero, prompt.shape[0])
    else:
        first = prompt_offsets[:-1].to(torch.int64)[index.clamp(min=0)]
        length = prompt_offsets[1:].to(torch.int64)[index.clamp(min=0)] - first
    length = length.where(index >= 0, 0)
    lead = start + (prompt_length - length if left else 0)  # empty slots before the prompt
    place = (
        torch.arange(prompt_length + own, device=device) - lead[:, None]
    )  # [B, P + S]: 0 at the first virtual token
    token = place - length[:, None] + start[:, None]
    from_prompt = (place >= 0) & (place < length[:, None])
    from_tokens = (place >= length[:, None]) & (token < own)
    entry = (place + first[:, None]).clamp(0, max(prompt.shape[0] - 1, 0))
    return from_prompt[..., None], from_tokens[..., None], entry, token.clamp(0, max(own - 1, 0))
