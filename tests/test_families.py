# SPDX-License-Identifier: Apache-2.0
"""Logits, losses and prompt gradients of every family under every method equal those of PEFT on each row alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import softprompt_fast as spf
from tests.families import FAMILIES, METHODS, VOCAB_SIZE, make_peft
from tests.oracle import (
    CASES,
    GRADIENT_TOLERANCE,
    IGNORED,
    LOGIT_TOLERANCE,
    LOSS_TOLERANCE,
    Batch,
    Case,
    RowResult,
    batch_gradients,
    batch_loss,
    forward_alone,
    make_batch,
    oracle_model,
)


def logit_failures(logits: Tensor, batch: Batch, expected: list[RowResult]) -> list[str]:
    """Own tokens only: what a model says at a pad position is its own business, as long as it is a number."""
    if tuple(logits.shape) != (*batch.input_ids.shape, VOCAB_SIZE):
        return [f"logits {tuple(logits.shape)}, expected {(*batch.input_ids.shape, VOCAB_SIZE)}"]
    failures = [] if logits.isfinite().all() else ["logits are not finite"]
    for index, (own, result) in enumerate(zip(batch.slices, expected, strict=True)):
        error = ((logits[index, own] - result.logits).abs().max() / result.logits.abs().max()).item()
        if not error <= LOGIT_TOLERANCE:
            failures.append(f"row {index} of {len(result.logits)} tokens: logits off by {error:.1e} of the largest")
    return failures


def training_failures(
    model: nn.Module, peft_model: PeftModel, method: str, batch: Batch, expected: list[RowResult]
) -> list[str]:
    """One training step up to the gradients, read where an optimizer of the PEFT model would read them."""
    parameters = dict(peft_model.named_parameters())
    peft_model.zero_grad(set_to_none=True)
    output = model(**batch.inputs(method, labels=True))
    output.loss.backward()

    # Training mode leaves out logits that the loss does not need.
    failures = [] if output.logits is None else logit_failures(output.logits.detach(), batch, expected)
    if output.logits is None and not model.training:
        failures.append("no logits in eval mode")
    expected_loss = batch_loss(expected)
    error = abs(output.loss.item() - expected_loss) / expected_loss
    if not error <= LOSS_TOLERANCE:
        failures.append(f"loss {output.loss.item():.6f}, expected {expected_loss:.6f}")
    for name, gradient in batch_gradients(expected).items():
        actual = parameters[name].grad
        if actual is None:
            failures.append(f"{name}: no gradient")
            continue
        error = ((actual - gradient).norm() / gradient.norm()).item()
        if not error <= GRADIENT_TOLERANCE:
            failures.append(f"{name}: gradient off by {error:.1e} of its norm")
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    failures += [f"{name} is frozen and got a gradient" for name in frozen if parameters[name].grad is not None]
    return failures


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_gradients(family: str, method: str) -> None:
    peft_model = make_peft(FAMILIES[family], method)
    model = spf.accelerate(peft_model)
    failures = []
    for case in CASES:
        batch = make_batch(case)
        expected = [forward_alone(family, method, row) for row in case.rows]
        model.eval()
        with torch.no_grad():
            logits = model(**batch.inputs(method)).logits
        failures += [f"{case}, no grad: {text}" for text in logit_failures(logits, batch, expected)]
        for mode in ("eval", "train"):
            model.train(mode == "train")
            found = training_failures(model, peft_model, method, batch, expected)
            failures += [f"{case}, {mode}: {text}" for text in found]
    assert not failures, f"{family} under {method} ({FAMILIES[family].notes}):\n" + "\n".join(failures)


@pytest.mark.parametrize("family", FAMILIES)
def test_path(family: str) -> None:
    """Exact is not enough: a family whose attention takes a shared prefix must get one, in every layer."""
    model = spf.accelerate(make_peft(FAMILIES[family], "prompt_tuning"))
    path = "shared prefix" if FAMILIES[family].shares_prefix else "expanded prefix"
    explanation = spf.explain(model)
    assert {layer.path.removesuffix(", fused decoder") for layer in explanation.layers} == {path}, str(explanation)
    assert len(explanation.layers) == model.config.num_hidden_layers
    assert FAMILIES[family].shares_prefix or all(layer.reason for layer in explanation.layers), "no reason given"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpt_types_of_own_tokens(case: Case) -> None:
    """CPT's `input_type_mask` says which own tokens are labels, and of which example: older ones weigh less."""
    batch = make_batch(case)
    types = torch.zeros_like(batch.input_ids)
    peft_alone = oracle_model("llama", "cpt")
    terms, loss_sum = 0, 0.0
    for index, (row, own) in enumerate(zip(case.rows, batch.slices, strict=True)):
        # Template, input, then label tokens: of a first example (4), of a second one (8).
        row_types = torch.tensor([1, 4, 2, 4, 4, 8, 7, 8])[: len(row)] if len(row) > 1 else torch.tensor([4])
        types[index, own] = row_types
        with torch.no_grad():
            loss = peft_alone(
                input_ids=torch.tensor([row.ids]),
                labels=torch.tensor([row.labels]),
                input_type_mask=row_types[None].clone(),  # PEFT writes into it
            ).loss
        labels = torch.tensor(row.labels)
        row_terms = 1 + int(((row_types % 4 == 0) & (labels != IGNORED)).sum())  # 1: the prompt's own label
        terms += row_terms
        loss_sum += loss.item() * row_terms
    model = spf.accelerate(make_peft(FAMILIES["llama"], "cpt"))
    before = types.clone()
    with torch.no_grad():
        actual = model(**batch.inputs("cpt", labels=True), input_type_mask=types).loss.item()
    assert actual == pytest.approx(loss_sum / terms, rel=LOSS_TOLERANCE)
    assert torch.equal(types, before), "the caller's input_type_mask was changed"


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_peft_model_computes_what_it_did(family: str, method: str) -> None:
    """Bit for bit, after it was accelerated and after the accelerated model ran."""
    batch = make_batch(CASES[-1])
    inputs = batch.inputs(method)

    def peft_outputs() -> list[Tensor]:
        with torch.no_grad():
            text = peft_model.generate(**inputs, do_sample=False, max_new_tokens=3)
            return [peft_model(**inputs).logits, peft_model(**batch.inputs(method, labels=True)).loss, text]

    peft_model = make_peft(FAMILIES[family], method)
    before = peft_outputs()
    model = spf.accelerate(peft_model)
    for moment in ("accelerated", "run"):
        for expected, actual in zip(before, peft_outputs(), strict=True):
            assert torch.equal(expected, actual), f"changed once {moment}"
        model(**batch.inputs(method, labels=True)).loss.backward()
        model.generate(**inputs, do_sample=False, max_new_tokens=3)
