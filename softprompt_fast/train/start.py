# SPDX-License-Identifier: Apache-2.0
"""The prompt before its first step: random, from the vocabulary, from a text, from rows, or another prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from softprompt_fast.demo.sentiment import fresh_prompt
from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.model import SoftPromptModel
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import METHODS, SoftPrompt
from softprompt_fast.train.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INITS = "random, normal, vocab, text:WORDS, examples:N (CPT) or prompt:DIR"
#: Where to begin, by the size of what is learnt: embeddings scaled to the base's, a network (P_TUNING), steps
#: inside a small ball (CPT), keys and values of order one. No more than that: each task has its own best.
LEARNING_RATES = {"P_TUNING": 1e-3, "CPT": 1e-3, "PREFIX_TUNING": 1e-2, "CARTRIDGE": 1e-2}
DEFAULT_LEARNING_RATE = 2e-2


def initial_prompt(
    method: str,
    model: SoftPromptModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    init: str,
    num_virtual_tokens: int | None,
    options: Mapping[str, Any],
    seed: int,
) -> SoftPrompt:
    """A trainable prompt for the base of `model`.

    Args:
        method: one of `METHODS`.
        examples: of the training data (for CPT's ``examples:N``).
        init: ``random``: PEFT's random start, for PROMPT_TUNING scaled to the size of the base's token embeddings
            (PEFT's own is a standard normal, several times as large, and learns slowly); ``normal``: exactly PEFT's;
            ``vocab``: embeddings of random tokens; ``text:WORDS``: of these words, for CARTRIDGE their keys and
            values; ``examples:N``: CPT's context, the first N rows; ``prompt:DIR``: go on from that adapter, or
            (CARTRIDGE, PREFIX_TUNING) from a saved PrefixKV.
        num_virtual_tokens: P; what init decides (another prompt's, a context's) may be left out.
        options: further keys of PEFT's configuration of the method.
        seed: of everything random.

    Raises:
        ValueError: an init that the method doesn't know, an option that is wrong; names it.
        OSError: ``prompt:DIR`` can't be read.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    base = model.base
    kind, _, what = init.partition(":")
    if kind == "prompt":
        return _from_saved(what, method, num_virtual_tokens, options, model)
    if method == "CPT":
        if kind != "examples" or not what.isdecimal() or not 0 < int(what) <= len(examples):
            raise ValueError(f"init: CPT starts from examples:N with N from 1 to {len(examples)} rows, found {init!r}")
        return SoftPrompt.for_model("CPT", base, **_context(examples[: int(what)]), **options)
    common: dict[str, Any] = {"num_virtual_tokens": num_virtual_tokens or 20, **options}
    has_tokens = method in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if init == "random" and method == "PROMPT_TUNING":
            return fresh_prompt(base, seed=seed, **common)
        if init in ("random", "normal"):
            return SoftPrompt.for_model(method, base, **common)
        if init == "vocab" and has_tokens:
            return SoftPrompt.for_model(method, base, prompt_tuning_init="SAMPLE_VOCAB", **common)
        if kind == "text" and (has_tokens or method == "CARTRIDGE"):
            ids = tokenizer(what, add_special_tokens=method == "CARTRIDGE").input_ids
            if not ids:
                raise ValueError(f"init: expected words after text:, found {init!r}")
            if has_tokens:
                return SoftPrompt.for_model(method, base, init_token_ids=ids, **common)
            if num_virtual_tokens is not None and len(ids) < num_virtual_tokens:
                raise ValueError(f"init: expected a text of {num_virtual_tokens} tokens or more, found {len(ids)}")
            return model.cartridge_from_tokens(torch.tensor(ids), num_virtual_tokens=num_virtual_tokens, **options)
    raise ValueError(f"init: expected {INITS}, as {method} knows them; found {init!r}")


def _from_saved(
    folder: str, method: str, num_virtual_tokens: int | None, options: Mapping[str, Any], model: SoftPromptModel
) -> SoftPrompt:
    if PrefixKV.is_saved_at(folder):
        prompt = _from_prefix(PrefixKV.from_pretrained(folder, base_model=model.base), folder, method, options)
    else:
        table = model.get_input_embeddings()
        prompt = peft_io.load_adapter(folder, trainable=True, token_embeddings=table)
    facts = {"method": (method, prompt.method), "num_virtual_tokens": (num_virtual_tokens, prompt.num_virtual_tokens)}
    facts |= {name: (value, prompt.config.get(name)) for name, value in options.items()}
    for name, (wanted, found) in facts.items():
        if wanted not in (None, found):
            raise ValueError(f"init: expected {name} {wanted} from the prompt in {folder}, found {found}")
    return prompt


def _from_prefix(prefix: PrefixKV, folder: str, method: str, options: Mapping[str, Any]) -> SoftPrompt:
    """Keys and values that train on; any prompt's will do, once they are computed."""
    if method == "CARTRIDGE":
        return SoftPrompt.from_prefix(prefix, num_frozen_tokens=options.get("num_frozen_tokens", 1))
    if method != "PREFIX_TUNING":
        raise ValueError(f"init: {folder} holds keys and values, which only CARTRIDGE and PREFIX_TUNING train")
    cartridge = SoftPrompt.from_prefix(prefix, num_frozen_tokens=0)
    config = {name: value for name, value in cartridge.config.items() if name != "num_frozen_tokens"}
    tensors = cartridge.adapter_tensors()
    return SoftPrompt.from_tensors(config | {"peft_type": method}, tensors).requires_grad_(True)


def _context(examples: Sequence[Example]) -> dict[str, Any]:
    """CPT's tokens and their types: in fours, 2 for an example's input and 4 for its label."""
    ids: list[int] = []
    types: list[int] = []
    for number, example in enumerate(examples):
        ids += example.ids
        labels = len(example.ids) - example.given
        types += [4 * number + 2] * example.given + [4 * number + 4] * labels
    return {"cpt_token_ids": ids, "cpt_tokens_type_mask": types}
