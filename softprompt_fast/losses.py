# SPDX-License-Identifier: Apache-2.0
"""The causal-LM loss of own tokens behind a prefix, as pure functions.

transformers shifts logits against labels over the whole sequence. Behind a shared prefix the virtual positions carry
no logits per row, so the term that the last virtual token contributes (it predicts a row's first own token) is taken
from the prefix's own ``next_logits``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

IGNORE = -100


def visible_labels(labels: Tensor, own_start: Tensor | None, own_end: Tensor | None) -> Tensor:
    """`labels` ``[B, S]`` with everything outside a row's own tokens set to -100."""
    if own_start is None and own_end is None:
        return labels
    column = torch.arange(labels.shape[1], device=labels.device)
    inside = torch.ones_like(labels, dtype=torch.bool)
    if own_start is not None:
        inside &= column >= own_start[:, None]
    if own_end is not None:
        inside &= column < own_end[:, None]
    return labels.masked_fill(~inside, IGNORE)


def split_labels(labels: Tensor, own_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split visible labels by what predicts them.

    Args:
        labels: int64 ``[B, S]``. own_start: int32 ``[B]`` or None for 0.

    Returns:
        ``shifted`` ``[B, S]``: at column j the label that the own token at j predicts (the label of j + 1), and
        ``first`` ``[B]``: the label of each row's first own token, which only the prefix can predict. -100 for none.
    """
    batch, length = labels.shape
    if length == 0:
        return labels, labels.new_full((batch,), IGNORE)
    start = torch.zeros(batch, dtype=torch.long, device=labels.device) if own_start is None else own_start.long()
    column = torch.arange(length, device=labels.device)
    at_start = column == start[:, None]
    first = labels.masked_fill(~at_start, IGNORE).gather(1, start.clamp(max=length - 1)[:, None]).squeeze(1)
    shifted = pad(labels.masked_fill(at_start, IGNORE)[:, 1:], (0, 1), value=IGNORE)
    return shifted, first


def labelled_columns(shifted: Tensor) -> Tensor:
    """The columns at which any row predicts a label: int64 ``[C]``. Logits elsewhere are not needed for the loss."""
    return (shifted != IGNORE).any(dim=0).nonzero().squeeze(1)


def causal_lm_loss(
    logits: Tensor,
    shifted: Tensor,
    next_logits: Tensor | None,
    first: Tensor | None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy of all labelled tokens, in fp32 (float64 for float64 logits).

    Formula: ``sum(-log softmax(logits)[label]) / count(labels)``, as transformers' ``ForCausalLMLoss`` over the
    sequence with its virtual tokens.

    Args:
        logits: ``[B, C, V]``; shifted: int64 ``[B, C]``, the label each of them predicts or -100.
        next_logits: ``[R, V]``, what the prefix predicts for the rows whose first own token has a label.
        first: int64 ``[R]``, those labels.
        num_items: divide the sum by this instead (transformers' Trainer under gradient accumulation).

    Returns:
        A scalar; 0 (with a zero gradient), not NaN, where nothing is labelled.
    """
    total = _sum(logits.reshape(-1, logits.shape[-1]), shifted.reshape(-1))
    count = (shifted != IGNORE).sum()
    if next_logits is not None and first is not None:
        total = total + _sum(next_logits, first)
        count = count + (first != IGNORE).sum()
    return total / (count.clamp(min=1) if num_items is None else num_items)


def cpt_terms(
    logits: Tensor,
    columns: int | Tensor,
    targets: Tensor,
    weights: Tensor,
    virtual_logits: Tensor,
    own_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sum and number of the terms of CPT's loss for the rows of one prompt (formula: ``SoftPrompt.cpt_targets``).

    Args:
        logits: ``[R, C, V]`` of own tokens, at `columns` (an int64 ``[C]``) or at all S of them (an int).
        targets, weights: ``[R, P + S]`` from ``cpt_targets``, targets -100 outside a row's own tokens.
        virtual_logits: ``[P, V]``, what the virtual tokens predict: the same for every row, so computed once.
        own_start: int ``[R]`` or None for 0.
    """
    virtual = virtual_logits.shape[0]
    own_weights = weights[:, virtual:]
    shifted, first = split_labels(targets[:, virtual:], own_start)
    shifted_weights = pad(own_weights[:, 1:], (0, 1))
    first_weights = own_weights[:, 0]
    if own_start is not None:
        place = own_start.long().clamp(max=own_weights.shape[1] - 1)[:, None]
        first_weights = own_weights.gather(1, place)[:, 0]
    if isinstance(columns, Tensor):
        shifted, shifted_weights = shifted[:, columns], shifted_weights[:, columns]
    total = weighted_sum(logits.flatten(0, 1), shifted.flatten(), shifted_weights.flatten())
    total = total + weighted_sum(virtual_logits[-1:].expand(len(first), -1), first, first_weights)
    # Every row has the same targets on its virtual tokens: one cross-entropy each, its weights summed over rows.
    total = total + weighted_sum(virtual_logits[:-1], targets[0, 1:virtual], weights[:, 1:virtual].sum(dim=0))
    return total, (targets[:, 1:] != IGNORE).sum()


def weighted_sum(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """``sum(weights * cross_entropy)`` over labels other than -100. logits ``[N, V]``; labels, weights ``[N]``."""
    return (weights * cross_entropy(_upcast(logits), labels, ignore_index=IGNORE, reduction="none")).sum()


def _sum(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(_upcast(logits), labels, ignore_index=IGNORE, reduction="sum")


def _upcast(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
