# SPDX-License-Identifier: Apache-2.0
"""A frozen causal LM whose prompts are prefixes in a bank: loading, adding, registering and compiling them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from softprompt_fast.accumulation import GradientAccumulation
from softprompt_fast.bank import BankOptions, PromptBank
from softprompt_fast.compiling import PromptCompiler
from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.integrations import trainer
from softprompt_fast.loading import PromptDirectory, PromptLoader
from softprompt_fast.packed import Packed, RowPrompt
from softprompt_fast.passes import PrefixedPasses
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.prompted import PromptedModel
from softprompt_fast.rows import check_token_ids
from softprompt_fast.selection import PromptSelector, Selection

if TYPE_CHECKING:
    from typing_extensions import Self


class BankedModel(PromptedModel):
    """The prompts of a :class:`~softprompt_fast.SoftPromptModel`, which says what the arguments are, and which of them
    a call selects.

    Raises:
        TypeError: `base` is no transformers causal LM, or can't be served.
    """

    def __init__(
        self, base: PreTrainedModel, *, backend: str | None, freeze_base: bool, bank: BankOptions | None
    ) -> None:
        if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
            raise TypeError(f"base: expected a transformers causal LM, found {type(base).__name__}")
        if base.config.is_encoder_decoder:
            raise TypeError(f"base: {type(base).__name__} is an encoder-decoder; use EncoderDecoderSoftPromptModel")
        super().__init__(base, backend=backend, freeze_base=freeze_base)
        self._passes = PrefixedPasses(base, backend)
        self._fused = self._passes.fused
        is_expanded = self._passes.why_expanded is not None
        self._compiler = PromptCompiler(base, self._fused, backend, is_expanded=is_expanded)
        self._loader = PromptLoader(base, self._compiler)
        self._bank = PromptBank(self._compiler.frozen, bank, device=self.device, dtype=self.dtype)
        self._accumulation = GradientAccumulation(trainer.more_micro_batches_follow)
        self._selector = PromptSelector(base, self._bank, self._compiler, self._accumulation, backend)

    def load_prompt(
        self, name: str, directory: str | os.PathLike[str], *, trainable: bool = False, replace: bool = False
    ) -> None:
        """Load a PEFT adapter directory or a saved :class:`PrefixKV` under `name`."""
        self.add_prompt(name, self._loader.read(directory, trainable=trainable), replace=replace)

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
        self._bank.register(name, PromptDirectory(self._loader, directory), replace=replace)
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
        self._bank.add(name, self._loader.checked(prompt), replace=replace)
        self._dispose(name)
        if isinstance(prompt, SoftPrompt):
            self._register_prompt(name, prompt)
        if self.active_prompt is None:
            self.active_prompt = name

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
        if self._passes.limit is not None:
            self._passes.limit.check(tokens, tokens)
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

    # ---- which prompt for which row ---------------------------------------------------------------------------------

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

    def _select(self, prompt: Any, task_ids: Any, batch: int, **wanted: Any) -> Selection:
        """The prefixes of a batch; to be released when the call is done.

        Args:
            prompt, task_ids: as a call takes them; or prefixes that were selected before.
            wanted: further arguments of :meth:`PromptSelector.select`.
        """
        rows = prompt if isinstance(prompt, Packed) else self._row_prompts(prompt, task_ids, batch)
        sharded = isinstance(self, FSDPModule)
        return self._selector.select(rows, training=self.training, sharded=sharded, **wanted)

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

    # ---- nn.Module plumbing -----------------------------------------------------------------------------------------

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)
        self._fused.forget()
        return loaded

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._compiler.forget()
        self._fused.forget()
        self._bank.move(self.device, self.dtype)
        return self
