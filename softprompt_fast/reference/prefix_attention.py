# SPDX-License-Identifier: Apache-2.0
"""Oracle of :func:`softprompt_fast.ops.prefix_attention`: every row gets its own copy of its prefix in front of its
own keys, then one masked softmax runs over the joined sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_offsets: Tensor | None = None,
    prefix_index: Tensor | None = None,
    own_start: Tensor | None = None,
    own_end: Tensor | None = None,
    query_start: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    prefix_key_scale: Tensor | None = None,
    prefix_value_scale: Tensor | None = None,
    prefix_scale_block: int | None = None,
    max_prefix_length: int | None = None,  # a hint: results don't depend on it
) -> tuple[Tensor, Tensor]:
    batch, q_heads, queries, head_dim = query.shape
    kv_heads, own = key.shape[1], key.shape[2]
    device, dtype = query.device, torch.promote_types(query.dtype, torch.float32)

    def per_row(values: Tensor | None, default: int) -> Tensor:  # [B]
        return torch.full((batch,), default, device=device) if values is None else values.to(torch.int64)

    own_start, own_end = per_row(own_start, 0), per_row(own_end, own)
    query_start = per_row(query_start, own - queries)

    # Each row's prefix, gathered from the pack: entry p of row b is packed entry first[b] + p, for p < length[b].
    packed = prefix_key.shape[1]
    if prefix_key_scale is not None and prefix_value_scale is not None and prefix_scale_block is not None:
        block = torch.arange(packed, device=device) // prefix_scale_block  # [L]
        prefix_key = prefix_key.to(dtype) * prefix_key_scale.to(dtype)[:, block, None]
        prefix_value = prefix_value.to(dtype) * prefix_value_scale.to(dtype)[:, block, None]
    prefix_index = per_row(prefix_index, 0)
    if prefix_offsets is None:
        prefix_offsets = torch.tensor([0, packed], device=device)
    prefix_offsets = prefix_offsets.to(torch.int64)
    first = prefix_offsets[:-1][prefix_index.clamp(min=0)]  # [B]
    length = (prefix_offsets[1:][prefix_index.clamp(min=0)] - first).masked_fill(prefix_index < 0, 0)  # [B]
    longest = packed if bias is None else bias.shape[-1] - own
    entry = torch.arange(longest, device=device)  # [L]
    gather = (first[:, None] + entry).clamp(max=max(packed - 1, 0))  # [B, L]
    row_prefix_key = prefix_key[:, gather].transpose(0, 1)  # [B, Hkv, L, D]
    row_prefix_value = prefix_value[:, gather].transpose(0, 1)

    keys = torch.cat([row_prefix_key, key], dim=2).to(dtype).repeat_interleave(q_heads // kv_heads, dim=1)
    values = torch.cat([row_prefix_value, value], dim=2).to(dtype).repeat_interleave(q_heads // kv_heads, dim=1)
    scores = query.to(dtype) @ keys.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)

    own_key = torch.arange(own, device=device)  # [T]
    position = query_start[:, None] + torch.arange(queries, device=device)  # [B, S]: a query's place among own keys
    sees_prefix = (entry < length[:, None])[:, None, :].expand(batch, queries, longest)  # [B, S, L]
    sees_own = ((own_key >= own_start[:, None]) & (own_key < own_end[:, None]))[:, None, :]  # [B, 1, T]
    if causal:
        sees_own = sees_own & (own_key <= position[..., None])
    if sliding_window is not None:
        # Counted over "prefix, then own tokens from own_start".
        absolute = length[:, None] + position - own_start[:, None]  # [B, S]
        sees_prefix = sees_prefix & (absolute[..., None] - entry < sliding_window)
        own_absolute = length[:, None] + own_key - own_start[:, None]  # [B, T]
        sees_own = sees_own & (absolute[..., None] - own_absolute[:, None, :] < sliding_window)
    visible = torch.cat([sees_prefix, sees_own.expand(batch, queries, own)], dim=-1)[:, None]  # [B, 1, S, L + T]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        # A sink is one more logit, whose value vector is zero.
        sink = sinks.to(dtype)[None, :, None, None].expand(batch, q_heads, queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
        values = torch.cat([values, values.new_zeros(batch, q_heads, 1, values.shape[-1])], dim=2)

    # A query that sees nothing: compute with finite scores, so that no NaN enters the graph, and mask the results.
    empty = torch.isneginf(scores).all(dim=-1, keepdim=True)  # [B, Hq, S, 1]
    scores = scores.masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = (scores - lse).exp().masked_fill(empty, 0.0) @ values
    return out.to(query.dtype), lse.masked_fill(empty, float("-inf")).squeeze(-1)
