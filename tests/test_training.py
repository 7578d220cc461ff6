# SPDX-License-Identifier: Apache-2.0
"""Training calls: what they compute and keep, packed rows, checkpointing, cartridges from text, and bad input.

That losses and gradients are PEFT's in every family and method is in test_families.py. The oracle here is
transformers on each row alone.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    FAMILIES,
    MAX_POSITIONS,
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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening
from transformers.models.llama.modeling_llama import LlamaMLP

from softprompt_fast import PrefixKV, SoftPrompt, SoftPromptModel
from softprompt_fast.backends import heuristics
from softprompt_fast.errors import AdapterError
from softprompt_fast.integrations.fused_decoder import PACK_VARIABLE
from tests import families
from tests.device import cpu_only, randint, seeded

IGNORE = -100
ROWS = make_rows([4, 7, 1, 3])


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def trainable_model(
    method: str = "PROMPT_TUNING", family: str = "llama", **options: Any
) -> tuple[SoftPromptModel, SoftPrompt]:
    base = make_base(family)
    prompt = make_prompt(base, method, **options)
    model = SoftPromptModel(base)
    model.add_prompt("t", prompt)
    return model.train(), prompt


def row_terms(
    oracle: Oracle, prompt: SoftPrompt | None, row: Tensor, labels: Tensor | None = None, task: int | None = None
) -> list[Tensor]:
    """The cross-entropies of one row alone; its first token's only where virtual tokens predict it."""
    labels = row if labels is None else labels
    logits = oracle.logits(row, prompt, task)
    if len(logits) == len(row):
        labels = labels[1:]
    each = cross_entropy(logits[-len(labels) - 1 : -1], labels, reduction="none", ignore_index=IGNORE)
    return list(each[labels != IGNORE].unbind()) if len(labels) else []


def mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()


def check(loss: Tensor, expected: Tensor, *parameters: Tensor) -> None:
    """Loss to 1e-5, the gradient of each parameter to 1e-4; `expected` is differentiated too."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, parameters)
    for ours, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        assert relative_error(ours, theirs) <= 1e-4


# ---- the loss in chunks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_labelled_positions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels here and there, in chunks smaller than their number, with soft caps and on the expanded path as well."""
    monkeypatch.setattr(heuristics, "head_rows", lambda rows, vocab_size: 2)
    model, prompt = trainable_model(family=family)
    ids, mask = pad_rows(ROWS, "left")
    labels = ids.masked_fill(randint(0, 2, ids.shape, generator=seeded(4)).bool(), IGNORE)
    out = model(ids, attention_mask=mask, labels=labels)
    oracle = Oracle(family)
    terms = [
        term
        for row, own, given in zip(ROWS, mask.bool(), labels, strict=True)
        for term in row_terms(oracle, prompt, row, given[own])
    ]
    assert out.logits is None and 4 < len(terms) < 15
    check(out.loss, mean(terms), prompt.embedding.weight)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("P_TUNING", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}),
        ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 12}),
        ("CARTRIDGE", {"num_frozen_tokens": 2}),
    ],
)
def test_reparameterised_prompts(method: str, options: dict[str, Any], oracle: Oracle) -> None:
    model, prompt = trainable_model(method, **options)
    ids, mask = pad_rows(ROWS, "right")
    loss = model(ids, attention_mask=mask, labels=ids).loss
    terms = [term for row in ROWS for term in row_terms(oracle, prompt, row)]
    check(loss, mean(terms), *(p for p in prompt.parameters() if p.requires_grad))


def test_a_bfloat16_base_errs_no_more_than_transformers_does() -> None:
    """The prompt is float32, as PEFT keeps it, and so is the loss."""
    model, prompt = trainable_model()
    ids, mask = pad_rows(ROWS, "left")
    weight = prompt.embedding.weight

    def step() -> tuple[Tensor, Tensor]:
        loss = model(ids, attention_mask=mask, labels=ids).loss
        return loss, torch.autograd.grad(loss, weight)[0]

    loss, gradient = step()
    model.to(torch.bfloat16)
    rounded, of_rounded = step()
    oracle = Oracle()
    oracle.base.to(torch.bfloat16)
    expected = mean([term.float() for row in ROWS for term in row_terms(oracle, prompt, row)])
    noise = relative_error(torch.autograd.grad(expected, weight)[0], gradient)
    assert rounded.dtype == torch.float32 and weight.dtype == torch.float32
    assert rounded.item() == pytest.approx(loss.item(), rel=1e-2)
    assert 1e-3 < relative_error(of_rounded, gradient) <= 1.5 * noise


def head_calls(model: SoftPromptModel, call: Callable[[], Any]) -> list[tuple[int, ...]]:
    """The shapes of what the base's output projection is given during `call`."""
    shapes: list[tuple[int, ...]] = []
    head = model.base.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    call()
    handle.remove()
    return shapes


def test_logits_are_computed_where_a_label_is() -> None:
    model, _ = trainable_model("PREFIX_TUNING")
    ids = torch.stack([ROWS[1], ROWS[1]])
    labels = torch.full_like(ids, IGNORE)
    labels[0, 2], labels[1, 6], labels[1, 0] = 3, 5, 4  # the last of them nothing predicts
    model(ids, labels=labels)  # tries the parts once
    assert head_calls(model, lambda: model(ids, labels=labels)) == [(1, 2, 32)]
    assert head_calls(model, lambda: model(ids, labels=labels, return_logits=True)) == [(2, 7, 32)]


def test_nothing_of_the_vocabulary_or_of_a_weight_is_kept() -> None:
    model, prompt = trainable_model()
    ids, mask = pad_rows(ROWS, "right")
    model(ids, attention_mask=mask, labels=ids)

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        loss = model(ids, attention_mask=mask, labels=ids).loss
    gc.collect()
    weights = {parameter.data_ptr() for parameter in model.base.parameters()}
    own = [kept.tensor for kept in alive if kept.tensor.untyped_storage().data_ptr() not in weights]
    assert len(own) > 10
    sizes = {parameter.numel() for parameter in model.base.parameters() if parameter.dim() == 2}
    # One vector of logits is the prefix's own prediction of first tokens.
    large = [t.shape for t in own if t.numel() in sizes or (VOCAB_SIZE in t.shape and t.numel() > VOCAB_SIZE)]
    assert not large
    loss.backward()
    assert prompt.embedding.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_a_base_that_runs_only_as_a_whole(caplog: pytest.LogCaptureFixture, oracle: Oracle) -> None:
    """With a hook on the base its parts can't be run one by one: exact all the same, and said once."""
    model, prompt = trainable_model()
    calls: list[int] = []
    handle = model.base.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = pad_rows(ROWS, "left")
    with caplog.at_level(logging.INFO, "softprompt_fast"):
        for _ in range(2):
            out = model(ids, attention_mask=mask, labels=ids)
    assert len(calls) >= 2 and sum("not computed in chunks: the base has hooks" in m for m in caplog.messages) == 1
    assert "loss in one piece: the base has hooks" in str(model.explain())
    handle.remove()
    assert "in one piece" not in str(model.explain())
    check(out.loss, mean([t for row in ROWS for t in row_terms(oracle, prompt, row)]), prompt.embedding.weight)


def test_a_base_that_cannot_be_taken_apart(monkeypatch: pytest.MonkeyPatch, oracle: Oracle) -> None:
    model, prompt = trainable_model()
    scale = type(model.base).forward

    def forward(self: Any, *args: Any, labels: None = None, **kwargs: Any) -> Any:
        out = scale(self, *args, **kwargs)
        if isinstance(self.model, type(model.base.model)):  # a head that looks at its decoder
            out["logits"] = out.logits * 2
        return out

    monkeypatch.setattr(type(model.base), "forward", forward)
    assert "through its parts differ" in str(model._passes.head.get())
    ids, mask = pad_rows(ROWS, "left")
    loss = model(ids, attention_mask=mask, labels=ids).loss
    check(loss, mean([t for row in ROWS for t in row_terms(oracle, prompt, row)]), prompt.embedding.weight)


# ---- the last layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("why_not", [None, "first", "hook", "checkpointing"])
def test_the_last_layer_runs_what_keys_and_values_need(
    family: str, why_not: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PACK_VARIABLE, "0")  # fused passes run none of the base's modules
    model, prompt = trainable_model(family=family, length=6)  # no other pass here is as long
    base = model.base.base_model
    mlps = [layer.mlp for layer in (base.h if family == "gpt2" else base.layers)]
    runs: list[tuple[int, int]] = []
    kind = type(mlps[0])
    forward = kind.forward

    def counted(self: nn.Module, states: Tensor) -> Tensor:
        if states.shape[1] == prompt.num_virtual_tokens:
            runs.append((mlps.index(self), states.shape[0]))
        return forward(self, states)

    monkeypatch.setattr(kind, "forward", counted)
    ids, mask = pad_rows(ROWS, "left")
    labels = ids.clone()
    if why_not != "first":  # nobody asks what the last virtual token predicts
        labels[torch.arange(len(ROWS)), (mask != 0).int().argmax(dim=1)] = IGNORE
    if why_not == "hook":
        mlps[0].register_forward_hook(lambda *_: None)
    if why_not == "checkpointing":
        model.gradient_checkpointing_enable()
    loss = model(ids, attention_mask=mask, labels=labels).loss
    assert runs == ([(0, 1)] if why_not is None else [(0, 1), (1, 1)])
    terms = [
        term
        for row, own, given in zip(ROWS, mask.bool(), labels, strict=True)
        for term in row_terms(Oracle(family), prompt, row, given[own])
    ]
    check(loss, mean(terms), prompt.embedding.weight)


# ---- packed rows ----------------------------------------------------------------------------------------------------


def flatten(rows: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """One packed row, as transformers' collator makes it: the first token of each is no label."""
    return DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in rows])


def without_first(row: Tensor) -> Tensor:
    return torch.cat([torch.tensor([IGNORE]), row[1:]])


@cpu_only  # the collator's tensors are on the CPU
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_loss_and_gradient_of_rows_alone(family: str, method: str) -> None:
    if family == "bloom" and method == "PREFIX_TUNING":
        pytest.skip("transformers' own cache does not take a prefix there: no oracle")
    model, prompt = trainable_model(method, family)
    oracle = Oracle(family)
    batch = flatten(ROWS, return_flash_attn_kwargs=True, return_seq_idx=True)
    tasks = [2, 0, 1, 0] if method == "MULTITASK_PROMPT_TUNING" else [None] * 4
    out = model(**batch, task_ids=None if tasks[0] is None else tasks)
    terms = [
        term
        for row, task in zip(ROWS, tasks, strict=True)
        for term in row_terms(oracle, prompt, row, without_first(row), task)
    ]
    assert out.logits is None and len(terms) == 11
    check(out.loss, mean(terms), *(p for p in prompt.parameters() if p.requires_grad))


def packed_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two packed rows of 4 + 7 and 1 + 3 tokens, the second with padding in it; ids, positions, mask."""
    ids, positions, mask = torch.full((2, 11), 13), torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11)
    for row, places in ((0, ((0, 0), (1, 4))), (1, ((2, 1), (3, 5)))):
        for number, start in places:
            at = slice(start, start + len(ROWS[number]))
            ids[row, at], positions[row, at], mask[row, at] = ROWS[number], torch.arange(len(ROWS[number])), 1
    return ids, positions, mask.long()


@pytest.mark.parametrize("per", ["segment", "row"])
def test_prompts_of_packed_rows(per: str) -> None:
    model = make_model()
    oracle = Oracle()
    ids, positions, mask = packed_batch()
    names = ["a", None, "b", "a"] if per == "segment" else ["a", "a", "b", "b"]
    given = names if per == "segment" else ["a", "b"]
    calls = {"prompt": given, "attention_mask": mask, "position_ids": positions}
    out = model(ids, **calls, output_hidden_states=True)
    assert out.logits.shape == (2, 11, VOCAB_SIZE) and out.past_key_values is None
    assert [states.shape for states in out.hidden_states] == [(2, 11, 32)] * 3
    found = out.logits[mask.bool()].split([len(row) for row in ROWS])
    last = out.hidden_states[-1][mask.bool()].split([len(row) for row in ROWS])
    for row, name, logits, states in zip(ROWS, names, found, last, strict=True):
        prompt = None if name is None else model.get_prompt(name)
        assert_same_logits(logits, oracle.logits(row, prompt)[-len(row) :])
        assert_same_logits(model.base.lm_head(states), logits)
    # Labels at first tokens are what the prefix predicts, and a row without a prompt has nothing that does.
    loss = model(ids, labels=ids, **calls).loss
    terms = []
    for row, name in zip(ROWS, names, strict=True):
        prompt = None if name is None else model.get_prompt(name)
        terms += row_terms(oracle, prompt, row, row if prompt is not None else without_first(row))
    assert loss.item() == pytest.approx(mean(terms).item(), rel=1e-5)


def test_packed_rows_of_embeddings_pass_their_gradient_on(oracle: Oracle) -> None:
    model, _ = trainable_model()
    ids, positions, mask = packed_batch()
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeds, labels=ids, attention_mask=mask, position_ids=positions).loss.backward()
    assert embeds.grad[mask.bool()].any(dim=1).sum() >= 10 and not embeds.grad[~mask.bool()].any()


def test_packed_cpt_is_each_segment_alone() -> None:
    model, prompt = trainable_model("CPT")
    ids, positions, mask = packed_batch()
    types = torch.where(torch.arange(11) % 3 == 1, 2, 4).expand(2, -1)
    loss = model(ids, labels=ids, attention_mask=mask, position_ids=positions, input_type_mask=types).loss
    padded, padding = pad_rows(ROWS, "right")
    row_types = torch.zeros_like(padded)
    for number, (row, start) in enumerate(((0, 0), (0, 4), (1, 1), (1, 5))):
        row_types[number, : len(ROWS[number])] = types[row, start : start + len(ROWS[number])]
    expected = model(padded, labels=padded, attention_mask=padding, input_type_mask=row_types).loss
    check(loss, expected, prompt.delta_embedding.weight)


def test_token_scores_of_packed_rows() -> None:
    """What TRL's trainers ask for: every label of every segment, with the loss of a plain call."""
    model, prompt = trainable_model()
    ids, positions, mask = packed_batch()
    call = {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, IGNORE),
    }
    scores, loss = model(**call, fused_lm_head=True), model(**call).loss
    assert len(scores.log_probs) == int(mask.sum()) and abs(scores.loss - loss) <= 1e-5 * loss
    gradients = [torch.autograd.grad(each, list(prompt.parameters())) for each in (scores.loss, loss)]
    assert all(relative_error(*pair) <= 1e-5 for pair in zip(*gradients, strict=True))


def test_cpt_weights_do_not_depend_on_padding(oracle: Oracle) -> None:
    """A type that stands in padding, or a row that is nothing else, is no group of labels that others decay by."""
    model, prompt = trainable_model("CPT", opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    rows = [ROWS[0], ROWS[0][:0], ROWS[3]]
    ids, mask = pad_rows(rows, "right")
    types = torch.where(mask.bool(), 4, 8)
    types[2] = torch.where(mask[2].bool(), 2, 4)  # no label among its own tokens
    loss = model(ids, attention_mask=mask, labels=ids, input_type_mask=types).loss
    terms = []
    for row, own in zip(rows, types, strict=True):
        targets, weights = (x[0, 1:] for x in prompt.cpt_targets(row[None], own[None, : len(row)]))
        each = cross_entropy(oracle.logits(row, prompt)[:-1], targets, reduction="none", ignore_index=IGNORE)
        terms += (weights * each)[targets != IGNORE].unbind()
    check(loss, mean(terms), prompt.delta_embedding.weight)


@pytest.mark.parametrize("family", ["bloom", "gptj"])
@pytest.mark.parametrize("padded", [True, False])
def test_positions_of_single_rows_on_the_expanded_path(family: str, padded: bool) -> None:
    """Positions that only say what a row's columns do, as a packing collator gives them for a row of one segment."""
    base = make_base(family) if family in FAMILIES else families.FAMILIES[family].make()
    model, prompt = SoftPromptModel(base).train(), make_prompt(base)
    model.add_prompt("t", prompt)
    assert model.explain().layers[0].path == "expanded prefix"
    ids, mask = pad_rows(ROWS if padded else [ROWS[1]], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    calls: dict[str, Any] = {"attention_mask": mask, "labels": ids}
    expected = model(ids, **calls).loss
    check(model(ids, position_ids=positions, **calls).loss, expected, prompt.embedding.weight)
    apart = torch.where(mask.bool(), positions * 2, 0)
    if family == "bloom":
        with pytest.raises(ValueError, match="position_ids: BloomForCausalLM counts positions itself"):
            model(ids, position_ids=apart, **calls)
        return
    rows = [base.get_input_embeddings()(row) for row in (ROWS if padded else [ROWS[1]])]
    terms = []
    for row, embeds in zip(ROWS if padded else [ROWS[1]], rows, strict=True):
        at = torch.cat([torch.arange(5), 5 + 2 * torch.arange(len(row))])[None]
        logits = base(inputs_embeds=torch.cat([prompt.embeddings(), embeds])[None], position_ids=at).logits[0]
        terms += cross_entropy(logits[4:-1], row, reduction="none").unbind()
    check(model(ids, position_ids=apart, **calls).loss, mean(terms), prompt.embedding.weight)


def test_given_embeddings_are_left_as_they_are() -> None:
    """ctrl scales what it is given in place."""
    base = families.FAMILIES["ctrl"].make()
    model = SoftPromptModel(base).eval()
    model.add_prompt("t", make_prompt(base))
    embeds = base.get_input_embeddings()(ROWS[1][None])
    before = embeds.clone()
    with torch.no_grad():
        model(inputs_embeds=embeds)
    assert torch.equal(embeds, before)


def test_packed_rows_that_cannot_be_served() -> None:
    model, _ = trainable_model()
    ids, positions, mask = packed_batch()
    calls: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    wrong = positions.clone()
    wrong[0, 6] = 7
    with pytest.raises(ValueError, match=r"position_ids: .*counts 0, 1, 2, \.\.\., found 7 at row 0, position 6"):
        model(ids, attention_mask=mask, position_ids=wrong)
    for option in ({"use_cache": True}, {"logits_to_keep": 1}, {"output_attentions": True}):
        with pytest.raises(ValueError, match="position_ids: packed rows"):
            model(ids, **calls, **option)
    with pytest.raises(ValueError, match=r"prompt: expected one per packed row \(2\) or per segment \(4\), found 3"):
        model(ids, **calls, prompt=["t"] * 3)
    with pytest.raises(ValueError, match=r"input_type_mask: expected shape \(2, 11\)"):
        model(ids, **calls, labels=ids, input_type_mask=mask[:, :4])
    with pytest.raises(ValueError, match=r"position_ids: packed rows \(cu_seq_lens_q\) need positions"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 11, 22], dtype=torch.int32))


# ---- checkpointing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_checkpointing_changes_neither_loss_nor_gradient(method: str, family: str) -> None:
    model, prompt = trainable_model(method, family)
    parameters = [p for p in prompt.parameters() if p.requires_grad]
    ids, mask = pad_rows(ROWS, "left")

    def step() -> tuple[Tensor, ...]:
        loss = model(ids, attention_mask=mask, labels=ids).loss
        return (loss.detach(), *torch.autograd.grad(loss, parameters))

    plain = step()
    for enable, disable in (
        (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable),
        (model.activation_checkpointing_enable, model.activation_checkpointing_disable),
    ):
        enable()
        assert model.is_gradient_checkpointing and model.is_activation_checkpointing
        torch.testing.assert_close(step(), plain, rtol=1e-6, atol=1e-7)
        disable()
        assert not model.is_gradient_checkpointing and not model.is_activation_checkpointing


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_checkpointing_that_would_drop_an_expanded_prefix_is_refused(method: str) -> None:
    model, prompt = trainable_model(method, "bloom")
    model.gradient_checkpointing_enable()
    for trains in (True, False):
        prompt.requires_grad_(trains)
        with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\)"):
            model(ROWS[1][None], labels=ROWS[1][None])
    assert model(ROWS[1][None], labels=ROWS[1][None], prompt=None).loss > 0


def test_layers_run_again_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PACK_VARIABLE, "0")
    model, _ = trainable_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs: list[int] = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: runs.append(1) or forward(self, x))
    loss = model(ROWS[1][None], labels=ROWS[1][None]).loss
    before = len(runs)
    loss.backward()
    assert len(runs) > before


def test_reentrant_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PACK_VARIABLE, "0")  # fused passes keep no graph of the base's that it could cut
    model, _ = trainable_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(ROWS[1][None], labels=ROWS[1][None])


# ---- cartridges from text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("tokens", [None, 3])
def test_a_cartridge_from_text_answers_as_the_base_with_that_text(family: str, tokens: int | None) -> None:
    model, oracle = make_model(family), Oracle(family)
    text = make_rows([6], seed=8)[0]
    prompt = model.train().cartridge_from_tokens(text, num_virtual_tokens=tokens, num_frozen_tokens=2)
    length = 6 if tokens is None else tokens
    assert prompt.method == "CARTRIDGE" and prompt.num_virtual_tokens == length and model.training
    assert prompt.trainable_embedding.requires_grad and not prompt.frozen_embedding.requires_grad
    assert prompt.frozen_embedding.shape[0] == 2 and prompt.trainable_embedding.shape[0] == length - 2
    model.add_prompt("text", prompt)
    found = model.eval()(ROWS[1][None], prompt="text").logits[0]
    whole = torch.cat([text[:length], ROWS[1]])
    assert_same_logits(found, oracle.base(whole[None]).logits[0, length:])


def test_a_cartridge_from_a_prefix_trains(tmp_path: Any, oracle: Oracle) -> None:
    model = make_model()
    prefix = model.compile_prompt("b")
    prompt = SoftPrompt.from_prefix(prefix)
    for (key, value), ours, theirs in zip(prompt.key_values(), prefix.keys, prefix.values, strict=True):
        assert torch.equal(key, ours) and torch.equal(value, theirs)
    model.add_prompt("c", prompt)
    ids, mask = pad_rows(ROWS, "left")
    loss = model.train()(ids, attention_mask=mask, labels=ids, prompt="c").loss
    terms = [term for row in ROWS for term in row_terms(oracle, prompt, row)]
    check(loss, mean(terms), prompt.trainable_embedding)
    model.save_prompt("c", tmp_path / "c")
    model.load_prompt("again", tmp_path / "c", trainable=True)
    again = model.get_prompt("again")
    assert torch.equal(again.frozen_embedding, prompt.frozen_embedding) and again.trainable_embedding.requires_grad
    # The prefix it came from is not what is trained.
    with torch.no_grad():
        prompt.trainable_embedding.zero_()
    assert prefix.keys[0].any()


def test_a_cartridge_from_an_8_bit_prefix() -> None:
    prefix = make_model().compile_prompt("b").quantize()
    exact = prefix.dequantize()
    prompt = SoftPrompt.from_prefix(prefix, num_frozen_tokens=0)
    assert torch.equal(prompt.key_values()[1][0], exact.keys[1]) and prompt.frozen_embedding is None


def test_what_no_cartridge_can_start_from() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"input_ids: expected one text of shape \[T\], found \(1, 7\)"):
        model.cartridge_from_tokens(ROWS[1][None])
    for tokens in (0, 8):
        with pytest.raises(ValueError, match=f"num_virtual_tokens: expected 1 to 7, the tokens given, found {tokens}"):
            model.cartridge_from_tokens(ROWS[1], num_virtual_tokens=tokens)
    with pytest.raises(IndexError, match=f"token id {VOCAB_SIZE} at row 0, position 1"):
        model.cartridge_from_tokens(torch.tensor([0, VOCAB_SIZE]))
    with pytest.raises(AdapterError, match="num_frozen_tokens"):
        model.cartridge_from_tokens(ROWS[1], num_frozen_tokens=8)
    with pytest.raises(ValueError, match="need 97 positions"):
        model.cartridge_from_tokens(torch.zeros(97, dtype=torch.long))
    shapes = [torch.ones(2, 4, 8), torch.ones(1, 4, 8)]
    with pytest.raises(AdapterError, match="one shape"):
        SoftPrompt.from_prefix(PrefixKV(shapes, shapes, method="CARTRIDGE", fingerprint=""))


# ---- bad input ------------------------------------------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize("label", [VOCAB_SIZE, -1, -101])
@pytest.mark.parametrize("training", [True, False])
def test_labels_outside_the_vocabulary(label: int, training: bool) -> None:
    model, _ = trainable_model()
    labels = ROWS[1][None].clone()
    labels[0, 4] = label
    with pytest.raises(IndexError, match=f"labels: label {label} at row 0, position 4 is neither -100 nor in the voc"):
        model.train(training)(ROWS[1][None], labels=labels)
    # At padding nobody looks.
    mask = torch.ones_like(labels)
    mask[0, 4:] = 0
    assert model(ROWS[1][None], attention_mask=mask, labels=labels).loss.isfinite()


def test_labels_that_are_no_ids() -> None:
    model, _ = trainable_model()
    with pytest.raises(ValueError, match=r"labels: expected token ids \(int64\), found torch.float32"):
        model(ROWS[1][None], labels=ROWS[1][None].float())
    ids = ROWS[1][None]
    torch.testing.assert_close(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_nothing_labelled_is_zero_with_a_zero_gradient(method: str, items: Tensor | int | None) -> None:
    model, prompt = trainable_model(method)
    ids, mask = pad_rows(ROWS, "left")
    loss = model(ids, attention_mask=mask, labels=torch.full_like(ids, IGNORE), num_items_in_batch=items).loss
    loss.backward()
    assert loss.item() == 0.0
    for parameter in prompt.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_only_padding_contribute_nothing(family: str, side: str) -> None:
    model, prompt = trainable_model(family=family)
    ids, mask = pad_rows([ROWS[0], ROWS[0][:0], ROWS[1]], side)
    loss = model(ids, attention_mask=mask, labels=ids).loss
    rows, alone = pad_rows([ROWS[0], ROWS[1]], side)
    check(loss, model(rows, attention_mask=alone, labels=rows).loss, prompt.embedding.weight)
    nothing = model(ids[1:2], attention_mask=mask[1:2], labels=ids[1:2]).loss
    nothing.backward()
    assert nothing.item() == 0.0 and not prompt.embedding.weight.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_only_padding_in_an_evaluation(family: str) -> None:
    """Nothing predicts its first token, and no loss needs that."""
    model, _ = trainable_model("PREFIX_TUNING", family)
    ids, mask = pad_rows([ROWS[0], ROWS[0][:0]], "right")
    with torch.no_grad():
        expected = model.eval()(ids[:1], labels=ids[:1]).loss
        out = model(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(out.loss, expected)
    assert out.logits.shape[:2] == ids.shape


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_in_padding_embeddings_reaches_nothing(
    family: str, side: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setenv(PACK_VARIABLE, "0")
    model, prompt = trainable_model(family=family)
    ids, mask = pad_rows(ROWS, side)
    embeds = model.get_input_embeddings()(ids).detach()
    expected = model(inputs_embeds=embeds, attention_mask=mask, labels=ids).loss
    poisoned = embeds.masked_fill(mask[..., None] == 0, float("nan")).requires_grad_()
    loss = model(inputs_embeds=poisoned, attention_mask=mask, labels=ids).loss
    check(loss, expected, prompt.embedding.weight)
    loss = model(inputs_embeds=poisoned, attention_mask=mask, labels=ids).loss
    (of_embeds,) = torch.autograd.grad(loss, poisoned)
    assert of_embeds[mask.bool()].any() and not of_embeds[~mask.bool()].any() and not of_embeds.isnan().any()
    with torch.no_grad():
        logits = model.eval()(inputs_embeds=poisoned, attention_mask=mask).logits
    assert not logits[mask.bool()].isnan().any()


@pytest.mark.parametrize("frozen_prompt", [False, True])
def test_a_base_that_is_trained_as_well(frozen_prompt: bool, oracle: Oracle) -> None:
    """Its gradient comes through the own tokens and through the prompt's keys and values."""
    base = make_base().requires_grad_(True)
    model = SoftPromptModel(base, freeze_base=False)
    prompt = make_prompt(base).requires_grad_(not frozen_prompt)
    model.add_prompt("t", prompt)
    ids, mask = pad_rows(ROWS, "right")
    loss = model.train()(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    reference = Oracle()
    reference.base.requires_grad_(True)
    mean([t for row in ROWS for t in row_terms(reference, prompt, row)]).backward()
    for ours, theirs in zip(base.parameters(), reference.base.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) <= 1e-4
    assert (prompt.embedding.weight.grad is None) is frozen_prompt


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "CARTRIDGE"])
def test_a_prompt_that_became_nan_shows_in_the_loss(method: str) -> None:
    model, prompt = trainable_model(method)
    with torch.no_grad():
        next(p for p in prompt.parameters() if p.requires_grad)[0, 0] = float("nan")
    assert model(ROWS[1][None], labels=ROWS[1][None]).loss.isnan()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_prompt_longer_than_the_bases_positions(family: str) -> None:
    base = make_base(family)
    model = SoftPromptModel(base).train()
    model.add_prompt("t", make_prompt(base, length=MAX_POSITIONS + 1))
    ids = ROWS[2][None]
    with pytest.raises(ValueError, match=f"{MAX_POSITIONS + 1} virtual and 0 own tokens need"):
        model(ids, labels=ids)
