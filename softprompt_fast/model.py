# SPDX-License-Identifier: Apache-2.0
"""SoftPromptModel: a frozen causal LM whose soft prompts are prefixes that every row shares."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import CompileConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from softprompt_fast import expanded
from softprompt_fast._io import identity
from softprompt_fast.accumulation import GradientAccumulation
from softprompt_fast.backends import heuristics
from softprompt_fast.backends._registry import requested
from softprompt_fast.bank import BankOptions, Held, PromptBank
from softprompt_fast.cache import OwnTokenCache, adopt, drop_first_token, make_static_cache
from softprompt_fast.compiling import PromptCompiler
from softprompt_fast.explanation import Explanation, LayerPath, serving_backend
from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.integrations import probe, trainer
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.fused_decoder import FusedDecoder, LazyDecoder
from softprompt_fast.integrations.head import BaseHead, LazyHead, vocab_size
from softprompt_fast.losses import Terms, padding_columns
from softprompt_fast.packed import Compiled, Packed, RowPrompt
from softprompt_fast.packing import SEGMENT_ARGUMENTS, find_segments
from softprompt_fast.prefix_kv import TENSORS_NAME, PrefixKV
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.prompted import PromptedModel
from softprompt_fast.rows import (
    cached_length,
    check_continuation,
    check_inputs,
    check_token_ids,
    claim_rows,
    own_ranges,
    padding_ranges,
    predict_empty_rows,
    right_align,
    row_positions,
    static_ranges,
)
from softprompt_fast.scoring import LabelledCall, LabelledStates

logger = logging.getLogger("softprompt_fast")


@dataclass(frozen=True)
class _PromptDirectory:
    """A registered prompt: :class:`~softprompt_fast.bank.Source` for one model's bank."""

    model: SoftPromptModel
    directory: Path

    def load(self) -> SoftPrompt | PrefixKV:
        return self.model._checked(self.model._read_prompt(self.directory))

    def num_tasks(self) -> int | None:
        if PrefixKV.is_saved_at(self.directory):
            return None
        config = peft_io.read_adapter_config(self.directory)
        return config.get("num_tasks") if config.get("peft_type") == "MULTITASK_PROMPT_TUNING" else None

    def identity(self) -> Hashable:
        return identity(self.directory / TENSORS_NAME, *peft_io.adapter_files(self.directory))


@dataclass(frozen=True)
class _Selection:
    """What a call attends to, until it is released.

    Attributes:
        packed: the prefixes; None: no row has one.
        index: int32 ``[B]``, each row's place in `packed`, -1 for none; None: all rows use the only one.
        held: what must stay in the bank until then.
    """

    packed: Packed | None = None
    index: Tensor | None = None
    held: tuple[Held | None, ...] = ()

    def release(self) -> None:
        for held in self.held:
            if held is not None:
                held.release()


_CACHE_IS_DROPPED = (
    "past_key_values: gradient checkpointing ignores caches in training mode; call eval(), or "
    "gradient_checkpointing_disable() on the base"
)


class SoftPromptModel(PromptedModel, GenerationMixin):
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
        if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
            raise TypeError(f"base: expected a transformers causal LM, found {type(base).__name__}")
        if base.config.is_encoder_decoder:
            raise TypeError(f"base: {type(base).__name__} is an encoder-decoder; use EncoderDecoderSoftPromptModel")
        super().__init__(base, backend=backend, freeze_base=freeze_base)
        self.generation_config = base.generation_config
        self._accumulation = GradientAccumulation(trainer.more_micro_batches_follow)
        self._num_layers = hooks.num_attention_layers(base)
        requested(backend)  # raises for a name that is no backend's
        self._limit = hooks.position_limit(base)
        # transformers hands unknown keywords down to every layer, so a misspelt prompt= would pass in silence.
        self._base_arguments = hooks.forward_arguments(base)
        self._why_expanded = probe.why_not_shared(base, backend)
        if self._why_expanded is not None:
            if (refused := probe.why_not_expanded(base)) is not None:
                raise TypeError(
                    f"base: {type(base).__name__} can't be served: {self._why_expanded}; with prefixes expanded into "
                    f"its cache: {refused}"
                )
            logger.warning(
                "%s: prefixes are expanded into an ordinary cache (exact, slower): %s",
                type(base).__name__,
                self._why_expanded,
            )
        self._fused = LazyDecoder(base)
        self._head = LazyHead(base)
        self._compiler = PromptCompiler(base, self._fused, backend, is_expanded=self._why_expanded is not None)
        self._bank = PromptBank(self._compiler.frozen, bank, device=self.device, dtype=self.dtype)

    # ---- prompts -------------------------------------------------------------------------------------------------

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

    def load_prompt(
        self, name: str, directory: str | os.PathLike[str], *, trainable: bool = False, replace: bool = False
    ) -> None:
        """Load a PEFT adapter directory or a saved :class:`PrefixKV` under `name`."""
        self.add_prompt(name, self._read_prompt(directory, trainable=trainable), replace=replace)

    def _read_prompt(self, directory: str | os.PathLike[str], *, trainable: bool = False) -> SoftPrompt | PrefixKV:
        if PrefixKV.is_saved_at(directory):
            prefix = PrefixKV.from_pretrained(directory)
            prefix.check_base(self.base, fingerprint=self.base_fingerprint)
            return prefix
        table = self.base.get_input_embeddings() if trainable else None
        return peft_io.load_adapter(directory, trainable=trainable, token_embeddings=table)

    def register_prompt(self, name: str, directory: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Put a PEFT adapter directory or a saved :class:`PrefixKV` under `name` without reading it: it is loaded,
        frozen, when it is first used, and again after the bank dropped it. A saved prefix stays a map of its file
        where it has the model's dtype: replace such files (by renaming, as ``save_pretrained`` does) and don't write
        into them. To have a change seen at once, register the prompt again.

        Raises:
            FileNotFoundError: `directory` holds neither. What else is wrong with it shows when the prompt is used,
                and hurts no other.
            ValueError: `name` is taken.
        """
        directory = Path(os.path.abspath(directory))
        if not PrefixKV.is_saved_at(directory) and not peft_io.is_adapter_at(directory):
            raise FileNotFoundError(f"prompt {name!r}: expected an adapter or a saved prefix in {directory}")
        self._bank.register(name, _PromptDirectory(self, directory), replace=replace)
        self._dispose(name)
        if self.active_prompt is None:
            self.active_prompt = name

    @property
    def bank(self) -> PromptBank:
        """Where the prompts' prefixes are kept; a server holds them there for its requests."""
        return self._bank

    def add_prompt(self, name: str, prompt: SoftPrompt | PrefixKV, *, replace: bool = False) -> None:
        """Put a prompt under `name`, on the base model's device and in its dtype; an 8-bit prefix
        (:meth:`PrefixKV.quantize`) stays so. The first one becomes the active prompt.

        Raises:
            ValueError: `name` is taken, or the prompt doesn't fit the base model (expected and found are named).
            TypeError: `prompt` is neither a SoftPrompt nor a PrefixKV.
        """
        self._bank.add(name, self._checked(prompt), replace=replace)
        self._dispose(name)
        if isinstance(prompt, SoftPrompt):
            self._register_prompt(name, prompt)
        if self.active_prompt is None:
            self.active_prompt = name

    def _checked(self, prompt: SoftPrompt | PrefixKV) -> SoftPrompt | PrefixKV:
        """`prompt` if it serves this base, a soft prompt on its device."""
        if isinstance(prompt, SoftPrompt):
            peft_io.check_compatible(prompt, self.base)
            prompt.check_finite()
            return prompt.to(self.device)
        if not isinstance(prompt, PrefixKV):
            raise TypeError(f"prompt: expected SoftPrompt or PrefixKV, found {type(prompt).__name__}")
        prompt.check_compatible(self.base)
        prompt.check_base(self.base, fingerprint=self.base_fingerprint)
        prompt.check_finite()
        return prompt

    def _dispose(self, name: str) -> None:
        """Take the soft prompt that was called `name`, if one was, out of the submodules."""
        if name in self._keys:
            del self.prompts[self._keys.pop(name)]

    def cartridge_from_tokens(
        self, input_ids: Tensor, *, num_virtual_tokens: int | None = None, num_frozen_tokens: int = 1
    ) -> SoftPrompt:
        """A trainable CARTRIDGE that starts as the base's own keys and values of a text: at first it answers as the
        base does with that text before every row.

        Args:
            input_ids: int64 ``[T]``, the text.
            num_virtual_tokens: P, how many of its first tokens to take; None for all.
            num_frozen_tokens: how many of those never change (:meth:`SoftPrompt.from_prefix`).

        Raises:
            ValueError: another shape, P outside 1..T, or more tokens than the base has positions.
            IndexError: a token id outside the vocabulary.
            AdapterError: `num_frozen_tokens` outside 0..P, or a base whose layers differ in shape.
        """
        if input_ids.dim() != 1:
            raise ValueError(f"input_ids: expected one text of shape [T], found {tuple(input_ids.shape)}")
        tokens = len(input_ids) if num_virtual_tokens is None else num_virtual_tokens
        if not 1 <= tokens <= len(input_ids):
            raise ValueError(f"num_virtual_tokens: expected 1 to {len(input_ids)}, the tokens given, found {tokens}")
        if self._limit is not None:
            self._limit.check(tokens, tokens)
        check_token_ids(input_ids[None], self.base.get_input_embeddings().num_embeddings)
        prefix = self._compiler.of_tokens(input_ids[:tokens])
        name = self.base.name_or_path or None
        prompt = SoftPrompt.from_prefix(prefix, num_frozen_tokens=num_frozen_tokens, base_model_name_or_path=name)
        return prompt.to(self.device)

    def remove_prompt(self, name: str) -> None:
        """Drop a prompt; if it was the active one, none is."""
        self._bank.remove(name)
        self._dispose(name)
        if self.active_prompt == name:
            self.active_prompt = None

    @property
    def prompt_names(self) -> list[str]:
        return self._bank.names

    def get_prompt(self, name: str) -> SoftPrompt | PrefixKV:
        """The prompt called `name` (a registered one is loaded for this); KeyError with known names if there is
        none."""
        return self._bank[name]

    def _check_name(self, name: str) -> None:
        self._bank.check_name(name)

    def compile_prompt(self, name: str, *, task: int | None = None) -> PrefixKV:
        """The frozen prefix of prompt `name` (for a multitask prompt, of its `task`), as the bank stores it."""
        return self._bank.prefix(name, self._bank.check_task(name, task))

    def invalidate(self) -> None:
        """Forget every computed prefix. Needed after the base's weights were changed, or a prompt's behind autograd's
        back (``.data``)."""
        self._compiler.forget()
        self._fused.forget()
        self._bank.invalidate()

    @property
    def base_fingerprint(self) -> str:
        """Digest of the base model's architecture and weights, computed once."""
        return self._compiler.fingerprint

    # ---- which prompt for which row ------------------------------------------------------------------------------

    def _row_prompts(self, prompt: Any, task_ids: Any, batch: int) -> list[RowPrompt | None]:
        names = self._row_names(prompt, batch)
        tasks: list[int | None] = [None] * batch
        if task_ids is not None:
            tasks = task_ids.tolist() if isinstance(task_ids, Tensor) else list(task_ids)
            if len(tasks) != batch:
                raise ValueError(f"task_ids: expected one per row ({batch} rows), found {len(tasks)}")
        rows: list[RowPrompt | None] = []
        for name, task in zip(names, tasks, strict=True):
            if name is None:
                rows.append(None)
                continue
            rows.append((name, self._bank.check_task(name, task)))
        return rows

    def _is_trainable(self, name: str) -> bool:
        """Whether the prefix of `name` has a gradient to give: to the prompt, or to a base that is trained as well."""
        base_trains = any(p.requires_grad for p in self.base.parameters())
        if self._bank.is_registered(name) and not base_trains:
            return False
        prompt = self._bank[name]
        if isinstance(prompt, PrefixKV):
            return False
        return prompt.trainable or (prompt.kind == "embedding" and base_trains)

    def _select(
        self,
        prompt: Any,
        task_ids: Any,
        batch: int,
        *,
        training: bool = False,
        virtual_logits: bool = False,
        next_logits: bool = True,
        output_attentions: bool | None = False,
    ) -> _Selection:
        """The prefixes of this batch; to be released when the call is done.

        Args:
            virtual_logits, next_logits: whether those are wanted of prefixes that are computed in this call.
            output_attentions: whether weights over all packed entries are.
        """
        if isinstance(prompt, Packed) and not prompt.is_sparse:
            return _Selection(prompt)
        in_place = not output_attentions and self._reads_places()
        if isinstance(prompt, Packed):
            return _Selection(prompt if in_place else prompt.dense(self.dtype))
        rows = self._row_prompts(prompt, task_ids, batch)
        distinct = list(dict.fromkeys(row for row in rows if row is not None))
        if not distinct:
            return _Selection()
        names = {name for name, _ in distinct}
        trainable = {name for name in names if torch.is_grad_enabled() and self._is_trainable(name)}
        if training and trainable and trainable != names:
            raise ValueError(
                f"prompt: a training call mixes trainable prompts {sorted(trainable)} with frozen ones "
                f"{sorted(names - trainable)}; train them in separate calls, or load all with trainable=True"
            )
        if trainable or virtual_logits:
            compiled = self._compile_once_a_step(distinct, virtual_logits, next_logits)
            packed = self._bank.pack(distinct, compiled, self.dtype)
        elif in_place:
            return self._hold_rows(rows, indexed=len(distinct) > 1 or None in rows)
        else:
            packed = self._bank.packed(distinct, self.dtype)
        if len(distinct) == 1 and None not in rows:
            return _Selection(packed)
        place: dict[RowPrompt | None, int] = {row: i for i, row in enumerate(distinct)}
        place[None] = -1
        index = torch.tensor([place[row] for row in rows], dtype=torch.int32, device=self.device)
        return _Selection(packed, index)

    def _hold_rows(self, rows: list[RowPrompt | None], *, indexed: bool) -> _Selection:
        held = tuple(self._bank.hold_all(rows))
        try:
            packed, index = self._bank.pack_held(held)
        except BaseException:
            _Selection(held=held).release()
            raise
        return _Selection(packed, index if indexed else None, held)

    def _reads_places(self) -> bool:
        """Whether a call now attends to prefixes where they lie in the bank's storage: where it makes no graph, which
        would keep them, and is served by kernels that neither touch nor convert the entries between."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.base.training:
            return False
        device = self.device.type
        if torch.is_autocast_enabled(device):
            return False
        serving, _ = serving_backend("prefix_attention", device, self.backend)
        if self._bank.options.dtype is not None:
            return serving == "triton" or (
                serving == "cpu" and self._bank.options.dtype == torch.int8 and self.dtype != torch.float64
            )
        return serving in ("cpu", "triton") or (serving == "torch" and device == "cpu")

    def _compile_once_a_step(
        self, distinct: list[RowPrompt], virtual_logits: bool, next_logits: bool
    ) -> list[Compiled]:
        def run(rows: list[RowPrompt]) -> list[Compiled]:
            return self._compile_rows(rows, virtual_logits, next_logits)

        # FSDP around the prompts themselves has to reduce their gradients at every backward.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or isinstance(self, FSDPModule):
            return run(distinct)
        if self._accumulation.explicit and trainer.active_ddp() is not None:
            raise RuntimeError(
                "accumulate_gradients: its gradients would not be reduced by DistributedDataParallel; leave it out "
                "and use the wrapper's no_sync(), which this model follows"
            )
        device = self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self._accumulation.compiled(
            {row: self._bank.version(row[0]) for row in distinct},
            (virtual_logits, next_logits, autocast),
            run,
            self._trained_by,
            training=self.training,
        )

    def _trained_by(self, row: RowPrompt) -> list[nn.Parameter]:
        """What a gradient of a prompt's keys and values may reach: its own parameters, and the base's."""
        prompt = self._bank[row[0]]
        if isinstance(prompt, PrefixKV):
            return []
        return [*prompt.parameters(), *(self.base.parameters() if prompt.kind == "embedding" else ())]

    def _compile_rows(self, rows: list[RowPrompt], virtual_logits: bool, next_logits: bool) -> list[Compiled]:
        compiled: dict[RowPrompt, Compiled] = {}
        for name in dict.fromkeys(name for name, _ in rows):
            prompt = self._bank[name]
            if isinstance(prompt, PrefixKV):
                compiled[name, None] = Compiled.of(prompt.to(self.device, self.dtype))
                continue
            wanted = [row for row in rows if row[0] == name]
            tasks = None if wanted[0][1] is None else [task for _, task in wanted if task is not None]
            wants_logits = virtual_logits and prompt.method == "CPT"
            computed = self._compiler.run(prompt, tasks, all_logits=wants_logits, next_logits=next_logits)
            compiled.update(zip(wanted, computed, strict=True))
        return [compiled[row] for row in rows]

    @contextmanager
    def accumulate_gradients(self) -> Iterator[None]:
        """Run each prompt once for all micro-batches of an optimizer step.

        ``loss.backward()`` inside leaves the gradients of the prompts' keys and values summed but unfinished; at the
        end of the block the prompts' own backward runs once and adds to their parameters' ``grad``, as if each
        micro-batch had run it. Clip and step after the block. An exception in it drops its gradients.

        Accelerate's ``accumulate``, transformers' Trainer, TRL's trainers and DistributedDataParallel's ``no_sync()``
        are followed without this block: there the last micro-batch's ``backward()`` finishes the gradients of all.

        Dropout in a prompt's own run (P_TUNING's LSTM, a base with dropout) then draws one mask a step.

        Raises:
            RuntimeError: a training call inside a DistributedDataParallel forward, whose gradients would not be
                reduced; or ``backward()`` of a loss of this block after its end.
        """
        with self._accumulation.window():
            yield

    # ---- forward -------------------------------------------------------------------------------------------------

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
            ValueError: shapes that don't match, a mask with holes, a cache of other prompts, too many positions.
            KeyError: unknown prompt (the message lists the known ones).
            IndexError: a token id or a label outside the vocabulary.
        """
        if unknown := kwargs.keys() - self._base_arguments - SEGMENT_ARGUMENTS:
            raise TypeError(f"forward() got unexpected keyword arguments {sorted(unknown)}")
        batch, length = check_inputs(input_ids, inputs_embeds, labels)
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
            training=self.training and call is not None,
            virtual_logits=call is not None and call.cpt,
            next_logits=call is None or call.wants_predictions,
            output_attentions=kwargs.get("output_attentions"),
        )
        run = functools.partial(
            self._run_selected,
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

    def _run_selected(
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
        **kwargs: Any,
    ) -> Any:
        """:meth:`forward` behind the prefixes that it selected."""
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
            terms = call.terms(packed, index, self._bank.__getitem__, padding, input_type_mask)
            if call.chunked:
                labelled = terms.positions
                head = self._head.serving() if self._runs_in_parts(kwargs) else None
                logits_to_keep = 0 if head is not None else (labelled % max(length, 1)).unique()
        if self._why_expanded is not None:
            self._check_rows_fit(batch, int(past) + length, attention_mask, packed, index)
        run = self._forward_shared if self._why_expanded is None else self._forward_expanded
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
        if self._why_expanded is None or packed is None or int(past) == 0:
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
        if hooks.drops_cache(self.base):
            if cache is not None:
                raise ValueError(_CACHE_IS_DROPPED)
            use_cache = False
        if cache is None and use_cache:
            cache = OwnTokenCache(self._num_layers)
        past: int | Tensor = 0
        query_start = None
        if cache is not None:
            adopt(cache, self._num_layers)
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
            backend=self.backend,
            scales=None if packed is None else packed.scales,
        )
        given_positions = kwargs.pop("position_ids", None)
        positions = row_positions(given_positions, past, length, packed, index, own_start, own_end, device)
        # Off the CPU reading a position waits for the device: only a prefill does, where an overrun would crash.
        readable = device.type == "cpu" or (isinstance(past, int) and past == 0)
        if self._limit is not None and readable and positions.numel() and not torch.compiler.is_compiling():
            self._limit.check(int(positions.max()) + 1, max(packed.lengths) if packed is not None else 0)
        if labelled is not None and cache is None:
            passes = self._fused.training(inputs_embeds, context, kwargs)
            if passes is not None:
                hidden = inputs_embeds if input_ids is None else passes.embed(input_ids)
                assert hidden is not None
                return LabelledStates(passes.own(hidden, positions, context, labelled), passes.head)
        fused = self._fused.serving(inputs_embeds, context, cache, kwargs) if length and head is None else None
        if fused is not None:
            hidden = fused.embed(input_ids) if inputs_embeds is None else inputs_embeds
            logits = fused(hidden, positions, context, cache, logits_to_keep)
            return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        if isinstance(logits_to_keep, int) and 0 < logits_to_keep < length:
            # As a slice the kept states stay strided, and the head's matmul then runs row by row, reading its weight
            # once per row (32 rows, SmolLM2-135M: 104 ms of an 860 ms prefill); as an index they are one dense block.
            logits_to_keep = torch.arange(length - logits_to_keep, length, device=device)
        if head is None:
            kwargs["logits_to_keep"] = logits_to_keep
        out = (self.base if head is None else head.decoder)(
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

    def _check_rows_fit(
        self, batch: int, length: int, attention_mask: Tensor | None, packed: Packed | None, index: Tensor | None
    ) -> None:
        """Whether all rows fit the model's positions, where a step has no positions at hand or would be late."""
        if self._limit is None:
            return
        own = torch.full((batch,), length, device=self.device)
        if attention_mask is not None:
            own = (attention_mask != 0).sum(dim=1)
        virtual = torch.zeros_like(own)
        if packed is not None:
            virtual = virtual + (packed.lengths[0] if index is None else packed.lengths_tensor[index.long()])
        row = int((own + virtual).argmax())
        self._limit.check(int(own[row] + virtual[row]), int(virtual[row]))

    def _runs_in_parts(self, options: dict[str, Any]) -> bool:
        """Whether a loss alone is better had from the base's decoder and head apart: not where the fused decoder may
        serve, which has both, nor where `options` ask for what only the whole gives."""
        asked = {name for name, value in options.items() if value is not None and value is not False}
        if torch.compiler.is_compiling() or asked - {"position_ids", "output_hidden_states", "output_attentions"}:
            return False
        return torch.is_grad_enabled() or not isinstance(self._fused.get(self.backend), FusedDecoder)

    def _forward_expanded(self, *, head: BaseHead | None, labelled: Tensor | None, **kwargs: Any) -> Any:
        packed, index, cache = kwargs["packed"], kwargs["index"], kwargs["cache"]
        given = kwargs["input_ids"] if kwargs["input_ids"] is not None else kwargs["inputs_embeds"]
        if packed is not None and hooks.drops_cache(self.base):
            raise ValueError(_CACHE_IS_DROPPED)  # and with it the prefix
        if cache is not None:
            claim_rows(cache, packed, index, None, None, given.shape[0], cache.get_seq_length())
        out = expanded.forward(self.base, decoder=None if head is None else head.decoder, **kwargs)
        if out.get("past_key_values") is not None:
            claim_rows(out.past_key_values, packed, index, None, None, given.shape[0], 0)
        return out if head is None else _labelled_states(out, head, labelled)

    def _virtual_embeddings(self, row: RowPrompt) -> Tensor | None:
        """Virtual token embeddings ``[P, H]`` of an embedding method; None where there are none."""
        prompt = self._bank[row[0]]
        if isinstance(prompt, PrefixKV) or prompt.kind == "prefix":
            return None
        task_ids = None if row[1] is None else torch.tensor([row[1]], device=self.device)
        return prompt.embeddings(task_ids=task_ids).to(self.dtype).flatten(0, -2)

    # ---- generation ----------------------------------------------------------------------------------------------

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
        input_ids = kwargs.pop("input_ids", None)
        if inputs is not None and input_ids is not None:
            raise ValueError("inputs: pass either inputs or input_ids, not both")
        input_ids = inputs if input_ids is None else input_ids
        inputs_embeds = kwargs.get("inputs_embeds")
        if input_ids is None and inputs_embeds is None:
            rows = 1 if prompt is None or prompt is ... or isinstance(prompt, str) else len(prompt)
            input_ids = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, length = check_inputs(input_ids if inputs_embeds is None else None, inputs_embeds)
        if input_ids is not None:
            check_token_ids(input_ids, self.base.get_input_embeddings().num_embeddings)
        if kwargs.get("assistant_model") is not None:
            raise ValueError("assistant_model: a draft model knows no prompts; use prompt_lookup_num_tokens instead")
        check_continuation(kwargs.get("past_key_values"), attention_mask, batch, length)
        if hooks.drops_cache(self.base):
            raise ValueError(_CACHE_IS_DROPPED)
        own_start, own_end = (None, None) if attention_mask is None else padding_ranges(attention_mask)
        config = kwargs.get("generation_config") or self.generation_config
        selected = self._select(
            prompt, task_ids, batch, output_attentions=kwargs.get("output_attentions", config.output_attentions)
        )
        try:
            return self._generate_selected(
                selected, batch, length, config, input_ids, attention_mask, own_start, own_end, **kwargs
            )
        finally:
            selected.release()

    def _generate_selected(
        self,
        selected: _Selection,
        batch: int,
        length: int,
        config: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        own_start: Tensor | None,
        own_end: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """:meth:`generate` behind the prefixes that it selected."""
        packed, index, inputs_embeds = selected.packed, selected.index, kwargs.get("inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        self._check_rows_fit(batch, length, attention_mask, packed, index)
        if kwargs.get("guidance_scale", config.guidance_scale) not in (None, 1):
            raise ValueError("guidance_scale: not supported; what an unconditional row attends to is not defined here")
        if kwargs.get("position_ids") is not None:
            raise ValueError("position_ids: generate counts positions itself; pad with an attention_mask instead")
        own = length if attention_mask is None else int((attention_mask != 0).sum(dim=1).max())
        if self._why_expanded is not None or self._copies_prefix(batch, own, packed, config, kwargs):
            kwargs["generation_config"] = config
            return expanded.generate(
                self.base,
                input_ids=input_ids,
                packed=packed,
                index=index,
                attention_mask=attention_mask,
                prompt_embeddings=self._virtual_embeddings,
                **kwargs,
            )
        kwargs["prompt"] = packed
        if index is not None:
            kwargs["prompt_index"] = index
        if length == 0:
            return self._generate_from_prompt(batch, **kwargs)

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
        result = super().generate(attention_mask=attention_mask, **kwargs)
        if shown is not None:
            sequences = result if isinstance(result, Tensor) else result.sequences
            sequences[:, :length] = shown.repeat_interleave(sequences.shape[0] // batch, dim=0)
        return result

    def _copies_prefix(
        self, batch: int, length: int, packed: Packed | None, config: Any, options: dict[str, Any]
    ) -> bool:
        """Whether one row, which has nobody to share with, copies its prefix into its own cache: one attention call a
        layer instead of two and a merge. Same results; only where the caller gets no cache to see the difference."""
        if packed is None or length == 0 or requested(self.backend) != "auto":
            return False
        if any(options.get(name) is not None for name in ("past_key_values", "inputs_embeds", "assistant_model")):
            return False
        config = copy.deepcopy(config)
        config.update(**options)
        plain = config.use_cache is not False and config.cache_implementation in (None, "dynamic")
        plain = plain and config.prefill_chunk_size is None and config.prompt_lookup_num_tokens is None
        last = length + config.max_new_tokens if config.max_new_tokens else config.max_length or length + 20
        if self._limit is not None and max(packed.lengths) + last > self._limit.positions:
            return False  # the other path says at which position the model ends
        rows = batch * max(config.num_beams or 1, config.num_return_sequences or 1)
        if not plain or config.return_dict_in_generate:
            return False
        return heuristics.copy_prefix(
            rows, max(packed.lengths), isinstance(self._fused.get(self.backend), FusedDecoder)
        )

    def _generate_from_prompt(self, batch: int, **kwargs: Any) -> Any:
        """With no own token, one padding position stands in for them; its logits are the prefix's prediction."""
        kwargs.pop("inputs_embeds", None)
        width = self.base.get_input_embeddings().embedding_dim
        placeholder = torch.zeros(batch, 1, width, dtype=self.dtype, device=self.device)
        kwargs["own_start"] = torch.ones(batch, dtype=torch.int32, device=self.device)
        mask = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        result = super().generate(inputs_embeds=placeholder, attention_mask=mask, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None and not isinstance(result, Tensor):
            cache = result.past_key_values
        if cache is not None:
            # Whoever continues it has only the new tokens.
            drop_first_token(cache)
            cache.soft_prompt_claim = dataclasses.replace(cache.soft_prompt_claim, own_start=None)
        return result

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
        given = model_kwargs.get("past_key_values")
        kind = generation_config.cache_implementation
        if given is not None:
            if kind is not None:
                raise ValueError("cache_implementation: can't be combined with past_key_values")
            model_kwargs["past_key_values"] = adopt(given, self._num_layers)
        elif generation_config.use_cache is False:
            return
        elif kind in (None, "dynamic"):
            model_kwargs["past_key_values"] = OwnTokenCache(self._num_layers, reserve=min(max_cache_length, 1024))
        elif kind == "static":
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs["past_key_values"] = make_static_cache(self._num_layers, length)
        else:
            raise ValueError(f"cache_implementation: expected None, 'dynamic' or 'static', found {kind!r}")

    # ---- what runs where -----------------------------------------------------------------------------------------

    def explain(self) -> Explanation:
        """The path of every layer; see :func:`softprompt_fast.explain`."""
        path, note = "shared prefix", ""
        if self._why_expanded is not None:
            path, backend, reason = "expanded prefix", "transformers", self._why_expanded
        else:
            backend, reason = serving_backend("prefix_attention", self.device.type, self.backend)
            if backend == "cpu":
                # What training calls take, or what all others do: planning that packs the weights.
                get, kind = (self._fused.get_training, "training") if self.training else (self._fused.get, "decoder")
                fused = get(self.backend)
                if isinstance(fused, str):
                    reason = "; ".join(filter(None, (reason, f"{kind} not fused: {fused}")))
                else:
                    path, note = f"shared prefix, fused {kind}", str(fused)
        if isinstance(why := self._head.get(), str):
            note = "; ".join(filter(None, (note, f"loss in one piece: {why}")))
        layers = tuple(LayerPath(i, path, backend, reason) for i in range(self._num_layers))
        return Explanation(type(self.base).__name__, layers, note)

    # ---- nn.Module and transformers plumbing ---------------------------------------------------------------------

    def _get_name(self) -> str:
        # By this name Trainer knows whether its label smoothing has to shift labels.
        return self.base._get_name()

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

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)
        self._fused.forget()
        return loaded

    def _apply(self, fn: Any, recurse: bool = True) -> SoftPromptModel:
        super()._apply(fn, recurse)
        self._compiler.forget()
        self._fused.forget()
        self._bank.move(self.device, self.dtype)
        return self


def _labelled_states(out: ModelOutput, head: BaseHead, labelled: Tensor | None) -> LabelledStates:
    return LabelledStates(out.last_hidden_state.flatten(0, 1)[labelled], head, out)
