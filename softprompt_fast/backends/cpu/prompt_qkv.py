# SPDX-License-Identifier: Apache-2.0
"""Norm, projection and rotation into the cache. A stand-in in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.cpu import _tensors
from softprompt_fast.backends.cpu._linear import Norm, PackedLinear, linear

_tensors.extension()


def reasons(*args: Any) -> list[str]:
    return ["a stand-in"]


def into_cache(
    x: Tensor,
    norm: Norm,
    qkv: PackedLinear,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
    key_out: Tensor,
    value_out: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Tensor:
    heads = linear(x, qkv, norm=norm).unflatten(-1, (q_heads + 2 * kv_heads, head_dim))
    query, key, value = heads.split([q_heads, kv_heads, kv_heads], dim=2)
    query = query if q_norm is None else q_norm(query)
    key = key if k_norm is None else k_norm(key)
    if cos is not None and sin is not None:
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    key_out.copy_(key.transpose(1, 2))
    value_out.copy_(value.transpose(1, 2))
    return query.contiguous().transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of the first ``cos.shape[-1]`` features."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]
    return torch.cat([turned, rest], dim=-1)
