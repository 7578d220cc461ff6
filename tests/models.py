# SPDX-License-Identifier: Apache-2.0
"""Tiny seeded base models and prompts for tests of the model API, and what a row alone must give. No PEFT needed.

The oracle is plain transformers on a base of its own: one unpadded row, behind its virtual tokens' embeddings
(``inputs_embeds``) or behind its learnt keys and values in a ``DynamicCache``.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from softprompt_fast import SoftPrompt, SoftPromptModel
from tests.device import randint, randn, seeded

VOCAB_SIZE = 61
MAX_POSITIONS = 96
NUM_TASKS = 3
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "tie_word_embeddings": False,
    # Token 0 pads; it is also an ordinary token of the rows below, which a mask read off pad ids would get wrong.
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    # Learnt positions: a row whose positions are wrong fails loudly.
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    ),
    # Sliding and full layers, soft caps, and embeddings scaled inside the model; the window ends inside the prompt.
    "gemma2": lambda: Gemma2Config(
        **_LLAMA,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=6.0,
    ),
    # ALiBi code of its own: prefixes take the expanded path.
    "bloom": lambda: BloomConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    ),
}
FAMILIES = tuple(_CONFIGS)


@functools.cache
def _base(family: str) -> PreTrainedModel:
    # Both attention implementations that a CPU has; bloom and soft caps need the first.
    attention = "eager" if family in ("bloom", "gemma2") else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(family.encode()))
        base = AutoModelForCausalLM.from_config(_CONFIGS[family](), attn_implementation=attention)
    generator = seeded(zlib.crc32(family.encode()))
    embeddings = base.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in base.parameters():
            noise = randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise / 3)
            elif parameter is embeddings:
                parameter.copy_(noise / getattr(base.get_input_embeddings(), "scalar_embed_scale", 1.0))
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)
    return base.eval().requires_grad_(False)


def make_base(family: str = "llama") -> PreTrainedModel:
    """A fresh copy: eval mode, fp32, on the device of the tests; the same weights at every call."""
    return copy.deepcopy(_base(family))


def make_prompt(
    base: PreTrainedModel, method: str = "PROMPT_TUNING", *, length: int = 5, seed: int = 1, **options: Any
) -> SoftPrompt:
    """A prompt of visible values: as large as the base's embeddings, prefixes of order one."""
    if method == "MULTITASK_PROMPT_TUNING":
        options = {"num_tasks": NUM_TASKS, "num_ranks": 2} | options
    if method == "CPT":
        options = {"cpt_token_ids": [7, 3, 9, 12, 4], "cpt_tokens_type_mask": [1, 2, 2, 3, 4]} | options
    else:
        options = {"num_virtual_tokens": length} | options
    prompt = SoftPrompt.for_model(method, base, **options)
    generator = seeded(seed)
    size = base.get_input_embeddings().weight.std().item() if prompt.kind == "embedding" else 1.0
    with torch.no_grad():
        for name, parameter in prompt.named_parameters():
            if parameter.requires_grad:
                noise = randn(parameter.shape, generator=generator)
                parameter.copy_(noise if name.startswith("prefix_task") else noise * size)
    return prompt


def make_model(family: str = "llama", prompts: dict[str, SoftPrompt] | None = None, **kwargs: Any) -> SoftPromptModel:
    """A model in eval mode with frozen prompts: by default "a" (5 virtual tokens) and "b" (9), of different values."""
    base = make_base(family)
    model = SoftPromptModel(base, **kwargs)
    if prompts is None:
        prompts = {"a": make_prompt(base, length=5, seed=1), "b": make_prompt(base, length=9, seed=2)}
    for name, prompt in prompts.items():
        model.add_prompt(name, prompt.requires_grad_(False))
    return model.eval()


def make_rows(lengths: Sequence[int], seed: int = 3) -> list[Tensor]:
    """Own tokens of each row, ``[S]`` each."""
    generator = seeded(seed)
    return [randint(0, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def pad_rows(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, S]`` of rows padded on one side, with a token that would show."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), 13)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


class Oracle:
    """What one row alone gives, by transformers alone.

    Args:
        family: base model. It has weights equal to those of ``make_base(family)`` and the family's own attention.
    """

    def __init__(self, family: str = "llama") -> None:
        self.base = make_base(family)

    def logits(self, row: Tensor, prompt: SoftPrompt | None, task: int | None = None) -> Tensor:
        """Logits of virtual and own tokens ``[P + S, V]`` (prefix methods: of own tokens, ``[S, V]``)."""
        if prompt is not None and prompt.kind == "prefix":
            cache = DynamicCache()
            for layer, (key, value) in enumerate(prompt.key_values()):
                cache.update(key[None], value[None], layer)
            mask = torch.ones(1, prompt.num_virtual_tokens + len(row), dtype=torch.long)
            return self.base(row[None], past_key_values=cache, attention_mask=mask).logits[0]
        return self.base(inputs_embeds=self.embeds(row, prompt, task)).logits[0]

    def embeds(self, row: Tensor, prompt: SoftPrompt | None, task: int | None = None) -> Tensor:
        """Embeddings of virtual and own tokens ``[1, P + S, H]``."""
        own = self.base.get_input_embeddings()(row)[None]
        if prompt is None:
            return own
        virtual = prompt.embeddings(None if task is None else torch.tensor([task]))
        return torch.cat([virtual.reshape(1, -1, own.shape[-1]).to(own.dtype), own], dim=1)

    @torch.no_grad()
    def greedy(self, row: Tensor, prompt: SoftPrompt | None, new_tokens: int, task: int | None = None) -> list[int]:
        """New tokens of a plain loop over whole forward passes."""
        tokens = row
        for _ in range(new_tokens):
            tokens = torch.cat([tokens, self.logits(tokens, prompt, task)[-1].argmax()[None]])
        return tokens[len(row) :].tolist()

    @torch.no_grad()
    def generate(self, row: Tensor, prompt: SoftPrompt | None, **kwargs: Any) -> Tensor:
        """transformers' ``generate`` behind the virtual tokens' embeddings: new tokens only, ``[N, new]``."""
        return self.base.generate(inputs_embeds=self.embeds(row, prompt), **kwargs)


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    """Equal up to the order of fp32 sums: measured 6e-7 of the largest logit, a wrong position or mask gives 1e-2."""
    assert found.shape == expected.shape
    error = (found - expected).abs().max().item() / expected.abs().max().item()
    assert error <= 1e-5, f"logits differ by {error:.1e} of the largest"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in the Euclidean norm."""
    return ((found - expected).norm() / expected.norm()).item()
