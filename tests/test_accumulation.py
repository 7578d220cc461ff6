# SPDX-License-Identifier: Apache-2.0
"""Micro-batches that share one run of the prompt: the gradient of plain accumulation, one forward and one backward."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from softprompt_fast import SoftPrompt, SoftPromptModel
from tests.models import make_base, make_prompt, make_rows, pad_rows, relative_error

METHODS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE")
LENGTHS = ([4, 7], [5, 5], [1, 6])


class Counter:
    """How often the prompts' own runs went forward, and backward."""

    def __init__(self, model: SoftPromptModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward = self.backward = 0
        compile_prompt = model._compiler.run

        def count(_: Tensor) -> None:
            self.backward += 1

        def counted(prompt: SoftPrompt, *args: object, **kwargs: object) -> object:
            result = compile_prompt(prompt, *args, **kwargs)
            if result[0].keys[0].requires_grad:
                self.forward += 1
                result[0].keys[0].register_hook(count)
            return result

        monkeypatch.setattr(model._compiler, "run", counted)

    def __call__(self) -> tuple[int, int]:
        return self.forward, self.backward


def make_trained(method: str = "PROMPT_TUNING", family: str = "llama") -> tuple[SoftPromptModel, SoftPrompt]:
    base = make_base(family)
    model, prompt = SoftPromptModel(base), make_prompt(base, method)
    model.add_prompt("t", prompt)
    return model.train(), prompt


def micro_batches(method: str = "") -> list[dict[str, Tensor]]:
    batches = []
    for seed, lengths in enumerate(LENGTHS):
        ids, mask = pad_rows(make_rows(lengths, seed), "left" if seed % 2 else "right")
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
        if method == "MULTITASK_PROMPT_TUNING":
            batches[-1]["task_ids"] = torch.tensor([seed % 3, 1])
    return batches


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def plain(model: SoftPromptModel, prompt: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return gradients(prompt)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= 1e-6, name


@contextlib.contextmanager
def announcing(model: SoftPromptModel) -> Iterator[Callable[[bool], None]]:
    """A training loop that says whether more micro-batches follow."""
    more = False

    def announce(follow: bool) -> None:
        nonlocal more
        more = follow

    original, model._accumulation.more_follow = model._accumulation.more_follow, lambda: more
    yield announce
    model._accumulation.more_follow = original


@pytest.mark.parametrize("method", METHODS)
def test_the_context_manager(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make_trained(method)
    batches = micro_batches(method)
    expected = plain(model, prompt, batches)
    runs = Counter(model, monkeypatch)
    with model.accumulate_gradients():
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        assert runs.backward == 0
    assert_equal(gradients(prompt), expected)
    # Tasks that no earlier micro-batch had are run when they come.
    assert runs() == ((2, 2) if method == "MULTITASK_PROMPT_TUNING" else (1, 1))


@pytest.mark.parametrize("method", METHODS)
def test_the_last_micro_batch_carries_all_gradients(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make_trained(method)
    batches = micro_batches(method)
    expected = plain(model, prompt, batches)
    runs = Counter(model, monkeypatch)
    with announcing(model) as announce:
        for i, batch in enumerate(batches):
            announce(i < len(batches) - 1)
            (model(**batch).loss / len(batches)).backward()
    assert_equal(gradients(prompt), expected)
    assert runs() == ((2, 2) if method == "MULTITASK_PROMPT_TUNING" else (1, 1))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom"])
def test_other_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make_trained(family=family)
    expected = plain(model, prompt, micro_batches())
    runs = Counter(model, monkeypatch)
    with model.accumulate_gradients():
        for batch in micro_batches():
            (model(**batch).loss / len(LENGTHS)).backward()
    assert_equal(gradients(prompt), expected)
    assert runs() == (1, 1)


def test_prompts_that_change_from_micro_batch_to_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    model = SoftPromptModel(base).train()
    for seed, name in enumerate("abc"):
        model.add_prompt(name, make_prompt(base, length=4 + seed, seed=seed))
    batches = [
        batch | {"prompt": names} for batch, names in zip(micro_batches(), (["a", "b"], "c", ["b", None]), strict=True)
    ]
    expected = plain(model, model.prompts, batches)
    runs = Counter(model, monkeypatch)
    with announcing(model) as announce:
        for i, batch in enumerate(batches):
            announce(i < 2)
            (model(**batch).loss / 3).backward()
    assert_equal(gradients(model.prompts), expected)
    assert runs() == (3, 3)


def test_steps_follow_each_other() -> None:
    """Three optimizer steps: no run outlives the version of the prompt it was made of."""
    prompts = []
    for shared in (False, True):
        model, prompt = make_trained()
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1, fused=True)
        with announcing(model) as announce:
            for _ in range(3):
                for i, batch in enumerate(micro_batches()):
                    announce(shared and i < 2)
                    model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        prompts.append(prompt.embedding.weight)
    assert relative_error(prompts[1], prompts[0]) <= 1e-5


def test_gradients_are_added_to_those_that_are_there() -> None:
    model, prompt = make_trained()
    first, *rest = micro_batches()
    expected = plain(model, prompt, [first, *rest])
    (model(**first).loss / 3).backward()
    with model.accumulate_gradients():
        for batch in rest:
            (model(**batch).loss / 3).backward()
    assert_equal(gradients(prompt), expected)


def test_an_exception_drops_the_gradients() -> None:
    model, prompt = make_trained()
    expected = plain(model, prompt, micro_batches())
    with pytest.raises(KeyboardInterrupt), model.accumulate_gradients():
        model(**micro_batches()[0]).loss.backward()
        raise KeyboardInterrupt
    model.zero_grad()
    assert_equal(plain(model, prompt, micro_batches()), expected)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_reaches_what_is_parked(set_to_none: bool) -> None:
    model, prompt = make_trained()
    batches = micro_batches()
    expected = plain(model, prompt, batches)
    optimizer = SGD(prompt.parameters(), lr=0.1)
    with announcing(model) as announce:
        announce(True)
        model(**batches[0]).loss.backward()
        optimizer.zero_grad(set_to_none=set_to_none)  # a step given up
        for i, batch in enumerate(batches):
            announce(i < 2)
            (model(**batch).loss / 3).backward()
    assert_equal(gradients(prompt), expected)


def test_a_step_before_the_last_micro_batch_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, prompt = make_trained()
    batches = micro_batches()
    expected = plain(model, prompt, batches[:2])
    before = prompt.embedding.weight.detach().clone()
    optimizer = SGD(prompt.parameters(), lr=0.5)
    with announcing(model) as announce, caplog.at_level(logging.WARNING, "softprompt_fast"):
        announce(True)
        for batch in batches[:2]:
            (model(**batch).loss / 2).backward()
        optimizer.step()
        assert "before the last micro-batch" in caplog.text
        moved = (before - prompt.embedding.weight.detach()) / 0.5
        assert relative_error(moved, expected["embedding.weight"]) <= 1e-5
        optimizer.zero_grad()
        announce(False)
        expected = plain(model, prompt, batches)
        for i, batch in enumerate(batches):
            announce(i < 2)
            (model(**batch).loss / 3).backward()
    assert_equal(gradients(prompt), expected)


def test_another_optimizers_step_in_between() -> None:
    """It changes the prompt's version and nothing else: what is parked has to reach the prompt all the same."""
    model, prompt = make_trained()
    expected = plain(model, prompt, micro_batches())
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    with model.accumulate_gradients():
        for batch in micro_batches():
            (model(**batch).loss / 3).backward()
            SGD([other], lr=0.1).step()
    assert_equal(gradients(prompt), expected)


def test_evaluation_inside_shares_nothing() -> None:
    model, prompt = make_trained()
    batches = micro_batches()
    expected = plain(model, prompt, batches)
    with model.accumulate_gradients():
        for batch in batches:
            with torch.no_grad():
                evaluated = model.eval()(**batch).loss
                assert not evaluated.requires_grad
            loss = model.train()(**batch).loss
            assert loss.item() == pytest.approx(evaluated.item(), rel=1e-5)
            (loss / 3).backward()
    assert_equal(gradients(prompt), expected)


def test_a_late_backward_is_refused() -> None:
    """Its gradient could reach the prompt no more."""
    model, _ = make_trained()
    first, second, _ = micro_batches()
    with model.accumulate_gradients():
        late = model(**first).loss
        model(**second).loss.backward()
    with pytest.raises(RuntimeError, match="has run already"):
        late.backward()
    with model.accumulate_gradients():
        alone = model(**first).loss
    with pytest.raises(RuntimeError, match="has run already"):
        alone.backward()


@pytest.mark.parametrize("way", ["block", "announced", "exception"])
def test_nothing_outlives_its_step(way: str) -> None:
    """Neither graphs nor keys and values wait for the garbage collector."""
    model, _ = make_trained()
    leaves: list[weakref.ref[Tensor]] = []
    first, second, _ = micro_batches()
    select = model._select

    def spied(*args: object, **kwargs: object) -> object:
        selected = select(*args, **kwargs)
        leaves.extend(map(weakref.ref, selected.packed.keys))
        return selected

    model._select = spied
    gc.collect()
    gc.disable()
    try:
        window = model.accumulate_gradients() if way != "announced" else contextlib.nullcontext()
        with announcing(model) as announce, contextlib.suppress(KeyError), window:
            announce(way == "announced")
            model(**first).loss.backward()
            announce(False)
            if way == "exception":
                raise KeyError
            model(**second).loss.backward()
        assert leaves and not any(leaf() is not None for leaf in leaves)
    finally:
        gc.enable()


def test_a_forward_pass_without_a_backward_changes_nothing() -> None:
    model, prompt = make_trained()
    with model.accumulate_gradients():
        model(**micro_batches()[0])
    assert all(p.grad is None for p in prompt.parameters())


def test_losses_summed_before_one_backward() -> None:
    model, prompt = make_trained()
    expected = plain(model, prompt, micro_batches())
    with model.accumulate_gradients():
        (sum(model(**batch).loss for batch in micro_batches()) / 3).backward()
    assert_equal(gradients(prompt), expected)


def test_a_kept_graph_twice() -> None:
    """retain_graph: the last micro-batch's own gradient counts twice, as it does in plain accumulation."""
    model, prompt = make_trained()
    first, last, _ = micro_batches()
    expected = plain(model, prompt, [first, last, last])
    with announcing(model) as announce:
        announce(True)
        (model(**first).loss / 3).backward()
        announce(False)
        loss = model(**last).loss / 3
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal(gradients(prompt), expected)


def test_checkpointing() -> None:
    model, prompt = make_trained()
    expected = plain(model, prompt, micro_batches())
    model.base.activation_checkpointing_enable()
    with model.accumulate_gradients():
        for batch in micro_batches():
            (model(**batch).loss / 3).backward()
    assert_equal(gradients(prompt), expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_step_given_up_leaves_nothing_behind(mode: str) -> None:
    """The last micro-batch's loss is thrown away (NaN, say), gradients are zeroed, and the loop goes on."""
    model, prompt = make_trained()
    batches = micro_batches()
    expected = plain(model, prompt, batches)
    optimizer = SGD(prompt.parameters(), lr=0.0)
    with announcing(model) as announce:
        announce(True)
        model(**batches[0]).loss.backward()
        announce(False)
        if mode == "train":
            model(**batches[1])
        optimizer.zero_grad()
        model.train(mode == "train")
        for i, batch in enumerate(batches):
            announce(i < 2)
            (model(**batch).loss / 3).backward()
    optimizer.step()
    assert_equal(gradients(prompt), expected)


@pytest.mark.parametrize("zeros_before", [True, False])
def test_gradients_scaled_in_between_are_not_taken_for_zeroed_ones(zeros_before: bool) -> None:
    model, prompt = make_trained("P_TUNING")
    expected = plain(model, prompt, micro_batches())
    if zeros_before:
        for parameter in prompt.parameters():
            parameter.grad = torch.zeros_like(parameter)
    with model.accumulate_gradients():
        for batch in micro_batches():
            (model(**batch).loss / 3).backward()
            nn.utils.clip_grad_norm_(prompt.parameters(), 1.0)
    assert_equal(gradients(prompt), expected)


@pytest.mark.parametrize("frozen_prompt", [True, False])
def test_a_base_that_is_trained_as_well(frozen_prompt: bool) -> None:
    base = make_base().requires_grad_(True)
    model, prompt = SoftPromptModel(base, freeze_base=False).train(), make_prompt(base)
    model.add_prompt("t", prompt.requires_grad_(not frozen_prompt))
    expected = plain(model, model, micro_batches())
    with model.accumulate_gradients():
        for batch in micro_batches():
            (model(**batch).loss / 3).backward()
    found = gradients(model)
    # The embeddings of tokens that no row holds, and so on, have gradients of zero.
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_step_of_the_base_in_between() -> None:
    """The prompts' backward runs before it, with the weights that their forward ran with."""

    def train(accumulates: bool) -> list[Tensor]:
        base = make_base().requires_grad_(True)
        model = SoftPromptModel(base, freeze_base=False).train()
        model.add_prompt("t", make_prompt(base))
        optimizer = SGD(base.parameters(), lr=0.1)
        with model.accumulate_gradients() if accumulates else contextlib.nullcontext():
            for batch in micro_batches():
                model(**batch).loss.backward()
                optimizer.step()
        return [p.detach() for p in model.parameters()]

    for found, expected in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_step_of_a_prompt_that_the_next_micro_batch_does_not_use() -> None:
    """Its run, whose weights have changed, is no part of that micro-batch's graph."""
    model, first = make_trained("MULTITASK_PROMPT_TUNING")
    second = make_prompt(model.base, seed=2)
    model.add_prompt("second", second)
    batch, tasks = micro_batches()[0], torch.tensor([0, 1])
    with announcing(model) as announce:
        announce(True)
        model(**batch, prompt="t", task_ids=tasks)  # its loss is given up
        for parameter in first.parameters():
            parameter.grad = torch.ones_like(parameter)
        SGD(first.parameters(), lr=0.1).step()
        announce(False)
        model(**batch, prompt="second").loss.backward()
    found = gradients(second)
    assert_equal(found, plain(model, second, [batch | {"prompt": "second"}]))
