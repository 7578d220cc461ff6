# SPDX-License-Identifier: Apache-2.0
"""Whole models on the Triton kernels, interpreted: logits, loss, gradients and greedy text of PEFT on each row alone.

Interpreted, a model's test takes seconds: a family for each thing that attention is asked for, and a method each. On a
GPU all model tests run on the backend that "auto" picks there (``make gpu``).
"""

from __future__ import annotations

import pytest
import torch

import softprompt_fast as spf
from softprompt_fast.backends import _registry
from tests.families import FAMILIES, make_peft
from tests.oracle import CASES, forward_alone, greedy_alone, make_batch
from tests.test_families import logit_failures, training_failures

pytest.importorskip("triton", reason="triton is not installed")

PADDED = [next(case for case in CASES if case.padding == side and len(case.rows) > 2) for side in ("left", "right")]
CHOSEN = [
    ("llama", "prompt_tuning"),
    ("qwen3", "multitask"),
    ("gemma2", "prefix_tuning"),  # softcap, and a window in every other layer
    ("gpt_oss", "cartridge"),  # sinks
]


@pytest.mark.parametrize(("family", "method"), CHOSEN)
def test_model(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_registry.ENVIRONMENT_VARIABLE, "triton")
    peft_model = make_peft(FAMILIES[family], method)
    model = spf.accelerate(peft_model)
    assert {layer.backend for layer in spf.explain(model).layers} == {"triton"}
    failures = []
    for case in PADDED:
        batch = make_batch(case)
        expected = [forward_alone(family, method, row) for row in case.rows]
        model.eval()
        with torch.no_grad():
            failures += logit_failures(model(**batch.inputs(method)).logits, batch, expected)
        model.train()
        failures += training_failures(model, peft_model, method, batch, expected)
        model.eval()
        new = model.generate(**batch.inputs(method), do_sample=False, max_new_tokens=3)[:, -3:]
        greedy = [list(greedy_alone(family, method, row).tokens)[:3] for row in case.rows]
        if new.tolist() != greedy:
            failures.append(f"{case}: greedy text {new.tolist()}, expected {greedy}")
    assert not failures, "\n".join(failures)
