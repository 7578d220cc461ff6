# SPDX-License-Identifier: Apache-2.0
"""torch.compile of the whole model: equal results, and no recompilation for new lengths.

The kernels' own full-graph tests are with the ops. Most tests here use the "eager" backend: what may go wrong in the
model is the tracing, not the code that inductor writes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import assert_same_logits, make_base, make_model, make_prompt, make_rows, pad_rows, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from softprompt_fast import SoftPromptModel


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_new_lengths_do_not_recompile() -> None:
    model = make_model()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    frames = []
    for lengths, side in (([4, 7], "left"), ([9, 5], "left"), ([3, 12], "right"), ([1, 20], "left")):
        ids, mask = pad_rows(make_rows(lengths), side)
        for names in (["a", "b"], ["b", "a"]):
            found = compiled(ids, attention_mask=mask, prompt=names, use_cache=False).logits
            expected = model(ids, attention_mask=mask, prompt=names, use_cache=False).logits
            assert_same_logits(found[mask.bool()], expected[mask.bool()])
        frames.append(counter.frame_count)
    assert frames[0] > 0 and frames == [frames[0]] * 4


@torch.no_grad()
def test_a_prompt_a_row_and_none() -> None:
    model = make_model("gemma2")
    compiled = torch.compile(model, backend="eager", dynamic=True)
    ids, mask = pad_rows(make_rows([4, 7, 1]), "left")
    for prompt in (["a", None, "b"], "a", None):
        found = compiled(ids, attention_mask=mask, prompt=prompt, use_cache=False).logits
        expected = model(ids, attention_mask=mask, prompt=prompt, use_cache=False).logits
        assert_same_logits(found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_decode_steps_with_a_cache() -> None:
    model = make_model()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    ids, mask = pad_rows(make_rows([4, 7]), "left")
    names = ["a", "b"]
    ours = compiled(ids, attention_mask=mask, prompt=names, use_cache=True).past_key_values
    theirs = model(ids, attention_mask=mask, prompt=names, use_cache=True).past_key_values
    frames = []
    for step in range(6):
        new = torch.tensor([[step + 2], [step + 3]])
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        kwargs = {"attention_mask": mask, "prompt": names}
        found = compiled(new, past_key_values=ours, **kwargs).logits
        assert_same_logits(found, model(new, past_key_values=theirs, **kwargs).logits)
        frames.append(counter.frame_count)
    assert frames[2:] == [frames[2]] * 4  # the second step shows dynamo which sizes change


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_compiled_forward(cache: str) -> None:
    model = make_model()
    ids, mask = pad_rows(make_rows([4, 7]), "left")
    options = {"attention_mask": mask, "prompt": ["a", None], "max_new_tokens": 6, "cache_implementation": cache}
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_compiles_this_model_and_not_its_base(family: str) -> None:
    """On a GPU transformers compiles the decode steps of a static cache by itself; asked to, on a CPU as well."""
    model = make_model(family)
    ids, mask = pad_rows(make_rows([4, 7]), "left")
    options = {"attention_mask": mask, "prompt": ["a", None], "max_new_tokens": 6, "cache_implementation": "static"}
    expected = model.generate(ids, disable_compile=True, **options)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    assert torch.equal(model.generate(ids, compile_config=config, **options), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_training(autocast: bool) -> None:
    """Equal to uncompiled steps (under autocast up to the order of bf16 sums), and not compiled anew at every one."""
    base = make_base()
    model, prompt = SoftPromptModel(base), make_prompt(base)
    model.add_prompt("t", prompt)
    model.train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=False)
    ids, mask = pad_rows(make_rows([5, 3]), "left")
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    frames = []
    for _ in range(3):
        losses, gradients = [], []
        for each in (model, compiled):
            with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
                loss = each(ids, attention_mask=mask, labels=ids).loss
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, prompt.embedding.weight)[0])
        assert losses[1] == pytest.approx(losses[0], rel=1e-3 if autocast else 1e-5)
        assert relative_error(gradients[1], gradients[0]) <= (1e-2 if autocast else 1e-4)
        prompt.embedding.weight.grad = gradients[0]
        optimizer.step()
        frames.append(counter.frame_count)
    assert frames[0] > 0 and frames[2] == frames[1]


@pytest.mark.slow
@torch.no_grad()
def test_inductor() -> None:
    model = make_model()
    compiled = torch.compile(model, dynamic=False)
    ids = make_rows([5])[0][None]
    try:
        found = compiled(ids, prompt="b", use_cache=False).logits
    except torch._inductor.exc.InductorError as error:
        if "InvalidCxxCompiler" in str(error):
            pytest.skip("inductor needs a C++ compiler, and there is none")
        raise
    assert_same_logits(found, model(ids, prompt="b", use_cache=False).logits)


def test_the_expanded_path() -> None:
    model = make_model("bloom")
    compiled = torch.compile(model, backend="eager", dynamic=True)
    ids, mask = pad_rows(make_rows([4, 7]), "right")
    with torch.no_grad():
        found = compiled(ids, attention_mask=mask, prompt=["a", "b"]).logits
        expected = model(ids, attention_mask=mask, prompt=["a", "b"]).logits
    assert_same_logits(found[mask.bool()], expected[mask.bool()])
