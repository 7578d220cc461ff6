# SPDX-License-Identifier: Apache-2.0
"""What every model with named prompts has: the names, the active one, and how it moves, freezes and is not pickled."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt

#: What ``prompt=`` takes: a name for the batch, one name (or None) per row, None for no prompt, and ``...`` (the
#: default) for the active prompt.
PromptArgument = str | Sequence[str | None] | None | EllipsisType


class PromptedModel(nn.Module):
    """A frozen transformers model with named soft prompts; base class of this package's models.

    Args:
        base: used as it is, not copied.
        backend: force one backend of the ops; None picks automatically.
        freeze_base: turn ``requires_grad`` of the base's weights off, as PEFT does. A prefix is computed once for
            weights that don't change; whoever trains the base as well calls ``invalidate`` when it has changed.

    Attributes:
        active_prompt: the prompt of calls that name none.

    ``state_dict()`` holds what training changes, and so what a checkpoint needs: the soft prompts, and those of the
    base's parameters that require grad. ``load_state_dict`` is strict about exactly these; a frozen weight of the base
    is loaded where it is given and not missed where it isn't. The base's own ``state_dict()`` is as ever.
    """

    def __init__(self, base: PreTrainedModel, *, backend: str | None = None, freeze_base: bool = True) -> None:
        super().__init__()
        self.base = base
        self.config = base.config
        self.backend = backend
        self.prompts = nn.ModuleDict()
        self.active_prompt: str | None = None
        self._keys: dict[str, str] = {}
        self.training = base.training
        if freeze_base:
            base.requires_grad_(False)
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_miss_no_frozen)

    def get_prompt(self, name: str) -> SoftPrompt | PrefixKV:
        """The prompt called `name`; KeyError with the known names if there is none."""
        raise NotImplementedError

    @property
    def prompt_names(self) -> list[str]:
        raise NotImplementedError

    def set_prompt(self, name: str | None) -> None:
        """Make `name` the prompt of calls that name none (None: no prompt)."""
        if name is not None:
            self._check_name(name)
        self.active_prompt = name

    def _check_name(self, name: str) -> None:
        """KeyError with known names if no prompt is called `name`."""
        self.get_prompt(name)

    def save_prompt(self, name: str, directory: Any) -> None:
        """Write prompt `name` as an adapter directory that PEFT loads back with equal outputs.

        Raises:
            TypeError: the prompt is a PrefixKV, which no PEFT method describes: use its ``save_pretrained``.
        """
        prompt = self.get_prompt(name)
        if isinstance(prompt, PrefixKV):
            raise TypeError(f"prompt: {name!r} is a PrefixKV, not an adapter; call its save_pretrained(directory)")
        peft_io.save_adapter(prompt, directory, base_model_name_or_path=self.base.name_or_path or None)

    def save_pretrained(self, directory: Any, **_: Any) -> None:
        """Write the active prompt as a PEFT adapter directory (the base model is frozen and not written)."""
        if self.active_prompt is None:
            raise ValueError("prompt: no active prompt to save; call save_prompt(name, directory)")
        self.save_prompt(self.active_prompt, directory)

    # transformers' Trainer calls these: the newer name of each pair where its version has it, else the older.

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Keep only each layer's input and run the layer again in the backward pass (in training mode). The prefix
        takes part in both runs.

        Args:
            activation_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is False
                unless they say True, which a call that trains a prompt refuses: its gradient would be cut.
            options: further ones of the base's method (``every_n_layers``, ``offload``).
        """
        hooks.enable_checkpointing(self.base, activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        hooks.disable_checkpointing(self.base)

    @property
    def is_activation_checkpointing(self) -> bool:
        return hooks.is_checkpointing(self.base)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    def _row_names(self, prompt: Any, batch: int) -> list[str | None]:
        """The prompt of each row, by name; all of them known."""
        if prompt is ...:
            prompt = self.active_prompt
        if prompt is None or isinstance(prompt, str):
            names: list[str | None] = [prompt] * batch
        elif isinstance(prompt, Sequence) and all(n is None or isinstance(n, str) for n in prompt):
            names = list(prompt)
            if len(names) != batch:
                raise ValueError(f"prompt: expected one name per row ({batch} rows), found a list of {len(names)}")
        else:
            raise TypeError(f"prompt: expected a name, a list of names or None, found {type(prompt).__name__}")
        for name in dict.fromkeys(names):
            if name is not None:
                self._check_name(name)
        return names

    def _register_prompt(self, name: str, prompt: SoftPrompt) -> str:
        """Make `prompt` a submodule, so that optimizers, ``state_dict`` and ``.to()`` see it. Returns its key."""
        # A ModuleDict key can hold neither a dot nor the name of one of its own methods.
        key = "prompt_" + name.replace(".", "_dot_")
        while key in self.prompts:
            key += "_"
        self._keys[name] = key
        self.prompts[key] = prompt
        return key

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base"), name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to()``, ``.half()``, ...: soft prompts follow to the device and keep the dtype that they train in."""
        prompts = self.prompts
        del self._modules["prompts"]
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules["prompts"] = prompts
        prompts.to(self.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} can't be pickled (nor deep-copied): save its prompts with "
            "save_prompt(name, directory) and rebuild the model around its base"
        )

    def extra_repr(self) -> str:
        return f"prompts={self.prompt_names}, active={self.active_prompt!r}"


def _left_out(model: PromptedModel) -> list[str]:
    """The base's entries of a state dict that training doesn't change, and further names of a tied weight (a
    safetensors file holds each once; loading one loads all)."""
    left_out, seen = [], set()
    for name, tensor in model.base.state_dict(keep_vars=True).items():
        if not tensor.requires_grad or id(tensor) in seen:
            left_out.append(f"base.{name}")
        seen.add(id(tensor))
    return left_out


def _leave_out_frozen(model: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _left_out(model):
        state_dict.pop(prefix + name, None)


def _miss_no_frozen(model: Any, found: Any) -> None:
    # Names come as the outermost module sees them: behind "module.", "_orig_mod.", ...
    left_out = set(_left_out(model))
    found.missing_keys[:] = [name for name in found.missing_keys if name[max(name.find("base."), 0) :] not in left_out]
