# SPDX-License-Identifier: Apache-2.0
"""A llama-like decoder's inference pass without transformers' modules in between: one loop over the layers, whose
linear parts are C++ on the CPU (:class:`CppDecoder`), CUDA kernels and a library's products on a GPU
(:class:`CudaDecoder`). ``fused_decoder.py`` says which bases and which calls they serve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from softprompt_fast.backends import heuristics
from softprompt_fast.backends.norm import Norm
from softprompt_fast.cache import GrowingLayer, extend, static_buffers
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.decoder_parts import (
    ACTIVATIONS,
    BaseState,
    DecoderParts,
    LayerParts,
    UnservedError,
    checked_rows,
    differentiated,
)


class _Projected(NamedTuple):
    """A layer's queries ``[B, Hq, S, D]``, all own keys and values ``[B, Hkv, T, D]`` with the new ones in place, and
    the residual stream ``[B * S, H]``."""

    query: Tensor
    keys: Tensor
    values: Tensor
    x: Tensor


class FusedDecoder(ABC):
    """The inference pass of one base, from token ids or embeddings to logits; ``fused_decoder.plan`` makes it.

    Args:
        base: whose weights it reads.
        parts: what it consists of.
    """

    eight_bits: ClassVar[tuple[torch.dtype, ...]] = (torch.int8,)
    """Of the prefixes that its kernels read as they are."""
    _attend: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, base: PreTrainedModel, parts: DecoderParts) -> None:
        self._state = BaseState(base)
        self._parts = parts
        self._no_prefix = parts.embed.weight.detach().new_empty(parts.kv_heads, 0, parts.head_dim)

    def why_not_now(self) -> str | None:
        """Why the base no longer computes what was planned; None where it does. Some tens of microseconds."""
        return self._state.changed()

    def why_not_these(self, embeds: Tensor | None, prefix: Sequence[Tensor], quantized: bool = False) -> str | None:
        """See :meth:`DecoderParts.why_not_these`; a differentiated call is not served either."""
        if differentiated(embeds, prefix, self._state.parameters):
            return "the call is differentiated"
        return self._parts.why_not_these(embeds, prefix, self.eight_bits if quantized else ())

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        context: hooks.PrefixContext,
        cache: Cache | None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """One pass over own tokens behind their prefixes.

        Args:
            tokens: ids ``[B, S]``, or embeddings ``[B, S, H]`` in the base's dtype, which are left as they are.
            positions: int64 ``[1 or B, S]``.
            context: the prefixes and each row's range of own tokens.
            cache: own tokens so far, of layers that :func:`softprompt_fast.cache.extend` knows; S more are appended.
            logits_to_keep: as in transformers: the last ones, 0 for all, or an index of columns.

        Returns:
            Logits ``[B, kept, V]``.

        Raises:
            ValueError: the shape of `positions`, or a value in `context`, does not fit.
        """
        batch, length = tokens.shape[:2]
        if positions.shape not in ((1, length), (batch, length)):
            raise ValueError(f"position_ids: expected shape {(batch, length)}, found {tuple(positions.shape)}")
        parts = self._parts
        cos, sin = (angles.contiguous() for angles in parts.rotary(self._no_prefix, positions))
        x = self._begin(tokens)
        scratch = GrowingLayer(length)
        rows: tuple[Tensor | None, ...] | None = None
        for i, layer in enumerate(parts.layers):
            own = scratch if cache is None else cache.layers[i]
            query, keys, values, x = self._project(i, x, (batch, length), cos, sin, own)
            prefix_keys = self._no_prefix if context.keys is None else context.keys[i]
            prefix_values = self._no_prefix if context.values is None else context.values[i]
            if rows is None:
                rows = checked_rows(context, batch, keys.shape[2], prefix_keys.shape[1], keys.device)
            if i == len(parts.layers) - 1 and isinstance(logits_to_keep, int) and 0 < logits_to_keep < length:
                # Behind the last layer's keys and values only the positions that give logits matter.
                query = query[:, :, length - logits_to_keep :]
                x = x.view(batch, length, x.shape[-1])[:, length - logits_to_keep :].flatten(0, 1).contiguous()
                if rows[-1] is not None:
                    rows = (*rows[:-1], rows[-1] + (length - logits_to_keep))
            attended, _ = self._attend(
                query,
                keys,
                values,
                prefix_keys,
                prefix_values,
                *rows,
                layer.scale,
                True,
                layer.sliding_window,
                layer.softcap,
                None,
                None,
                *((None, None, None) if context.scales is None else context.scales.of_layer(i)),
                context.max_prefix_length,
            )
            x = self._behind(i, attended.transpose(1, 2).reshape(x.shape[0], -1), x)
            if cache is None:
                scratch.crop(-length)
        self._end(cache, length)
        if isinstance(logits_to_keep, Tensor):
            x = x.view(batch, length, x.shape[-1])[:, logits_to_keep].flatten(0, 1)
        return self._logits(x).view(batch, -1, parts.head.out_features)

    @abstractmethod
    def _begin(self, tokens: Tensor) -> Tensor:
        """The residual stream ``[B * S, H]``, which every layer adds to in place; or what the first layer makes it
        from."""

    @abstractmethod
    def _project(self, i: int, x: Tensor, shape: tuple[int, int], cos: Tensor, sin: Tensor, own: Any) -> _Projected:
        """Layer `i` up to attention, for `shape` ``(B, S)``: norm, projection, rotation, and new keys and values
        appended to the cache layer `own`."""

    @abstractmethod
    def _behind(self, i: int, attended: Tensor, x: Tensor) -> Tensor:
        """Layer `i` from attention's result ``[M, Hq * D]`` on: `x` with output projection and MLP added."""

    @abstractmethod
    def _logits(self, x: Tensor) -> Tensor:
        """Final norm and head."""

    def _end(self, cache: Cache | None, length: int) -> None:
        """What is left to do once all layers have run."""
        return


# ---- on the CPU -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    """One layer's packed weights (``PackedLinear`` of ``backends/cpu/_linear.py``)."""

    qkv: Any
    output: Any
    gate_up: Any
    down: Any


class CppDecoder(FusedDecoder):
    """Four C++ calls a layer, of a base in float32, whose weights are packed a second time for it.

    Raises:
        ImportError: the C++ extension is not there.
    """

    def __init__(self, base: PreTrainedModel, parts: DecoderParts) -> None:
        from softprompt_fast.backends.cpu import _linear, prefix_attention, prompt_qkv

        super().__init__(base, parts)
        self._linear, self._gated_mlp = _linear.linear, _linear.gated_mlp
        self._into_cache, self._attend = prompt_qkv.into_cache, prefix_attention.forward
        self._packed_bytes = 0

        def packed(*linears: nn.Linear, heads: Sequence[int] | None = None) -> Any:
            weights = _linear.PackedLinear([m.weight for m in linears], [m.bias for m in linears], heads=heads)
            self._packed_bytes += weights.nbytes
            return weights

        heads = (parts.q_heads, parts.kv_heads, parts.kv_heads)
        self._packed = [
            _Packed(
                qkv=packed(*layer.qkv, heads=heads),
                output=packed(layer.attention.o_proj),
                gate_up=packed(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=packed(layer.mlp.down_proj),
            )
            for layer in parts.layers
        ]
        self._head = packed(parts.head)

    def __str__(self) -> str:
        return f"fused decoder, packed weights {self._packed_bytes / 1e6:.0f} MB"

    def _begin(self, tokens: Tensor) -> Tensor:
        hidden = tokens.clone() if tokens.is_floating_point() else self._parts.embed(tokens)
        return hidden.flatten(0, 1).contiguous()

    def _project(self, i: int, x: Tensor, shape: tuple[int, int], cos: Tensor, sin: Tensor, own: Any) -> _Projected:
        parts = self._parts
        layer, (batch, length) = parts.layers[i], shape
        places = (batch, parts.kv_heads, length, parts.head_dim)
        new_keys, new_values, keys, values = extend(own, x, places, parts.head_dim)
        query = self._into_cache(
            x.view(batch, length, x.shape[-1]),
            layer.norm,
            self._packed[i].qkv,
            parts.q_heads,
            parts.kv_heads,
            cos,
            sin,
            new_keys,
            new_values,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
        )
        return _Projected(query, keys, values, x)

    def _behind(self, i: int, attended: Tensor, x: Tensor) -> Tensor:
        layer, packed = self._parts.layers[i], self._packed[i]
        x = self._linear(attended, packed.output, residual=x)
        return self._gated_mlp(x, layer.mlp_norm, packed.gate_up, packed.down, self._parts.activation, x)

    def _logits(self, x: Tensor) -> Tensor:
        return self._linear(x, self._head, norm=self._parts.norm)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


class _Product:
    """A library's product with a module's weight, held as it is: looking it up would take a launch's time."""

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = linear.weight.detach()
        self._transposed = self._weight.t()
        self._bias = None if linear.bias is None else linear.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def add(self, to: Tensor, x: Tensor) -> Tensor:
        """Added to `to` in place: rounded once, in the product's own launch (a bias takes another)."""
        to.addmm_(x, self._transposed)
        return to if self._bias is None else to.add_(self._bias)


class _Products(NamedTuple):
    """Of one layer, behind attention."""

    output: _Product
    gate: _Product
    up: _Product
    down: _Product

    @classmethod
    def of(cls, layer: LayerParts) -> _Products:
        mlp = layer.mlp
        return cls(*map(_Product, (layer.attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)))


class CudaDecoder(FusedDecoder):
    """Backend "cuda" for a base in bfloat16 or float16: one launch from hidden states (in the first layer from token
    ids) to queries and the cache (two where the heads of queries and keys have a norm), one for attention, and a
    library's products behind it, seven launches.

    More rows than a decode step's take ``prompt_qkv`` and ``prefix_attention`` in the forms that the backend has for
    them. No value is read on the host, so a step can be captured in a CUDA graph.

    Raises:
        ImportError: the CUDA kernels, or Triton's, are not there.
        UnservedError: they can't take this base's weights.
    """

    eight_bits = (torch.int8, torch.float8_e4m3fn)

    def __init__(self, base: PreTrainedModel, parts: DecoderParts) -> None:
        from softprompt_fast.backends.cuda import _runtime, prefix_attention, prompt_qkv

        super().__init__(base, parts)
        self._attend = prefix_attention.forward
        self._kernel: Any = prompt_qkv
        embed = parts.embed
        # Embeddings that are more than a row of the table are their module's own business.
        self._table = embed.weight.detach() if type(embed) is nn.Embedding and embed.max_norm is None else None
        if why := _runtime.refusals(embed.weight.detach()):
            raise UnservedError(why[0])
        self._weights = [[linear.weight.detach() for linear in layer.qkv] for layer in parts.layers]
        self._biases = [_biases(layer) for layer in parts.layers]
        self._products = [_Products.of(layer) for layer in parts.layers]
        self._head, self._activation = _Product(parts.head), ACTIVATIONS[parts.activation]
        for layer, weights, biases in zip(parts.layers, self._weights, self._biases, strict=True):
            rows = (embed.weight.detach(), None, None)
            heads = (parts.q_heads, parts.kv_heads, "rms", layer.norm.weight, None)
            if not prompt_qkv.fits(rows, weights, biases or (), heads, embed.weight.dtype):
                raise UnservedError("its sizes or addresses do not suit the CUDA kernel's loads of 16 bytes")

    def __str__(self) -> str:
        return f"fused decoder, CUDA kernels, first layer from {'embeddings' if self._table is None else 'token ids'}"

    def _begin(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point():
            return tokens.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        return self._parts.embed(tokens).flatten(0, 1) if self._table is None else tokens.long()

    def _project(self, i: int, x: Tensor, shape: tuple[int, int], cos: Tensor, sin: Tensor, own: Any) -> _Projected:
        parts, (batch, length), like = self._parts, shape, self._no_prefix
        places, start = (batch, parts.kv_heads, length, parts.head_dim), None
        if isinstance(own, StaticLayer):
            keys, values = new_keys, new_values = static_buffers(own, like, places, parts.head_dim)
            start = own.cumulative_length.view(1)
        else:
            new_keys, new_values, keys, values = own.extend(like, places, parts.head_dim)
        norm, q_norm, k_norm = parts.layers[i].norm, parts.layers[i].q_norm, parts.layers[i].k_norm
        rotation = (cos, sin) if q_norm is None else (None, None)  # heads with a norm turn behind it
        table = None if x.is_floating_point() else self._table
        source = (
            (x.view(batch, length, x.shape[-1]), None, None) if table is None else (x, table, table[:0])
        )  # no prompt
        rows = (*source, None, None, None, 0, 1.0, 1.0)
        layer = (parts.q_heads, parts.kv_heads, "rms", norm.weight, None, norm.offset, norm.eps, *rotation, False)
        weights, biases = self._weights[i], self._biases[i]
        residual: Tensor | None = None
        if heuristics.fuse_projection(batch * length):
            query = like.new_empty(batch, length, parts.q_heads, parts.head_dim).transpose(1, 2)
            if table is not None:
                residual = like.new_empty(batch, length, table.shape[1])
            results = (query, new_keys, new_values, residual, start)
            self._kernel.into_cache(*rows, True, weights, biases, *layer, *results)
        else:
            query, *new, residual = self._kernel.forward(*rows, like.dtype, True, weights, biases or (), *layer)
            for place, computed in zip((new_keys, new_values), new, strict=True):
                if start is None:
                    place.copy_(computed)
                else:
                    place.index_copy_(2, start + torch.arange(length, device=like.device), computed)
        if q_norm is not None and k_norm is not None:
            self._kernel.norm_heads(query, new_keys, q_norm, k_norm, cos, sin, start)
        return _Projected(query, keys, values, x if table is None or residual is None else residual.flatten(0, 1))

    def _end(self, cache: Cache | None, length: int) -> None:
        filled = [own.cumulative_length for own in (cache.layers if cache else ()) if isinstance(own, StaticLayer)]
        if filled:
            torch._foreach_add_(filled, length)

    def _behind(self, i: int, attended: Tensor, x: Tensor) -> Tensor:
        products = self._products[i]
        normed = _rms_norm(products.output.add(x, attended), self._parts.layers[i].mlp_norm)
        inner = self._activation(products.gate(normed)).mul_(products.up(normed))
        return products.down.add(x, inner)

    def _logits(self, x: Tensor) -> Tensor:
        return self._head(_rms_norm(x, self._parts.norm))


def _biases(layer: LayerParts) -> list[Tensor] | None:
    """Of q, k and v; zeros where only others have one."""
    if all(linear.bias is None for linear in layer.qkv):
        return None
    return [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in layer.qkv]


def _rms_norm(x: Tensor, norm: Norm) -> Tensor:
    weight = norm.weight
    if weight is None or norm.offset == 0.0:
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
    # Rounded once, as gemma's own: its weights are distances from 1, of which 16 bits would keep little.
    return (F.rms_norm(x.float(), x.shape[-1:], None, norm.eps) * (weight.float() + norm.offset)).to(x.dtype)
