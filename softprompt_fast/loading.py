# SPDX-License-Identifier: Apache-2.0
"""Prompts from files: read, and checked against the base model that they are for."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from softprompt_fast._io import identity
from softprompt_fast.compiling import PromptCompiler
from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.prefix_kv import TENSORS_NAME, PrefixKV
from softprompt_fast.prompt import SoftPrompt


class PromptLoader:
    """Loads prompts for one base.

    Args:
        compiler: of the base, whose fingerprint it knows.
    """

    def __init__(self, base: PreTrainedModel, compiler: PromptCompiler) -> None:
        self._base, self._compiler = base, compiler

    def read(self, directory: str | os.PathLike[str], *, trainable: bool = False) -> SoftPrompt | PrefixKV:
        """The adapter or the saved prefix in `directory`."""
        if PrefixKV.is_saved_at(directory):
            prefix = PrefixKV.from_pretrained(directory)
            prefix.check_base(self._base, fingerprint=self._compiler.fingerprint)
            return prefix
        table = self._base.get_input_embeddings() if trainable else None
        return peft_io.load_adapter(directory, trainable=trainable, token_embeddings=table)

    def checked(self, prompt: SoftPrompt | PrefixKV) -> SoftPrompt | PrefixKV:
        """`prompt` if it serves this base, a soft prompt on its device."""
        if isinstance(prompt, SoftPrompt):
            peft_io.check_compatible(prompt, self._base)
            prompt.check_finite()
            return prompt.to(self._base.device)
        if not isinstance(prompt, PrefixKV):
            raise TypeError(f"prompt: expected SoftPrompt or PrefixKV, found {type(prompt).__name__}")
        prompt.check_compatible(self._base)
        prompt.check_base(self._base, fingerprint=self._compiler.fingerprint)
        prompt.check_finite()
        return prompt


@dataclass(frozen=True)
class PromptDirectory:
    """A prompt that a bank loads when it is used: :class:`~softprompt_fast.bank.Source`."""

    loader: PromptLoader
    directory: Path

    def load(self) -> SoftPrompt | PrefixKV:
        return self.loader.checked(self.loader.read(self.directory))

    def num_tasks(self) -> int | None:
        if PrefixKV.is_saved_at(self.directory):
            return None
        config = peft_io.read_adapter_config(self.directory)
        return config.get("num_tasks") if config.get("peft_type") == "MULTITASK_PROMPT_TUNING" else None

    def identity(self) -> Hashable:
        return identity(self.directory / TENSORS_NAME, *peft_io.adapter_files(self.directory))
