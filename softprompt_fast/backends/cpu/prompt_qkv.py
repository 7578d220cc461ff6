# SPDX-License-Identifier: Apache-2.0
"""prompt_qkv in C++: see ``csrc/cpu/linear_kernel.h``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.cpu import _tensors, prompt_concat
from softprompt_fast.backends.cpu._linear import PackedLinear, packed
from softprompt_fast.backends.norm import Norm
from softprompt_fast.backends.torch import prompt_qkv as torch_backend

_C = _tensors.extension()

# The gradients are the torch backend's: two products a weight and little else, which PyTorch does as well.
backward = torch_backend.backward


def reasons(*args: Any) -> list[str]:
    tensors = [*args[:3], *args[11], *args[12], args[16], args[17], args[20], args[21]]
    why = _tensors.refusals(*(x for x in tensors if x is not None and x.is_floating_point()))
    if args[9] not in _tensors.CODES:
        why.append(f"it gives float32, bfloat16 and float16, asked for {str(args[9]).removeprefix('torch.')}")
    if len({x.dtype for x in args[11]}) > 1:
        why.append("it takes weights of one dtype")
    return why + torch_backend.reasons(*args)


def forward(
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
    if prompt is None:
        residual = tokens.clone(memory_format=torch.contiguous_format)  # an op's results may not be its arguments
    else:
        concat = (tokens, table, prompt, prompt_offsets, prompt_index, own_start)
        residual = prompt_concat.forward(*concat, prompt_length, scale, prompt_scale, out_dtype, left)
    batch, length, _ = residual.shape
    heads = (q_heads, kv_heads, kv_heads)
    sections = heads if len(weights) == 3 else (sum(heads),)
    qkv = packed(weights, biases, heads=sections)
    key_dim, value_dim = (weights[i].shape[0] // sections[i] for i in ((1, 2) if len(weights) == 3 else (0, 0)))
    key = residual.new_empty(batch, length, kv_heads, key_dim).transpose(1, 2)
    value = residual.new_empty(batch, length, kv_heads, value_dim).transpose(1, 2)
    before = Norm(norm, norm_weight, norm_bias, norm_offset, eps)
    rotation = _tensors.as_float(cos), _tensors.as_float(sin)
    query = into_cache(residual, before, qkv, q_heads, kv_heads, *rotation, key, value, interleaved=interleaved)
    return query, key, value, residual


def into_cache(
    x: Tensor,
    norm: Norm,
    qkv: PackedLinear,
    q_heads: int,
    kv_heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    key_out: Tensor,
    value_out: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Tensor:
    """Queries of a decoder layer; its keys and values are written where they stay.

    Args:
        x: ``[B, S, H]``, dense. norm: before the projection. qkv: packed by head.
        cos, sin: float32 ``[B or 1, S, D_rot]``, dense; None: no rotation.
        key_out, value_out: ``[B, Hkv, S, D]``, any strides: views of the cache.
        q_norm, k_norm: over a head, before the rotation.

    Returns:
        ``[B, Hq, S, D]``, a view of ``[B, S, Hq, D]`` memory, in x's dtype.
    """
    batch, queries, hidden = x.shape
    query = x.new_empty(batch, queries, q_heads, key_out.shape[3]).transpose(1, 2)
    rotation = (0, 0, 0, 0)
    if cos is not None and sin is not None:
        rotation = (cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else cos.stride(0), cos.shape[2])
    _C.qkv(
        (x.data_ptr(), _tensors.CODES[x.dtype], hidden, 1),
        (batch, queries, q_heads, kv_heads),
        qkv.layer,
        norm.packed,
        qkv.bias_pointer,
        _tensors.view(query),
        _tensors.view(key_out),
        _tensors.view(value_out),
        None if q_norm is None else q_norm.packed,
        None if k_norm is None else k_norm.packed,
        *rotation,
        interleaved,
        torch.get_num_threads(),
    )
    return query
