# SPDX-License-Identifier: Apache-2.0
"""SoftPromptModel: a frozen causal LM whose soft prompts are prefixes that every row shares."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from softprompt_fast.bank import BankOptions
from softprompt_fast.banked import BankedModel
from softprompt_fast.explanation import Explanation
from softprompt_fast.generation import PromptGeneration, prepare_cache
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.head import vocab_size
from softprompt_fast.packing import SEGMENT_ARGUMENTS, find_segments
from softprompt_fast.rows import cached_length, check_inputs, check_token_ids, own_ranges
from softprompt_fast.scoring import LabelledCall


class SoftPromptModel(BankedModel, GenerationMixin):
    """A frozen causal language model with soft prompts, each computed once and shared by every row.

    Args:
        base: a transformers causal LM (``...ForCausalLM``). Its weights are used as they are and not copied. Its
            attention implementation is replaced by one that computes the same without a prompt.
        backend: force one backend of the ops ("reference", "torch", ...); None picks automatically.
        freeze_base: turn the base's gradients off, as PEFT does; False leaves them, and :meth:`invalidate` has to be
            called when its weights have changed.
        bank: budgets and storage of the prompts' prefixes (:class:`~softprompt_fast.bank.BankOptions`).

    Results equal PEFT's on each row alone and unpadded, whatever the padding and the neighbours. Logits are
    ``[B, S, V]``: one per own token. A prompt that requires grad is differentiated whenever grad is enabled (its
    forward and backward run once per call, not once per row); otherwise its prefix is computed at the first use.

    Raises:
        TypeError: `base` is no transformers causal LM, or one whose layers keep more than keys and values (recurrent
            hybrids); found by a probe of a few tokens.
    """

    # GenerationMixin's questions about the model.
    main_input_name = "input_ids"
    _is_stateful = False
    _supports_cache_class = True

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        backend: str | None = None,
        freeze_base: bool = True,
        bank: BankOptions | None = None,
    ) -> None:
        super().__init__(base, backend=backend, freeze_base=freeze_base, bank=bank)
        self.generation_config = base.generation_config
        # transformers hands unknown keywords down to every layer, so a misspelt prompt= would pass in silence.
        self._base_arguments = hooks.forward_arguments(base)
        self._generation = PromptGeneration(base, self._passes, backend, self._selector.virtual_embeddings)

    @classmethod
    def from_pretrained(
        cls,
        base: PreTrainedModel | str | os.PathLike[str],
        adapter: str | os.PathLike[str] | None = None,
        *,
        prompt_name: str = "default",
        trainable: bool = False,
        backend: str | None = None,
        bank: BankOptions | None = None,
        **base_kwargs: Any,
    ) -> SoftPromptModel:
        """A model with one prompt, read from a PEFT adapter directory (PEFT need not be installed) or a PrefixKV's.

        Args:
            base: a loaded model, or what ``AutoModelForCausalLM.from_pretrained`` takes.
            adapter: directory of the adapter; None for no prompt yet.
            prompt_name: the name to give it.
            trainable: let its parameters require grad.
            bank: as the class takes it.
            base_kwargs: passed on when the base is loaded here (``dtype``, ``gguf_file``, ...).

        Raises:
            ValueError: the adapter is for another base, or is no prompt-learning method; the message names what.
        """
        if not isinstance(base, PreTrainedModel):
            from transformers import AutoModelForCausalLM

            base = AutoModelForCausalLM.from_pretrained(base, **base_kwargs).eval()
        model = cls(base, backend=backend, bank=bank)
        if adapter is not None:
            model.load_prompt(prompt_name, adapter, trainable=trainable)
        return model

    # ---- forward ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # TRL replaces `forward` by one that, asked for a fused head, runs the base without its prompt; the same
        # question under another name passes through to the forward below.
        if kwargs.pop("fused_lm_head", False):
            kwargs["return_token_scores"] = True
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt: Any = ...,
        task_ids: Tensor | Sequence[int] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        return_token_scores: bool = False,
        input_type_mask: Tensor | None = None,
        prompt_index: Tensor | None = None,
        own_start: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass over own tokens behind their prompts.

        Args:
            input_ids: int64 ``[B, S]`` own tokens (or ``inputs_embeds`` ``[B, S, H]``).
            attention_mask: ``[B, past + S]``, 1 for real own tokens; zeros only at the ends of a row (padding).
            labels: int64 ``[B, S]``, -100 where no loss is wanted. The first own token's label is predicted by the
                last virtual token and counts, as in PEFT; prefix tuning and cartridges have no such term.
            prompt: name for the batch, one name or None per row, or None; left out: the active prompt.
            task_ids: int ``[B]``, for multitask prompts.
            past_key_values: own tokens seen so far. use_cache: whether to return such a cache.
            logits_to_keep: as in transformers.
            return_logits: None: everywhere but in a training call (``self.training`` and labels), where only the
                logits at labelled positions are computed and ``out.logits`` is None. True always gives them.
            position_ids: ``[B, S]``, positions among own tokens. Where they restart at 0, a row is packed: several
                short rows, each seeing the prefix and itself (transformers' ``DataCollatorWithFlattening``, TRL's
                packing); ``prompt`` and ``task_ids`` may then name one per segment.
            input_type_mask: int ``[B, S]``, CPT's token types of own tokens (default: all labels count).
            num_items_in_batch: divisor of the summed loss instead of the number of labels (gradient accumulation).
            return_token_scores: return a :class:`~softprompt_fast.integrations.trainer.TokenScores` of the labelled
                tokens instead (TRL's ``fused_lm_head``; not for CPT, whose loss has other terms).
            prompt_index, own_start: int32 ``[B]``, set by :meth:`generate` so that a decode step computes neither.

        Returns:
            The base model's output class with ``loss`` and ``logits`` ``[B, S, V]``.

        Raises:
            ValueError: shapes that don't match, no token, a mask with holes, a cache of other prompts, too many
                positions, ``is_causal=False``.
            KeyError: unknown prompt (the message lists the known ones).
            IndexError: a token id or a label outside the vocabulary.
        """
        if unknown := kwargs.keys() - self._base_arguments - SEGMENT_ARGUMENTS:
            raise TypeError(f"forward() got unexpected keyword arguments {sorted(unknown)}")
        hooks.take_causal(kwargs)
        batch, length = check_inputs(input_ids, inputs_embeds, labels)
        if length == 0:
            name = "input_ids" if inputs_embeds is None else "inputs_embeds"
            raise ValueError(f"{name}: expected at least one column, found none; generate() takes a prompt alone")
        decodes = past_key_values is not None and length == 1
        if input_ids is not None and input_ids.device.type == "cpu" and not (decodes or torch.compiler.is_compiling()):
            # Elsewhere only `generate` pays the synchronisation, once a call.
            check_token_ids(input_ids, self.base.get_input_embeddings().num_embeddings)
        if (segments := find_segments(kwargs, attention_mask, past_key_values, (batch, length))) is not None:
            out = segments.run(
                self.forward,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                input_type_mask=input_type_mask,
                prompt=prompt,
                task_ids=task_ids,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_logits=return_logits,
                return_token_scores=return_token_scores,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
            return out.to_tuple() if return_dict is False else out
        own_end = None
        call: LabelledCall | None = None
        if labels is not None:
            if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
                raise ValueError("logits_to_keep: can't be combined with labels, whose positions decide what is kept")
            if int(cached_length(past_key_values)) > 0:
                raise ValueError("labels: can't be combined with past_key_values that hold tokens")
            if own_start is None and attention_mask is not None:
                own_start, own_end = own_ranges(attention_mask, batch, 0, length)
            rows = self._row_prompts(prompt, task_ids, batch)
            call = LabelledCall.of(
                labels,
                own_start,
                own_end,
                [None if row is None else self._bank[row[0]] for row in rows],
                vocab_size=vocab_size(self.base),
                chunked=self.training if return_logits is None else not return_logits,
                scores=return_token_scores,
            )
        elif return_token_scores:
            raise ValueError("return_token_scores: needs labels")
        selected = self._select(
            prompt,
            task_ids,
            batch,
            labels=call is not None,
            virtual_logits=call is not None and call.cpt,
            next_logits=call is None or call.wants_predictions,
            output_attentions=kwargs.get("output_attentions"),
        )
        run = functools.partial(
            self._passes.run,
            packed=selected.packed,
            index=prompt_index if prompt_index is not None else selected.index,
            call=call,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            input_type_mask=input_type_mask,
            own_start=own_start,
            own_end=own_end,
            cache=past_key_values,
            use_cache=use_cache if use_cache is not None else labels is None and self.config.use_cache,
            logits_to_keep=logits_to_keep,
            num_items_in_batch=num_items_in_batch,
            prompt_of=self._bank.__getitem__,
            **kwargs,
        )
        if not selected.held:  # dynamo traces no `finally` behind a graph break
            out = run()
        else:
            try:
                out = run()
            finally:
                selected.release()
        return out.to_tuple() if return_dict is False else out

    # ---- generation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        prompt: Any = ...,
        task_ids: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` behind one or many prompts; every decoding option of it that uses a cache.

        Args:
            inputs: int64 ``[B, S]`` own tokens (also as ``input_ids=``), padded left or right. None or S = 0: generate
                from the prompt alone.
            prompt: name for the batch, one name or None per row, or None; left out: the active prompt.
            task_ids: int ``[B]``, for multitask prompts.
            attention_mask: ``[B, S]``, 1 for own tokens. Rows are continued after their last real token.
            kwargs: as in transformers: ``max_new_tokens``, ``do_sample``, ``num_beams``, ``streamer``,
                ``logits_processor``, ``cache_implementation="static"``, ``past_key_values`` of an earlier call, ...

        Returns:
            As transformers: the given ids followed by the new ones, ``[B * num_return_sequences, S + new]``.
        """
        rows = len(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else 1
        request = self._generation.read(inputs, attention_mask, kwargs, self.generation_config, rows)
        selected = self._select(prompt, task_ids, request.batch, output_attentions=request.output_attentions)
        try:
            return self._generation.run(super().generate, request, selected)
        finally:
            selected.release()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """A manager of transformers' continuous batching whose ``add_request`` takes a ``prompt``; arguments as in
        transformers. ``continuous_batching_context_manager`` starts and stops one.

        Raises:
            ValueError: the base can't be served so (anything but "sdpa" attention, sliding windows); says why.
            ImportError: transformers is older than 5.23.
        """
        from softprompt_fast.integrations import continuous_batching

        return continuous_batching.init_continuous_batching(self, *args, **kwargs)

    def generate_batch(self, inputs: Sequence[list[int] | Tensor], **kwargs: Any) -> Any:
        """transformers' ``generate_batch``: rows of own tokens, run by continuous batching in a paged cache that holds
        each prompt once.

        Args:
            inputs: own tokens of each row, at least one a row.
            kwargs: ``prompt`` and ``task_ids`` as in :meth:`generate`; ``generation_config``,
                ``continuous_batching_config``, ``max_new_tokens`` and ``warmup`` as in transformers.

        Returns:
            Request id -> transformers' ``GenerationOutput``, in the order of the rows.

        Raises:
            ValueError, ImportError: as :meth:`init_continuous_batching`; KeyError: unknown prompt.
        """
        from softprompt_fast.integrations import continuous_batching

        return continuous_batching.generate_batch(self, inputs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The next step's arguments: new own tokens, the cache, and the prompt selection made by :meth:`generate`.
        No mask and no position is built here: a row's ``own_start`` says all there is."""
        inputs: dict[str, Any] = {name: value for name, value in kwargs.items() if name != "position_ids"}
        if inputs_embeds is not None and is_first_iteration:
            inputs["inputs_embeds"] = (
                inputs_embeds if next_sequence_length is None else inputs_embeds[:, -next_sequence_length:]
            )
        else:
            inputs["input_ids"] = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        inputs["past_key_values"] = past_key_values
        return inputs

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
    ) -> None:
        prepare_cache(generation_config, model_kwargs, max_cache_length, self._passes.num_layers)

    # ---- what transformers asks of a model, and spf.explain ---------------------------------------------------------

    def can_generate(self) -> bool:
        return True

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Any:
        """What ``generate`` runs its decode steps with on a GPU, where the cache is static. The base's own method,
        which would be found otherwise, compiles the base alone: it knows no prompt."""
        config = compile_config or CompileConfig()
        known = self.__dict__.get("_compiled_step")
        if known is None or known[0] != config:
            known = self.__dict__["_compiled_step"] = (config, torch.compile(self.__call__, **config.to_dict()))
        return known[1]

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def _get_name(self) -> str:
        # By this name Trainer knows whether its label smoothing has to shift labels.
        return self.base._get_name()

    def explain(self) -> Explanation:
        """The path of every layer; see :func:`softprompt_fast.explain`."""
        return self._passes.explain(self.training)
