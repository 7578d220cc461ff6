# SPDX-License-Identifier: Apache-2.0
"""transformers.pipeline("text-generation") over a SoftPromptModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import VOCAB_SIZE, Oracle, make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from softprompt_fast import SoftPromptModel

FAMILIES = pytest.mark.parametrize("family", ["llama", "bloom"])


def make_tokenizer(side: str = "left") -> PreTrainedTokenizerFast:
    """Word ``w7`` is token 7; ``w0`` pads."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w60"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="w0",
        unk_token="w60",
        padding_side=side,
        clean_up_tokenization_spaces=False,
    )


def make_pipeline(model: SoftPromptModel, side: str = "left") -> Any:
    return transformers.pipeline("text-generation", model=model, tokenizer=make_tokenizer(side))


def words(tokens: list[int]) -> str:
    """As the pipeline decodes them: without the padding and the unknown word."""
    return " ".join(f"w{token}" for token in tokens if token not in (0, 60))


def expected(model: SoftPromptModel, family: str, text: list[int], name: str | None) -> str:
    prompt = None if name is None else model.get_prompt(name)
    tokens = Oracle(family).greedy(torch.tensor(text, dtype=torch.long), prompt, 5)
    return words(tokens)


OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}


@FAMILIES
def test_one_text_with_the_active_prompt(family: str) -> None:
    model = make_model(family)
    pipeline = make_pipeline(model)
    for name in ("a", "b", None):
        model.set_prompt(name)
        assert pipeline("w3 w4 w5", **OPTIONS) == [{"generated_text": expected(model, family, [3, 4, 5], name)}]


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_with_a_prompt_by_name(family: str, side: str) -> None:
    model = make_model(family)
    found = make_pipeline(model, side)(["w3 w4 w5", "w7"], batch_size=2, prompt="b", **OPTIONS)
    texts = [expected(model, family, [3, 4, 5], "b"), expected(model, family, [7], "b")]
    assert found == [[{"generated_text": text}] for text in texts]


def test_a_prompt_a_row() -> None:
    model = make_model()
    found = make_pipeline(model)(["w3 w4 w5", "w7"], batch_size=2, prompt=["b", None], **OPTIONS)
    texts = [expected(model, "llama", [3, 4, 5], "b"), expected(model, "llama", [7], None)]
    assert found == [[{"generated_text": text}] for text in texts]


def test_several_sequences_and_beams() -> None:
    model = make_model()
    pipeline = make_pipeline(model)
    found = pipeline("w3 w4", num_beams=3, num_return_sequences=2, **OPTIONS)
    beams = model.generate(torch.tensor([[3, 4]]), num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert [each["generated_text"] for each in found] == [words(beam) for beam in beams[:, 2:].tolist()]


def test_no_text_at_all() -> None:
    """The prompt alone: the pipeline passes no input ids."""
    model = make_model()
    assert make_pipeline(model)("", **OPTIONS) == [{"generated_text": expected(model, "llama", [], "a")}]


def test_the_pipeline_moves_the_model_as_one() -> None:
    model = make_model()
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=make_tokenizer(), device="cpu")
    assert pipeline.model is model and pipeline.device.type == "cpu"
    assert pipeline("w3 w4 w5", **OPTIONS) == [{"generated_text": expected(model, "llama", [3, 4, 5], "a")}]
