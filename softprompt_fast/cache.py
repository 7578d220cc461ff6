# SPDX-License-Identifier: Apache-2.0
"""The cache of a row's *own* tokens.

The prefix is shared and lives elsewhere; what a request stores per row is only the keys and values of its own
tokens. transformers' ``DynamicCache`` concatenates (and so copies) the whole history at every step;
:class:`GrowingLayer` writes in place into a buffer whose capacity doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

_FIRST_CAPACITY = 32


class GrowingLayer(DynamicLayer):
    """Keys and values ``[B, Hkv, T, D]`` of one layer, in a buffer that grows by doubling.

    ``keys`` and ``values`` are views of the first ``T`` entries of the buffer. While autograd records the new keys
    (training with a cache), entries are concatenated instead, because writing in place would break the graph.
    """

    # One buffer of every own token also serves sliding-window layers: the window is applied by position in the
    # kernel, and positions survive in a layer that drops nothing.
    is_sliding = False

    def __init__(self, reserve: int = 0) -> None:
        self._reserve = max(reserve, _FIRST_CAPACITY)
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._length = 0
        # Not by super().__init__(), which assigns keys and values: Dynamo of torch 2.11 repeats such an assignment to
        # a property when a compiled call ends, and the buffer would be lost.
        self.is_initialized = False

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._keys is None else self._keys[:, :, : self._length]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        # transformers' batch operations (select, repeat) assign whole tensors: those become the buffer.
        self._keys = value
        self._length = 0 if value is None else value.shape[2]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._values is None else self._values[:, :, : self._length]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._values = value

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, Hkv, S, D]`` and return all keys and values so far, as views of the buffer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            past_keys, past_values = self.keys, self.values
            keys = key_states if past_keys is None else torch.cat([past_keys, key_states], dim=2)
            values = value_states if past_values is None else torch.cat([past_values, value_states], dim=2)
            self.keys, self.values = keys, values
            return keys, values
        new_keys, new_values, keys, values = self.extend(key_states, key_states.shape, value_states.shape[3])
        new_keys.copy_(key_states)
        new_values.copy_(value_states)
        return keys, values

    def extend(
        self, like: torch.Tensor, shape: Sequence[int], value_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Room for new entries that the caller writes in place; without autograd only.

        Args:
            like: a tensor of the dtype and device.
            shape: ``(B, Hkv, S, D)`` of the new keys. value_dim: last dimension of the new values.

        Returns:
            New keys and values ``[B, Hkv, S, .]``, unwritten, and all of them ``[B, Hkv, T, .]``: views of the buffer.
        """
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        batch, heads, length, key_dim = shape
        start, end = self._length, self._length + length
        keys = self._keys = self._with_room(self._keys, like, (batch, heads, end, key_dim))
        values = self._values = self._with_room(self._values, like, (batch, heads, end, value_dim))
        self._length = end
        return keys[:, :, start:end], values[:, :, start:end], keys[:, :, :end], values[:, :, :end]

    def _with_room(self, buffer: torch.Tensor | None, like: torch.Tensor, needed: Sequence[int]) -> torch.Tensor:
        """`buffer` itself if it holds `needed` (``(B, Hkv, T, D)``), else a doubled one with the used part copied."""
        batch, heads, length, width = needed
        if buffer is not None:
            _check_buffer(buffer, like, heads, width)
        if buffer is not None and buffer.shape[2] >= length and buffer.shape[0] == batch:
            return buffer
        capacity = max(length, self._reserve, 2 * self._length)
        grown = like.new_empty(batch, heads, capacity, width)
        if buffer is not None and self._length:
            grown[:, :, : self._length] = buffer[:, :, : self._length]
        return grown

    def hold(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Hold the first `length` entries of buffers ``[B, Hkv, capacity, .]``, which may be views of larger ones: the
        next entries are written into them."""
        self.lazy_initialization(keys, values)
        self._keys, self._values, self._length = keys, values, length

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (transformers passes a negative number)."""
        if tokens_to_remove > 0:  # transformers < 5.18 passes the length to keep
            self._length = min(self._length, tokens_to_remove)
        else:
            self._length = max(0, self._length + tokens_to_remove)

    def reset(self) -> None:
        self._keys = self._values = None
        self._length = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows ``beam_idx`` become the rows of the cache; the buffer and its spare room are kept."""
        for used in (self.keys, self.values):
            if used is not None and self._length:
                used.copy_(used.index_select(0, beam_idx.to(used.device)))


class OwnTokenCache(Cache):
    """The default cache of :class:`softprompt_fast.SoftPromptModel`: one :class:`GrowingLayer` a layer.

    Args:
        num_layers: number of attention layers of the base model.
        reserve: tokens a row to make room for at once, where the final length is known.

    ``row_prompts`` names, per row, the prompt (and the version of it) whose prefix the cached tokens attended to, so
    that a cache handed back with another prompt is refused rather than continued wrongly.
    """

    def __init__(self, num_layers: int, reserve: int = 0) -> None:
        super().__init__(layers=[GrowingLayer(reserve) for _ in range(num_layers)])


def make_static_cache(num_layers: int, max_cache_len: int) -> Cache:
    """A cache of fixed capacity for own tokens, for torch.compile and CUDA graphs.

    Every layer holds all positions, sliding-window layers too: transformers' sliding static layer rolls its buffer,
    after which own positions can no longer be told from the buffer's index.
    """
    return Cache(layers=[StaticLayer(max_cache_len=max_cache_len) for _ in range(num_layers)])


def drop_first_token(cache: Cache) -> None:
    """Forget the first token of every row, in place."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            # In the buffers themselves: CUDA graphs know them by address.
            for buffer in (layer.keys, layer.values):
                buffer.copy_(buffer.roll(-1, dims=2))
            layer.cumulative_length.sub_(1)
        else:
            keys, values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
            layer.keys, layer.values = keys, values


def extend(
    layer: Any, like: torch.Tensor, shape: Sequence[int], value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:meth:`GrowingLayer.extend` for it or a StaticLayer, of which all entries are the whole buffer. The latter reads
    where its entries end, so it is for the CPU; on a device passes write into :func:`static_buffers` at that place."""
    if isinstance(layer, GrowingLayer):
        return layer.extend(like, shape, value_dim)
    keys, values = static_buffers(layer, like, shape, value_dim)
    start, length = int(layer.cumulative_length), shape[2]
    layer.cumulative_length.add_(length)
    new = slice(start, start + length)
    return keys[:, :, new], values[:, :, new], keys, values


def static_buffers(
    layer: StaticLayer, like: torch.Tensor, shape: Sequence[int], value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[B, Hkv, capacity, .]`` of a StaticLayer, made at its first use; arguments as of
    :func:`extend`."""
    batch, heads, _, key_dim = shape
    if not layer.is_initialized:
        layer.lazy_initialization(like.new_empty(batch, heads, 0, key_dim), like.new_empty(batch, heads, 0, value_dim))
    _check_buffer(layer.keys, like, heads, key_dim)
    _check_buffer(layer.values, like, heads, value_dim)
    return layer.keys, layer.values


def _check_buffer(buffer: torch.Tensor, like: torch.Tensor, heads: int, width: int) -> None:
    if (buffer.shape[1], buffer.shape[3]) != (heads, width) or buffer.dtype != like.dtype:
        expected, found = f"{heads} heads of {width}", f"{buffer.shape[1]} heads of {buffer.shape[3]}"
        raise ValueError(
            f"past_key_values: this model caches {expected} in {like.dtype}, found {found} in {buffer.dtype}"
        )


def rows_held(cache: Cache) -> int | None:
    """The number of rows a cache is tied to by the tokens it holds; None while it is empty."""
    keys = cache.layers[0].keys if cache.layers else None
    return keys.shape[0] if keys is not None and keys.dim() == 4 and keys.shape[2] else None


def adopt(cache: Cache, num_layers: int) -> Cache:
    """Make a caller's cache usable for own tokens, in place where it is still empty.

    Raises:
        ValueError: the cache already holds tokens in a layer that drops old ones, so positions are lost, or it is of
            a kind (quantized, offloaded, encoder-decoder) that does not keep plain keys and values.
    """
    plain = (DynamicLayer, StaticLayer)
    layers = list(getattr(cache, "layers", []))
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise ValueError(
            f"past_key_values: expected softprompt_fast.cache.OwnTokenCache, DynamicCache or StaticCache, "
            f"found {type(cache).__name__}{' with offloading' if getattr(cache, 'offloading', False) else ''}"
        )
    if all(type(layer) in (GrowingLayer, StaticLayer) for layer in layers) and len(layers) == num_layers:
        return cache
    for layer in layers:
        if not isinstance(layer, plain):
            raise ValueError(f"past_key_values: layers of type {type(layer).__name__} are not supported")
        if layer.get_seq_length() > 0 and type(layer) not in (GrowingLayer, StaticLayer, DynamicLayer):
            raise ValueError(
                f"past_key_values: a {type(layer).__name__} that already holds tokens has dropped positions; "
                "pass an empty cache or one returned by this model"
            )
    static = next((layer for layer in layers if isinstance(layer, StaticLayer)), None)
    if static is not None:
        if not any(type(layer) is StaticLayer for layer in layers):
            raise ValueError(
                "past_key_values: every layer of this StaticCache is a rolling sliding window, which loses positions; "
                'use generate(cache_implementation="static") or softprompt_fast.cache.make_static_cache'
            )
        longest = max(layer.max_cache_len for layer in layers if type(layer) is StaticLayer)
        cache.layers = [
            layer if type(layer) is StaticLayer else StaticLayer(max_cache_len=longest) for layer in layers
        ]
    elif any(layer.get_seq_length() for layer in layers):
        return cache
    else:
        cache.layers = [GrowingLayer() for _ in range(num_layers)]
    return cache
