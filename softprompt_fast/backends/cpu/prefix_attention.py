# SPDX-License-Identifier: Apache-2.0
"""prefix_attention in C++: see ``csrc/cpu/prefix_attention_kernel.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import native_ops
from softprompt_fast.backends.cpu import _tensors
from softprompt_fast.backends.native_ops import prefix_attention_results as results

_C = _tensors.extension()
NATIVE = native_ops.op("prefix_attention", "cpu", results)
_OUT = native_ops.op("prefix_attention.out", "cpu")
_BACKWARD = native_ops.op("prefix_attention_backward", "cpu")


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
    out, lse = results(query, key, value)
    done = _OUT(
        *(query, key, value, prefix_key, prefix_value),
        *native_ops.dense(prefix_offsets, prefix_index, own_start, own_end, query_start),
        *(scale, causal, sliding_window, softcap, _tensors.as_float(sinks), bias),
        *(*native_ops.dense(prefix_key_scale, prefix_value_scale), prefix_scale_block, None),
        out=out,
        lse=lse,
    )
    native_ops.served(_C, done)
    return out, lse


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
    done = _BACKWARD(
        *(grad_out, grad_lse, query, key, value, prefix_key, prefix_value),
        *native_ops.dense(prefix_offsets, prefix_index, own_start, own_end, query_start),
        *(scale, causal, sliding_window, softcap, None, bias),  # the sinks are in lse
        *(None, None, None, None, out, lse, *grads, delta),
    )
    native_ops.served(_C, done)
    if sinks is None or delta is None:
        return *grads, None
    # A sink's probability is exp(sink - lse), its value zero: only -delta is left of p (grad_out . value - delta).
    weights = (sinks.to(torch.float64).view(1, -1, 1) - lse).exp()
    return *grads, -(weights * delta).sum((0, 2)).to(sinks.dtype)
