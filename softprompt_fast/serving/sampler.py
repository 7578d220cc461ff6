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

#: How many of the largest logits are looked at first, and then, where a row keeps more than those. Sorting them all
#: (32 rows of 49,152) takes as long as a decode step of SmolLM2-135M; the largest 64 take a fiftieth of that.
_CANDIDATES = (64, 1024)


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
        self._random = random.Random(sampling.seed)
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
    largest, most_probable = adjusted.max(dim=-1)
    tokens: list[int | None] = most_probable.tolist()
    # NaN and +inf are the largest where they are at all.
    finite = torch.isfinite(largest).tolist()
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and finite[i]]
    if drawn:
        chosen = _draw(adjusted[drawn], [rows[i] for i in drawn])
        for i, token in zip(drawn, chosen, strict=True):
            tokens[i] = token
    tokens = [token if good else None for token, good in zip(tokens, finite, strict=True)]
    for row, token in zip(rows, tokens, strict=True):
        if token is not None and row.adjusts:
            row.accept(token)
    logprobs = _logprobs(logits, tokens, rows)
    return [Choice(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


def _draw(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Tokens drawn from ``[B, V]`` by inverting each row's cumulative distribution at its next random number.

    ``top_k``, ``top_p`` and ``min_p`` each keep the first so many of the tokens in order of probability; they apply in
    that order, as in transformers, ``top_p`` to what ``top_k`` has left.
    """
    device, vocab = logits.device, logits.shape[1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    scaled = logits / column([row.sampling.temperature for row in rows]).float()
    uniform = column([row.draw() for row in rows])
    tokens = [0] * len(rows)

    def invert(probabilities: Tensor, at: list[int]) -> list[int]:
        """Each row's place in ``[n, K]``; never one of probability 0."""
        cumulative = probabilities.cumsum(-1)
        total = cumulative[:, -1:]
        place = torch.searchsorted(cumulative, uniform[at] * total, right=True).squeeze(1)
        return torch.minimum(place, (cumulative < total).sum(-1)).tolist()

    def cuts(row: RowSampler) -> bool:
        return row.sampling.top_k > 0 or row.sampling.top_p < 1 or row.sampling.min_p > 0

    plain = [i for i, row in enumerate(rows) if not cuts(row)]
    if plain:
        # In the vocabulary's order: nothing has to be sorted.
        for i, token in zip(plain, invert(scaled[plain].double().softmax(-1), plain), strict=True):
            tokens[i] = token

    open_rows = [i for i, row in enumerate(rows) if cuts(row)]
    for width in (*(w for w in _CANDIDATES if w < vocab), vocab):
        if not open_rows:
            break
        # Row by row the same, however many rows stand beside it: so ties are broken the same way.
        values, ids = scaled[open_rows].topk(width)
        values = values.double()
        rules = [rows[i].sampling for i in open_rows]
        top_k = column([rule.top_k if rule.top_k else vocab for rule in rules])
        in_k = torch.arange(width, device=device) < top_k
        normaliser = torch.where(
            top_k <= width,
            values.masked_fill(~in_k, -math.inf).logsumexp(-1, keepdim=True),
            scaled[open_rows].double().logsumexp(-1, keepdim=True),
        )
        probabilities = (values - normaliser).exp()
        before = probabilities.cumsum(-1) - probabilities
        keep = in_k & (before < column([rule.top_p for rule in rules]))
        keep &= values >= values[:, :1] + column([math.log(rule.min_p) if rule.min_p else -math.inf for rule in rules])
        keep[:, 0] = True
        # With k beyond the candidates the normaliser is too large by what is not in k: no cut by it is certain.
        known = (top_k.squeeze(1) <= width) | ((top_k.squeeze(1) >= vocab) & ~keep[:, -1])
        done = [j for j, is_known in enumerate(known.tolist()) if is_known or width == vocab]
        if done:
            at = [open_rows[j] for j in done]
            for i, j, place in zip(at, done, invert(probabilities[done] * keep[done], at), strict=True):
                tokens[i] = int(ids[j, place])
            open_rows = [i for i in open_rows if i not in set(at)]
    return tokens


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
