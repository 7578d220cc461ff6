# SPDX-License-Identifier: Apache-2.0
"""Sentiment as next-token prediction: reviews as token batches, training of a soft prompt, held-out accuracy.

A review is put as ``Review: ...\\nSentiment:`` and the logits of " positive" and " negative" are compared at its last
token. Only the virtual tokens are trained; the language model stays as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt_fast.demo.assets import Review
from softprompt_fast.model import SoftPromptModel
from softprompt_fast.prompt import SoftPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPLATE = "Review: {}\nSentiment:"
PROMPT_NAME = "sentiment"
IGNORE = -100

Advance = Callable[[], object]
"""Called once per finished batch or step, to move a progress bar."""


@dataclass(frozen=True)
class Task:
    """Turns reviews into token ids for one tokenizer.

    Raises:
        ValueError: the tokenizer splits one of the two labels into several tokens.
    """

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self.tokenizer.padding_side = "left"  # so that the last column is every row's last token
        for label in (" negative", " positive"):
            ids = self.tokenizer(label, add_special_tokens=False).input_ids
            if len(ids) != 1:
                raise ValueError(f"base: its tokenizer makes {len(ids)} tokens of the label {label!r}, expected 1")

    @property
    def label_ids(self) -> Tensor:
        """Token ids of " negative" and " positive": int64 ``[2]``, in the order of ``Review.positive``."""
        return self.tokenizer([" negative", " positive"], add_special_tokens=False, return_tensors="pt").input_ids[
            :, 0
        ]

    def encode(self, reviews: Sequence[Review]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 ``[B, S]``, padded left."""
        texts = [TEMPLATE.format(review.text) for review in reviews]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    def encode_for_training(self, reviews: Sequence[Review]) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`encode` with the label's token appended, and labels that are -100 everywhere else."""
        ids, mask = self.encode(reviews)
        target = self.label_ids[torch.tensor([int(review.positive) for review in reviews])][:, None]
        labels = torch.cat([torch.full_like(ids, IGNORE), target], dim=1)
        return torch.cat([ids, target], dim=1), torch.cat([mask, torch.ones_like(target)], dim=1), labels


def label_logits(model: SoftPromptModel, task: Task, reviews: Sequence[Review], prompt: str | None) -> Tensor:
    """Logits of the two labels, ``[B, 2]``, behind ``prompt`` (None: the bare model)."""
    ids, mask = task.encode(reviews)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, prompt=prompt, logits_to_keep=1, use_cache=False).logits
    return logits[:, -1, task.label_ids]


def accuracy(
    model: SoftPromptModel,
    task: Task,
    reviews: Sequence[Review],
    prompt: str | None,
    advance: Advance,
    rows: int = 32,
) -> float:
    """Share of reviews whose label is the likelier one of the two."""
    model.eval()
    right = 0
    for batch in batches_of_one_size(reviews, rows):
        guess = label_logits(model, task, batch, prompt).argmax(dim=1)
        right += sum(int(g) == int(review.positive) for g, review in zip(guess, batch, strict=True))
        advance()
    return right / len(reviews)


def for_training(reviews: Sequence[Review]) -> list[Review]:
    """The reviews to learn from: not held out, rated clearly (at least 1 from neutral), at most 22 words.

    A step costs what its longest review costs, and a review that raters could not agree on teaches little. Accuracy
    is measured on held-out reviews of every kind.
    """
    return [r for r in reviews if not r.held_out and abs(r.rating) >= 1 and len(r.text.split()) <= 22]


def batches_of_one_size(reviews: Sequence[Review], rows: int) -> list[list[Review]]:
    """Batches of ``rows`` reviews of about the same length: padding is what an unsorted batch mostly computes."""
    by_length = sorted(reviews, key=lambda review: len(review.text))
    return [by_length[start : start + rows] for start in range(0, len(by_length), rows)]


def training_batches(reviews: Sequence[Review], rows: int, seed: int) -> Iterator[list[Review]]:
    """Random batches without end; 8 are drawn at a time so that each can hold reviews of about the same length."""
    rng = random.Random(seed)
    while True:
        drawn = batches_of_one_size(rng.sample(list(reviews), min(8 * rows, len(reviews))), rows)
        rng.shuffle(drawn)
        yield from drawn


def fresh_prompt(base: PreTrainedModel, num_virtual_tokens: int, seed: int, **options: Any) -> SoftPrompt:
    """A PROMPT_TUNING prompt of random vectors as large as the base's token embeddings (`options`: of its config)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prompt = SoftPrompt.for_model("PROMPT_TUNING", base, num_virtual_tokens=num_virtual_tokens, **options)
    with torch.no_grad():
        # The method starts from a standard normal, seven times the size of this model's embeddings: far from any
        # text that the model has seen, and slow to come back from.
        scale = base.get_input_embeddings().weight.std()
        for parameter in prompt.parameters():
            parameter.mul_(scale)
    return prompt


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up of five steps times a linear decay to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 5, 1.0) * (1 - s / steps))


def train(
    model: SoftPromptModel,
    prompt: SoftPrompt,
    task: Task,
    reviews: Sequence[Review],
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
    advance: Callable[[float], object],
) -> list[float]:
    """Train ``prompt``, the model's PROMPT_NAME, in place and return the loss of every step (nats per label).

    Adam with a linear warm-up of five steps and a linear decay to zero; the loss is taken at the label only.
    ``advance`` gets the loss of each step.
    """
    model.train()
    parameters = list(prompt.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = warm_up_and_decay(optimizer, steps)
    losses = []
    for batch in islice(training_batches(reviews, rows, seed), steps):
        ids, mask, labels = task.encode_for_training(batch)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, prompt=PROMPT_NAME).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        advance(losses[-1])
    model.eval()
    return losses
