# SPDX-License-Identifier: Apache-2.0
"""Greedy text of every family under every method equals, token for token, that of PEFT on each row alone."""

from __future__ import annotations

import pytest
import torch

import softprompt_fast as spf
from tests.families import FAMILIES, METHODS, make_peft
from tests.oracle import CASES, NEW_TOKENS, greedy_alone, make_batch


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text(family: str, method: str) -> None:
    """Right-padded rows go on after their last own token; what comes back is the input and then the new tokens."""
    model = spf.accelerate(make_peft(FAMILIES[family], method))
    failures = []
    for case in CASES:
        batch = make_batch(case)
        output = model.generate(**batch.inputs(method), do_sample=False, max_new_tokens=NEW_TOKENS)
        given, new = output.split([batch.input_ids.shape[1], output.shape[1] - batch.input_ids.shape[1]], dim=1)
        if not torch.equal(given, batch.input_ids):
            failures.append(f"{case}: the input did not come back unchanged")
        for index, row in enumerate(case.rows):
            expected, actual = list(greedy_alone(family, method, row).tokens), new[index].tolist()
            if actual != expected:
                failures.append(f"{case}: row {index} of {len(row)} tokens: {actual}, expected {expected}")
    assert not failures, f"{family} under {method} ({FAMILIES[family].notes}):\n" + "\n".join(failures)
