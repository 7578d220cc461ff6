# SPDX-License-Identifier: Apache-2.0
"""One base model's passes over own tokens behind prefixes: which of them serves a call, and the call through it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from softprompt_fast import expanded
from softprompt_fast.backends._registry import requested
from softprompt_fast.cache import OwnTokenCache, adopt
from softprompt_fast.explanation import Explanation, LayerPath, serving_backend
from softprompt_fast.integrations import probe
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.decoder_pass import CppDecoder
from softprompt_fast.integrations.fused_decoder import LazyDecoder
from softprompt_fast.integrations.head import BaseHead, LazyHead
from softprompt_fast.losses import Terms, padding_columns
from softprompt_fast.packed import Packed
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.rows import (
    cached_length,
    claim_rows,
    own_ranges,
    predict_empty_rows,
    row_positions,
    static_ranges,
)
from softprompt_fast.scoring import LabelledCall, LabelledStates

logger = logging.getLogger("softprompt_fast")

CACHE_IS_DROPPED = (
    "past_key_values: gradient checkpointing ignores caches in training mode; call eval(), or "
    "gradient_checkpointing_disable() on the base"
)


class PrefixedPasses:
    """A base that attends to prefixes: in place (by its own modules or fused passes), or expanded into its cache.

    Args:
        base: whose attention implementation is replaced here by one that computes the same without a prompt.
        backend: force one backend of the ops; None picks automatically.

    Attributes:
        num_layers: with attention. limit: of its positions; None: it has none.
        why_expanded: why prefixes have to be expanded; None: all rows share them.
        fused, head: the base's fused passes, and its head apart from its decoder, where it has them.

    Raises:
        TypeError: `base` can't be served either way.
    """

    def __init__(self, base: PreTrainedModel, backend: str | None) -> None:
        self._base, self._backend = base, backend
        self.num_layers = hooks.num_attention_layers(base)
        requested(backend)  # raises for a name that is no backend's
        self.limit = hooks.position_limit(base)
        self.why_expanded = probe.why_not_shared(base, backend)
        if self.why_expanded is not None:
            if (refused := probe.why_not_expanded(base)) is not None:
                raise TypeError(
                    f"base: {type(base).__name__} can't be served: {self.why_expanded}; with prefixes expanded into "
                    f"its cache: {refused}"
                )
            logger.warning(
                "%s: prefixes are expanded into an ordinary cache (exact, slower): %s",
                type(base).__name__,
                self.why_expanded,
            )
        self.fused = LazyDecoder(base)
        self.head = LazyHead(base)

    def run(
        self,
        *,
        packed: Packed | None,
        index: Tensor | None,
        call: LabelledCall | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        input_type_mask: Tensor | None,
        own_start: Tensor | None,
        own_end: Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
        prompt_of: Callable[[str], SoftPrompt | PrefixKV],
        **kwargs: Any,
    ) -> Any:
        """A call of :meth:`SoftPromptModel.forward` behind the prefixes that it selected.

        Args:
            packed, index: those prefixes (:class:`~softprompt_fast.selection.Selection`).
            call: of its labels; None: it has none.
            own_start, own_end: int32 ``[B]``, as far as they are known already.
            prompt_of: the prompt of a name.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, length = given.shape[:2]
        past = self._own_length(cache, packed, index)
        if call is None and own_start is None and attention_mask is not None:
            own_start, own_end = own_ranges(attention_mask, batch, past, length)
        padding = None
        if inputs_embeds is not None or (call is not None and call.cpt):
            padding = padding_columns(length, own_start, own_end, past)
        if inputs_embeds is not None:
            # A copy, because some families (ctrl) scale what they are given in place. No token sees the padding, but
            # an attention weight of 0 times NaN is NaN.
            inputs_embeds = (
                inputs_embeds.clone() if padding is None else inputs_embeds.masked_fill(padding[..., None], 0)
            )
        terms: Terms | None = None
        labelled: Tensor | None = None  # where hidden states are enough
        head: BaseHead | None = None
        if call is not None:
            terms = call.terms(packed, index, prompt_of, padding, input_type_mask)
            if call.chunked:
                labelled = terms.positions
                head = self.head.serving() if self._runs_in_parts(kwargs) else None
                logits_to_keep = 0 if head is not None else (labelled % length).unique()
        if self.why_expanded is not None:
            self.check_rows_fit(batch, int(past) + length, attention_mask, packed, index)
        run = self._forward_shared if self.why_expanded is None else self._forward_expanded
        out = run(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            packed=packed,
            index=index,
            own_start=own_start,
            own_end=own_end,
            cache=cache,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            head=head,
            labelled=labelled,
            **kwargs,
        )
        if own_start is not None and isinstance(past, int) and past == 0 and labelled is None:
            predict_empty_rows(out, packed, index, own_start, own_end, length, required=call is None)
        if call is not None and terms is not None:
            out = call.result(out, terms, logits_to_keep, packed, num_items_in_batch)
        return out

    def _own_length(self, cache: Cache | None, packed: Packed | None, index: Tensor | None) -> int | Tensor:
        """Own tokens that each row has in `cache`."""
        past = cached_length(cache)
        if self.why_expanded is None or packed is None or int(past) == 0:
            return past
        return past - int(packed.lengths_tensor[0 if index is None else index[0].long()])

    def _forward_shared(
        self,
        *,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        packed: Packed | None,
        index: Tensor | None,
        own_start: Tensor | None,
        own_end: Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        logits_to_keep: int | Tensor,
        head: BaseHead | None,
        labelled: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """One pass of the base behind its prefixes; with `labelled` places ``row * S + column`` as far as their hidden
        states (:class:`LabelledStates`) where the passes are fused, or where there is a `head` to go on with."""
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        (batch, length), device = given.shape[:2], given.device
        if hooks.drops_cache(self._base):
            if cache is not None:
                raise ValueError(CACHE_IS_DROPPED)
            use_cache = False
        if cache is None and use_cache:
            cache = OwnTokenCache(self.num_layers)
        past: int | Tensor = 0
        query_start = None
        if cache is not None:
            adopt(cache, self.num_layers)
            past = cache.get_seq_length()
            own_start = claim_rows(cache, packed, index, own_start, own_end, batch, past)
            if cache.layers and isinstance(cache.layers[0], StaticLayer):
                # The buffer's capacity says nothing about positions: they travel in device tensors.
                query_start, own_end = static_ranges(
                    cache.layers[0].max_cache_len, past, length, own_end, batch, device
                )
        context = hooks.PrefixContext(
            keys=None if packed is None else packed.keys,
            values=None if packed is None else packed.values,
            prefix_offsets=None if packed is None else packed.offsets,
            prefix_index=None if packed is None else index,
            own_start=own_start,
            own_end=own_end,
            query_start=query_start,
            backend=self._backend,
            scales=None if packed is None else packed.scales,
            # Of a traced call it would be a constant, by which every new length compiles anew.
            max_prefix_length=None if packed is None or torch.compiler.is_compiling() else max(packed.lengths),
        )
        given_positions = kwargs.pop("position_ids", None)
        positions = row_positions(given_positions, past, length, packed, index, own_start, own_end, device)
        # Off the CPU reading a position waits for the device: only a prefill does, where an overrun would crash.
        readable = device.type == "cpu" or (isinstance(past, int) and past == 0)
        if self.limit is not None and readable and positions.numel() and not torch.compiler.is_compiling():
            self.limit.check(int(positions.max()) + 1, max(packed.lengths) if packed is not None else 0)
        if labelled is not None and cache is None:
            passes = self.fused.training(inputs_embeds, context, kwargs)
            if passes is not None:
                hidden = inputs_embeds if input_ids is None else passes.embed(input_ids)
                assert hidden is not None
                return LabelledStates(passes.own(hidden, positions, context, labelled), passes.head)
        fused = self.fused.serving(inputs_embeds, context, cache, kwargs) if head is None else None
        if fused is not None:
            logits = fused(given, positions, context, cache, logits_to_keep)
            return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        if isinstance(logits_to_keep, int) and 0 < logits_to_keep < length:
            # As a slice the kept states stay strided, and the head's matmul then runs row by row, reading its weight
            # once per row (32 rows, SmolLM2-135M: 104 ms of an 860 ms prefill); as an index they are one dense block.
            logits_to_keep = torch.arange(length - logits_to_keep, length, device=device)
        if head is None:
            kwargs["logits_to_keep"] = logits_to_keep
        out = (self._base if head is None else head.decoder)(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=hooks.no_mask(batch, device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **{hooks.KEYWORD: context},
            **kwargs,
        )
        return out if head is None else _labelled_states(out, head, labelled)

    def _forward_expanded(self, *, head: BaseHead | None, labelled: Tensor | None, **kwargs: Any) -> Any:
        packed, index, cache = kwargs["packed"], kwargs["index"], kwargs["cache"]
        given = kwargs["input_ids"] if kwargs["input_ids"] is not None else kwargs["inputs_embeds"]
        if packed is not None and hooks.drops_cache(self._base):
            raise ValueError(CACHE_IS_DROPPED)  # and with it the prefix
        if cache is not None:
            claim_rows(cache, packed, index, None, None, given.shape[0], cache.get_seq_length())
        out = expanded.forward(self._base, decoder=None if head is None else head.decoder, **kwargs)
        if out.get("past_key_values") is not None:
            claim_rows(out.past_key_values, packed, index, None, None, given.shape[0], 0)
        return out if head is None else _labelled_states(out, head, labelled)

    def check_rows_fit(
        self, batch: int, length: int, attention_mask: Tensor | None, packed: Packed | None, index: Tensor | None
    ) -> None:
        """Whether all rows fit the model's positions, where a step has no positions at hand or would be late."""
        if self.limit is None:
            return
        own = torch.full((batch,), length, device=self._base.device)
        if attention_mask is not None:
            own = (attention_mask != 0).sum(dim=1)
        virtual = torch.zeros_like(own)
        if packed is not None:
            virtual = virtual + (packed.lengths[0] if index is None else packed.lengths_tensor[index.long()])
        row = int((own + virtual).argmax())
        self.limit.check(int(own[row] + virtual[row]), int(virtual[row]))

    def _runs_in_parts(self, options: dict[str, Any]) -> bool:
        """Whether a loss alone is better had from the base's decoder and head apart: not where the C++ decoder may
        serve, which has both, nor where `options` ask for what only the whole gives."""
        asked = {name for name, value in options.items() if value is not None and value is not False}
        if torch.compiler.is_compiling() or asked - {"position_ids", "output_hidden_states", "output_attentions"}:
            return False
        return torch.is_grad_enabled() or not isinstance(self.fused.get(self._backend), CppDecoder)

    def explain(self, training: bool) -> Explanation:
        """The path of every layer, in training mode or not; see :func:`softprompt_fast.explain`."""
        path, note = "shared prefix", ""
        if self.why_expanded is not None:
            path, backend, reason = "expanded prefix", "transformers", self.why_expanded
        else:
            backend, reason = serving_backend("prefix_attention", self._base.device.type, self._backend)
            if backend in ("cpu", "cuda"):
                # What training calls take, or what all others do: planning that packs the weights.
                get, kind = (self.fused.get_training, "training") if training else (self.fused.get, "decoder")
                fused = get(self._backend)
                if isinstance(fused, str):
                    reason = "; ".join(filter(None, (reason, f"{kind} not fused: {fused}")))
                else:
                    path, note = f"shared prefix, fused {kind}", str(fused)
        if isinstance(why := self.head.get(), str):
            note = "; ".join(filter(None, (note, f"loss in one piece: {why}")))
        layers = tuple(LayerPath(i, path, backend, reason) for i in range(self.num_layers))
        return Explanation(type(self._base).__name__, layers, note)


def _labelled_states(out: ModelOutput, head: BaseHead, labelled: Tensor | None) -> LabelledStates:
    return LabelledStates(out.last_hidden_state.flatten(0, 1)[labelled], head, out)
