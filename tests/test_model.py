# SPDX-License-Identifier: Apache-2.0
"""SoftPromptModel.forward and everything around it but generation: prompts, training, dtypes, saving."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from models import (
    FAMILIES,
    NUM_TASKS,
    VOCAB_SIZE,
    Oracle,
    assert_same_logits,
    make_base,
    make_model,
    make_prompt,
    make_rows,
    pad_rows,
    relative_error,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

import softprompt_fast as spf
from softprompt_fast import PrefixKV, SoftPrompt, SoftPromptModel
from softprompt_fast.integrations import transformers as hooks
from tests.device import float64

# The name that every supported transformers knows.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

METHODS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE")
ROWS = make_rows([4, 7, 1])
NAMES = ["a", None, "b"]


@pytest.fixture(scope="module")
def model() -> SoftPromptModel:
    """Prompts "a" and "b" on llama. Tests must not change it."""
    return make_model()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def trainable_model(method: str = "PROMPT_TUNING", family: str = "llama") -> tuple[SoftPromptModel, SoftPrompt]:
    base = make_base(family)
    prompt = make_prompt(base, method)
    model = SoftPromptModel(base)
    model.add_prompt("t", prompt)
    return model.train(), prompt


def oracle_loss(oracle: Oracle, prompt: SoftPrompt | None, rows: list[Tensor], tasks: list[int] | None) -> Tensor:
    """Mean over all labels of all rows; the last virtual token predicts a row's first own token."""
    total, count = torch.zeros(()), 0
    for i, row in enumerate(rows):
        logits = oracle.logits(row, prompt, None if tasks is None else tasks[i])
        predicted = len(logits) > len(row)
        labels = row if predicted else row[1:]
        total = total + cross_entropy(logits[-len(labels) - 1 : -1], labels, reduction="sum")
        count += len(labels)
    return total / count


# ---- forward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_with_a_prompt_each_give_what_each_row_alone_gives(family: str, side: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    ids, mask = pad_rows(ROWS, side)
    logits = model(ids, attention_mask=mask, prompt=NAMES).logits
    assert logits.shape == (3, 7, VOCAB_SIZE)
    assert logits.isfinite().all()  # at padding too: a NaN there would spread
    for row, name, real, found in zip(ROWS, NAMES, mask.bool(), logits, strict=True):
        prompt = None if name is None else model.get_prompt(name)
        assert_same_logits(found[real], oracle.logits(row, prompt)[-len(row) :])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_backend_asked_for_by_name_serves(backend: str, oracle: Oracle) -> None:
    model = make_model(backend=backend)
    assert {layer.backend for layer in model.explain().layers} == {backend}
    found = model(ROWS[1][None], prompt="a").logits[0]
    assert_same_logits(found, oracle.logits(ROWS[1], model.get_prompt("a"))[5:])


def test_inputs_embeds_replace_input_ids(model: SoftPromptModel) -> None:
    embeds = model.get_input_embeddings()(ROWS[1])[None]
    found = model(inputs_embeds=embeds, prompt="a").logits
    assert torch.equal(found, model(ROWS[1][None], prompt="a").logits)


def test_logits_to_keep(model: SoftPromptModel) -> None:
    whole = model(ROWS[1][None], prompt="a").logits
    torch.testing.assert_close(model(ROWS[1][None], prompt="a", logits_to_keep=2).logits, whole[:, -2:])
    columns = torch.tensor([1, 4])
    torch.testing.assert_close(model(ROWS[1][None], prompt="a", logits_to_keep=columns).logits, whole[:, columns])


def test_return_dict_false_gives_a_tuple(model: SoftPromptModel) -> None:
    out = model(ROWS[1][None], labels=ROWS[1][None], prompt="a")
    loss, logits = model(ROWS[1][None], labels=ROWS[1][None], prompt="a", return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)


def test_position_ids_count_own_tokens(model: SoftPromptModel) -> None:
    given = torch.arange(7)[None]
    assert torch.equal(model(ROWS[1][None], position_ids=given).logits, model(ROWS[1][None]).logits)
    assert not torch.allclose(model(ROWS[1][None], position_ids=given + 3).logits, model(ROWS[1][None]).logits)


def test_hidden_states_are_those_of_own_tokens(model: SoftPromptModel, oracle: Oracle) -> None:
    found = model(ROWS[1][None], prompt="a", output_hidden_states=True).hidden_states
    embeds = oracle.embeds(ROWS[1], model.get_prompt("a"))
    expected = oracle.base(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_logits(ours, theirs[:, 5:])


def test_attention_weights_cover_prefix_and_own_tokens(oracle: Oracle) -> None:
    base = make_base()
    base.set_attn_implementation("eager")
    model = SoftPromptModel(base)
    prompt = make_prompt(base)
    model.add_prompt("a", prompt)
    found = model(ROWS[1][None], output_attentions=True).attentions
    plain = make_base()
    plain.set_attn_implementation("eager")
    expected = plain(inputs_embeds=oracle.embeds(ROWS[1], prompt), output_attentions=True).attentions
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, 5:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompt_is_the_base_model(family: str) -> None:
    model, oracle = make_model(family), Oracle(family)
    ids = ROWS[1][None]
    assert_same_logits(model(ids, prompt=None).logits, oracle.base(ids).logits)
    # The base itself, in the same process and after the switch of its attention, bit for bit.
    assert torch.equal(model.base(ids).logits, oracle.base(ids).logits)
    found = model.base.generate(ids, max_new_tokens=5)
    assert torch.equal(found, oracle.base.generate(ids, max_new_tokens=5))


def test_two_models_share_one_base(model: SoftPromptModel) -> None:
    other = SoftPromptModel(model.base)
    other.add_prompt("a", model.get_prompt("b"))
    assert torch.equal(other(ROWS[1][None]).logits, model(ROWS[1][None], prompt="b").logits)


# ---- losses and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_the_loss_and_gradient_of_rows_alone(
    method: str, side: str, checkpointing: bool, oracle: Oracle
) -> None:
    model, prompt = trainable_model(method)
    if checkpointing:
        model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tasks = [2, 0, 1] if method == "MULTITASK_PROMPT_TUNING" else None
    ids, mask = pad_rows(ROWS, side)
    # Labels at padding must not count: the oracle never sees them.
    out = model(ids, attention_mask=mask, labels=ids, task_ids=tasks)
    out.loss.backward()
    parameters = [p for p in prompt.parameters() if p.requires_grad]
    expected = oracle_loss(oracle, prompt, ROWS, tasks)
    gradients = torch.autograd.grad(expected, parameters)

    assert out.logits is None
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None and relative_error(parameter.grad, gradient) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_loss_and_gradient_in_every_family(family: str) -> None:
    model, prompt = trainable_model(family=family)
    oracle = Oracle(family)
    ids, mask = pad_rows(ROWS, "left")
    out = model.eval()(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    expected = oracle_loss(oracle, prompt, ROWS, None)
    (gradient,) = torch.autograd.grad(expected, [prompt.embedding.weight])
    assert out.logits.shape == (3, 7, VOCAB_SIZE)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(prompt.embedding.weight.grad, gradient) <= 1e-4


def test_rows_of_two_trainable_prompts_train_both(oracle: Oracle) -> None:
    model, prompt = trainable_model()
    other = make_prompt(model.base, length=3, seed=9)
    model.add_prompt("u", other)
    ids, mask = pad_rows(ROWS, "left")
    model(ids, attention_mask=mask, labels=ids, prompt=["t", "u", "t"]).loss.backward()
    total = sum(
        len(row) * oracle_loss(oracle, p, [row], None) for row, p in zip(ROWS, [prompt, other, prompt], strict=True)
    )
    expected = torch.autograd.grad(total / 12, [prompt.embedding.weight, other.embedding.weight])
    for found, gradient in zip((prompt, other), expected, strict=True):
        assert relative_error(found.embedding.weight.grad, gradient) <= 1e-4


def test_only_the_first_own_token_labelled(model: SoftPromptModel, oracle: Oracle) -> None:
    labels = torch.full((1, 7), -100)
    labels[0, 0] = ROWS[1][0]
    loss = model(ROWS[1][None], labels=labels, prompt="a").loss
    virtual = oracle.logits(ROWS[1][:0], model.get_prompt("a"))
    assert loss.item() == pytest.approx(cross_entropy(virtual[-1:], ROWS[1][:1]).item(), rel=1e-5)
    # Keys and values predict nothing, so a prefix method has no such term.
    model, _ = trainable_model("PREFIX_TUNING")
    assert model(ROWS[1][None], labels=labels).loss.item() == 0.0


def test_num_items_in_batch_divides_the_sum(model: SoftPromptModel) -> None:
    ids = ROWS[1][None]
    mean = model(ids, labels=ids, prompt="a").loss
    for items in (14, torch.tensor(14)):
        accumulated = model(ids, labels=ids, prompt="a", num_items_in_batch=items).loss
        torch.testing.assert_close(accumulated, mean / 2)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_no_label_at_all_is_no_loss_and_no_gradient(method: str) -> None:
    model, prompt = trainable_model(method)
    out = model(ROWS[1][None], labels=torch.full((1, 7), -100))
    out.loss.backward()
    assert out.loss.item() == 0.0
    for parameter in prompt.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_no_label_beside_a_row_without_own_tokens(model: SoftPromptModel) -> None:
    ids, mask = pad_rows([ROWS[0], ROWS[0][:0]], "left")
    labels = torch.full_like(ids, -100)
    assert model(ids, attention_mask=mask, labels=labels, prompt="a", return_logits=False).loss.item() == 0.0


def test_return_logits_in_a_training_call(oracle: Oracle) -> None:
    model, prompt = trainable_model()
    ids = ROWS[1][None]
    assert model(ids, labels=ids).logits is None
    found = model(ids, labels=ids, return_logits=True)
    assert_same_logits(found.logits[0], oracle.logits(ROWS[1], prompt)[5:])
    assert model.eval()(ids, labels=ids, return_logits=False).logits is None
    torch.testing.assert_close(model(ids, labels=ids).loss, found.loss)


def test_the_gradient_reaches_inputs_embeds(model: SoftPromptModel, oracle: Oracle) -> None:
    embeds = model.get_input_embeddings()(ROWS[1])[None].requires_grad_()
    model(inputs_embeds=embeds, labels=ROWS[1][None], prompt="a").loss.backward()
    whole = oracle.embeds(ROWS[1], model.get_prompt("a")).requires_grad_()
    cross_entropy(oracle.base(inputs_embeds=whole).logits[0, 4:-1], ROWS[1]).backward()
    assert relative_error(embeds.grad, whole.grad[:, 5:]) <= 1e-4


def test_reentrant_checkpointing_is_refused_where_it_would_cut_the_gradient() -> None:
    model, _ = trainable_model(family="gpt2")  # fused training passes keep no graph of the base's
    model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(ROWS[1][None], labels=ROWS[1][None])


def test_a_cache_under_checkpointing_in_training_is_refused() -> None:
    model, _ = trainable_model()
    model.base.gradient_checkpointing_enable()
    assert model(ROWS[1][None]).past_key_values is None
    with pytest.raises(ValueError, match=r"past_key_values: gradient checkpointing.*eval\(\)"):
        model.generate(ROWS[1][None], max_new_tokens=2)


def test_training_mode_is_the_bases() -> None:
    base = make_base()
    assert not SoftPromptModel(base).training
    assert SoftPromptModel(base.train()).training


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_switching_adding_replacing_and_removing_prompts(oracle: Oracle) -> None:
    model = make_model()
    ids = ROWS[1][None]
    before = {name: model(ids, prompt=name).logits for name in ("a", "b", None)}
    assert model.prompt_names == ["a", "b"] and model.active_prompt == "a"
    assert torch.equal(model(ids).logits, before["a"])
    model.set_prompt("b")
    assert torch.equal(model(ids).logits, before["b"])
    model.set_prompt(None)
    assert torch.equal(model(ids).logits, before[None])

    added = make_prompt(model.base, length=4, seed=8).requires_grad_(False)
    model.add_prompt("a.b", added)
    model.add_prompt("a_dot_b", model.get_prompt("a"))
    assert_same_logits(model(ids, prompt="a.b").logits[0], oracle.logits(ROWS[1], added)[4:])
    assert torch.equal(model(ids, prompt="a_dot_b").logits, before["a"])

    with pytest.raises(ValueError, match="'b' is already loaded; pass replace=True"):
        model.add_prompt("b", added)
    model.add_prompt("b", added, replace=True)
    assert torch.equal(model(ids, prompt="b").logits, model(ids, prompt="a.b").logits)
    mixed = model(torch.cat([ids, ids]), prompt=["b", "a"]).logits
    assert_same_logits(mixed[0], oracle.logits(ROWS[1], added)[4:])

    model.set_prompt("b")
    model.remove_prompt("b")
    assert model.active_prompt is None and model.prompt_names == ["a", "a.b", "a_dot_b"]
    assert torch.equal(model(ids).logits, before[None])
    assert len(list(model.prompts.parameters())) == 2  # "a" and "a_dot_b" are one prompt


def test_a_failed_replacement_keeps_the_old_prompt(model: SoftPromptModel) -> None:
    before = model(ROWS[1][None], prompt="a").logits
    wrong = SoftPrompt.for_model("PROMPT_TUNING", make_base().config, num_virtual_tokens=3, token_dim=16)
    with pytest.raises(ValueError, match=r"32.*16"):
        model.add_prompt("a", wrong, replace=True)
    assert torch.equal(model(ROWS[1][None], prompt="a").logits, before)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1.0, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1.0, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_step_is_seen(kind: str, oracle: Oracle) -> None:
    model, prompt = trainable_model()
    optimizer = OPTIMIZERS[kind](list(prompt.parameters()))
    for _ in range(2):
        model.train()(ROWS[0][None], labels=ROWS[0][None]).loss.backward()
        optimizer.step()
        with torch.no_grad():
            found = model.eval()(ROWS[0][None]).logits[0]
            assert_same_logits(found, oracle.logits(ROWS[0], prompt)[5:])


def test_other_changes_of_a_prompt_are_seen(oracle: Oracle) -> None:
    model, prompt = trainable_model()
    prompt.requires_grad_(False)

    def check() -> None:
        assert_same_logits(model(ROWS[0][None]).logits[0], oracle.logits(ROWS[0], prompt)[5:])

    check()
    prompt.load_state_dict({name: value + 1 for name, value in prompt.state_dict().items()})
    check()
    prompt.load_state_dict({name: value - 3 for name, value in prompt.state_dict().items()}, assign=True)
    check()
    for _ in range(20):
        # Twice: the second may take the address, hence the id, of the one that was seen last.
        for _ in range(2):
            prompt.embedding.weight = torch.nn.Parameter(torch.randn(5, 32), requires_grad=False)
        check()
    prompt.embedding.weight.data.mul_(-1.0)  # behind autograd's back
    model.invalidate()
    check()


def test_new_base_weights_need_invalidate(tmp_path: Path) -> None:
    model = make_model()
    model(ROWS[1][None])
    fingerprint = model.base_fingerprint
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.mul_(1.1)
    model.invalidate()
    fresh = SoftPromptModel(model.base)
    fresh.add_prompt("a", model.get_prompt("a"))
    assert torch.equal(model(ROWS[1][None]).logits, fresh(ROWS[1][None]).logits)
    assert model.base_fingerprint == fresh.base_fingerprint != fingerprint


def test_multitask_rows(oracle: Oracle) -> None:
    model, prompt = trainable_model("MULTITASK_PROMPT_TUNING")
    prompt.requires_grad_(False)
    model.eval()
    ids, mask = pad_rows(ROWS, "left")
    for tasks in ([2, 0, 2], torch.tensor([0, 1, 1])):
        logits = model(ids, attention_mask=mask, task_ids=tasks, prompt=["t", None, "t"]).logits
        for i in (0, 2):
            expected = oracle.logits(ROWS[i], prompt, int(tasks[i]))
            assert_same_logits(logits[i][mask[i].bool()], expected[5:])
    one = model.compile_prompt("t", task=1)
    model.add_prompt("one", one)
    assert torch.equal(
        model(ROWS[1][None], prompt="one").logits, model(ROWS[1][None], prompt="t", task_ids=[1]).logits
    )
    assert NUM_TASKS == 3


# ---- one copy of the prefix -----------------------------------------------------------------------------------------


def test_prefix_bytes_do_not_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    length = 80
    model = make_model(prompts={"long": make_prompt(base, length=length)})
    model.compile_prompt("long")
    contexts: list[hooks.PrefixContext] = []

    class Recorded(hooks.PrefixContext):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            contexts.append(self)

    monkeypatch.setattr(hooks, "PrefixContext", Recorded)
    batch = 256  # below some 1 MB of keys, one joined run a row is faster and is what the torch backend makes
    with torch.no_grad():
        for rows in (1, batch):
            model(torch.full((rows, 1), 3))
        one, many = contexts
        for ours, theirs in zip(one.keys + one.values, many.keys + many.values, strict=True):
            assert ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape == (2, length, 8)
        stored = sum(k.untyped_storage().nbytes() for k in many.keys + many.values)
        assert stored == 2 * 2 * 2 * length * 8 * 4  # layers, keys and values, heads, P, D, bytes

        # Nor does a row get a copy for a moment: the largest single allocation stays below rows x prefix.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(torch.full((batch, 1), 3))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert batch * VOCAB_SIZE * 4 <= largest < batch * length * 2 * 8 * 4


def test_a_prompt_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    compiled = []
    compile_frozen = model._bank._tiers._compile
    monkeypatch.setattr(model._bank._tiers, "_compile", lambda *args: compiled.append(1) or compile_frozen(*args))
    for _ in range(3):
        model(ROWS[1][None], prompt="a")
        model(torch.stack([ROWS[1], ROWS[1]]), prompt=["b", "a"])
    assert len(compiled) == 2


# ---- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, pytest.param(torch.float64, marks=float64)])
def test_to_dtype(dtype: torch.dtype) -> None:
    model = make_model()
    model.add_prompt("frozen", model.compile_prompt("a"))
    prompt = model.get_prompt("a")
    values = prompt.embedding.weight.clone()
    model.to(dtype)
    # What trains keeps its dtype and its value; the prefix follows the base.
    assert prompt.embedding.weight.dtype == torch.float32 and torch.equal(prompt.embedding.weight, values)
    assert model.compile_prompt("a").dtype == model.get_prompt("frozen").dtype == dtype

    base = make_base().to(dtype)
    own = base.get_input_embeddings()(ROWS[1])[None]
    expected = base(inputs_embeds=torch.cat([values.to(dtype)[None], own], dim=1)).logits[:, 5:]
    found = model(ROWS[1][None], prompt="a").logits
    assert found.dtype == dtype
    exact = make_base().double()
    own = exact.get_input_embeddings()(ROWS[1])[None]
    exact_logits = exact(inputs_embeds=torch.cat([values.double()[None], own], dim=1)).logits[:, 5:]
    # As far from the exact logits as transformers is in this dtype, give or take half of it.
    noise = (expected.double() - exact_logits).abs().max().item()
    assert (found.double() - exact_logits).abs().max().item() <= 1.5 * noise + 1e-12
    assert model.generate(ROWS[1][None], prompt="a", max_new_tokens=3).shape == (1, 10)
    assert model.generate(prompt="frozen", max_new_tokens=3).shape == (1, 3)


def test_half_and_back_keeps_a_prompt_trainable() -> None:
    model, prompt = trainable_model()
    model.bfloat16()
    model(ROWS[1][None], labels=ROWS[1][None]).loss.backward()
    assert prompt.embedding.weight.grad.dtype == torch.float32 and prompt.embedding.weight.grad.any()
    model.float()
    assert model(ROWS[1][None]).logits.dtype == torch.float32


# ---- saving, explaining ---------------------------------------------------------------------------------------------


def test_a_prefix_saved_and_loaded_gives_equal_outputs(tmp_path: Path, model: SoftPromptModel) -> None:
    model.compile_prompt("a").save_pretrained(tmp_path)
    other = SoftPromptModel(make_base())
    other.load_prompt("k", tmp_path)
    other.add_prompt("l", PrefixKV.from_pretrained(tmp_path, base_model=other.base))
    for name in ("k", "l"):
        assert_same_logits(other(ROWS[1][None], prompt=name).logits, model(ROWS[1][None], prompt="a").logits)
        found = other.generate(prompt=name, max_new_tokens=5)
        assert torch.equal(found, model.generate(prompt="a", max_new_tokens=5))
    # Its loss has the term of the first own token too.
    ids = ROWS[1][None]
    torch.testing.assert_close(other(ids, labels=ids).loss, model(ids, labels=ids, prompt="a").loss)


@pytest.mark.parametrize("method", [*METHODS, "CPT"])
def test_a_saved_prompt_loads_in_peft_with_equal_outputs(tmp_path: Path, method: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to compare with")
    model, _ = trainable_model(method)
    model.eval().save_pretrained(tmp_path)
    tasks = torch.tensor([2]) if method == "MULTITASK_PROMPT_TUNING" else None
    kwargs = {} if tasks is None else {"task_ids": tasks}
    theirs = peft.PeftModel.from_pretrained(make_base(), tmp_path).eval()
    ours = SoftPromptModel.from_pretrained(make_base(), tmp_path)
    mask = torch.ones(1, 7, dtype=torch.long)
    with torch.no_grad():
        expected = theirs(input_ids=ROWS[1][None], attention_mask=mask, **kwargs).logits[:, -7:]
        for candidate in (model, ours):
            assert_same_logits(candidate(ROWS[1][None], task_ids=tasks).logits, expected)


def test_explain() -> None:
    model = make_model(backend="torch")
    found = spf.explain(model).to_dict()
    assert found["model"] == "LlamaForCausalLM"
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert {layer["path"] for layer in found["layers"]} == {"shared prefix"}
    assert "layers 0-1: shared prefix" in str(spf.explain(model))

    expanded = spf.explain(make_model("bloom"))
    assert {layer.path for layer in expanded.layers} == {"expanded prefix"}
    assert "BloomForCausalLM" in expanded.layers[0].reason and expanded.layers[0].reason in str(expanded)
    with pytest.raises(TypeError, match="expected a model of softprompt_fast, found LlamaForCausalLM"):
        spf.explain(make_base())


def test_falling_back_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="softprompt_fast"):
        make_model("bloom")
    assert "BloomForCausalLM: prefixes are expanded" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="softprompt_fast"):
        make_model("llama")
    assert not caplog.text


@pytest.mark.parametrize("copier", [pickle.dumps, copy.deepcopy, lambda m: torch.save(m, io.BytesIO())])
def test_pickling_is_refused(copier, model: SoftPromptModel) -> None:
    with pytest.raises(TypeError, match=r"can't be pickled.*save_prompt\(name, directory\)"):
        copier(model)
