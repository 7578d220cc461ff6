# SPDX-License-Identifier: Apache-2.0
"""One saved adapter in three systems: PEFT, transformers with the prefix expanded into its cache, and this package."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria

from softprompt_fast.demo.assets import Review
from softprompt_fast.demo.sentiment import PROMPT_NAME, Advance, Task, batches_of_one_size, label_logits
from softprompt_fast.model import SoftPromptModel
from softprompt_fast.prefix_kv import PrefixKV

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PEFT, EXPANDED, OURS = "PEFT", "expanded prefix", "softprompt_fast"


@dataclass(frozen=True)
class Agreement:
    """Predictions of this package, in padded batches, against PEFT's on each row alone and unpadded."""

    rows: int
    equal: int
    max_logit_difference: float


def agreement(
    model: SoftPromptModel, peft_model: PeftModel, task: Task, reviews: Sequence[Review], advance: Advance
) -> Agreement:
    """Compare the two label logits of every review.

    PEFT gets one row at a time: in its own padded batches the pad tokens shift the positions, and its results change.
    """
    ordered = [review for batch in batches_of_one_size(reviews, 32) for review in batch]
    ours = torch.cat([label_logits(model, task, batch, PROMPT_NAME) for batch in batches_of_one_size(reviews, 32)])
    theirs = []
    for review in ordered:
        ids, mask = task.encode([review])
        with torch.no_grad():
            theirs.append(peft_model(input_ids=ids, attention_mask=mask).logits[:, -1, task.label_ids])
        advance()
    reference = torch.cat(theirs)
    return Agreement(
        rows=len(ordered),
        equal=int((ours.argmax(1) == reference.argmax(1)).sum()),
        max_logit_difference=float((ours - reference).abs().max()),
    )


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds. ``prefix_bytes``: what a system keeps of the prompt while the batch runs. The others
    keep its keys and values once per row, this package one copy (and the logits of the last virtual token)."""

    system: str
    num_virtual_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    prefix_bytes: int
    same_tokens: bool


class _FirstToken(StoppingCriteria):
    """Never stops; notes when the first new token was there."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def expanded_cache(base: PreTrainedModel, prefix: PrefixKV, rows: int) -> DynamicCache:
    """The prefix as an ordinary cache of transformers: one copy for every row."""
    cache = DynamicCache(config=base.config)
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(key.expand(rows, *key.shape).contiguous(), value.expand(rows, *value.shape).contiguous(), layer)
    return cache


def timings(
    model: SoftPromptModel,
    peft_model: PeftModel,
    prompt: str,
    input_ids: Tensor,
    *,
    new_tokens: int,
    rounds: int,
    advance: Advance,
) -> list[Timing]:
    """Greedy generation for unpadded rows ``input_ids`` ``[B, S]`` by all three systems, in turn, ``rounds`` times.

    ``prompt`` names the prompt in ``model``; in ``peft_model`` it is the active adapter.

    One more round goes first and is not counted. Each system runs once in every round, so that a slow moment of the
    machine hits all three.
    """
    rows = input_ids.shape[0]
    prefix = model.compile_prompt(prompt)
    base = peft_model.get_base_model()
    virtual = input_ids.new_zeros(rows, prefix.num_virtual_tokens)  # their place; the cache holds what they compute
    behind_prefix = torch.cat([virtual, input_ids], dim=1)

    def peft(**options: Any) -> Tensor:
        return peft_model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)

    def expanded(**options: Any) -> Tensor:
        return base.generate(
            input_ids=behind_prefix,
            attention_mask=torch.ones_like(behind_prefix),
            past_key_values=expanded_cache(base, prefix, rows),
            **options,
        )

    def ours(**options: Any) -> Tensor:
        return model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), prompt=prompt, **options)

    systems: dict[str, Callable[..., Tensor]] = {PEFT: peft, EXPANDED: expanded, OURS: ours}
    a_copy = sum(tensor.nbytes for tensor in prefix.keys + prefix.values)
    kept = {PEFT: rows * a_copy, EXPANDED: rows * a_copy, OURS: prefix.nbytes}
    first: dict[str, list[float]] = {name: [] for name in systems}
    total: dict[str, list[float]] = {name: [] for name in systems}
    tokens: dict[str, Tensor] = {}
    for counted in [False] + [True] * rounds:
        for name, generate in systems.items():
            clock = _FirstToken()
            start = time.perf_counter()
            output = generate(
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                stopping_criteria=[clock],
                pad_token_id=0,
            )
            end = time.perf_counter()
            tokens[name] = output[:, -new_tokens:]
            if counted:
                assert clock.at is not None
                first[name].append(clock.at - start)
                total[name].append(end - start)
            advance()
    return [
        Timing(
            system=name,
            num_virtual_tokens=prefix.num_virtual_tokens,
            seconds_to_first_token=statistics.median(first[name]),
            tokens_per_second=rows * new_tokens / statistics.median(total[name]),
            prefix_bytes=kept[name],
            same_tokens=torch.equal(tokens[name], tokens[PEFT]),
        )
        for name in systems
    ]
