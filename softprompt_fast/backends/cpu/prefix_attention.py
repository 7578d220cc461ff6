# SPDX-License-Identifier: Apache-2.0
"""prefix_attention in C++: see ``csrc/cpu/prefix_attention_kernel.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.cpu import _tensors

_C = _tensors.extension()


def reasons(*args: Any) -> list[str]:
    why = _tensors.refusals(*args[:5], args[14], args[15])
    bias = args[15]
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        why.append("it gives no gradient for bias")
    return why


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_offsets: Tensor | None,
    prefix_index: Tensor | None,
    own_start: Tensor | None,
    own_end: Tensor | None,
    query_start: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    prefix_key_scale: Tensor | None = None,
    prefix_value_scale: Tensor | None = None,
    prefix_scale_block: int | None = None,
    max_prefix_length: int | None = None,  # lengths can be read here
) -> tuple[Tensor, Tensor]:
    batch, q_heads, queries, _ = query.shape
    v_dim = value.shape[3]
    strides = (queries * q_heads * v_dim, v_dim, q_heads * v_dim, 1)  # [B, S, Hq, Dv] memory
    out = torch.empty_strided((batch, q_heads, queries, v_dim), strides, dtype=query.dtype)
    lse = torch.empty((batch, q_heads, queries), dtype=torch.float32)
    rows = [_tensors.dense(x) for x in (prefix_offsets, prefix_index, own_start, own_end, query_start)]
    sinks = _tensors.as_float(sinks)
    key_scale, value_scale = _tensors.dense(prefix_key_scale), _tensors.dense(prefix_value_scale)
    scales = None
    if key_scale is not None and value_scale is not None:
        scales = (key_scale.data_ptr(), value_scale.data_ptr(), key_scale.shape[1], prefix_scale_block)
    call = (query, key, value, prefix_key, prefix_value, out, lse, rows, scale, causal, sliding_window, softcap)
    _C.prefix_attention(
        *_arguments(*call, sinks, bias),
        scales,
        torch.get_num_threads(),
    )
    return out, lse


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: list[Tensor | None],
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> tuple[Any, ...]:
    """What the extension's forward and backward both begin with. They are pointers: the caller keeps the tensors."""
    batch, q_heads, queries, head_dim = query.shape
    kv_heads, own, v_dim = value.shape[1:]
    return (
        *(_tensors.view(x) for x in (query, key, value, prefix_key, prefix_value, out)),
        lse.data_ptr(),
        (batch, q_heads, kv_heads, queries, own, prefix_key.shape[1], head_dim, v_dim),
        tuple(_tensors.indexes(x) for x in rows),
        scale,
        causal,
        sliding_window or 0,
        softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
        None if bias is None else _tensors.view(bias.expand(batch, q_heads, queries, -1)),
        0 if bias is None else bias.shape[3] - own,
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_offsets: Tensor | None,
    prefix_index: Tensor | None,
    own_start: Tensor | None,
    own_end: Tensor | None,
    query_start: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    batch, q_heads, queries, head_dim = query.shape
    grad_query = query.new_empty(batch, queries, q_heads, head_dim).transpose(1, 2)
    # The kernel writes the gradients of every row's own keys, where there are rows of queries; of a pack those in use.
    grad_key, grad_value = (x.new_empty(x.shape) if lse.numel() else x.new_zeros(x.shape) for x in (key, value))
    grad_prefix_key, grad_prefix_value = (x.new_zeros(x.shape) for x in (prefix_key, prefix_value))
    grads = (grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value)
    lse, grad_lse = lse.contiguous(), _tensors.as_float(grad_lse)
    delta = None if sinks is None else torch.empty_like(lse)
    rows = [_tensors.dense(x) for x in (prefix_offsets, prefix_index, own_start, own_end, query_start)]
    call = (query, key, value, prefix_key, prefix_value, out, lse, rows, scale, causal, sliding_window, softcap)
    _C.prefix_attention_backward(
        *_arguments(*call, None, bias),  # the sinks are in lse
        _tensors.view(grad_out),
        0 if grad_lse is None else grad_lse.data_ptr(),
        tuple(_tensors.view(x) for x in grads),
        0 if delta is None else delta.data_ptr(),
        torch.get_num_threads(),
    )
    if sinks is None or delta is None:
        return *grads, None
    # A sink's probability is exp(sink - lse), its value zero: only -delta is left of p (grad_out . value - delta).
    weights = (sinks.to(torch.float64).view(1, -1, 1) - lse).exp()
    return *grads, -(weights * delta).sum((0, 2)).to(sinks.dtype)
