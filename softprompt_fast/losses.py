# SPDX-License-Identifier: Apache-2.0
"""The losses of own tokens behind a prefix, as pure functions.

transformers shifts logits against labels over the whole sequence. Behind a shared prefix the virtual positions carry
no logits per row, so the term that the last virtual token contributes (it predicts a row's first own token) is taken
from the prefix's own ``next_logits``. A batch's loss is a list of :class:`Terms`: which own tokens predict which
label, and which labels the prefixes themselves predict. Logits are needed there only, and never all at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, pad

from softprompt_fast.backends import heuristics

IGNORE = -100


def padding_columns(
    length: int, own_start: Tensor | None, own_end: Tensor | None, past: int | Tensor = 0
) -> Tensor | None:
    """Which of `length` columns, the first of them a row's token number `past`, are none of a row's own tokens
    ``[own_start, own_end)``: bool ``[B, length]``; None where neither end is given and so nothing is padding."""
    bounds = [x for x in (own_start, own_end) if x is not None]
    if not bounds:
        return None
    column = torch.arange(length, device=bounds[0].device) + past
    outside = torch.zeros(len(bounds[0]), length, dtype=torch.bool, device=bounds[0].device)
    if own_start is not None:
        outside |= column < own_start[:, None]
    if own_end is not None:
        outside |= column >= own_end[:, None]
    return outside


def visible_labels(labels: Tensor, own_start: Tensor | None, own_end: Tensor | None) -> Tensor:
    """`labels` ``[B, S]`` with everything outside a row's own tokens set to -100."""
    outside = padding_columns(labels.shape[1], own_start, own_end)
    return labels if outside is None else labels.masked_fill(outside, IGNORE)


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


# ---- the terms of a batch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixTerms:
    """The labels that one packed prefix predicts by itself.

    Attributes:
        labels: int64 ``[k]``, first own tokens of its rows, all predicted by its last virtual token.
        weights: ``[k]``, None for 1.
        virtual_labels, virtual_weights: ``[P - 1]``, labels of its own virtual tokens but for the first (-100: none),
            and what they weigh in all rows together. None but in CPT.
    """

    labels: Tensor
    weights: Tensor | None = None
    virtual_labels: Tensor | None = None
    virtual_weights: Tensor | None = None

    def total(self, next_logits: Tensor | None, virtual_logits: Tensor | None) -> Tensor | float:
        """Their summed cross-entropy, from logits ``[V]`` and ``[P, V]``; a prefix without `next_logits` has none."""
        total: Tensor | float = 0.0
        if next_logits is not None and self.labels.numel():
            total = total + repeated_cross_entropy(next_logits, self.labels, self.weights)
        if virtual_logits is not None and self.virtual_labels is not None and self.virtual_weights is not None:
            total = total + weighted_sum(virtual_logits[:-1], self.virtual_labels, self.virtual_weights)
        return total


@dataclass(frozen=True)
class Terms:
    """The cross-entropies that a batch's loss is the mean of.

    Attributes:
        positions: int64 ``[n]``, the own tokens that predict a label, as ``row * S + column``, ascending.
        labels: int64 ``[n]``, those labels. weights: ``[n]``, None for 1.
        prefixes: for each packed prefix what it predicts itself.
        count: how many terms there are.
    """

    positions: Tensor
    labels: Tensor
    weights: Tensor | None
    prefixes: tuple[PrefixTerms, ...]
    count: int

    def places(self, columns: int | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of `positions` in logits ``[B, C, V]``; the arguments are those of :meth:`sum_of`."""
        row, column = self.positions // max(length, 1), self.positions % max(length, 1)
        return row, torch.searchsorted(columns, column) if isinstance(columns, Tensor) else column

    def sum_of(self, logits: Tensor, columns: int | Tensor, length: int) -> Tensor:
        """The summed cross-entropies at own tokens, from logits that were made in one piece.

        Args:
            logits: ``[B, C, V]`` of all S columns (`columns` is an int) or of the ascending int64 `columns` ``[C]``.
            length: S.
        """
        row, column = self.places(columns, length)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return weighted_sum(logits[row, column], self.labels, self.weights)
        places, rows = row * logits.shape[1] + column, logits.flatten(0, 1)
        return summed_cross_entropy(rows.__getitem__, places, self.labels, self.weights, vocab_size=logits.shape[-1])

    def loss(
        self,
        own: Tensor,
        next_logits: Sequence[Tensor | None] = (),
        virtual_logits: Sequence[Tensor | None] = (),
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        """Their mean, or sum over `num_items`; 0 and no NaN where there is none.

        Args:
            own: scalar, the sum at own tokens (``summed_cross_entropy`` of `labels` and `weights`).
            next_logits: per packed prefix ``[V]`` or None. virtual_logits: per packed prefix ``[P, V]`` or None.
            num_items: divisor instead of the number of terms (transformers' Trainer under gradient accumulation).
        """
        for place, terms in enumerate(self.prefixes):
            own = own + terms.total(next_logits[place], virtual_logits[place] if virtual_logits else None)
        if num_items is None:
            return own / max(self.count, 1)
        return own / (num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1))


def causal_lm_terms(labels: Tensor, own_start: Tensor | None, index: Tensor | None, predicts: Sequence[bool]) -> Terms:
    """The terms of transformers' ``ForCausalLMLoss`` over each row's sequence with its virtual tokens.

    Formula: ``sum(-log softmax(logits)[label]) / count(labels)``.

    Args:
        labels: int64 ``[B, S]``, visible ones only (:func:`visible_labels`). own_start: int ``[B]`` or None for 0.
        index: int ``[B]``, each row's packed prefix, -1 for none; None: all rows have prefix 0, if there is one.
        predicts: for each packed prefix whether its last virtual token predicts (prefix tuning and cartridges have
            keys and values only: the first own token of their rows is no term).
    """
    shifted, first = split_labels(labels, own_start)
    prefixes = []
    for place, does in enumerate(predicts):
        of_rows = first if index is None else first[index == place]
        prefixes.append(PrefixTerms(of_rows[of_rows != IGNORE] if does else of_rows[:0]))
    positions = (shifted.flatten() != IGNORE).nonzero().squeeze(1)
    count = len(positions) + sum(len(terms.labels) for terms in prefixes)
    return Terms(positions, shifted.flatten()[positions], None, tuple(prefixes), count)


def cpt_terms(labels: Tensor, own_start: Tensor | None, groups: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Terms:
    """The terms of CPT's loss (formula: ``SoftPrompt.cpt_targets``).

    Args:
        labels: int64 ``[B, S]``, for its shape. own_start: int ``[B]`` or None for 0.
        groups: for each packed prefix the numbers ``[R]`` of its rows, and their targets and weights ``[R, P + S]``
            from ``cpt_targets``, targets -100 outside a row's own tokens.
    """
    shifted = torch.full_like(labels, IGNORE)
    own_weights = torch.zeros_like(labels, dtype=torch.float32)
    prefixes, count = [], 0
    for rows, targets, weights in groups:
        virtual = targets.shape[1] - labels.shape[1]
        start = None if own_start is None else own_start[rows]
        shifted[rows], first = split_labels(targets[:, virtual:], start)
        own_weights[rows] = pad(weights[:, virtual + 1 :], (0, 1))
        place = torch.full_like(first, virtual) if start is None else virtual + start.long()
        first_weights = weights.gather(1, place.clamp(max=weights.shape[1] - 1)[:, None]).squeeze(1)
        labelled = first != IGNORE
        # Every row has the same targets on its virtual tokens: one cross-entropy each, its weights summed over rows.
        terms = PrefixTerms(
            first[labelled], first_weights[labelled], targets[0, 1:virtual], weights[:, 1:virtual].sum(dim=0)
        )
        prefixes.append(terms)
        count += int((targets[:, 1:] != IGNORE).sum())
    positions = (shifted.flatten() != IGNORE).nonzero().squeeze(1)
    own = shifted.flatten()[positions], own_weights.flatten()[positions]
    return Terms(positions, *own, tuple(prefixes), count)


# ---- what a loss asks of a head -------------------------------------------------------------------------------------


class Head(Protocol):
    """What turns a decoder's hidden states ``[n, H]`` into logits, row by row. Weights of it that require
    grad get theirs.

    Which hidden states these are (before or behind the final norm) is between a head and its decoder.
    """

    @property
    def vocab_size(self) -> int:
        """V."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, V]``; differentiable."""

    def sum(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """``sum(weights * cross_entropy(logits(hidden), labels))``, a scalar in fp32, without a tensor ``[n, V]``.

        Args:
            hidden: ``[n, H]``, which the gradient goes to, once. labels: int64 ``[n]``, in 0..V-1.
            weights: ``[n]``, None for 1.
        """


# ---- sums of cross-entropies ----------------------------------------------------------------------------------------


def weighted_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum(weights * cross_entropy)`` over labels other than -100. logits ``[N, V]``; labels, weights ``[N]``.
    In fp32 (float64 for float64 logits)."""
    if weights is None:
        return cross_entropy(_upcast(logits), labels, ignore_index=IGNORE, reduction="sum")
    return (weights * cross_entropy(_upcast(logits), labels, ignore_index=IGNORE, reduction="none")).sum()


def repeated_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """:func:`weighted_sum` of one vector of logits ``[V]`` against many labels ``[k]``: one log-sum-exp for all, and
    no ``[k, V]`` copy. Labels of -100 are not expected."""
    logits = _upcast(logits)
    each = logits.logsumexp(0) - logits[labels]
    return (each if weights is None else weights * each).sum()


def summed_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, weights: Tensor | None = None, *, vocab_size: int
) -> Tensor:
    """``sum(weights * cross_entropy(head(hidden), labels))`` in chunks of rows: no ``[n, V]`` tensor is made or kept.

    With a gradient to `hidden`, each chunk's logits, their gradient and its product with the head's weights are
    computed right in the forward pass, as in Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024): what is kept
    is one ``[n, H]`` gradient. Weights of the head get none: where they are trained, call ``weighted_sum`` instead.

    Args:
        head: ``[m, H] -> [m, V]``, each row by itself.
        hidden: ``[n, H]``, what the head takes. labels: int64 ``[n]``, none of them -100. weights: ``[n]``.
        vocab_size: V, which the size of a chunk depends on (``heuristics.head_rows``).

    Returns:
        A scalar in fp32 (float64 for float64 `hidden`); once differentiable.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _SummedCrossEntropy.apply(hidden, labels, weights, head, vocab_size)
    total = _zero(hidden)
    for at in _chunks(len(hidden), vocab_size):
        total = total + weighted_sum(head(hidden[at]), labels[at], None if weights is None else weights[at])
    return total


def first_derivative_only(why: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for the ``backward`` of an autograd Function: RuntimeError with `why` under ``create_graph=True``.

    ``once_differentiable`` would return constants where the incoming gradient is one, as that of ``loss.backward()``
    is: a wrong second derivative and no error.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def checked(ctx: Any, *gradients: Tensor | None) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"create_graph: {why}")
            return backward(ctx, *gradients)

        return checked

    return decorate


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, weights: Tensor | None, head: Any, vocab_size: int
    ) -> Tensor:
        total, gradient = _zero(hidden), torch.empty_like(hidden)
        for at in _chunks(len(hidden), vocab_size):
            states = hidden[at].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(states)
            of_logits = log_softmax(_upcast(logits.detach()), dim=-1)
            column = labels[at, None]
            each = of_logits.gather(1, column).squeeze(1)
            of_logits.exp_().scatter_add_(1, column, torch.full_like(column, -1, dtype=of_logits.dtype))
            if weights is not None:
                each, of_logits = each * weights[at], of_logits.mul_(weights[at, None])
            total -= each.sum()
            (gradient[at],) = torch.autograd.grad(logits, states, of_logits.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @first_derivative_only("a loss in chunks has no second derivative; ask for return_logits=True")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(gradient.dtype), None, None, None, None


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    step = heuristics.head_rows(rows, vocab_size)
    return (slice(first, first + step) for first in range(0, rows, step))


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64 if like.dtype == torch.float64 else torch.float32, device=like.device)


def _upcast(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
