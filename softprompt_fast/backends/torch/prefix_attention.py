# SPDX-License-Identifier: Apache-2.0
"""prefix_attention in pure PyTorch.

All rows that use a prefix stack their queries into one ``[Hkv, B * G * S, D]`` block, so that the one copy of the
prefix is read once, by a dense product (Hydragen, Juravsky et al., 2024); every row then attends to its own keys, and
the two partial softmaxes merge through their log-sum-exps. The backward needs no merge: with the final LSE,
``exp(score - lse)`` is a key's probability whichever part it is in, so every part gives its share of each gradient
alone (as in ring attention).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.heuristics import join_keys, score_rows
from softprompt_fast.backends.quantized import dequantize
from softprompt_fast.backends.torch._visibility import Part, Visibility

# PyTorch's own tiled CPU kernels. Unlike scaled_dot_product_attention they return the LSE, and the backward takes any
# LSE.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def reasons(*args: Any) -> list[str]:
    bias = args[15]
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return ["it gives no gradient for bias"]
    return []


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
    max_prefix_length: int | None = None,  # its work is not planned by lengths
) -> tuple[Tensor, Tensor]:
    batch, q_heads, queries, head_dim = query.shape
    kv_heads, own = key.shape[1], key.shape[2]
    groups = q_heads // kv_heads
    result_dtype, dtype = query.dtype, torch.promote_types(query.dtype, torch.float32)
    if query.numel() == 0:
        out = query.new_empty(batch, queries, q_heads, value.shape[-1]).transpose(1, 2)
        return out, query.new_empty(batch, q_heads, queries, dtype=dtype)
    if prefix_key_scale is not None and prefix_value_scale is not None and prefix_scale_block is not None:
        prefix_key = dequantize(prefix_key, prefix_key_scale, prefix_scale_block, dtype)
        prefix_value = dequantize(prefix_value, prefix_value_scale, prefix_scale_block, dtype)
    query = _operand(query, dtype)
    parts = Visibility(
        batch, queries, own, prefix_key.shape[1], query.device, prefix_offsets, prefix_index, own_start, own_end,
        query_start, causal, sliding_window, bias,
    ).parts()  # fmt: skip
    runs = [(part, *_keys(part, key, value, prefix_key, prefix_value, dtype)) for part in parts]
    if queries == 1 and len(runs) == 2 and sinks is None and _flash_serves(query, value, softcap):
        (own_part, own_key, own_value), (prefix_part, packed_key, packed_value) = runs
        if (
            own_part.plain
            and prefix_part.plain
            and join_keys(batch, own_part.size + prefix_part.size, 2 * kv_heads * head_dim)
        ):
            key = torch.cat([packed_key.expand(batch, -1, -1, -1), own_key], 2)
            value = torch.cat([packed_value.expand(batch, -1, -1, -1), own_value], 2)
            out, lse = _flash(query, key, value, 0.0, False, scale=scale)  # in [B, S, Hq, D] memory
            return out.to(result_dtype), lse

    result = query.new_empty(batch, queries, q_heads, value.shape[-1], dtype=result_dtype).transpose(1, 2)
    lse = query.new_empty(batch, q_heads, queries)
    # The state so far, [B, Hkv, G, S, Dv] and [B, Hkv, G, S]; what is final is written to the result's own memory.
    out = result if result.dtype == dtype else torch.empty_like(result, dtype=dtype)
    final = out.unflatten(1, (kv_heads, groups)), lse.unflatten(1, (kv_heads, groups))
    state: tuple[Tensor, Tensor] | None = None
    for part, part_key, part_value in runs:
        mask = _mask(part, batch, kv_heads, groups, queries, dtype)
        packed = _attend(_pack(query, part, kv_heads), part_key, part_value, mask, part.causal, scale, softcap)
        part_out, part_lse = (_unpack(x, part, kv_heads, groups, queries) for x in packed)
        if part.rows is not None:
            if state is None:
                state = final[0].zero_(), final[1].fill_(-math.inf)
            merged = _merge(state[0][part.rows], state[1][part.rows], part_out, part_lse)
            state[0][part.rows], state[1][part.rows] = merged
        elif state is None:
            state = part_out, part_lse
        else:
            state = _merge(*state, part_out, part_lse, final)
    if state is None:
        state = final[0].zero_(), final[1].fill_(-math.inf)
    if sinks is not None:
        # A sink is one more logit with a zero value vector.
        sink = sinks.to(dtype).view(1, kv_heads, -1, 1)
        state = state[0] * torch.sigmoid(state[1] - sink).unsqueeze(-1), torch.logaddexp(state[1], sink)
    if state[0] is not final[0]:
        final[0].copy_(state[0])
        final[1].copy_(state[1])
    return result if out is result else result.copy_(out), lse


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
    batch, q_heads, queries, _ = query.shape
    kv_heads, own = key.shape[1], key.shape[2]
    groups, query_dtype, dtype = q_heads // kv_heads, query.dtype, lse.dtype
    grad_query = torch.zeros(batch, queries, q_heads, query.shape[-1], dtype=dtype, device=query.device).transpose(
        1, 2
    )
    grad_heads = grad_query.unflatten(1, (kv_heads, groups))
    grads = [
        grad_query,
        *(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value, prefix_key, prefix_value)),
    ]
    grad_sinks = None if sinks is None else torch.zeros_like(sinks)
    if lse.numel():
        query, grad_out, out = (_operand(x, dtype) for x in (query, grad_out, out))
        # The CPU kernel works delta out from out by itself, so it cannot take a gradient of the LSE.
        flash = grad_lse is None and _flash_serves(query, value, softcap)
        delta = (grad_out * out).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse
        if sinks is not None:
            # Its probability is exp(sink - lse), its value zero: only -delta is left of p (grad_out . value - delta).
            grad_sinks = -((sinks.to(dtype).view(1, -1, 1) - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)
        lse = _finite(lse)
        parts = Visibility(
            batch, queries, own, prefix_key.shape[1], query.device, prefix_offsets, prefix_index, own_start, own_end,
            query_start, causal, sliding_window, bias,
        ).parts()  # fmt: skip
        for part in parts:
            part_key, part_value = _keys(part, key, value, prefix_key, prefix_value, dtype)
            part_mask = _mask(part, batch, kv_heads, groups, queries, dtype)
            part_grad, part_query, part_lse = (_pack(x, part, kv_heads) for x in (grad_out, query, lse))
            if flash:
                grad_part = _flash_backward(
                    part_grad, part_query, part_key, part_value, _pack(out, part, kv_heads), part_lse, 0.0,
                    part.causal, attn_mask=part_mask, scale=scale,
                )  # fmt: skip
            else:
                grad_part = _attend_backward(
                    part_grad, part_query, part_key, part_value, part_lse, _pack(delta, part, kv_heads), part_mask,
                    part.causal, scale, softcap,
                )  # fmt: skip
            grad_part_query = _unpack(grad_part[0], part, kv_heads, groups, queries)
            if part.rows is None:
                grad_heads += grad_part_query
            else:
                grad_heads[part.rows] += grad_part_query
            for total, grad in zip(grads[3:] if part.shared else grads[1:3], grad_part[1:], strict=True):
                total[..., part.start : part.stop, :] += grad[0] if part.shared else grad
    grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value = (grad.to(query_dtype) for grad in grads)
    return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_sinks


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    # 16-bit inputs are computed in float32: scores rounded to 16 bits would double the error of the result, and CPUs
    # without 16-bit units are a hundred times slower in them. The CPU kernel takes the last dimension to be dense.
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _keys(
    part: Part, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The part's keys and values, ``[B, Hkv, T, ...]`` or, shared, ``[1, Hkv, T, ...]``."""
    if part.shared:
        key, value = prefix_key[None], prefix_value[None]
    if part.size != key.shape[2]:
        key, value = key[:, :, part.start : part.stop], value[:, :, part.start : part.stop]
    return _operand(key, dtype), _operand(value, dtype)


def _pack(x: Tensor, part: Part, kv_heads: int) -> Tensor:
    """Lay ``[B, Hq, S, ...]`` out for the part's attention, ``[n, h, M, ...]``.

    Shared keys: ``[1, Hkv, b * G * S, ...]``, all rows as one block of queries. Own keys: ``[B, Hkv, G, ...]`` where a
    row has a single query (a view; a key is then read once and not once a query head), else ``[B, Hq, S, ...]`` as it
    is.
    """
    if part.shared:
        x = x if part.rows is None else x[part.rows]
        return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 3).unsqueeze(0)
    return x.squeeze(2).unflatten(1, (kv_heads, -1)) if x.shape[2] == 1 else x


def _unpack(x: Tensor, part: Part, kv_heads: int, groups: int, queries: int) -> Tensor:
    """The inverse of :func:`_pack`, as a view ``[b, Hkv, G, S, ...]``."""
    if part.shared:
        return x[0].unflatten(1, (-1, groups, queries)).transpose(0, 1)
    return x.unsqueeze(3) if queries == 1 else x.unflatten(1, (kv_heads, groups))


def _mask(part: Part, batch: int, kv_heads: int, groups: int, queries: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the part's packed scores: broadcasts to ``[n, h, M, T]``."""
    mask = None if part.bias is None else part.bias.to(dtype)  # [b or 1, Hq or 1, S or 1, T]
    if part.hidden is not None:
        hidden = part.hidden.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if mask is None else mask
        mask = mask.masked_fill(hidden, -math.inf)
    if mask is None:
        return None
    if not part.shared:
        return _pack(mask, part, kv_heads) if mask.shape[1] > 1 else mask
    rows = batch if part.rows is None else len(part.rows)
    if mask.shape[1] == 1:
        return mask.expand(rows, groups, queries, -1).flatten(0, 2)[None, None]
    return _pack(mask.expand(rows, -1, queries, -1), Part(True, 0, 0), kv_heads)


def _flash_serves(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    return query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to one run of keys: out ``[n, h, M, Dv]`` and lse ``[n, h, M]``."""
    if _flash_serves(query, value, softcap):
        out, lse = _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        if mask is not None:  # the kernel says lse = 0 for a query that sees nothing
            lse = lse.masked_fill(mask.amax(-1) == -math.inf, -math.inf)
        return out, lse
    out, lse = query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1])
    for chunk, _, scores, _ in _score_chunks(query, key, mask, causal, scale, softcap):
        chunk_lse = torch.logsumexp(scores, -1)
        chunk_out = scores.sub_(_finite(chunk_lse).unsqueeze(-1)).exp_() @ value
        lse[:, :, chunk] = chunk_lse.view_as(lse[:, :, chunk])
        out[:, :, chunk] = chunk_out.view_as(out[:, :, chunk])
    return out, lse


def _attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed queries, keys and values through one part. With p = exp(score - lse), lse over all parts,
    and delta = sum(grad_out * out) - grad_lse, the gradient of a score is p (grad_out . value - delta)."""
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    by_kv_head = query.shape[0], key.shape[1], -1
    for chunk, chunk_query, scores, slope in _score_chunks(query, key, mask, causal, scale, softcap):
        chunk_grad = grad_out[:, :, chunk].reshape(*by_kv_head, value.shape[-1])
        probs = scores.sub_(lse[:, :, chunk].reshape(*by_kv_head, 1)).exp_()
        grad_value += probs.transpose(-1, -2) @ chunk_grad
        grad_scores = (chunk_grad @ value.transpose(-1, -2)).sub_(delta[:, :, chunk].reshape(*by_kv_head, 1))
        grad_scores = grad_scores.mul_(probs).mul_(scale if slope is None else slope.mul_(scale))
        grad_key += grad_scores.transpose(-1, -2) @ chunk_query
        grad_query[:, :, chunk] = (grad_scores @ key).view_as(grad_query[:, :, chunk])
    return grad_query, grad_key, grad_value


def _score_chunks(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Yield, for runs of M that bound the memory, the slice of M, its queries ``[n, Hkv, g * m, D]``, their scores
    ``[n, Hkv, g * m, T]`` and, with a softcap, the slope of the cap there."""
    n, heads, rows, head_dim = query.shape
    keys = key.shape[2]
    step = score_rows(n * heads, rows, keys)
    for begin in range(0, rows, step):
        chunk = slice(begin, min(begin + step, rows))
        chunk_query = query[:, :, chunk].reshape(n, key.shape[1], -1, head_dim)
        scores = (chunk_query @ key.transpose(-1, -2)).mul_(scale)
        slope = None
        if softcap is not None:
            scores = scores.div_(softcap).tanh_()
            slope = 1 - scores.square()
            scores = scores.mul_(softcap)
        by_head = scores.view(n, heads, -1, keys)
        if mask is not None:
            by_head += mask if mask.shape[2] == 1 else mask[:, :, chunk]
        if causal:
            last = torch.arange(chunk.start, chunk.stop, device=query.device)[:, None]
            by_head.masked_fill_(torch.arange(keys, device=query.device) > last, -math.inf)
        yield chunk, chunk_query, scores, slope


def _merge(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, final: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    weight = torch.sigmoid(lse_b - _finite(lse_a)).unsqueeze(-1)
    out, lse = (None, None) if final is None else final
    return torch.lerp(out_a, out_b, weight, out=out), torch.logaddexp(lse_a, lse_b, out=lse)


def _finite(lse: Tensor) -> Tensor:
    """Where a query sees nothing (-inf) - (-inf) would be NaN; against any finite stand-in its weights are 0."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)
