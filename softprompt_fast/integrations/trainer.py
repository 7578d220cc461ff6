# SPDX-License-Identifier: Apache-2.0
"""What training loops of other libraries say and ask: Accelerate, transformers' Trainer, TRL, DistributedDataParallel.

Nothing is imported here that a loop has not imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from softprompt_fast.backends import heuristics
from softprompt_fast.losses import Head


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel module whose forward is running."""
    return DistributedDataParallel._get_active_ddp_module()


def more_micro_batches_follow() -> bool:
    """Whether the loop around this training call has said that the optimizer will not step after it.

    DistributedDataParallel says so by ``no_sync()``. Without it, Accelerate does: ``accelerator.accumulate(model)``
    and transformers' Trainer (and so TRL's) set ``GradientState.sync_gradients`` before every forward pass. That state
    outlives its loop, so it counts only while one of Accelerate's data loaders is being iterated.
    """
    if (ddp := active_ddp()) is not None:
        return not ddp.require_backward_grad_sync
    state: Any = sys.modules.get("accelerate.state")
    # Where gradients are reduced or sharded by others (DeepSpeed, FSDP, ...), they have to arrive at every backward.
    if state is None or not state.AcceleratorState._shared_state or not state.GradientState._shared_state:
        return False
    if state.AcceleratorState().distributed_type != "NO":
        return False
    gradients = state.GradientState()
    return not gradients.sync_gradients and gradients.in_dataloader


@dataclass
class TokenScores(ModelOutput):
    """What TRL's SFTTrainer asks of a model in place of logits (``fused_lm_head=True``), one entry per labelled token.

    Attributes:
        loss: scalar, the mean of ``-log_probs``.
        log_probs: ``[n]``, log-probability of each label, differentiable.
        entropy: ``[n]``, of the distribution that predicts it, without gradient.
        is_top1: bool ``[n]``, whether the label is its most likely token.
        label_mask: bool ``[n]``, all true: no other position is in here.
        aux_loss: always None.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def token_scores(groups: Sequence[tuple[Tensor, Tensor, Head | None]]) -> TokenScores:
    """Scores of labels in chunks of rows, whose logits are computed again in the backward instead of kept.

    Args:
        groups: hidden states ``[n, H]``, their labels int64 ``[n]``, and the head for them; None: they are logits
            ``[n, V]``.
    """

    def scores(head: Head | None, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = hidden if head is None else head.logits(hidden)
        log_probs = logits.float().log_softmax(dim=-1)
        picked = log_probs.gather(1, labels[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            return picked, entropy, log_probs.argmax(dim=-1) == labels

    parts = []
    for hidden, labels, head in groups:
        rows = heuristics.head_rows(len(hidden), hidden.shape[1] if head is None else head.vocab_size)
        for chunk in zip(hidden.split(rows), labels.split(rows), strict=True):
            parts.append(checkpoint(scores, head, *chunk, use_reentrant=False))
    log_probs, entropy, is_top1 = (torch.cat(part) for part in zip(*parts, strict=True))
    return TokenScores(
        loss=-log_probs.sum() / max(len(log_probs), 1),
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=torch.ones_like(is_top1),
    )
