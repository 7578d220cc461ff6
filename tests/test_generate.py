# SPDX-License-Identifier: Apache-2.0
"""generate: every decoding option, against plain loops and against transformers' own generate on rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, VOCAB_SIZE, Oracle, make_model, make_prompt, make_rows, pad_rows
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from softprompt_fast import SoftPromptModel

ROWS = make_rows([4, 7, 1])
NAMES = ["a", None, "b"]
EMPTY = torch.zeros(0, dtype=torch.long)
NEW = 6
#: How a step finds the tokens before it.
CACHES: dict[str, dict[str, Any]] = {
    "growing": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}


@pytest.fixture(scope="module", params=[None, "torch"], ids=["auto", "torch"])
def model(request: pytest.FixtureRequest) -> SoftPromptModel:
    """Prompts "a" and "b" on llama. Tests must not change it.

    A single row may copy its prefix where that is faster, unless a backend is asked for: both ways are tested.
    """
    return make_model(backend=request.param)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def prompt_of(model: SoftPromptModel, name: str | None) -> Any:
    return None if name is None else model.get_prompt(name)


def greedy(model: SoftPromptModel, oracle: Oracle, row: Tensor, name: str | None, new: int = NEW) -> list[int]:
    return oracle.greedy(row, prompt_of(model, name), new)


# ---- greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", CACHES)
def test_greedy_with_a_prompt_a_row(family: str, side: str, cache: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    ids, mask = pad_rows(ROWS, side)
    found = model.generate(ids, attention_mask=mask, prompt=NAMES, max_new_tokens=NEW, **CACHES[cache])
    assert torch.equal(found[:, :7], ids)
    expected = [greedy(model, oracle, row, name) for row, name in zip(ROWS, NAMES, strict=True)]
    assert found[:, 7:].tolist() == expected


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "CARTRIDGE", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"])
def test_greedy_with_every_method(method: str, oracle: Oracle) -> None:
    prompt = make_prompt(oracle.base, method)
    model = make_model(prompts={"p": prompt})
    tasks = [2, 0, 1] if method == "MULTITASK_PROMPT_TUNING" else None
    ids, mask = pad_rows(ROWS, "left")
    found = model.generate(ids, attention_mask=mask, task_ids=tasks, max_new_tokens=NEW)[:, 7:]
    for i, row in enumerate(ROWS):
        assert found[i].tolist() == oracle.greedy(row, prompt, NEW, None if tasks is None else tasks[i])


def test_one_prompt_for_the_batch_and_the_active_one(model: SoftPromptModel, oracle: Oracle) -> None:
    ids, mask = pad_rows(ROWS, "left")
    expected = [greedy(model, oracle, row, "a") for row in ROWS]
    for kwargs in ({"prompt": "a"}, {"prompt": ("a", "a", "a")}, {}):
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, **kwargs)
        assert found[:, 7:].tolist() == expected


def test_own_tokens_may_equal_the_pad_token(model: SoftPromptModel, oracle: Oracle) -> None:
    row = torch.tensor([0, 0, 5, 0])
    assert model.config.pad_token_id == 0
    found = model.generate(row[None], prompt="a", max_new_tokens=NEW)
    assert found[0, 4:].tolist() == greedy(model, oracle, row, "a")


def test_a_boolean_mask(model: SoftPromptModel, oracle: Oracle) -> None:
    ids, mask = pad_rows(ROWS, "left")
    found = model.generate(ids, attention_mask=mask.bool(), prompt="b", max_new_tokens=NEW)
    assert found[:, 7:].tolist() == [greedy(model, oracle, row, "b") for row in ROWS]


def test_inputs_embeds(model: SoftPromptModel, oracle: Oracle) -> None:
    ids, mask = pad_rows(ROWS, "left")
    embeds = model.get_input_embeddings()(ids)
    expected = [greedy(model, oracle, row, name) for row, name in zip(ROWS, NAMES, strict=True)]
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, prompt=NAMES, max_new_tokens=NEW)
    assert found.tolist() == expected
    # With the ids beside them they are what comes back, as in transformers.
    found = model.generate(input_ids=ids, inputs_embeds=embeds, attention_mask=mask, prompt=NAMES, max_new_tokens=NEW)
    assert torch.equal(found[:, :7], ids) and found[:, 7:].tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill(family: str, rows: int, cache: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    found = model.generate(
        ROWS[1].repeat(rows, 1), max_new_tokens=NEW, prefill_chunk_size=3, cache_implementation=cache
    )
    assert found[:, 7:].tolist() == [greedy(model, oracle, ROWS[1], "a")] * rows


def test_a_row_that_ends_early_leaves_its_neighbours_alone(model: SoftPromptModel, oracle: Oracle) -> None:
    ids, mask = pad_rows(ROWS, "left")
    expected = [greedy(model, oracle, row, "a", 12) for row in ROWS]
    eos = expected[0][1]
    found = model.generate(ids, attention_mask=mask, prompt="a", max_new_tokens=12, eos_token_id=eos, pad_token_id=0)
    for row, tokens in zip(found[:, 7:].tolist(), expected, strict=True):
        until = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert row[:until] == tokens[:until] and not any(row[until:])


def test_training_mode_changes_nothing(oracle: Oracle) -> None:
    model = make_model().train()
    ids, mask = pad_rows([ROWS[1], EMPTY], "left")
    found = model.generate(ids, attention_mask=mask, prompt="a", max_new_tokens=NEW)[:, 7:]
    assert found.tolist() == [greedy(model, oracle, row, "a") for row in (ROWS[1], EMPTY)]
    assert model.training and model.base.training


# ---- no own token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_from_the_prompt_alone(family: str, cache: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    expected = {name: greedy(model, oracle, EMPTY, name) for name in ("a", "b")}
    found = model.generate(prompt="b", max_new_tokens=NEW, **CACHES[cache])
    assert found.tolist() == [expected["b"]]
    none = torch.zeros(2, 0, dtype=torch.long)
    found = model.generate(none, prompt=["a", "b"], max_new_tokens=NEW, **CACHES[cache])
    assert found.tolist() == [expected["a"], expected["b"]]


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", CACHES)
def test_rows_without_own_tokens_among_others(family: str, side: str, cache: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    rows, names = [ROWS[0], EMPTY, ROWS[2], EMPTY], ["a", "a", None, "b"]
    ids, mask = pad_rows(rows, side)
    found = model.generate(ids, attention_mask=mask, prompt=names, max_new_tokens=NEW, **CACHES[cache])
    expected = [greedy(model, oracle, row, name) for row, name in zip(rows, names, strict=True)]
    assert found[:, 4:].tolist() == expected
    last = model(ids, attention_mask=mask, prompt=names).logits[:, -1]
    for i in (1, 3):
        assert last[i].argmax().item() == expected[i][0]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_compiled_prefix_knows_what_follows_it(rows: int, model: SoftPromptModel, oracle: Oracle) -> None:
    frozen = make_model(prompts={})
    frozen.add_prompt("k", model.compile_prompt("a"))
    expected = [greedy(model, oracle, EMPTY, "a")] * rows
    none = torch.zeros(rows, 0, dtype=torch.long)
    assert frozen.generate(none, max_new_tokens=NEW).tolist() == expected
    padding = torch.ones(rows, 3, dtype=torch.long)
    found = frozen.generate(padding, attention_mask=torch.zeros_like(padding), max_new_tokens=NEW)
    assert found[:, 3:].tolist() == expected


def test_beams_and_samples_from_the_prompt_alone(model: SoftPromptModel, oracle: Oracle) -> None:
    found = model.generate(
        torch.zeros(2, 0, dtype=torch.long), prompt=["a", "b"], num_beams=3, num_return_sequences=2, max_new_tokens=NEW
    )
    for i, name in enumerate(("a", "b")):
        prompt = model.get_prompt(name)
        expected = oracle.generate(EMPTY, prompt, num_beams=3, num_return_sequences=2, max_new_tokens=NEW)
        assert torch.equal(found[2 * i : 2 * i + 2], expected)
    samples = {"do_sample": True, "top_k": 0, "num_return_sequences": 4, "max_new_tokens": NEW}
    torch.manual_seed(4)
    found = model.generate(prompt="a", **samples)
    torch.manual_seed(4)
    assert torch.equal(found, oracle.generate(EMPTY, model.get_prompt("a"), **samples))


# ---- sampling and beams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 5, "temperature": 0.7},
        {"top_p": 0.8, "num_return_sequences": 3},
        {"num_beams": 2, "top_k": 0},
    ],
    ids=str,
)
def test_sampling_draws_what_transformers_draws(
    options: dict[str, Any], model: SoftPromptModel, oracle: Oracle
) -> None:
    options = {"do_sample": True, "max_new_tokens": 16, **options}
    torch.manual_seed(11)
    found = model.generate(ROWS[1][None], prompt="a", **options)
    torch.manual_seed(11)
    assert torch.equal(found[:, 7:], oracle.generate(ROWS[1], model.get_prompt("a"), **options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("returned", [1, 3])
@pytest.mark.parametrize("cache", CACHES)
def test_beam_search_with_a_prompt_a_row(family: str, side: str, returned: int, cache: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    options = {"num_beams": 3, "num_return_sequences": returned, "max_new_tokens": NEW}
    ids, mask = pad_rows(ROWS, side)
    found = model.generate(ids, attention_mask=mask, prompt=NAMES, **options, **CACHES[cache])
    assert torch.equal(found[:, :7], ids.repeat_interleave(returned, dim=0))
    for i, (row, name) in enumerate(zip(ROWS, NAMES, strict=True)):
        expected = oracle.generate(row, prompt_of(model, name), **options)
        assert torch.equal(found[i * returned : (i + 1) * returned, 7:], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_samples_of_padded_rows_follow_their_own_row(side: str, model: SoftPromptModel, oracle: Oracle) -> None:
    """Which numbers a row draws depends on the batch; what it may draw must not. top_k=2 leaves two tokens a step."""
    ids, mask = pad_rows(ROWS, side)
    found = model.generate(
        ids, attention_mask=mask, prompt=NAMES, do_sample=True, top_k=2, num_return_sequences=4, max_new_tokens=4
    )
    assert torch.equal(found[:, :7], ids.repeat_interleave(4, dim=0))
    distinct = 0
    for i, (row, name) in enumerate(zip(ROWS, NAMES, strict=True)):
        samples = found[4 * i : 4 * i + 4, 7:]
        distinct += len(samples.unique(dim=0))
        for sample in samples:
            logits = oracle.logits(torch.cat([row, sample]), prompt_of(model, name))[-5:-1]
            for token, step in zip(sample.tolist(), logits, strict=True):
                assert token in step.topk(2).indices.tolist()
    assert distinct > 3


def test_beam_search_equals_beam_search_from_a_generation_config(model: SoftPromptModel) -> None:
    options = {"num_beams": 3, "max_new_tokens": NEW}
    by_config = model.generate(ROWS[1][None], prompt="a", generation_config=GenerationConfig(**options))
    assert torch.equal(by_config, model.generate(ROWS[1][None], prompt="a", **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_decoding(family: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    row = torch.tensor([3, 4, 5, 3, 4, 5, 3, 4])
    found = model.generate(row[None], prompt="a", max_new_tokens=14, prompt_lookup_num_tokens=3)
    assert found[0, 8:].tolist() == greedy(model, oracle, row, "a", 14)
    if family == "bloom":
        return  # the expanded path continues no cache
    # Its cache is cropped after every rejected guess, and can be continued.
    first = model.generate(
        row[None], prompt="a", max_new_tokens=7, prompt_lookup_num_tokens=3, return_dict_in_generate=True
    )
    found = model.generate(first.sequences, prompt="a", past_key_values=first.past_key_values, max_new_tokens=7)
    assert found[0, 8:].tolist() == greedy(model, oracle, row, "a", 14)


# ---- hooks ----------------------------------------------------------------------------------------------------------


#: A prefix copied for a single row, shared, and expanded.
MODELS = pytest.mark.parametrize(("family", "backend"), [("llama", None), ("llama", "torch"), ("bloom", None)])


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@MODELS
def test_a_streamer_sees_every_token(family: str, backend: str | None) -> None:
    model, streamer = make_model(family, backend=backend), Recorder()
    found = model.generate(ROWS[1][None], prompt="a", max_new_tokens=NEW, streamer=streamer)
    assert streamer.ended and streamer.tokens == found[0].tolist()


class Forbid(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token, self.widths = token, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.widths.append(input_ids.shape[1])
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


@MODELS
def test_a_logits_processor_is_applied(family: str, backend: str | None) -> None:
    model, oracle = make_model(family, backend=backend), Oracle(family)
    forbid = Forbid(oracle.greedy(ROWS[1], model.get_prompt("a"), 1)[0])
    options = {"logits_processor": LogitsProcessorList([forbid]), "max_new_tokens": NEW}
    found = model.generate(ROWS[1][None], prompt="a", **options)
    assert forbid.widths == list(range(7, 7 + NEW))  # it sees own tokens, none virtual
    assert torch.equal(found[:, 7:], oracle.generate(ROWS[1], model.get_prompt("a"), **options))
    assert forbid.token not in found[0, 7:]


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@MODELS
def test_a_stopping_criterion_stops(family: str, backend: str | None) -> None:
    model = make_model(family, backend=backend)
    stop = StoppingCriteriaList([StopAfter(9)])
    assert model.generate(ROWS[1][None], prompt="a", max_new_tokens=NEW, stopping_criteria=stop).shape == (1, 9)


def test_scores_and_hidden_states_are_returned(model: SoftPromptModel, oracle: Oracle) -> None:
    options = {
        "max_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
        "output_hidden_states": True,
    }
    found = model.generate(ROWS[1][None], prompt="a", **options)
    expected = oracle.generate(ROWS[1], model.get_prompt("a"), **options)
    assert torch.equal(found.sequences[:, 7:], expected.sequences)
    for name in ("logits", "scores"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert [step[-1].shape[1] for step in found.hidden_states] == [7, 1, 1]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_generation_config_is_the_models(family: str, rows: int) -> None:
    model, ids = make_model(family), ROWS[1].repeat(rows, 1)
    model.generation_config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert model.generate(ids, prompt="a").shape == (rows, 10)
    assert model.generate(ids, prompt="a", generation_config=GenerationConfig(max_new_tokens=2)).shape == (rows, 9)
    assert model.generate(ids, prompt="a", max_new_tokens=None, max_length=12).shape == (rows, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_of_whole_sequences(family: str) -> None:
    """A single row and a batch of it take different paths, and see the same tokens."""
    model = make_model(family)
    options = {"max_new_tokens": 8, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    options["eos_token_id"] = model.generate(ROWS[1][None], prompt="a", max_new_tokens=1)[0, -1].item()
    alone = model.generate(ROWS[1][None], prompt="a", **options)
    oracle = Oracle(family)
    tokens = oracle.greedy(ROWS[1], model.get_prompt("a"), 8)
    assert alone[0, 7:].tolist() != tokens[: alone.shape[1] - 7]
    assert torch.equal(model.generate(ROWS[1].repeat(2, 1), prompt="a", **options), alone.repeat(2, 1))


def test_repeated_calls_are_equal(model: SoftPromptModel) -> None:
    ids, mask = pad_rows(ROWS, "left")
    calls = [model.generate(ids, attention_mask=mask, prompt=NAMES, max_new_tokens=NEW) for _ in range(3)]
    assert torch.equal(calls[0], calls[1]) and torch.equal(calls[0], calls[2])
    assert int(calls[0].max()) < VOCAB_SIZE
