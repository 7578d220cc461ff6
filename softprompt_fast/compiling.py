# SPDX-License-Identifier: Apache-2.0
"""A base model run once over a soft prompt: its keys and values, with their graph or frozen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_fast import expanded
from softprompt_fast.cache import OwnTokenCache
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.fused_decoder import LazyDecoder
from softprompt_fast.packed import Compiled
from softprompt_fast.prefix_kv import PrefixKV, base_config_fields, model_fingerprint
from softprompt_fast.prompt import SoftPrompt


class PromptCompiler:
    """Runs one base over soft prompts, by the fastest of its passes that gives what is wanted.

    Args:
        base: on which the prefix-aware attention function is installed, but for `is_expanded`.
        fused: its fused passes.
        backend: the one asked for by name; None picks automatically.
        is_expanded: whether its prefixes go into an ordinary cache, and so come from one.
    """

    def __init__(self, base: PreTrainedModel, fused: LazyDecoder, backend: str | None, is_expanded: bool) -> None:
        self._base = base
        self._fused = fused
        self._backend = backend
        self._is_expanded = is_expanded
        self._limit = hooks.position_limit(base)
        self._lock = threading.Lock()
        self._fingerprint: str | None = None
        self._changes = 0  # counts calls of forget()

    @property
    def fingerprint(self) -> str:
        """Digest of the base's architecture and weights, computed once."""
        known = self._fingerprint
        while known is None:
            changes, found = self._changes, model_fingerprint(self._base)
            if changes == self._changes:  # else it may be of old weights, or of some of them
                known = self._fingerprint = found
        return known

    def forget(self) -> None:
        """The base's weights, dtype or device changed."""
        self._changes += 1
        self._fingerprint = None

    def frozen(self, prompt: SoftPrompt, task: int | None) -> PrefixKV:
        """The prefix of a prompt (of a multitask prompt's `task`), for calls with autocast and without."""
        with self._kept() as base, hooks.evaluating(prompt) as prompt:
            compiled = self._run(base, prompt, None if task is None else [task])[0]
            return PrefixKV(
                keys=tuple(k.detach().clone(memory_format=torch.contiguous_format) for k in compiled.keys),
                values=tuple(v.detach().clone(memory_format=torch.contiguous_format) for v in compiled.values),
                next_logits=None if compiled.next_logits is None else compiled.next_logits.detach().clone(),
                method=prompt.method,
                fingerprint=self.fingerprint,
                metadata={"base_config": base_config_fields(self._base)},
            )

    def of_tokens(self, input_ids: Tensor) -> PrefixKV:
        """The base's own keys and values of a text ``[T]``; of no use beyond this process, for it has no
        fingerprint."""
        with self._kept() as base:
            embeds = base.get_input_embeddings()(input_ids[None].to(base.device))
            keys, values, _ = self._pass(base, embeds, all_logits=False, next_logits=False)
        pairs = tuple(key[0] for key in keys), tuple(value[0] for value in values)
        return PrefixKV(*pairs, method="CARTRIDGE", fingerprint="")

    def run(
        self, prompt: SoftPrompt, tasks: list[int] | None, *, all_logits: bool = False, next_logits: bool = True
    ) -> list[Compiled]:
        """One run over a prompt (over all its `tasks` at once); keeps the graph where grad is enabled. Without
        `next_logits` the last layer computes keys and values only, where the base can stop there."""
        return self._run(self._base, prompt, tasks, all_logits, next_logits)

    def _run(
        self,
        base: PreTrainedModel,
        prompt: SoftPrompt,
        tasks: list[int] | None,
        all_logits: bool = False,
        next_logits: bool = True,
    ) -> list[Compiled]:
        device, dtype = base.device, base.dtype
        if prompt.kind == "prefix":
            pairs = [(k.to(device, dtype), v.to(device, dtype)) for k, v in prompt.key_values()]
            return [Compiled(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), None)]
        if tasks is None:
            embeds = prompt.embeddings()[None]
        else:
            embeds = prompt.embeddings(task_ids=torch.tensor(tasks, device=device))
        if self._limit is not None:
            self._limit.check(embeds.shape[1], embeds.shape[1])
        # A copy: some families (ctrl) scale the embeddings they are given in place, and these are the prompt's own.
        embeds = embeds.to(device, dtype, copy=True)
        keys, values, logits = self._pass(base, embeds, all_logits, next_logits)
        return [
            Compiled(
                tuple(k[n] for k in keys),
                tuple(v[n] for v in values),
                None if logits is None else logits[n, -1],
                logits[n] if logits is not None and all_logits else None,
            )
            for n in range(embeds.shape[0])
        ]

    def _pass(
        self, base: PreTrainedModel, embeds: Tensor, all_logits: bool, next_logits: bool
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Keys and values per layer ``[N, Hkv, P, D]`` and logits of ``[N, P, H]`` embeddings (all, the last, or None
        where neither is wanted and the pass could stop before)."""
        keep = 0 if all_logits else 1
        if self._is_expanded:
            return expanded.run_prompt(base, embeds, keep)
        context = hooks.PrefixContext(None, None, backend=self._backend)
        if (passes := self._fused.training(embeds, context)) is not None:
            keys, values, hidden = passes.prompt(embeds, None if all_logits else int(next_logits))
            if hidden.shape[1] == 0:
                return keys, values, None
            return keys, values, passes.head.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        if (fused := self._fused.serving(embeds, context, None)) is not None:
            cache = OwnTokenCache(hooks.num_attention_layers(base), reserve=embeds.shape[1])
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
            predicted = fused(embeds, positions, context, cache, keep)
            return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], predicted
        return hooks.run_prompt(base, embeds, keep, next_logits=next_logits)

    @contextmanager
    def _kept(self) -> Iterator[PreTrainedModel]:
        """The base for what is kept for later calls: without gradients, autocast and, also in training mode,
        dropout."""
        off = torch.autocast(self._base.device.type, enabled=False)
        with self._lock, torch.no_grad(), off, hooks.evaluating(self._base) as base:
            yield base
