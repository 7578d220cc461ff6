# SPDX-License-Identifier: Apache-2.0
"""transformers' ``generate`` behind prompts: what a call asks for, checked, and its rows as transformers has to see
them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_fast import expanded
from softprompt_fast.backends import heuristics
from softprompt_fast.backends._registry import requested
from softprompt_fast.cache import OwnTokenCache, adopt, drop_first_token, make_static_cache
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.fused_decoder import FusedDecoder
from softprompt_fast.packed import Packed, RowPrompt
from softprompt_fast.passes import CACHE_IS_DROPPED, PrefixedPasses
from softprompt_fast.rows import check_continuation, check_inputs, check_token_ids, padding_ranges, right_align
from softprompt_fast.selection import Selection


@dataclass(frozen=True)
class GenerationRequest:
    """A call of :meth:`SoftPromptModel.generate`, checked.

    Attributes:
        batch, length: B and S. config: the ``GenerationConfig`` that options override.
        input_ids: int64 ``[B, S]``; None where `options` hold ``inputs_embeds``.
        attention_mask: ``[B, S]`` or, behind a cache, ``[B, past + S]``; None: no padding.
        own_start, own_end: int32 ``[B]``, where own tokens begin and end in it; None: at its ends.
        options: all further keyword arguments.
    """

    batch: int
    length: int
    config: Any
    input_ids: Tensor | None
    attention_mask: Tensor | None
    own_start: Tensor | None
    own_end: Tensor | None
    options: dict[str, Any]

    @property
    def output_attentions(self) -> bool | None:
        """Whether attention weights are to be returned."""
        return self.options.get("output_attentions", self.config.output_attentions)


class PromptGeneration:
    """Generates by one base.

    Args:
        passes: of the base. backend: the one of the ops that is asked for by name; None picks automatically.
        prompt_embeddings: virtual token embeddings ``[P, H]`` of a row's prompt; None where it has none.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        passes: PrefixedPasses,
        backend: str | None,
        prompt_embeddings: Callable[[RowPrompt], Tensor | None],
    ) -> None:
        self._base, self._passes, self._backend = base, passes, backend
        self._prompt_embeddings = prompt_embeddings

    def read(
        self, inputs: Tensor | None, attention_mask: Tensor | None, options: dict[str, Any], config: Any, rows: int
    ) -> GenerationRequest:
        """A call with these arguments.

        Args:
            config: the model's, where `options` have none.
            rows: how many there are where neither ids nor embeddings say so.

        Raises:
            ValueError, IndexError, TypeError: inputs, a mask or a cache that don't fit each other or the base;
                ``is_causal=False``.
        """
        hooks.take_causal(options)
        input_ids = options.pop("input_ids", None)
        if inputs is not None and input_ids is not None:
            raise ValueError("inputs: pass either inputs or input_ids, not both")
        input_ids = inputs if input_ids is None else input_ids
        inputs_embeds = options.get("inputs_embeds")
        if input_ids is None and inputs_embeds is None:
            input_ids = torch.zeros(rows, 0, dtype=torch.long, device=self._base.device)
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, length = check_inputs(input_ids if inputs_embeds is None else None, inputs_embeds)
        if input_ids is not None:
            check_token_ids(input_ids, self._base.get_input_embeddings().num_embeddings)
        if options.get("assistant_model") is not None:
            raise ValueError("assistant_model: a draft model knows no prompts; use prompt_lookup_num_tokens instead")
        check_continuation(options.get("past_key_values"), attention_mask, batch, length)
        if hooks.drops_cache(self._base):
            raise ValueError(CACHE_IS_DROPPED)
        own_start, own_end = (None, None) if attention_mask is None else padding_ranges(attention_mask)
        config = options.get("generation_config") or config
        return GenerationRequest(batch, length, config, input_ids, attention_mask, own_start, own_end, options)

    def run(self, generate: Callable[..., Any], request: GenerationRequest, selected: Selection) -> Any:
        """What `request` asks for, by the model's own `generate`, behind the prefixes that were selected."""
        batch, length, config, kwargs = request.batch, request.length, request.config, dict(request.options)
        input_ids, attention_mask = request.input_ids, request.attention_mask
        own_start, own_end = request.own_start, request.own_end
        packed, index, inputs_embeds = selected.packed, selected.index, kwargs.get("inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        self._passes.check_rows_fit(batch, length, attention_mask, packed, index)
        if kwargs.get("guidance_scale", config.guidance_scale) not in (None, 1):
            raise ValueError("guidance_scale: not supported; what an unconditional row attends to is not defined here")
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids: generate counts positions itself; pad with an attention_mask instead")
        own = length if attention_mask is None else int((attention_mask != 0).sum(dim=1).max())
        if self._passes.why_expanded is not None or self._copies_prefix(batch, own, packed, config, kwargs):
            kwargs["generation_config"] = config
            return expanded.generate(
                self._base,
                input_ids=input_ids,
                packed=packed,
                index=index,
                attention_mask=attention_mask,
                prompt_embeddings=self._prompt_embeddings,
                **kwargs,
            )
        kwargs["prompt"] = packed
        if index is not None:
            kwargs["prompt_index"] = index
        if length == 0:
            return self._run_from_prompt(generate, batch, **kwargs)

        shown = None
        if own_end is not None:
            if inputs_embeds is not None or kwargs.get("past_key_values") is not None:
                raise ValueError("attention_mask: right padding needs input_ids and no cache; pad on the left instead")
            # A row's continuation follows its last real token, so padding has to stand on the left.
            shown, input_ids = given, right_align(given, own_end)
            own_start = (own_start if own_start is not None else 0) + (length - own_end)
            attention_mask = (torch.arange(length, device=input_ids.device) >= own_start[:, None]).long()
        if own_start is not None:
            kwargs["own_start"] = own_start
            if kwargs.get("prefill_chunk_size", config.prefill_chunk_size) is not None:
                raise ValueError("prefill_chunk_size: can't be combined with padded rows, which start in other chunks")
        if attention_mask is None:
            # Never let transformers guess a mask from pad ids: an own token may equal the pad token.
            attention_mask = torch.ones(batch, length, dtype=torch.long, device=given.device)
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        result = generate(attention_mask=attention_mask, **kwargs)
        if shown is not None:
            sequences = result if isinstance(result, Tensor) else result.sequences
            sequences[:, :length] = shown.repeat_interleave(sequences.shape[0] // batch, dim=0)
        return result

    def _copies_prefix(
        self, batch: int, length: int, packed: Packed | None, config: Any, options: dict[str, Any]
    ) -> bool:
        """Whether one row, which has nobody to share with, copies its prefix into its own cache: one attention call a
        layer instead of two and a merge. Same results; only where the caller gets no cache to see the difference."""
        if packed is None or length == 0 or requested(self._backend) != "auto":
            return False
        if any(options.get(name) is not None for name in ("past_key_values", "inputs_embeds", "assistant_model")):
            return False
        config = copy.deepcopy(config)
        config.update(**options)
        plain = config.use_cache is not False and config.cache_implementation in (None, "dynamic")
        plain = plain and config.prefill_chunk_size is None and config.prompt_lookup_num_tokens is None
        last = length + config.max_new_tokens if config.max_new_tokens else config.max_length or length + 20
        if self._passes.limit is not None and max(packed.lengths) + last > self._passes.limit.positions:
            return False  # the other path says at which position the model ends
        rows = batch * max(config.num_beams or 1, config.num_return_sequences or 1)
        if not plain or config.return_dict_in_generate:
            return False
        return heuristics.copy_prefix(
            rows, max(packed.lengths), isinstance(self._passes.fused.get(self._backend), FusedDecoder)
        )

    def _run_from_prompt(self, generate: Callable[..., Any], batch: int, **kwargs: Any) -> Any:
        """With no own token, one padding position stands in for them; its logits are the prefix's prediction."""
        kwargs.pop("inputs_embeds", None)
        width = self._base.get_input_embeddings().embedding_dim
        placeholder = torch.zeros(batch, 1, width, dtype=self._base.dtype, device=self._base.device)
        kwargs["own_start"] = torch.ones(batch, dtype=torch.int32, device=self._base.device)
        mask = torch.zeros(batch, 1, dtype=torch.long, device=self._base.device)
        result = generate(inputs_embeds=placeholder, attention_mask=mask, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None and not isinstance(result, Tensor):
            cache = result.past_key_values
        if cache is not None:
            # Whoever continues it has only the new tokens.
            drop_first_token(cache)
            cache.soft_prompt_claim = dataclasses.replace(cache.soft_prompt_claim, own_start=None)
        return result


def prepare_cache(config: Any, model_kwargs: dict[str, Any], max_cache_length: int, num_layers: int) -> None:
    """Put a cache of own tokens into `model_kwargs`, as `config` (a ``GenerationConfig``) wants it.

    Raises:
        ValueError: another kind of cache, or one given that can't be used.
    """
    given = model_kwargs.get("past_key_values")
    kind = config.cache_implementation
    if given is not None:
        if kind is not None:
            raise ValueError("cache_implementation: can't be combined with past_key_values")
        model_kwargs["past_key_values"] = adopt(given, num_layers)
    elif config.use_cache is False:
        return
    elif kind in (None, "dynamic"):
        model_kwargs["past_key_values"] = OwnTokenCache(num_layers, reserve=min(max_cache_length, 1024))
    elif kind == "static":
        length = max(max_cache_length, getattr(config, "max_cache_len", None) or 0)
        model_kwargs["past_key_values"] = make_static_cache(num_layers, length)
    else:
        raise ValueError(f"cache_implementation: expected None, 'dynamic' or 'static', found {kind!r}")
