# SPDX-License-Identifier: Apache-2.0
"""The self-study example on a tiny base: the cartridge learns, and what is saved is what was measured."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from softprompt_fast import PrefixKV, SoftPromptModel
from tests.models import Oracle, make_base
from tests.test_cli import ROOT, WORDS, save_base


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("self_study", ROOT / "examples" / "self_study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["self_study"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_divergence_is_a_sum_of_kl(example: ModuleType):
    teacher, student = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(example.divergence(teacher, student), (p * (p / q).log()).sum())
    assert example.divergence(teacher, teacher).abs() < 1e-12


def test_a_cartridge_of_the_whole_text_is_the_text(example: ModuleType):
    """Behind all its keys and values a row sees what it sees behind the text's own tokens."""
    model, oracle = SoftPromptModel(make_base()).eval(), Oracle()
    text, row = torch.randint(0, 61, (11,)), torch.randint(0, 61, (4,))
    model.add_prompt("text", model.cartridge_from_tokens(text))
    with torch.no_grad():
        expected = oracle.logits(torch.cat([text, row]), None)[len(text) :]
        torch.testing.assert_close(model(input_ids=row[None], prompt="text").logits[0], expected, atol=1e-5, rtol=1e-5)


def test_batches_hold_every_example_before_one_comes_again(example: ModuleType):
    found = example.batches(range(10), 3, random.Random(0))
    for _ in range(4):
        rows = [row for _ in range(3) for row in next(found)]
        assert len(set(rows)) == 9


def test_a_text_becomes_a_cartridge(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = save_base(tmp_path / "base")
    words = random.Random(0).choices(WORDS[2:], k=64)
    (tmp_path / "text.txt").write_text(" ".join(words))
    output = tmp_path / "out"
    args = [tmp_path / "text.txt", "-o", output, "--base", base, "--text-tokens", 48, "-P", 6, "--steps", 60]
    args += ["--conversations", 32, "--excerpts", 16, "--held-out", 6, "--answer-tokens", 6, "--excerpt-tokens", 12]
    example.main([str(arg) for arg in [*args, "--learning-rate", 0.1]])

    results = json.loads((output / "results.json").read_text())
    scores = results["scores"]
    none, untrained, trained, full = scores.values()
    names = ["no context", "untrained cartridge (first tokens)", "trained cartridge", "full context"]
    assert list(scores) == names
    assert trained["kl"] < 0.8 * min(untrained["kl"], none["kl"])
    assert full["kl"] == pytest.approx(0, abs=1e-6) and full["agreement"] == 1 and none["prefix_bytes"] == 0
    assert full["prefix_bytes"] == 8 * trained["prefix_bytes"] == 8 * untrained["prefix_bytes"]
    assert results["text_tokens"] == 48 and len(results["losses"]) == 60
    assert (output / "self_study.png").read_bytes().startswith(b"\x89PNG")
    assert "trained cartridge" in capsys.readouterr().out

    model = SoftPromptModel.from_pretrained(str(base), output / "adapter", prompt_name="adapter")
    model.add_prompt("prefix", PrefixKV.from_pretrained(output / "prefix", base_model=model.base))
    row = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        logits = [model(input_ids=row, prompt=name).logits for name in ("adapter", "prefix")]
    torch.testing.assert_close(*logits)
    # The first token's keys and values are the text's own, as at the start.
    ids = torch.tensor([WORDS.index(word) for word in words[:6]])
    first = model.cartridge_from_tokens(ids)
    kept = PrefixKV.from_pretrained(output / "prefix", base_model=model.base).keys
    for (key, _), found in zip(first.key_values(), kept, strict=True):
        assert torch.equal(key[:, :1], found[:, :1]) and not torch.allclose(key[:, 1:], found[:, 1:])
