# SPDX-License-Identifier: Apache-2.0
"""The model-level oracle: PEFT run on each row alone and unpadded, its batch quantities put together from those rows.

PEFT's own batches are no oracle: under left padding its pad tokens shift positions, so that a row's result depends on
its neighbours. Alone and unpadded every family is right, which `test_oracle.py` checks against plain transformers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.device import randint, seeded
from tests.families import FAMILIES, NUM_TASKS, NUM_VIRTUAL_TOKENS, PREFIX_METHODS, VOCAB_SIZE, make_peft

IGNORED = -100
NEW_TOKENS = 5

# A logit may differ from the oracle's by this share of the row's largest one. Rounding in float32 explains a tenth of
# it (`test_oracle.py` measures that against float64); a wrong position or mask moves logits by a thousand times as
# much (measured there as well).
LOGIT_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # relative, in the norm of each parameter's gradient

PADDINGS = ("none", "left", "right")
BATCH_SIZES = (1, 3)


# -- rows and batches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One example: own token ids, labels (-100: no term) and, for multitask prompts, its task."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    task: int

    def __len__(self) -> int:
        return len(self.ids)


@functools.cache
def make_rows(lengths: tuple[int, ...]) -> tuple[Row, ...]:
    """Seeded rows. The first token's label counts in row 0 (the prompt predicts it) but not in row 1."""
    rows = []
    for index, length in enumerate(lengths):
        generator = seeded(100 + index)
        ids = randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
        labels = list(ids)
        if index == 1 and length > 1:
            labels[0] = IGNORED
        if length > 3:
            labels[3] = IGNORED
        rows.append(Row(tuple(ids), tuple(labels), task=(index + 1) % NUM_TASKS))
    return tuple(rows)


@dataclass(frozen=True)
class Case:
    """One way to hand rows over: padding x batch size."""

    padding: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return f"padding={self.padding} batch={len(self.rows)}"


# Unpadded rows are of one length; padded ones are not, down to a single token.
CASES = tuple(
    Case(padding, make_rows((6, 6, 6) if padding == "none" else (6, 1, 8))[:batch_size])
    for padding in PADDINGS
    for batch_size in BATCH_SIZES
)


@dataclass(frozen=True)
class Batch:
    """Tensors [B, S] of a case, and where in them each row's own tokens lie."""

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    task_ids: Tensor
    slices: tuple[slice, ...]

    def inputs(self, method: str, *, labels: bool = False) -> dict[str, Tensor]:
        """Keyword arguments of a model under an adapter of the method."""
        arguments = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            arguments["attention_mask"] = self.attention_mask
        if labels:
            arguments["labels"] = self.labels
        if method == "multitask":
            arguments["task_ids"] = self.task_ids
        return arguments


def make_batch(case: Case) -> Batch:
    """Lay out a case. Pads are random tokens, not a pad token: only the mask tells them apart, so they must not leak.

    Padded batches are two tokens wider than their longest row, so that a batch of one is padded as well.
    """
    width = max(map(len, case.rows)) + (0 if case.padding == "none" else 2)
    generator = seeded(width)
    input_ids = randint(2, VOCAB_SIZE, (len(case.rows), width), generator=generator)
    labels = torch.full_like(input_ids, IGNORED)
    mask = torch.zeros_like(input_ids)
    slices = []
    for index, row in enumerate(case.rows):
        start = width - len(row) if case.padding == "left" else 0
        own = slice(start, start + len(row))
        input_ids[index, own] = torch.tensor(row.ids)
        labels[index, own] = torch.tensor(row.labels)
        mask[index, own] = 1
        slices.append(own)
    # Without padding a mask may be left out: batches of one do.
    attention_mask = None if case.padding == "none" and len(case.rows) == 1 else mask
    return Batch(input_ids, attention_mask, labels, torch.tensor([row.task for row in case.rows]), tuple(slices))


# -- PEFT on a row alone ----------------------------------------------------------------------------------------------


@functools.cache
def oracle_model(family: str, method: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The oracle's own PEFT model: never accelerated, never handed to a test that changes it."""
    peft_model = make_peft(FAMILIES[family], method).to(dtype)
    if dtype == torch.float64:
        peft_model.get_base_model().set_experts_implementation("eager")  # grouped matrix products stop at float32
    return peft_model


def run_alone(
    peft_model: PeftModel, method: str, ids: tuple[int, ...], task: int, labels: tuple[int, ...] | None = None
) -> CausalLMOutputWithPast:
    """PEFT on one unpadded row. No mask is passed: PEFT's all-ones mask says nothing that its absence does not."""
    arguments: dict[str, Tensor] = {"input_ids": torch.tensor([ids])}
    if labels is not None:
        arguments["labels"] = torch.tensor([labels])
    if method == "multitask":
        arguments["task_ids"] = torch.tensor([task])
    return peft_model(**arguments)


def own_logits(method: str, logits: Tensor) -> Tensor:
    """Logits [1, P + S, V] or [1, S, V] of PEFT -> those at own tokens, [S, V]."""
    return logits[0] if method in PREFIX_METHODS else logits[0, NUM_VIRTUAL_TOKENS:]


@dataclass(frozen=True)
class RowResult:
    """`loss_sum` and `gradients` are of the sum of the row's `num_terms` loss terms: rows add up to batches."""

    logits: Tensor
    loss_sum: float
    num_terms: int
    gradients: dict[str, Tensor]


def num_loss_terms(peft_model: PeftModel, method: str, labels: tuple[int, ...]) -> int:
    """How many terms the mean in PEFT's loss is over."""
    if method in PREFIX_METHODS:
        labels = labels[1:]  # no logit predicts the first own token
    terms = sum(label != IGNORED for label in labels)
    if method == "cpt":  # virtual tokens of a label type are predicted as well, but for the first
        types = peft_model.active_peft_config.cpt_tokens_type_mask
        terms += sum(kind > 0 and kind % 4 == 0 for kind in types[1:])
    return terms


@functools.cache
def forward_alone(family: str, method: str, row: Row, dtype: torch.dtype = torch.float32) -> RowResult:
    """Logits [S, V], summed loss and its prompt gradients of a row run alone."""
    peft_model = oracle_model(family, method, dtype)
    trainable = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    output = run_alone(peft_model, method, row.ids, row.task, row.labels)
    num_terms = num_loss_terms(peft_model, method, row.labels)
    if num_terms:
        loss_sum = output.loss * num_terms
        gradients = torch.autograd.grad(loss_sum, list(trainable.values()))
    else:  # the mean over nothing that PEFT returns is NaN; the sum is not
        loss_sum = torch.zeros(())
        gradients = tuple(torch.zeros_like(parameter) for parameter in trainable.values())
    return RowResult(
        logits=own_logits(method, output.logits).detach(),
        loss_sum=loss_sum.item(),
        num_terms=num_terms,
        gradients=dict(zip(trainable, gradients, strict=True)),
    )


def batch_loss(results: list[RowResult]) -> float:
    """The mean over all loss terms of the batch."""
    return sum(result.loss_sum for result in results) / sum(result.num_terms for result in results)


def batch_gradients(results: list[RowResult]) -> dict[str, Tensor]:
    """Prompt gradients of `batch_loss`, by parameter name of the PEFT model."""
    num_terms = sum(result.num_terms for result in results)
    return {
        name: torch.stack([result.gradients[name] for result in results]).sum(0) / num_terms
        for name in results[0].gradients
    }


# -- greedy text ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """New tokens of a row, and the smallest lead of a chosen token over the next best, as a share of its logit."""

    tokens: tuple[int, ...]
    margin: float


@functools.cache
def greedy_alone(family: str, method: str, row: Row, new_tokens: int = NEW_TOKENS) -> Continuation:
    """Greedy continuation of a row alone, by a full PEFT forward per token: no cache that could be wrong."""
    peft_model = oracle_model(family, method)
    ids, margin = row.ids, float("inf")
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = own_logits(method, run_alone(peft_model, method, ids, row.task).logits)[-1]
            best, second = logits.topk(2).values.tolist()
            margin = min(margin, (best - second) / logits.abs().max().item())
            ids += (int(logits.argmax()),)
    return Continuation(ids[len(row) :], margin)


def peft_generate_alone(peft_model: PeftModel, method: str, row: Row, new_tokens: int = NEW_TOKENS) -> tuple[int, ...]:
    """The same continuation as PEFT's own `generate` gives it."""
    input_ids = torch.tensor([row.ids])
    arguments = {"task_ids": torch.tensor([row.task])} if method == "multitask" else {}
    output = peft_model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        **arguments,
    )
    return tuple(output[0, len(row) :].tolist())
