# SPDX-License-Identifier: Apache-2.0
"""Whole models on the CUDA kernels: what a model does otherwise than a call of an op. On a CPU they are emulated; on a
GPU ``make gpu`` runs all model tests on them."""

from __future__ import annotations

import pytest
import torch
from models import make_base, make_model, make_prompt, make_rows

from softprompt_fast import BankOptions
from softprompt_fast.bank import PromptBank
from softprompt_fast.packed import Packed
from tests.device import ON_GPU

cuda = pytest.importorskip("softprompt_fast.backends.cuda.prefix_attention", exc_type=ImportError)
ROWS = make_rows([4, 4, 4])


@pytest.mark.parametrize("stored", [None, torch.int8], ids=["16 bits", "8 bits"])
@torch.no_grad()
def test_a_banks_prompts_are_read_in_place(stored: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they lie among others that no row has; a decode step gives the bits of a bank that holds nothing else."""
    base = make_base()
    prompts = {name: make_prompt(base, length=n, seed=n) for name, n in (("a", 5), ("between", 40), ("b", 9))}
    options = BankOptions(device_bytes=100_000, dtype=stored)
    ids, names = torch.stack(ROWS), ["b", None, "a"]

    def step(names_in_bank: tuple[str, ...]) -> torch.Tensor:
        chosen = {name: prompts[name] for name in names_in_bank}
        model = make_model(prompts=chosen, backend="cuda", bank=options).to(torch.bfloat16)
        for name in names_in_bank:  # in this order in the arena
            model.bank.hold(name).release()
        with monkeypatch.context() as patch:
            for of, copying in ((Packed, "dense"), (PromptBank, "packed")):
                patch.setattr(of, copying, lambda *args: pytest.fail("a copy"))
            selected = model._select(names, None, 3)
            assert selected.packed.is_sparse
            cache = model(ids, prompt=names).past_key_values
            return model(ids[:, :1], prompt=names, past_key_values=cache).logits

    kernel, calls = cuda.NATIVE, []
    if not ON_GPU:
        monkeypatch.setattr(cuda, "NATIVE", lambda *args: calls.append(args) or kernel(*args))
    found = step(("a", "between", "b"))
    assert ON_GPU or calls
    assert torch.equal(found, step(("a", "b")))
