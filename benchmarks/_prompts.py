# SPDX-License-Identifier: Apache-2.0
"""Soft prompts with seeded values, and the same ones in PEFT's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import softprompt_fast as spf


def words_of(base: Any, count: int, generator: torch.Generator) -> Tensor:
    """int64 ``[count]`` ids, not of the first tokens, which are special ones."""
    vocabulary = base.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary // 100, vocabulary, (count,), generator=generator)


def prompt_values(base: Any, length: int, number: int) -> Tensor:
    """``[P, H]`` virtual tokens near the embeddings of random words, seeded: behind random values a deep base is so
    far from any text that rounding alone changes what it says."""
    generator = torch.Generator().manual_seed(1000 + number)
    values = base.get_input_embeddings().weight.detach()[words_of(base, length, generator)].float().cpu()
    return values + 0.01 * torch.randn(values.shape, generator=generator)


def make_prompt(base: Any, values: Tensor) -> spf.SoftPrompt:
    prompt = spf.SoftPrompt.for_model("PROMPT_TUNING", base, num_virtual_tokens=len(values))
    (weight,) = prompt.parameters()
    with torch.no_grad():
        weight.copy_(values.reshape(weight.shape))
    return prompt.requires_grad_(False)


def make_peft(base: Any, prompts: dict[str, Tensor]) -> Any:
    """PEFT's model with one prompt-tuning adapter for each of `prompts`."""
    from peft import PromptTuningConfig, get_peft_model

    model: Any = None
    for name, values in prompts.items():
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(values))
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        with torch.no_grad():
            model.prompt_encoder[name].embedding.weight.copy_(values)
    return model.eval()
