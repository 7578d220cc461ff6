# SPDX-License-Identifier: Apache-2.0
"""A llama-like decoder's differentiable passes in C++: the gradients of prompts, prefixes and embeddings, no other.

The base is frozen, so nothing is kept that only a weight's gradient would need. Per token and layer that leaves the
residual stream at two places, queries, keys, values and what attention makes of them, and gate and up projections;
norms and activation are computed again in the backward. Products read the base's own weights in both directions
(``csrc/cpu/training.h``), so there is no packed copy of them either.

All layers are one autograd node. Its linear parts see one dense stream of real tokens ``[M, H]``: padding costs
nothing outside attention, and the last layer, beyond its keys and values, runs only where hidden states are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt_fast.backends import heuristics
from softprompt_fast.backends.norm import Norm
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.decoder_parts import BaseState, DecoderParts, LayerParts, checked_rows
from softprompt_fast.losses import first_derivative_only

#: ``gradient_checkpointing_enable`` has it mark the token embeddings as requiring grad, so that reentrant checkpoints
#: have a graph. No layer of the base runs here, and a gradient of frozen embeddings would go nowhere.
CHECKPOINTING_HOOK = "transformers.modeling_utils.make_inputs_require_grads"


class FusedTraining:
    """Differentiable passes over one base; ``fused_decoder.plan_training`` makes it.

    Hidden states are those before the final norm, which belongs to :attr:`head`. All results are float32. Second
    derivatives (``create_graph=True``) are refused with a RuntimeError.

    Args:
        base: the base, float32 on the CPU.
        parts: what it consists of.

    Raises:
        ImportError: the C++ extension is not there.
    """

    def __init__(self, base: PreTrainedModel, parts: DecoderParts) -> None:
        self._base = base
        self._state = BaseState(base)
        self._parts = parts
        self._stack = _Stack(parts)
        self.head = FusedHead(parts, self._state)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings, past any hook of the module."""
        return self._parts.embed.forward(input_ids)

    def why_not_now(self) -> str | None:
        """Why the base no longer computes what was planned, or wants gradients of its own; None where it does not."""
        if any(p.requires_grad for p in self._state.parameters):
            return "weights of the base require grad"
        return self._state.changed(harmless=CHECKPOINTING_HOOK)

    def why_not_these(self, embeds: Tensor | None, prefix: Sequence[Tensor]) -> str | None:
        return self._parts.why_not_these(embeds, prefix)

    def __str__(self) -> str:
        return "fused training passes"

    def prompt(self, embeds: Tensor, wanted: int | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Keys and values of every layer, as attention sees them, of virtual tokens alone.

        Args:
            embeds: float32 ``[N, P, H]``. wanted: how many of the last positions' hidden states are; None: all.

        Returns:
            Keys and values, each ``[N, Hkv, P, D]``, and hidden states ``[N, wanted, H]``.
        """
        count, length, width = embeds.shape
        positions = torch.arange(length)[None]
        wanted = length if wanted is None else min(wanted, length)
        places = torch.arange(count * length).view(count, length)[:, length - wanted :].reshape(-1)
        tokens = self._tokens(embeds, positions, hooks.PrefixContext(None, None), places)
        hidden, *pairs = self._run(tokens, embeds, (), True)
        half = len(pairs) // 2
        return pairs[:half], pairs[half:], hidden.view(count, wanted, width)

    def own(self, embeds: Tensor, positions: Tensor, context: hooks.PrefixContext, wanted: Tensor) -> Tensor:
        """Hidden states of own tokens behind their prefixes.

        Args:
            embeds: float32 ``[B, S, H]``. positions: int64 ``[1 or B, S]``.
            context: the prefixes, whose keys and values may require grad, and each row's range of own tokens.
            wanted: int64 ``[n]``, distinct places ``row * S + column`` of real own tokens.

        Returns:
            ``[n, H]``.

        Raises:
            ValueError: the shape of `positions`, or a value in `context` or `wanted`, does not fit.
        """
        batch, length, _ = embeds.shape
        if positions.shape not in ((1, length), (batch, length)):
            raise ValueError(f"position_ids: expected shape {(batch, length)}, found {tuple(positions.shape)}")
        tokens = self._tokens(embeds, positions, context, wanted)
        return self._run(tokens, embeds, (*(context.keys or ()), *(context.values or ())), False)[0]

    def _tokens(self, embeds: Tensor, positions: Tensor, context: hooks.PrefixContext, wanted: Tensor) -> _Tokens:
        batch, length, _ = embeds.shape
        packed = 0 if context.keys is None else context.keys[0].shape[1]
        rows = checked_rows(context, batch, length, packed, torch.device("cpu"))
        own_start, own_end = rows[2], rows[3]
        places = None
        if own_start is not None or own_end is not None:
            column = torch.arange(length)
            real = torch.ones(batch, length, dtype=torch.bool)
            if own_start is not None:
                real &= column >= own_start[:, None]
            if own_end is not None:
                real &= column < own_end[:, None]
            places = real.view(-1).nonzero()[:, 0]
            order = torch.full((batch * length,), -1)
            order[places] = torch.arange(len(places))
            wanted = order[wanted]
            if bool((wanted < 0).any()):
                raise ValueError("wanted: expected places of real own tokens, found one of padding")
        with torch.no_grad():
            # Flattening alone leaves one position that all rows share a view with a stride of 0.
            cos, sin = (
                x.expand(batch, -1, -1).flatten(0, 1).contiguous() for x in self._parts.rotary(embeds, positions)
            )
        if places is not None:
            cos, sin = cos[places], sin[places]
        count = cos.shape[0]
        everything = len(wanted) == count and bool((wanted == torch.arange(count)).all())
        return _Tokens(batch, length, cos, sin, places, None if everything else wanted, rows)

    def _run(self, tokens: _Tokens, embeds: Tensor, prefix: Sequence[Tensor], keys: bool) -> tuple[Tensor, ...]:
        x = embeds.reshape(-1, embeds.shape[2])
        x = x.contiguous() if tokens.places is None else x[tokens.places]
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *prefix))
        call = _Call(self._stack, self._state, tokens, keys, graph, graph and hooks.drops_cache(self._base))
        return _Layers.apply(call, x, *prefix)


# ---- the layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """The real tokens of a call.

    Attributes:
        cos, sin: ``[M, rotated]``.
        places: int64 ``[M]``, where each stands in ``[B * S]``; None: there is no padding.
        wanted: int64 ``[n]``, which of them hidden states are wanted of; None: of all.
        rows: offsets, index, own_start, own_end and query_start of ``prefix_attention``.
    """

    batch: int
    length: int
    cos: Tensor
    sin: Tensor
    places: Tensor | None
    wanted: Tensor | None
    rows: tuple[Tensor | None, ...]

    def only(self, wanted: Tensor) -> _Tokens:
        """Some of the tokens, as queries: in the same rows, with all of themselves wanted."""
        places = wanted if self.places is None else self.places[wanted]
        return replace(self, cos=self.cos[wanted], sin=self.sin[wanted], places=places, wanted=None)

    def spread(self, x: Tensor, head_dim: int) -> Tensor:
        """``[M, heads * D]`` as ``[B, heads, S, D]``, zero in padding."""
        if self.places is not None:
            x = x.new_zeros(self.batch * self.length, x.shape[1]).index_copy_(0, self.places, x)
        return x.view(self.batch, self.length, -1, head_dim).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`spread`: dense ``[M, heads * D]``."""
        x = x.transpose(1, 2).reshape(self.batch * self.length, -1)
        return x if self.places is None else x[self.places]


class _Kept(NamedTuple):
    """What a layer's backward needs: of the residual stream before (`x`) and behind (`mid`) attention, queries, keys
    and values as attention sees them (and flat, before their norm, where heads are normed), its result, and gate and
    up projections. Where the layer runs again, only `x`; behind the last layer's keys and values nothing where no
    hidden state is wanted."""

    x: Tensor
    key: Tensor | None = None
    value: Tensor | None = None
    unnormed_key: Tensor | None = None
    query: Tensor | None = None
    unnormed_query: Tensor | None = None
    attended: Tensor | None = None
    lse: Tensor | None = None
    mid: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None


class _Stack:
    """Forward and backward of single layers over a stream of tokens."""

    def __init__(self, parts: DecoderParts) -> None:
        from softprompt_fast.backends.cpu import _training, prefix_attention

        self._ops: Any = _training
        self._attention: Any = prefix_attention
        self._parts = parts
        self.depth = len(parts.layers)
        self._no_prefix = parts.embed.weight.new_empty(parts.kv_heads, 0, parts.head_dim)

    def prefix(self, prefix: Sequence[Tensor], i: int) -> tuple[Tensor, Tensor]:
        """Layer i's of all keys, then all values."""
        return (prefix[i], prefix[self.depth + i]) if prefix else (self._no_prefix, self._no_prefix)

    def tokens_of(self, tokens: _Tokens, i: int) -> tuple[_Tokens, Tensor | None]:
        """The tokens that are queries in layer i, and which of all tokens they are (None: all)."""
        wanted = tokens.wanted if i == self.depth - 1 else None
        return (tokens, None) if wanted is None else (tokens.only(wanted), wanted)

    def forward(self, i: int, x: Tensor, tokens: _Tokens, prefix: Sequence[Tensor]) -> tuple[Tensor, _Kept]:
        """The residual stream behind layer i ``[M, H]`` (behind the last one only where wanted), and what is kept."""
        ops, layer = self._ops, self._parts.layers[i]
        attention, mlp = layer.attention, layer.mlp
        queries, some = self.tokens_of(tokens, i)
        normed = ops.norm_rows(x, layer.norm)
        key, unnormed_key = self._heads(normed, attention.k_proj, layer.k_norm, tokens)
        value = tokens.spread(_linear(ops, normed, attention.v_proj), self._parts.head_dim)
        if some is not None:
            if len(some) == 0:
                return x.new_empty(0, x.shape[1]), _Kept(x, key, value, unnormed_key)
            normed = normed[some]
        query, unnormed_query = self._heads(normed, attention.q_proj, layer.q_norm, queries)
        attended, lse = self._attention.forward(
            query, key, value, *self.prefix(prefix, i), *tokens.rows, *self._options(layer)
        )
        mid = x.clone() if some is None else x[some]
        _linear(ops, queries.gather(attended), attention.o_proj, mid)
        normed = ops.norm_rows(mid, layer.mlp_norm)
        gate, up, inner = ops.gated_product(
            normed,
            mlp.gate_proj.weight.t(),
            mlp.gate_proj.bias,
            mlp.up_proj.weight.t(),
            mlp.up_proj.bias,
            self._parts.activation,
        )
        out = _linear(ops, inner, mlp.down_proj, mid.clone())
        kept = _Kept(x, key, value, unnormed_key, query, unnormed_query, attended, lse, mid, gate, up)
        return out, kept

    def backward(
        self,
        i: int,
        kept: _Kept,
        tokens: _Tokens,
        prefix: Sequence[Tensor],
        grad: Tensor,
        grad_pair: tuple[Tensor | None, Tensor | None],
        to_input: bool,
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:
        """Gradients of a layer's input and of its prefix's keys and values.

        Args:
            grad: of its result; overwritten.
            grad_pair: of its own keys and values, beside what attention adds.
            to_input: whether that of the input is wanted.
        """
        ops, layer = self._ops, self._parts.layers[i]
        attention, mlp = layer.attention, layer.mlp
        queries, some = self.tokens_of(tokens, i)
        grad_query: Tensor | None = None
        grad_prefix: tuple[Tensor | None, Tensor | None] = (None, None)
        grad_key, grad_value = grad_pair
        if kept.mid is not None:
            assert kept.gate is not None and kept.up is not None
            grad_gate, grad_up = ops.gated_product_backward(
                grad, mlp.down_proj.weight, kept.gate, kept.up, self._parts.activation
            )
            normed = ops.product(grad_gate, mlp.gate_proj.weight)
            ops.product(grad_up, mlp.up_proj.weight, out=normed, add=True)
            del grad_gate, grad_up
            ops.norm_rows_backward(kept.mid, normed, layer.mlp_norm, out=grad)
            attended = queries.spread(ops.product(grad, attention.o_proj.weight), self._parts.head_dim)
            grad_query, *own, grad_prefix_key, grad_prefix_value, _ = self._attention.backward(
                attended,
                None,
                kept.query,
                kept.key,
                kept.value,
                *self.prefix(prefix, i),
                *tokens.rows,
                *self._options(layer),
                kept.attended,
                kept.lse,
            )
            grad_key = own[0] if grad_key is None else own[0].add_(grad_key)
            grad_value = own[1] if grad_value is None else own[1].add_(grad_value)
            grad_prefix = (grad_prefix_key, grad_prefix_value)
        if not to_input:
            return None, grad_prefix
        through = kept.x.new_zeros(kept.x.shape)
        if grad_key is not None:
            heads = self._heads_backward(grad_key, kept.unnormed_key, layer.k_norm, tokens)
            ops.product(heads, attention.k_proj.weight, out=through)
        if grad_value is not None:
            ops.product(tokens.gather(grad_value), attention.v_proj.weight, out=through, add=True)
        if grad_query is None:
            grad = torch.zeros_like(through)
        else:
            heads = self._heads_backward(grad_query, kept.unnormed_query, layer.q_norm, queries)
            if some is None:
                ops.product(heads, attention.q_proj.weight, out=through, add=True)
            else:
                through.index_add_(0, some, ops.product(heads, attention.q_proj.weight))
                grad = torch.zeros_like(through).index_copy_(0, some, grad)
        return ops.norm_rows_backward(kept.x, through, layer.norm, out=grad), grad_prefix

    def _heads(
        self, normed: Tensor, linear: nn.Linear, norm: Norm | None, tokens: _Tokens
    ) -> tuple[Tensor, Tensor | None]:
        """Queries or keys, and what they were before their norm, if they have one."""
        head_dim, unnormed = self._parts.head_dim, None
        heads = _linear(self._ops, normed, linear)
        if norm is not None:
            unnormed = heads
            heads = self._ops.norm_rows(heads.view(-1, head_dim), norm).view(heads.shape)
        self._ops.rotate_rows(heads, tokens.cos, tokens.sin, head_dim)
        return tokens.spread(heads, head_dim), unnormed

    def _heads_backward(self, grad: Tensor, unnormed: Tensor | None, norm: Norm | None, tokens: _Tokens) -> Tensor:
        head_dim = self._parts.head_dim
        gathered = tokens.gather(grad)
        if gathered.data_ptr() == grad.data_ptr():
            gathered = gathered.clone()  # it may be the caller's
        self._ops.rotate_rows(gathered, tokens.cos, tokens.sin, head_dim, transposed=True)
        if unnormed is None:
            return gathered
        rows = (unnormed.view(-1, head_dim), gathered.view(-1, head_dim))
        return self._ops.norm_rows_backward(*rows, norm).view(gathered.shape)

    @staticmethod
    def _options(layer: LayerParts) -> tuple[Any, ...]:
        """Scale, causal, window, soft cap, sinks and bias."""
        return layer.scale, True, layer.sliding_window, layer.softcap, None, None


def _linear(ops: Any, x: Tensor, linear: nn.Linear, residual: Tensor | None = None) -> Tensor:
    """``linear(x)``, or that added to `residual` in place."""
    return ops.product(x, linear.weight.t(), bias=linear.bias, out=residual, add=residual is not None)


@dataclass(frozen=True)
class _Call:
    """How :class:`_Layers` runs: whether own keys and values are results, whether there will be a backward, and
    whether that runs the layers again (gradient checkpointing)."""

    stack: _Stack
    state: BaseState
    tokens: _Tokens
    returns_keys: bool
    graph: bool
    checkpointing: bool


_first_derivative_only = first_derivative_only(
    "the fused training passes have no second derivative; construct the model with backend='torch' to differentiate "
    "the base's own modules"
)


def _check_weights(state: BaseState) -> None:
    # Weights are read again in the backward and not saved for it, so autograd doesn't notice when they change.
    if state.weights_changed():
        raise RuntimeError(
            "the base's weights changed between the forward and the backward pass; change them after backward()"
        )


class _Layers(torch.autograd.Function):
    """All layers: hidden states where wanted, then (``returns_keys``) every layer's keys and every layer's values."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *prefix: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        saved: list[Tensor | None] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for i in range(call.stack.depth):
            x, kept = call.stack.forward(i, x, call.tokens, prefix)
            if call.returns_keys:
                assert kept.key is not None and kept.value is not None
                keys.append(kept.key)
                values.append(kept.value)
            if call.graph:
                saved += _Kept(kept.x) if call.checkpointing else kept
        ctx.save_for_backward(*prefix, *saved)
        return x, *keys, *values

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        _check_weights(call.state)
        depth, fields = call.stack.depth, len(_Kept._fields)
        to_embeds, to_prefix = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:])
        saved = list(ctx.saved_tensors)
        prefix = saved[: len(saved) - depth * fields]
        grad_prefix: list[Tensor | None] = [None] * len(prefix)
        for i in reversed(range(depth)):
            kept = _Kept(*saved[len(saved) - fields :])
            del saved[len(saved) - fields :]
            if call.checkpointing:
                kept = call.stack.forward(i, kept.x, call.tokens, prefix)[1]
            if i == depth - 1:
                rows = len(kept.x) if call.tokens.wanted is None else len(call.tokens.wanted)
                zeros = kept.x.new_zeros(rows, kept.x.shape[1])
                grad = zeros if grad is None else zeros.copy_(grad)  # a copy: the layers write to it
            assert grad is not None
            pair = (grads[i], grads[depth + i]) if grads else (None, None)
            to_input = to_embeds or i > 0
            through, pair = call.stack.backward(i, kept, call.tokens, prefix, grad, pair, to_input)
            if to_prefix:
                grad_prefix[i], grad_prefix[depth + i] = pair
            grad = through
        return None, grad if to_embeds else None, *grad_prefix


# ---- the head -------------------------------------------------------------------------------------------------------


class FusedHead:
    """The :class:`~softprompt_fast.losses.Head` behind the fused passes: final norm and output projection, from
    float32 hidden states before that norm."""

    def __init__(self, parts: DecoderParts, state: BaseState) -> None:
        from softprompt_fast.backends.cpu import _training

        self.state = state
        self._ops = _training
        self._norm, self._linear = parts.norm, parts.head

    @property
    def vocab_size(self) -> int:
        return int(self._linear.out_features)

    def logits(self, hidden: Tensor) -> Tensor:
        return _Logits.apply(self, hidden)

    def sum(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Summed weighted cross-entropy, a float32 scalar; differentiable with respect to `hidden`.

        Formula: ``sum_i weights_i * (log(sum(exp(logits_i))) - logits_i[labels_i])``. Logits are made, and turned into
        the gradient, a chunk of rows at a time (:func:`heuristics.head_rows`), so nothing of size V outlives the call
        (as Liger-Kernel's fused linear cross-entropy; Hsu et al., 2024).

        Args:
            hidden: float32 ``[n, H]``. labels: int64 ``[n]``, negative: not counted. weights: floating ``[n]`` or
                None for ones.

        Raises:
            ValueError: a label not below V, or a shape or dtype other than these.
        """
        graph = torch.is_grad_enabled() and hidden.requires_grad
        return _SummedLoss.apply(self, hidden, labels, weights, graph)

    def _project(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        normed = self._ops.norm_rows(hidden, self._norm)
        return self._ops.product(normed, self._linear.weight.t(), bias=self._linear.bias, out=out)

    def _backward(self, hidden: Tensor, grad_logits: Tensor) -> Tensor:
        grad = self._ops.product(grad_logits, self._linear.weight)
        return self._ops.norm_rows_backward(hidden, grad, self._norm)

    def _loss(self, hidden: Tensor, labels: Tensor, weights: Tensor | None, graph: bool) -> tuple[Tensor, Tensor]:
        """The sum, and where there is to be a graph its gradient (else an empty tensor)."""
        count, step = len(hidden), heuristics.head_rows(len(hidden), self.vocab_size)
        losses = hidden.new_empty(count)
        grad = torch.empty_like(hidden) if graph else hidden.new_empty(0)
        logits = hidden.new_empty(step, self.vocab_size)
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            some = self._project(hidden[part], out=logits[: part.stop - first])
            weight = None if weights is None else weights[part]
            losses[part] = self._ops.cross_entropy_rows(some, labels[part], weight, gradient=graph)
            if graph:
                grad[part] = self._backward(hidden[part], some)
        return losses.sum(dtype=torch.float64).to(torch.float32), grad


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: FusedHead, hidden: Tensor) -> Tensor:
        ctx.head = head
        hidden = hidden.contiguous()
        ctx.save_for_backward(hidden)
        return head._project(hidden)

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        _check_weights(ctx.head.state)
        return None, ctx.head._backward(ctx.saved_tensors[0], grad.contiguous())


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: FusedHead, hidden: Tensor, labels: Tensor, weights: Tensor | None, graph: bool
    ) -> Tensor:
        weights = None if weights is None else weights.to(torch.float32).contiguous()
        total, grad = head._loss(hidden.contiguous(), labels.contiguous(), weights, graph)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.saved_tensors[0] * grad, None, None, None
