# SPDX-License-Identifier: Apache-2.0
"""A base model in two parts, so that a loss needs logits only where there is a label: its decoder, and what turns the
decoder's hidden states into logits (a projection; in some families with a bias, a scale or a soft cap).

The second part is the base's own ``forward`` with a stand-in for the decoder that hands given hidden states back, so
no family's formula is written down here. Whether a base can be taken apart so is tried, not looked up by its name.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from softprompt_fast.integrations import probe
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.losses import summed_cross_entropy, weighted_sum

logger = logging.getLogger("softprompt_fast")


class _Output(BaseModelOutputWithPast):
    """An output whose further fields (router logits, cross attentions, ...) are None, whichever a family reads."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _StandIn(nn.Module):
    @property
    def decoder(self) -> _StandIn:
        """Some families (opt) call their decoder's inner part directly."""
        return self

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


class BaseHead:
    """The :class:`~softprompt_fast.losses.Head` of any base: what `base` does behind the child of it called `decoder`.
    It holds no state of its own."""

    def __init__(self, base: PreTrainedModel, decoder: str) -> None:
        self._base = base
        self._decoder = decoder
        self._stand_in = _StandIn()

    @property
    def decoder(self) -> nn.Module:
        """The part before: called with the base's arguments, it gives ``last_hidden_state`` ``[B, S, H]``."""
        return getattr(self._base, self._decoder)

    @property
    def _behind_decoder(self) -> nn.Module:
        """The base over its own modules as they are now, but for the decoder."""
        return hooks.shallow_copy(self._base, _modules=self._base._modules | {self._decoder: self._stand_in})

    @property
    def vocab_size(self) -> int:
        return vocab_size(self._base)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._behind_decoder(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def sum(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._behind_decoder.parameters()):
            return weighted_sum(self.logits(hidden), labels, weights)  # chunks have no gradient of the weights
        return summed_cross_entropy(self.logits, hidden, labels, weights, vocab_size=self.vocab_size)


class LazyHead:
    """The head of one base, tried at the first call that could use it. Thread-safe."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._tried: BaseHead | str | None = None
        self._told: set[str] = set()

    def get(self) -> BaseHead | str:
        """The head, or the reason why the base has to run in one piece now."""
        if torch.compiler.is_compiling():
            return "the call is being compiled"
        base = self._base
        if "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
            return "the base has hooks, or a forward of its own, that it has to run with as a whole"
        if base.device.type == "meta":
            return "the base holds no weights yet"
        if self._tried is None:
            with self._lock:
                if self._tried is None:
                    self._tried = _try(base)
        return self._tried

    def serving(self) -> BaseHead | None:
        """The head; None, and the reason logged once, where the base has to run in one piece."""
        found = self.get()
        if isinstance(found, BaseHead):
            return found
        if found not in self._told:
            self._told.add(found)
            logger.info("%s: the loss is not computed in chunks: %s", type(self._base).__name__, found)
        return None


def vocab_size(base: PreTrainedModel) -> int:
    """How many tokens `base` gives logits of."""
    size = getattr(base.get_output_embeddings(), "out_features", None)
    return int(size or base.config.get_text_config(decoder=True).vocab_size)


def _try(base: PreTrainedModel) -> BaseHead | str:
    parts = (base.base_model, base.get_decoder(), getattr(base, "model", None))
    decoder = next((name for name, child in base.named_children() if any(child is part for part in parts)), None)
    if decoder is None:
        return f"{type(base).__name__} names no decoder among its children"

    def run(base: PreTrainedModel, embeddings: Tensor) -> Tensor:
        head = BaseHead(base, decoder)
        hidden = head.decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return head.logits(hidden[0])[None]

    why = probe.why_not_in_parts(base, run)
    return BaseHead(base, decoder) if why is None else why
