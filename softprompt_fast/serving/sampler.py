# SPDX-License-Identifier: Apache-2.0
"""The next token of every row of a batch, each by its own rules and its own random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_fast.serving.requests import Logprobs, Sampling

#: With `top_k`, so many of the largest logits are sorted, the first that suffices: sorting all (32 rows of 49,152)
#: takes as long as a decode step of SmolLM2-135M, and the largest 64 take a fiftieth of that.
_WIDTHS = (64, 1024)


class RowSampler:
    """One row's rules and what they remember.

    Args:
        sampling: the rules.
        input_ids: the given own tokens.
        vocab_size: V.
        device: of the logits.
    """

    def __init__(
        self, sampling: Sampling, input_ids: Sequence[int], vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sampling = sampling
        # One uniform number a token is all that is drawn.
        # As a string: of an integer it takes the absolute value, and -1 would draw as 1 does.
        self._random = random.Random(None if sampling.seed is None else str(sampling.seed))
        self._counts: Tensor | None = None  # of new tokens, float32 [V]
        self._seen: Tensor | None = None  # given or new, bool [V]
        self._bias: tuple[Tensor, Tensor] | None = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(vocab_size, device=device)
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor([*input_ids], dtype=torch.long, device=device)] = True
        if sampling.logit_bias:
            ids, biases = zip(*sampling.logit_bias.items(), strict=True)
            self._bias = (torch.tensor(ids, device=device), torch.tensor(biases, dtype=torch.float32, device=device))

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return not (self._counts is None and self._seen is None and self._bias is None)

    def adjust(self, logits: Tensor) -> None:
        """Penalties and biases, in place on ``[V]``."""
        if self._seen is not None:
            penalty = self.sampling.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits.copy_(torch.where(self._seen, penalised, logits))
        if self._counts is not None:
            logits.sub_(self._counts, alpha=self.sampling.frequency_penalty)
            logits.sub_(self._counts.sign(), alpha=self.sampling.presence_penalty)
        if self._bias is not None:
            logits.index_add_(0, *self._bias)

    def draw(self) -> float:
        """The next random number, uniform in [0, 1)."""
        return self._random.random()

    def accept(self, token: int) -> None:
        """Remember the token that was chosen."""
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True


@dataclass(frozen=True)
class Choice:
    """One row's next token; None where its logits are not finite."""

    token: int | None
    logprobs: Logprobs | None = None


def choose(logits: Tensor, rows: Sequence[RowSampler]) -> list[Choice]:
    """The next token of each row.

    Args:
        logits: ``[B, V]``, left as they are.
        rows: B samplers. Each row's result depends on its own logits and sampler alone.
    """
    logits = logits.float()
    adjusted = logits
    if any(row.adjusts for row in rows):
        adjusted = logits.clone()
        for i, row in enumerate(rows):
            if row.adjusts:
                row.adjust(adjusted[i])
    most_probable = adjusted.argmax(dim=-1, keepdim=True)
    tokens: list[int | None] = most_probable.squeeze(1).tolist()
    # NaN and +inf count as the largest where there are any.
    finite = adjusted.gather(1, most_probable).isfinite().squeeze(1).tolist()
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and finite[i]]
    if drawn:
        chosen = _draw(adjusted[drawn], [rows[i] for i in drawn])
        for i, token in zip(drawn, chosen, strict=True):
            tokens[i] = token
    tokens = [token if good else None for token, good in zip(tokens, finite, strict=True)]
    for row, taken in zip(rows, tokens, strict=True):
        if taken is not None:
            row.accept(taken)
    logprobs = _logprobs(logits, tokens, rows)
    return [Choice(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


def _draw(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Tokens drawn from ``[B, V]``; ``top_k``, ``top_p`` and ``min_p`` apply in that order, as in transformers,
    ``top_p`` to what ``top_k`` has left."""
    vocab = logits.shape[1]
    widths = [next((w for w in (*_WIDTHS, vocab) if row.sampling.top_k <= w), vocab) for row in rows]
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(min(widths[i], vocab) if 0 < row.sampling.top_k < vocab else 0, []).append(i)
    tokens = [0] * len(rows)
    for width, places in groups.items():
        group = [rows[i] for i in places]
        shifted = logits[places] - logits[places].amax(-1, keepdim=True)  # a low temperature overflows nothing so
        temperatures = _column([row.sampling.temperature for row in group], logits)
        scaled = shifted / temperatures.clamp_(min=torch.finfo(logits.dtype).tiny)
        drawn = _draw_sorted(scaled, group, width) if width else _draw_unsorted(scaled, group)
        for i, token in zip(places, drawn, strict=True):
            tokens[i] = token
    return tokens


def _draw_sorted(logits: Tensor, rows: Sequence[RowSampler], width: int) -> list[int]:
    """With ``top_k``, from the `width` most probable tokens in order."""
    rules = [row.sampling for row in rows]
    values, ids = logits.topk(width)
    outside = torch.arange(width, device=logits.device) >= _column([rule.top_k for rule in rules], logits)
    probabilities = values.masked_fill(outside, -math.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = before < _column([rule.top_p for rule in rules], logits)
    keep &= probabilities >= probabilities[:, :1] * _column([rule.min_p for rule in rules], logits)
    keep[:, 0] = True
    places = _invert(probabilities * keep, rows)
    return ids.gather(1, places).squeeze(1).tolist()


def _draw_unsorted(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Without ``top_k``, by rejection: a token is drawn, and drawn again among the more probable ones where those
    before it have ``top_p`` already. Exact, and mostly one round, where sorting takes ten times as long; as in
    FlashInfer's sorting-free sampling (2025)."""
    rules = [row.sampling for row in rows]
    probabilities = logits.softmax(-1)
    if any(rule.min_p for rule in rules):
        least = probabilities.amax(-1, keepdim=True) * _column([rule.min_p for rule in rules], logits)
        probabilities = probabilities * (probabilities >= least)
    top_p = _column([rule.top_p for rule in rules], logits)
    tokens = [0] * len(rows)
    left = list(range(len(rows)))
    while left:
        places = _invert(probabilities, [rows[i] for i in left])
        more_probable = probabilities * (probabilities > probabilities.gather(1, places))
        # top_p of 1 keeps all, however the sum is rounded; nothing before: the most probable one, even where top_p is
        # so small that it is 0 here.
        before = more_probable.sum(-1, keepdim=True)
        taken = (top_p >= 1) | (before < top_p) | (before == 0)
        again = []
        for j, (token, is_taken) in enumerate(zip(places.squeeze(1).tolist(), taken.squeeze(1).tolist(), strict=True)):
            tokens[left[j]] = token
            if not is_taken:
                again.append(j)
        left = [left[j] for j in again]
        probabilities, top_p = more_probable[again], top_p[again]
    return tokens


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _invert(probabilities: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """Places ``[B, 1]`` in ``[B, K]`` where each row's next random number cuts its cumulative distribution, never one
    of probability 0; the probabilities need not sum to 1."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    places = torch.searchsorted(cumulative, _column([row.draw() for row in rows], cumulative) * total, right=True)
    return torch.minimum(places, (cumulative < total).sum(-1, keepdim=True))


def _logprobs(logits: Tensor, tokens: Sequence[int | None], rows: Sequence[RowSampler]) -> list[Logprobs | None]:
    found: list[Logprobs | None] = [None] * len(rows)
    wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None and tokens[i] is not None]
    if not wanted:
        return found
    logprobs = logits[wanted].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=logits.device)).squeeze(1).tolist()
    most = min(max(rows[i].sampling.logprobs or 0 for i in wanted), logits.shape[1])
    values, ids = logprobs.topk(most)
    for i, own, row_values, row_ids in zip(wanted, chosen, values.tolist(), ids.tolist(), strict=True):
        count = rows[i].sampling.logprobs or 0
        found[i] = Logprobs(own, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
    return found
