# SPDX-License-Identifier: Apache-2.0
"""prompt_qkv in pure PyTorch: PyTorch's fused norms, one projection each for q, k and v into the memory that attention
reads, and the rotation in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_fast.backends.torch import prompt_concat


def reasons(*args: Any) -> list[str]:
    named = {"table": args[1], "norm_weight": args[16], "norm_bias": args[17], "cos": args[20], "sin": args[21]}
    frozen = [*named.items(), *(("weights", w) for w in args[11]), *(("biases", b) for b in args[12])]
    trained = dict.fromkeys(name for name, x in frozen if x is not None and x.requires_grad)
    return [f"it gives no gradient for {name}" for name in trained] if torch.is_grad_enabled() else []


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
        residual = tokens.clone()  # an op's results may not be its arguments
    else:
        concat = (tokens, table, prompt, prompt_offsets, prompt_index, own_start)
        residual = prompt_concat.forward(*concat, prompt_length, scale, prompt_scale, out_dtype, left)
    dtype = _compute_dtype(residual)
    hidden = residual.to(dtype)
    gain = None if norm_weight is None else norm_weight.to(dtype)
    if gain is not None and norm_offset:
        gain = gain + norm_offset
    if norm == "layer":
        hidden = F.layer_norm(hidden, hidden.shape[-1:], gain, None if norm_bias is None else norm_bias.to(dtype), eps)
    elif norm == "rms":
        hidden = F.rms_norm(hidden, hidden.shape[-1:], gain, eps)
    heads = (q_heads, kv_heads, kv_heads)
    results = []
    bias_of = _split(biases, heads) if biases else (None, None, None)
    for weight, bias, count in zip(_split(weights, heads), bias_of, heads, strict=True):
        projected = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
        results.append(projected.unflatten(-1, (count, weight.shape[0] // count)))  # [B, S, heads, D]
    if cos is not None and sin is not None:
        cos, sin = cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
        for x in results[:2]:
            _rotate_(x, cos, sin, interleaved)
    query, key, value = (x.to(residual.dtype).transpose(1, 2) for x in results)
    return query, key, value, residual


def backward(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_residual: Tensor | None,
    residual: Tensor,
    tokens: Tensor,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    left: bool,
    weights: Sequence[Tensor],
    q_heads: int,
    kv_heads: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_offset: float,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of tokens (where they are hidden states or embeddings) and of prompt."""
    dtype = _compute_dtype(residual)
    if cos is not None and sin is not None:
        cos, sin = cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
    grad_hidden = torch.zeros(residual.shape, dtype=dtype, device=residual.device)
    projections = zip((grad_query, grad_key, grad_value), _split(weights, (q_heads, kv_heads, kv_heads)), strict=True)
    for place, (grad, weight) in enumerate(projections):
        if grad is None:
            continue
        grad = grad.transpose(1, 2).to(dtype, copy=True, memory_format=torch.contiguous_format)  # [B, S, heads, D]
        if place < 2 and cos is not None and sin is not None:
            _rotate_(grad, cos, sin, interleaved, back=True)
        grad_hidden += grad.flatten(2) @ weight.to(dtype)
    if norm != "none":
        # y = gain * x_hat with x_hat = (x - mean) / deviation: the gradient of x is that of x_hat without its parts
        # along x_hat (and, LayerNorm, along the constant vector), over the deviation.
        hidden = residual.to(dtype)
        if norm_weight is not None:
            grad_hidden *= norm_weight.to(dtype) + norm_offset
        if norm == "layer":
            hidden = hidden - hidden.mean(-1, keepdim=True)
            grad_hidden -= grad_hidden.mean(-1, keepdim=True)
        inverse = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
        normed = hidden * inverse
        grad_hidden = (grad_hidden - normed * (grad_hidden * normed).mean(-1, keepdim=True)) * inverse
    if grad_residual is not None:
        grad_hidden = grad_hidden + grad_residual
    if prompt is None:
        return grad_hidden.to(tokens.dtype), None
    grad_prompt, grad_tokens = prompt_concat.backward(
        grad_hidden,
        tokens,
        prompt,
        prompt_offsets,
        prompt_index,
        own_start,
        prompt_length,
        scale,
        prompt_scale,
        left,
    )
    return grad_tokens, grad_prompt


def _compute_dtype(x: Tensor) -> torch.dtype:
    # On an accelerator a 16-bit projection is the fast one; many CPUs have no 16-bit units and are far slower in it.
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype


def _split(parts: Sequence[Tensor], heads: tuple[int, int, int]) -> Sequence[Tensor]:
    """Weights or biases of q, k and v: given apart, or as one tensor with q's rows first (the pieces are views)."""
    if len(parts) == 3:
        return parts
    head_dim = parts[0].shape[0] // sum(heads)
    return parts[0].split([count * head_dim for count in heads])


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool = False) -> None:
    """Rotate the first ``cos.shape[-1]`` elements of every head in place; ``back``: the transposed rotation."""
    size = cos.shape[-1]
    if interleaved:
        one, two = slice(0, size, 2), slice(1, size, 2)
    else:
        one, two = slice(0, size // 2), slice(size // 2, size)
    first, second = x[..., one], x[..., two]
    if back:
        new = first * cos[..., one] + second * sin[..., two], second * cos[..., two] - first * sin[..., one]
    else:
        new = first * cos[..., one] - second * sin[..., one], second * cos[..., two] + first * sin[..., two]
    x[..., one], x[..., two] = new
