# SPDX-License-Identifier: Apache-2.0
"""A tiny model in a folder with a tokenizer, and what transformers alone makes of a row behind a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedTokenizerFast

from softprompt_fast import PrefixKV
from softprompt_fast.prefix_kv import model_fingerprint

VOCAB_SIZE = 512
LENGTHS = (16, 20, 100, 128, 512)
#: Words that the tokenizer knows; ids behind them are placeholders' to take.
WORDS = 500
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = (
    "{% for message in messages %}w3 {{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
)


class Base:
    """A model in a folder, and its greedy answers by transformers alone."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder = folder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.dim() > 1:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * weight.shape[1] ** -0.5)
        self.model.save_pretrained(folder)
        words = {name: i for i, name in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), WORDS)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        fast.chat_template = TEMPLATE
        fast.save_pretrained(folder)
        self.fingerprint = model_fingerprint(self.model)

    def prefix(self, length: int, seed: int) -> PrefixKV:
        """Random keys and values, of every layer's own draws."""
        config, generator = self.model.config, torch.Generator().manual_seed(seed)
        shape = (config.num_key_value_heads, length, config.head_dim)
        draws = [torch.randn(shape, generator=generator) for _ in range(2 * config.num_hidden_layers)]
        return PrefixKV(draws[::2], draws[1::2], method="PREFIX_TUNING", fingerprint=self.fingerprint)

    @torch.inference_mode()
    def greedy(
        self, ids: list[int], prefix: PrefixKV | None, new: int, penalty: float = 1.0, eos: int | None = None
    ) -> list[int]:
        """The row alone, unpadded, behind a cache that holds the prefix; `penalty` on ids of the row and of the answer
        (Keskar et al., 2019)."""
        cache, length, answer = DynamicCache(), 0, []
        if prefix is not None:
            length = prefix.num_virtual_tokens
            for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                cache.update(key[None].clone(), value[None].clone(), layer)
        step = torch.tensor([ids])
        while len(answer) < new and (eos is None or eos not in answer):
            position = torch.arange(length, length + step.shape[1])[None]
            logits = self.model(input_ids=step, past_key_values=cache, position_ids=position).logits[0, -1]
            seen = torch.tensor([*ids, *answer])
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            length += step.shape[1]
            answer.append(int(logits.argmax()))
            step = torch.tensor([answer[-1:]])
        return answer


def make_config(**changes: Any) -> LlamaConfig:
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**fields | changes)


def make_rows(count: int, seed: int = 9, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, WORDS, (length,), generator=generator).tolist() for length in lengths]
