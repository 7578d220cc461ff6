# SPDX-License-Identifier: Apache-2.0
"""A real model, and every kind of prompt: embeddings that the model turns into a prefix, and learnt prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softprompt_fast import SoftPrompt, SoftPromptModel
from softprompt_fast.demo.assets import load_demo_model
from tests.vllm_engine.engine import run

NEW = 16
TEXTS = ("A warm and funny film.", "Dull.", "The plot, such as it is, concerns", "I would")


@pytest.mark.real
def test_three_methods_on_the_demo_model(tmp_path: Path) -> None:
    base, tokenizer = load_demo_model()
    model = SoftPromptModel(base)
    generator = torch.Generator().manual_seed(0)
    for method, length in (("PROMPT_TUNING", 100), ("PREFIX_TUNING", 20), ("CARTRIDGE", 64)):
        prompt = SoftPrompt.for_model(method, base, num_virtual_tokens=length)
        size = base.get_input_embeddings().weight.std().item() if prompt.kind == "embedding" else 0.5
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        model.add_prompt(method, prompt)
        model.compile_prompt(method).save_pretrained(tmp_path / "prompts" / method)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    names = [None, "PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"]
    asked = [(tokenizer(text)["input_ids"], name) for text in TEXTS for name in names]
    answers, _ = run(tmp_path / "base", tmp_path / "prompts", tmp_path, {"max_model_len": 256}, asked, NEW)
    for (ids, name), answer in zip(asked, answers, strict=True):
        row = torch.tensor([ids])
        alone = model.generate(input_ids=row, prompt=name, max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
        assert alone and answer[: len(alone)] == alone, (name, ids)  # it ends with the text, the engine goes on
