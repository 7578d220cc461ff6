# SPDX-License-Identifier: Apache-2.0
"""bf16 autocast: no further from float32 than transformers alone is under it, in evaluation and in training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt_fast import SoftPrompt, SoftPromptModel
from tests.device import DEVICE
from tests.models import Oracle, make_base, make_prompt, make_rows, relative_error

CASES = [
    *(("llama", method) for method in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")),
    ("gpt2", "PROMPT_TUNING"),
    ("gpt2", "PREFIX_TUNING"),
    ("gemma2", "PROMPT_TUNING"),
    ("bloom", "PROMPT_TUNING"),
]
ROW = make_rows([12])[0]


def make(family: str, method: str) -> tuple[SoftPromptModel, SoftPrompt]:
    base = make_base(family)
    model, prompt = SoftPromptModel(base), make_prompt(base, method)
    model.add_prompt("t", prompt)
    return model, prompt


def under(autocast: bool) -> torch.autocast:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast)


def gradient(loss: Callable[[], Tensor], prompt: SoftPrompt, autocast: bool) -> Tensor:
    with under(autocast):
        value = loss()
    parameters = [p for p in prompt.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


@pytest.mark.parametrize(("family", "method"), CASES)
def test_training(family: str, method: str) -> None:
    model, prompt = make(family, method)
    oracle = Oracle(family)
    model.train()

    def ours() -> Tensor:
        return model(ROW[None], labels=ROW[None]).loss

    def theirs() -> Tensor:
        logits = oracle.logits(ROW, prompt)[-len(ROW) - 1 : -1]  # what predicts the row, or all of it but the first
        return cross_entropy(logits.float(), ROW[-len(logits) :])

    exact = gradient(theirs, prompt, False)
    assert relative_error(gradient(ours, prompt, False), exact) <= 1e-4
    noise = relative_error(gradient(theirs, prompt, True), exact)
    assert noise > 1e-3  # bf16 is what we think it is
    assert relative_error(gradient(ours, prompt, True), exact) <= 2 * noise


@torch.no_grad()
@pytest.mark.parametrize(("family", "method"), CASES)
def test_evaluation(family: str, method: str) -> None:
    model, prompt = make(family, method)
    oracle, last = Oracle(family), slice(-len(ROW), None)
    with under(True):
        found, rounded = model(ROW[None]).logits[0], oracle.logits(ROW, prompt)[last]
    exact = oracle.logits(ROW, prompt)[last]
    assert relative_error(found.float(), exact) <= 2 * relative_error(rounded.float(), exact)
    # The prefix that the call under autocast has left behind is not of its precision.
    assert relative_error(model(ROW[None]).logits[0], exact) <= 1e-5
