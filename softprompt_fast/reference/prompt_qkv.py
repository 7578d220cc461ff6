# SPDX-License-Identifier: Apache-2.0
"""Oracle of :func:`softprompt_fast.ops.prompt_qkv`: concatenate, normalise, project, rotate, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt_fast.reference.prompt_concat import prompt_concat


def prompt_qkv(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    out_dtype: torch.dtype,
    left: bool,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    q_heads: int,
    kv_heads: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_offset: float,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual = tokens
    if prompt is not None:
        concat = (tokens, table, prompt, prompt_offsets, prompt_index, own_start)
        residual = prompt_concat(*concat, prompt_length, scale, prompt_scale, out_dtype, left)
    dtype = torch.promote_types(residual.dtype, torch.float32)

    hidden = residual.to(dtype)
    if norm == "layer":
        hidden = hidden - hidden.mean(-1, keepdim=True)
    if norm != "none":
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    if norm_weight is not None:
        hidden = hidden * (norm_offset + norm_weight.to(dtype))
    if norm_bias is not None:
        hidden = hidden + norm_bias.to(dtype)

    projected = hidden @ torch.cat([weight.to(dtype) for weight in weights]).T
    if biases:
        projected = projected + torch.cat([bias.to(dtype) for bias in biases])
    if len(weights) == 3:
        query, key, value = projected.split([len(weight) for weight in weights], dim=-1)
    else:
        head_dim = projected.shape[-1] // (q_heads + 2 * kv_heads)
        query, key, value = projected.split([q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    query = query.unflatten(-1, (q_heads, -1)).transpose(1, 2)  # [B, Hq, S, D]
    key = key.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    value = value.unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    if cos is not None and sin is not None:
        query, key = (_rotate(x, cos.to(dtype), sin.to(dtype), interleaved) for x in (query, key))
    return query.to(residual.dtype), key.to(residual.dtype), value.to(residual.dtype), residual


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first ``cos.shape[-1]`` elements of every head, in pairs, by their position's angles."""
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:  # pairs (0, 1), (2, 3), ...
        quarter = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    else:  # pairs (0, R / 2), (1, R / 2 + 1), ...
        first, second = turned.chunk(2, dim=-1)
        quarter = torch.cat([-second, first], dim=-1)
    turned = turned * cos[:, None] + quarter * sin[:, None]
    return torch.cat([turned, passed], dim=-1)
