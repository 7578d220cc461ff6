# SPDX-License-Identifier: Apache-2.0
"""One model used by several threads at once gives each of them what it gives alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import Oracle, assert_same_logits, make_base, make_model, make_prompt, make_rows, pad_rows
from transformers import PreTrainedConfig, PreTrainedModel

from softprompt_fast import SoftPromptModel
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.serving.engine import Engine
from softprompt_fast.serving.requests import Request, Sampling
from tests.families import FAMILIES, Family

THREADS = 8
ROWS = make_rows([3 + i for i in range(THREADS)])
NEW = 8


def together(work: Callable[[int], Any], indices: Sequence[int] = range(THREADS)) -> list[Any]:
    """``work(i)`` for all `indices`, started at once, each in a thread; the first exception is raised here."""
    start = threading.Barrier(len(indices))
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in indices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[i] for i in indices]


def model_of_many(family: str, backend: str | None = None) -> SoftPromptModel:
    """A prompt of its own length for every thread, none compiled yet."""
    base = make_base(family)
    prompts = {f"p{i}": make_prompt(base, length=3 + i, seed=50 + i) for i in range(THREADS)}
    return make_model(family, prompts, backend=backend)


@pytest.mark.parametrize(
    ("family", "backend"), [("llama", None), ("llama", "torch"), ("gemma2", "torch"), ("bloom", None)]
)
def test_threads_generate_behind_prompts_of_their_own(family: str, backend: str | None) -> None:
    model, oracle = model_of_many(family, backend), Oracle(family)
    expected = [oracle.greedy(row, model.get_prompt(f"p{i}"), NEW) for i, row in enumerate(ROWS)]

    def work(i: int) -> list[list[int]]:
        calls = [model.generate(ROWS[i][None], prompt=f"p{i}", max_new_tokens=NEW) for _ in range(4)]
        return [call[0, len(ROWS[i]) :].tolist() for call in calls]

    for found, tokens in zip(together(work), expected, strict=True):
        assert found == [tokens] * 4


def test_threads_with_batches_of_mixed_prompts() -> None:
    model, oracle = model_of_many("llama"), Oracle()
    rows = ROWS[:3]
    batch = [pad_rows(rows, "left"), pad_rows(rows, "right")]
    names = [[f"p{(i + k) % THREADS}" if k else None for k in range(3)] for i in range(THREADS)]

    def work(i: int) -> list[list[int]]:
        ids, mask = batch[i % 2]
        found = model.generate(ids, attention_mask=mask, prompt=names[i], max_new_tokens=NEW)
        return found[:, ids.shape[1] :].tolist()

    for i, found in enumerate(together(work)):
        for row, name, tokens in zip(rows, names[i], found, strict=True):
            assert tokens == oracle.greedy(row, None if name is None else model.get_prompt(name), NEW)


def test_a_thread_trains_while_others_generate() -> None:
    model, oracle = model_of_many("llama"), Oracle()
    prompt = make_prompt(model.base, seed=99)
    model.add_prompt("training", prompt)
    expected = [oracle.greedy(row, model.get_prompt(f"p{i}"), NEW) for i, row in enumerate(ROWS)]
    alone = make_prompt(model.base, seed=99)
    plain = make_model(prompts={})
    plain.add_prompt("training", alone)

    def train(model: SoftPromptModel, weights: torch.nn.Parameter) -> None:
        optimizer = torch.optim.AdamW([weights], lr=0.1)
        for row in ROWS[:6]:
            optimizer.zero_grad()
            model(row[None], labels=row[None], prompt="training").loss.backward()
            optimizer.step()

    def work(i: int) -> list[int] | None:
        if i == 0:
            return train(model, prompt.embedding.weight)
        return model.generate(ROWS[i][None], prompt=f"p{i}", max_new_tokens=NEW)[0, len(ROWS[i]) :].tolist()

    found = together(work)
    assert found[1:] == expected[1:]
    train(plain, alone.embedding.weight)
    torch.testing.assert_close(prompt.embedding.weight, alone.embedding.weight)


def test_threads_differentiate_one_prompt() -> None:
    """Backward passes of several threads add to one gradient; what must hold is that each had its own forward."""
    model = make_model(prompts={})
    prompt = make_prompt(model.base)
    model.add_prompt("t", prompt)

    def loss_and_gradient(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss = model(ROWS[i][None], labels=ROWS[i][None]).loss
        return loss.detach(), torch.autograd.grad(loss, prompt.embedding.weight)[0]

    expected = [loss_and_gradient(i) for i in range(THREADS)]
    for found, alone in zip(together(loss_and_gradient), expected, strict=True):
        torch.testing.assert_close(found, alone)


def test_prompts_come_and_go_while_others_generate() -> None:
    model, oracle = make_model(), Oracle()
    expected = {name: oracle.greedy(ROWS[4], model.get_prompt(name), NEW) for name in ("a", "b")}
    visitors = [make_prompt(model.base, length=2 + i, seed=70 + i).requires_grad_(False) for i in range(3)]
    visiting = [oracle.greedy(ROWS[4], prompt, NEW) for prompt in visitors]

    def work(i: int) -> None:
        if i < 2:
            for turn in range(6):
                k = turn % 3
                model.add_prompt(f"visitor {i}", visitors[k], replace=turn % 2 == 1)
                found = model.generate(ROWS[4][None], prompt=f"visitor {i}", max_new_tokens=NEW)
                assert found[0, 7:].tolist() == visiting[k]
                if turn % 2 == 1:
                    model.remove_prompt(f"visitor {i}")
        else:
            ids = ROWS[4].expand(2, -1)
            for _ in range(6):
                found = model.generate(ids, prompt=["a", "b"], max_new_tokens=NEW)
                assert found[:, 7:].tolist() == [expected["a"], expected["b"]]

    together(work, range(5))
    assert model.prompt_names == ["a", "b"] and len(model.prompts) == 2


def generate(model: SoftPromptModel) -> list[int]:
    return model.generate(ROWS[4][None], prompt="a", max_new_tokens=3)[0, 7:].tolist()


def serve(model: SoftPromptModel) -> list[int]:
    with Engine(model) as engine:
        return engine.submit(Request(ROWS[4].tolist(), "a", sampling=Sampling(max_tokens=3))).result().tokens


def train(model: SoftPromptModel, name: str = "trained") -> list[float]:
    prompt = model.get_prompt(name)
    model(ROWS[4][None], labels=ROWS[4][None], prompt=name).loss.backward()
    return prompt.embedding.weight.grad.flatten().tolist()


def model_at_work(base: PreTrainedModel, backend: str | None = "torch") -> SoftPromptModel:
    model = SoftPromptModel(base, backend=backend).eval()
    for i, name in enumerate("abc"):
        model.add_prompt(name, make_prompt(base, length=5 + i, seed=i).requires_grad_(False))
    model.add_prompt("trained", make_prompt(base, seed=9))
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("work", [generate, serve, train])
def test_prompts_are_compiled_in_the_middle_of_other_threads_passes(family: str, work: Callable[..., Any]) -> None:
    model, alone = model_at_work(make_base(family)), model_at_work(make_base(family))
    here, inside, leave = threading.current_thread(), threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread() is not here:
            inside.set()
            assert leave.wait(timeout=60)

    model.explain()  # whose probes are no passes
    model.base.get_input_embeddings().register_forward_hook(hold)  # of own tokens: inside a pass of the base
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(work, model)
        try:
            assert inside.wait(timeout=60)
            prefix = model.compile_prompt("b")
        finally:
            leave.set()
    expected = alone.compile_prompt("b")
    assert all(map(torch.equal, prefix.keys, expected.keys)) and all(map(torch.equal, prefix.values, expected.values))
    assert found.result() == work(alone)


def watch(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, *owners: type) -> list[str]:
    """The attributes of modules and configs of `base`, of the classes `owners`, that are written from now on."""
    shared = {id(module): name for name, module in base.named_modules()}
    shared |= {
        id(module.config): f"{name}.config" for name, module in base.named_modules() if hasattr(module, "config")
    }
    written: list[str] = []

    def of(owner: type, method: str) -> None:
        real = getattr(owner, method)

        def watched(self: Any, name: str, *value: Any) -> None:
            if id(self) in shared and getattr(self, name, watch) is not (value[0] if value else watch):
                written.append(f"{shared[id(self)]}.{name}")
            real(self, name, *value)

        monkeypatch.setattr(owner, method, watched, raising=False)

    for owner in owners:
        of(owner, "__setattr__")
        of(owner, "__delattr__")
    return written


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_calls_write_to_nothing_that_threads_share(
    family: Family, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for a while, as some of transformers' options do: neither the base's configs, nor its modules, nor a
    tensor of theirs."""
    base = family.make()
    model = model_at_work(base, backend)
    for prompt in ("a", "trained"):
        model(ROWS[0][None], prompt=prompt)  # what is planned once
    tensors = {name: tensor for named in (base.named_parameters(), base.named_buffers()) for name, tensor in named}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    written = watch(base, monkeypatch, torch.nn.Module, PreTrainedConfig)
    for work in (generate, train, serve) if family.shares_prefix else (generate, train):
        work(model)
    model.generate(ROWS[4].expand(2, -1), prompt=["b", None], max_new_tokens=2)
    model.compile_prompt("c")
    model.explain()
    assert written == []
    assert {name: tensor._version for name, tensor in tensors.items()} == versions


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_base_that_is_trained_stays_in_training_mode(
    family: Family, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all threads, while it is probed and planned and while prompts are compiled, which is without dropout."""
    base = family.make().train()
    if family.shares_prefix and base.supports_gradient_checkpointing:
        hooks.enable_checkpointing(base, None)
    written = watch(base, monkeypatch, torch.nn.Module)
    model = SoftPromptModel(base, backend=backend)
    model.add_prompt("a", make_prompt(base))
    train(model, "a")
    for module in base.modules():
        dropouts = (name for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
        vars(module).update((name, 0.5) for name in [*dropouts, *(["p"] if hasattr(module, "p") else [])])
    prefix = model.compile_prompt("a")
    model.explain()
    assert written == []
    model.eval().invalidate()
    expected = model.compile_prompt("a")
    for found, of in zip((*prefix.keys, *prefix.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(found, of, rtol=1e-5, atol=1e-5)


def test_a_forward_of_a_modules_own_sees_evaluation_mode() -> None:
    """It is bound to the module itself, which no view can change."""
    base = make_base().train()
    layer, seen = base.model.layers[0], []
    real = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(layer.training)
        return real(*args, **kwargs)

    layer.forward = forward
    model = SoftPromptModel(base)
    model.add_prompt("a", make_prompt(base))
    model.compile_prompt("a")
    assert seen and not any(seen) and all(module.training for module in base.modules())


@pytest.mark.parametrize("prompt", ["a", ["a"], ["a", "b", None]], ids=str)
def test_inference_mode_leaves_nothing_that_training_can_not_use(prompt: str | list[str | None]) -> None:
    """Prefixes are kept; computed under inference_mode, they must not be inference tensors."""
    model = make_model()
    rows = len(prompt) if isinstance(prompt, list) else 1
    ids = ROWS[1].expand(rows, -1)
    with torch.inference_mode():
        found = model(ids, prompt=prompt).logits
        model.generate(ids, prompt=prompt, max_new_tokens=2)
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    out = model(inputs_embeds=embeds, labels=ids, prompt=prompt)
    out.loss.backward()
    assert embeds.grad.any()
    assert_same_logits(out.logits.detach(), found.clone())


def test_a_prompt_loaded_in_inference_mode_serves() -> None:
    model = make_model()
    with torch.inference_mode():
        model.add_prompt("c", make_prompt(model.base, seed=1))
        found = model(ROWS[1][None], prompt="c").logits
    assert_same_logits(found.clone(), model(ROWS[1][None], prompt="a").logits)
