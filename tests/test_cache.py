# SPDX-License-Identifier: Apache-2.0
"""The cache of own tokens: its layers, and continuing from one that a call returned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, Oracle, assert_same_logits, make_base, make_model, make_prompt, make_rows, pad_rows
from torch import Tensor
from transformers import DynamicCache, StaticCache

from softprompt_fast import SoftPromptModel
from softprompt_fast.cache import GrowingLayer, OwnTokenCache, adopt, drop_first_token, make_static_cache
from tests.device import cpu_only

ROWS = make_rows([4, 7, 1])
NAMES = ["a", None, "b"]
EMPTY = torch.zeros(0, dtype=torch.long)
SHARING = [family for family in FAMILIES if family != "bloom"]


@pytest.fixture(scope="module")
def model() -> SoftPromptModel:
    """Prompts "a" and "b" on llama. Tests must not change it."""
    return make_model()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def greedy(model: SoftPromptModel, oracle: Oracle, row: Tensor, name: str | None, new: int) -> list[int]:
    return oracle.greedy(row, None if name is None else model.get_prompt(name), new)


def grown(mask: Tensor, new: int) -> Tensor:
    return torch.cat([mask, torch.ones(len(mask), new, dtype=mask.dtype)], dim=1)


# ---- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[1] * 40, [33, 1, 64, 1], [5, 40], [100]], ids=str)
def test_a_growing_layer_is_a_concatenation(steps: list[int]) -> None:
    layer, keys, values = GrowingLayer(), [], []
    for step in steps:
        keys.append(torch.randn(2, 3, step, 4))
        values.append(torch.randn(2, 3, step, 5))  # a value dimension of its own
        found = layer.update(keys[-1], values[-1])
        assert torch.equal(found[0], torch.cat(keys, dim=2)) and torch.equal(found[1], torch.cat(values, dim=2))
    assert layer.get_seq_length() == sum(steps)
    assert torch.equal(layer.keys, found[0]) and torch.equal(layer.values, found[1])


def test_growing_copies_seldom() -> None:
    layer, buffers = GrowingLayer(), set()
    for _ in range(1000):
        layer.update(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2))
        buffers.add(layer.keys.data_ptr())
    assert len(buffers) <= 7  # 32, 64, ... 1024


def test_crop_reorder_select_repeat_and_reset() -> None:
    keys, values = torch.randn(3, 2, 6, 4), torch.randn(3, 2, 6, 4)
    layer = GrowingLayer()
    layer.update(keys, values)
    layer.crop(-2)
    assert layer.get_seq_length() == 4 and torch.equal(layer.keys, keys[:, :, :4])
    layer.crop(0)
    assert layer.get_seq_length() == 4
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.keys, keys[[2, 0, 0], :, :4]) and torch.equal(layer.values, values[[2, 0, 0], :, :4])
    layer.batch_select_indices(torch.tensor([1, 2]))
    assert torch.equal(layer.keys, keys[[0, 0], :, :4])
    layer.batch_repeat_interleave(2)
    assert layer.keys.shape[0] == layer.values.shape[0] == 4 and layer.get_seq_length() == 4
    more = torch.randn(4, 2, 1, 4)
    assert torch.equal(layer.update(more, more)[0], torch.cat([keys[[0, 0, 0, 0], :, :4], more], dim=2))
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None
    assert torch.equal(layer.update(keys, values)[0], keys)


def test_recording_gradients_concatenates() -> None:
    layer = GrowingLayer()
    parts = [torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3)]
    for part in parts:
        keys, _ = layer.update(part, part)
    keys.square().sum().backward()
    for part in parts:
        torch.testing.assert_close(part.grad, 2 * part.detach())


@pytest.mark.parametrize(
    "make", [lambda: OwnTokenCache(1), lambda: make_static_cache(1, 8)], ids=["growing", "static"]
)
def test_drop_first_token(make: Any) -> None:
    cache, keys, values = make(), torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3)
    cache.update(keys, values, 0)
    drop_first_token(cache)
    assert cache.get_seq_length() == 3
    more = torch.randn(2, 2, 1, 3)
    found = cache.update(more, more, 0)
    for whole, part in zip(found, (keys, values), strict=True):
        assert torch.equal(whole[:, :, :4], torch.cat([part[:, :, 1:], more], dim=2))


# ---- adopting a caller's cache --------------------------------------------------------------------------------------


def test_adopt_keeps_its_own_and_fills_empty_ones(model: SoftPromptModel) -> None:
    ours = OwnTokenCache(2)
    assert adopt(ours, 2) is ours
    for empty in (DynamicCache(), DynamicCache(config=make_model("gemma2").config)):
        assert adopt(empty, 2) is empty and [type(layer) for layer in empty.layers] == [GrowingLayer] * 2


@pytest.mark.parametrize("family", SHARING)
def test_transformers_own_caches_serve(family: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    ids, mask = pad_rows(ROWS, "left")
    expected = [greedy(model, oracle, row, name, 9) for row, name in zip(ROWS, NAMES, strict=True)]
    config = model.config
    for cache in (DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=32)):
        found = model.generate(ids, attention_mask=mask, prompt=NAMES, past_key_values=cache, max_new_tokens=9)
        assert found[:, 7:].tolist() == expected


def test_caches_that_lose_positions_are_refused(model: SoftPromptModel) -> None:
    filled = DynamicCache()
    for layer in range(2):
        filled.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), layer)
    with pytest.raises(ValueError, match="past_key_values: the cache holds tokens that did not come from this model"):
        model(ROWS[1][None], past_key_values=filled)
    with pytest.raises(TypeError, match="past_key_values: expected a transformers Cache, found list"):
        model.generate(ROWS[1][None], past_key_values=[], max_new_tokens=2)
    with pytest.raises(ValueError, match="found DynamicCache with offloading"):
        model(ROWS[1][None], past_key_values=DynamicCache(config=model.config, offloading=True))


# ---- continuing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("given", ["whole", "new"])
def test_two_calls_are_one_long_call(family: str, cache: str, given: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    ids, mask = pad_rows(ROWS, "left")
    past = make_static_cache(2, 40) if cache == "static" else None
    first = model.generate(
        ids, attention_mask=mask, prompt=NAMES, past_key_values=past, max_new_tokens=4, return_dict_in_generate=True
    )
    # The last token was sampled but not run: it is what a caller who passes only new tokens passes.
    new = first.sequences if given == "whole" else first.sequences[:, -1:]
    found = model.generate(
        new,
        attention_mask=grown(mask, 4),
        prompt=NAMES,
        past_key_values=first.past_key_values,
        max_new_tokens=5,
    )
    expected = [greedy(model, oracle, row, name, 9) for row, name in zip(ROWS, NAMES, strict=True)]
    assert found[:, new.shape[1] :].tolist() == [tokens[4:] for tokens in expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_continuing_without_repeating_the_mask(side: str, model: SoftPromptModel, oracle: Oracle) -> None:
    ids, mask = pad_rows(ROWS, side)
    first = model.generate(ids, attention_mask=mask, prompt=NAMES, max_new_tokens=4, return_dict_in_generate=True)
    found = model.generate(first.sequences, prompt=NAMES, past_key_values=first.past_key_values, max_new_tokens=5)
    expected = [greedy(model, oracle, row, name, 9) for row, name in zip(ROWS, NAMES, strict=True)]
    assert found[:, 11:].tolist() == [tokens[4:] for tokens in expected]


@pytest.mark.parametrize("family", SHARING)
def test_a_second_turn_with_more_text(family: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    first = model.generate(ROWS[1][None], prompt="a", max_new_tokens=4, return_dict_in_generate=True)
    text = torch.cat([first.sequences[0], torch.tensor([9, 8, 7])])
    cache = first.past_key_values
    branch = copy.deepcopy(cache)
    for past in (cache, branch):
        found = model.generate(text[None], prompt="a", past_key_values=past, max_new_tokens=5)
        assert found[0, 14:].tolist() == greedy(model, oracle, text, "a", 5)
    beams = {"num_beams": 3, "max_new_tokens": 5}
    branch = model(text[None, :-1], prompt="a", use_cache=True).past_key_values
    with torch.no_grad():
        branch.batch_repeat_interleave(3)
        found = model.generate(text[None], prompt="a", past_key_values=branch, **beams)
    assert torch.equal(found[:, 14:], oracle.generate(text, model.get_prompt("a"), **beams))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_continuing_what_began_from_the_prompt_alone(cache: str, model: SoftPromptModel, oracle: Oracle) -> None:
    none = torch.zeros(2, 0, dtype=torch.long)
    past = make_static_cache(2, 20) if cache == "static" else None
    first = model.generate(
        none, prompt=["a", "b"], past_key_values=past, max_new_tokens=4, return_dict_in_generate=True
    )
    assert first.past_key_values.get_seq_length() == 3
    found = model.generate(first.sequences, prompt=["a", "b"], past_key_values=first.past_key_values, max_new_tokens=5)
    assert found.tolist() == [greedy(model, oracle, EMPTY, name, 9) for name in ("a", "b")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["a", None])
def test_forward_step_by_step(family: str, name: str | None) -> None:
    model, oracle = make_model(family), Oracle(family)
    expected = oracle.logits(ROWS[1], None if name is None else model.get_prompt(name))[-7:]
    pieces, cache = [], None
    for piece in ROWS[1].split([3, 1, 1, 2]):
        out = model(piece[None], prompt=name, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits[0])
    assert_same_logits(torch.cat(pieces), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_forward_step_by_step_with_left_padding(masked: bool, model: SoftPromptModel, oracle: Oracle) -> None:
    ids, mask = pad_rows(ROWS, "left")
    cache = model(ids, attention_mask=mask, prompt=NAMES, use_cache=True).past_key_values
    new = torch.tensor([[5, 1], [6, 2], [7, 3]])
    step = {"attention_mask": grown(mask, 2)} if masked else {}
    logits = model(new, prompt=NAMES, past_key_values=cache, **step).logits
    for i, (row, name) in enumerate(zip(ROWS, NAMES, strict=True)):
        expected = oracle.logits(torch.cat([row, new[i]]), None if name is None else model.get_prompt(name))
        assert_same_logits(logits[i], expected[-2:])


def test_a_static_cache_in_forward(model: SoftPromptModel, oracle: Oracle) -> None:
    ids, mask = pad_rows([ROWS[0], EMPTY], "left")
    cache = make_static_cache(2, 12)
    logits = model(ids, attention_mask=mask, prompt=["a", "b"], past_key_values=cache).logits
    assert_same_logits(logits[0], oracle.logits(ROWS[0], model.get_prompt("a"))[5:])
    assert_same_logits(logits[1, -1], oracle.logits(EMPTY, model.get_prompt("b"))[-1])
    cache.reset()
    again = model(ids, attention_mask=mask, prompt=["b", "b"], past_key_values=cache).logits
    assert_same_logits(again[0], oracle.logits(ROWS[0], model.get_prompt("b"))[9:])


def test_an_empty_cache_may_be_handed_to_the_expanded_path() -> None:
    model, oracle = make_model("bloom"), Oracle("bloom")
    out = model(ROWS[1][None], prompt="a", past_key_values=DynamicCache(), use_cache=True)
    assert_same_logits(out.logits[0], oracle.logits(ROWS[1], model.get_prompt("a"))[5:])
    mask = torch.ones(1, 8, dtype=torch.long)
    out = model(torch.tensor([[3]]), attention_mask=mask, prompt="a", past_key_values=out.past_key_values)
    row = torch.cat([ROWS[1], torch.tensor([3])])
    assert_same_logits(out.logits[0], oracle.logits(row, model.get_prompt("a"))[-1:])


# ---- caches that don't fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_from_another_prompt_is_refused(family: str) -> None:
    model = make_model(family)
    cache = model(ROWS[1][None], prompt="a", use_cache=True).past_key_values
    for other in ("b", None):
        with pytest.raises(
            ValueError, match=f"past_key_values: .*prompt 'a', but row 0 now asks for {other and repr(other)}"
        ):
            model(torch.tensor([[3]]), prompt=other, past_key_values=cache)
    model(torch.tensor([[3]]), prompt="a", past_key_values=cache)  # and is still good


def test_a_cache_from_another_prompt_is_refused_in_generate(model: SoftPromptModel) -> None:
    ids, mask = pad_rows(ROWS, "left")
    first = model.generate(ids, attention_mask=mask, prompt=NAMES, max_new_tokens=2, return_dict_in_generate=True)
    for names, found in ((["a", "a", "b"], "row 1 now asks for 'a'"), (["a", None, None], "row 2 now asks for None")):
        with pytest.raises(ValueError, match=f"past_key_values: .*{found}"):
            model.generate(
                first.sequences,
                attention_mask=grown(mask, 2),
                prompt=names,
                past_key_values=first.past_key_values,
                max_new_tokens=2,
            )


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_cache_of_an_older_version_is_refused(family: str) -> None:
    model = make_model(family)
    cache = model(ROWS[1][None], prompt="a", use_cache=True).past_key_values
    with torch.no_grad():
        model.get_prompt("a").embedding.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"past_key_values: .*an earlier version of prompt 'a'"):
        model(torch.tensor([[3]]), prompt="a", past_key_values=cache)


def test_a_cache_of_another_task_is_refused() -> None:
    model = make_model(prompts={"t": make_prompt(make_base(), "MULTITASK_PROMPT_TUNING")})
    cache = model(ROWS[1][None], task_ids=[1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values: .*task"):
        model(torch.tensor([[3]]), task_ids=[2], past_key_values=cache)


def test_a_cache_of_another_model_is_refused(model: SoftPromptModel) -> None:
    """Same names, same order of loading, same shapes."""
    cache = model(ROWS[1][None], prompt="a", use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values: .*prompt 'a'"):
        make_model()(torch.tensor([[3]]), prompt="a", past_key_values=cache)


@pytest.mark.parametrize("prompt", [["a", "b", None], "a"])
def test_a_cache_of_another_batch_is_refused(prompt: Any, model: SoftPromptModel) -> None:
    cache = model(torch.ones(3, 2, dtype=torch.long), prompt=prompt, use_cache=True).past_key_values
    for rows in (1, 2):
        names = prompt[:rows] if isinstance(prompt, list) else prompt
        with pytest.raises(ValueError, match=f"past_key_values: expected a cache of {rows} rows.*found one of 3"):
            model(torch.ones(rows, 1, dtype=torch.long), prompt=names, past_key_values=cache)


def test_right_padding_is_not_continued(model: SoftPromptModel) -> None:
    ids, mask = pad_rows(ROWS, "right")
    cache = model(ids, attention_mask=mask, prompt=NAMES, use_cache=True).past_key_values
    new = torch.tensor([[5], [6], [7]])
    with pytest.raises(ValueError, match=r"past_key_values: .*padded on the right.*pad on the left"):
        model(new, prompt=NAMES, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask: row 0 has masked positions between its tokens"):
        model(new, attention_mask=grown(mask, 1), prompt=NAMES, past_key_values=cache)


def test_another_left_padding_is_refused(model: SoftPromptModel) -> None:
    ids, mask = pad_rows(ROWS, "left")
    cache = model(ids, attention_mask=mask, prompt=NAMES, use_cache=True).past_key_values
    shifted = grown(mask, 1)
    shifted[1, 0] = 0
    with pytest.raises(
        ValueError, match="attention_mask: its left padding is not that of the tokens in past_key_values"
    ):
        model(torch.tensor([[5], [6], [7]]), attention_mask=shifted, prompt=NAMES, past_key_values=cache)


def test_text_that_is_all_cached_is_refused(model: SoftPromptModel) -> None:
    cache = model(ROWS[1][None], prompt="a", use_cache=True).past_key_values
    for ids in (ROWS[1][None], ROWS[1][None, :3], EMPTY[None]):
        with pytest.raises(
            ValueError, match=f"input_ids: expected the whole text, longer than the 7.*found {ids.shape[1]} "
        ):
            model.generate(ids, prompt="a", past_key_values=cache, max_new_tokens=2)


@cpu_only
def test_a_full_static_cache_says_so(model: SoftPromptModel) -> None:
    cache = make_static_cache(2, 8)
    model(ROWS[1][None], prompt="a", past_key_values=cache)
    with pytest.raises(
        ValueError, match="past_key_values: a static cache of max_cache_len=8 can't hold 7 cached and 2"
    ):
        model(torch.tensor([[3, 4]]), prompt="a", past_key_values=cache)
