# SPDX-License-Identifier: Apache-2.0
"""How one prefix reaches the self-attention of a transformers encoder-decoder's decoder.

As in :mod:`softprompt_fast.integrations.transformers` the prefix travels as keyword ``soft_prompt``. Here it passes
the encoder and cross-attention too, which must not see it, and the decoder may count positions by its cache's length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from softprompt_fast.integrations.transformers import KEYWORD, register
from softprompt_fast.ops import prefix_attention


@dataclass
class DecoderPrefix:
    """What a decoder's self-attention attends to besides its own tokens, passed as keyword ``soft_prompt``.

    Attributes:
        keys, values: per layer ``[H, P, D]``.
        relative: the module that computes T5's relative position bias (later layers reuse the first one's), or None.
        backend: backend to force, None for "auto".
        reached: layers that attended to their prefix.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    relative: nn.Module | None
    backend: str | None = None
    reached: set[int] = field(default_factory=set)
    _bias: Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    def bias(self, module: Any, num_queries: int, num_keys: int) -> Tensor | None:
        """Additive bias ``[1, H, S, P + T]`` over prefix and own keys, as if the prefix were the first keys."""
        if getattr(module, "has_relative_attention_bias", False):  # the first layer, or in umt5 every layer
            return _relative_bias(module, num_queries, self.length + num_keys)
        if self.relative is None:
            return None
        if self._bias is None or self._bias.shape[2:] != (num_queries, self.length + num_keys):
            self._bias = _relative_bias(self.relative, num_queries, self.length + num_keys)
        return self._bias


def _relative_bias(module: Any, num_queries: int, num_keys: int) -> Tensor:
    """T5's bias ``[1, H, S, T]`` of the last S of T positions, from a module's buckets and table."""
    position = torch.arange(num_keys, device=module.relative_attention_bias.weight.device)
    bucket = module._relative_position_bucket(
        position - position[num_keys - num_queries :, None],
        bidirectional=False,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    return module.relative_attention_bias(bucket).permute(2, 0, 1)[None]


class PositionedCache(EncoderDecoderCache):
    """An encoder-decoder cache of own tokens whose length, by which bart-like decoders count positions, includes the
    `offset` tokens of a prefix that it does not store. Its ``self_attention_cache`` counts own tokens only."""

    def __init__(self, *caches: Cache, offset: int = 0) -> None:
        super().__init__(*caches)
        self.offset = offset

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.offset + super().get_seq_length(layer_idx)


_NAME = "softprompt_fast_decoder_"


def install(base: PreTrainedModel) -> str | None:
    """Switch `base` to :func:`decoder_attention` over its own implementation; the reason why not, or None."""
    current = base.config._attn_implementation
    if current is None or not base._can_set_attn_implementation():
        return f"{type(base).__name__} bypasses transformers' attention interface"
    if not current.startswith(_NAME):
        base.set_attn_implementation(register(_NAME, current, decoder_attention))
    return None


def decoder_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    original: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``[B, H, S, D]`` queries to the shared prefix and own keys ``[B, H, T, D]``; `original` in the
    encoder, in cross-attention, and where there is no prefix. Returns ``[B, S, H, D]`` and no weights."""
    prefix = kwargs.pop(KEYWORD, None)
    if not isinstance(prefix, DecoderPrefix) or not module.is_causal:
        return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    layer = module.layer_idx
    prefix.reached.add(layer)
    prefix_key, prefix_value = prefix.keys[layer], prefix.values[layer]
    queries, own = query.shape[2], key.shape[2]
    bias = prefix.bias(module, queries, own)
    if dropout == 0.0:
        out = prefix_attention(
            query, key, value, prefix_key, prefix_value, scale=scaling, bias=bias, backend=prefix.backend
        )
        return out.transpose(1, 2), None
    # The op has no dropout: give every row its copy of the prefix.
    batch = len(query)
    key = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([prefix_value.expand(batch, -1, -1, -1), value], dim=2)
    visible = torch.ones(queries, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - queries)
    mask = visible if bias is None else bias.masked_fill(~visible, float("-inf"))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2), None


def relative_bias(base: PreTrainedModel) -> nn.Module | None:
    modules = base.get_decoder().modules()
    return next((m for m in modules if getattr(m, "has_relative_attention_bias", False)), None)
