# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders, against PEFT on each row alone and unpadded."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from encoder_families import (
    ENCODER_DECODERS,
    METHODS,
    PAD,
    VOCAB,
    Family,
    assert_gradients_equal,
    columns,
    gradients,
    layouts,
    ragged_rows,
    stack,
    trained,
    with_adapter,
)
from packaging.version import Version
from torch import Tensor

import softprompt_fast as spf

T5, BART = ENCODER_DECODERS
BOTH = pytest.mark.parametrize("family", ENCODER_DECODERS, ids=lambda f: f.name)
CASES = [(f, method) for f in ENCODER_DECODERS for method in METHODS]
EVERY = pytest.mark.parametrize(("family", "method"), CASES, ids=[f"{f.name}-{m}" for f, m in CASES])


def ones(row: Tensor) -> Tensor:
    return torch.ones(1, len(row), dtype=torch.long)


def task_of(method: str, row: int) -> dict[str, Tensor]:
    return {"task_ids": torch.tensor([row % 3])} if method.startswith("MULTITASK") else {}


@EVERY
def test_equals_peft_on_each_row_alone(family: Family, method: str) -> None:
    model = with_adapter(family.build(), family, method)
    fast = spf.accelerate(model)
    assert isinstance(fast, spf.EncoderDecoderSoftPromptModel)
    parameters = trained(model)
    for batch, side in layouts():
        rows, targets = ragged_rows(batch), ragged_rows(batch, longest=6, seed=7)[::-1]
        ids, mask = stack(rows, side)
        if side == "none":
            rows = list(ids)
        labels, _ = stack(targets, "right", fill=-100)
        alone = [
            model(input_ids=r[None], attention_mask=ones(r), labels=t[None], **task_of(method, i))
            for i, (r, t) in enumerate(zip(rows, targets, strict=True))
        ]
        tasks = torch.arange(batch) % 3
        output = fast(input_ids=ids, attention_mask=mask, labels=labels, task_ids=tasks)
        assert output.logits.shape == (batch, labels.shape[1], VOCAB)
        for i, (row, target, expected) in enumerate(zip(rows, targets, alone, strict=True)):
            ours = output.logits[i, : len(target)]
            torch.testing.assert_close(ours, expected.logits[0, -len(target) :], rtol=1e-5, atol=2e-5)
            ours = output.encoder_last_hidden_state[i, columns(mask, i, ids.shape[1])]
            theirs = expected.encoder_last_hidden_state[0, -len(row) :]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        counts = torch.tensor([len(target) for target in targets])
        expected = (torch.stack([a.loss for a in alone]) * counts).sum() / counts.sum()
        torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
        if batch > 1:
            assert_gradients_equal(gradients(output.loss, parameters), gradients(expected, parameters))


@EVERY
def test_greedy_text_equals_peft_on_each_row_alone(family: Family, method: str) -> None:
    model = with_adapter(family.build(), family, method)
    fast = spf.accelerate(model)
    longest = 8
    for batch, side in layouts():
        rows = ragged_rows(batch)
        ids, mask = stack(rows, side)
        if side == "none":
            rows = list(ids)
        out = fast.generate(
            input_ids=ids,
            attention_mask=mask,
            task_ids=torch.arange(batch) % 3,
            max_new_tokens=longest,
            do_sample=False,
        )
        for i, row in enumerate(rows):
            expected = model.generate(
                input_ids=row[None],
                attention_mask=ones(row),
                max_new_tokens=longest,
                do_sample=False,
                **task_of(method, i),
            )[0]
            assert out[i, : len(expected)].tolist() == expected.tolist()
            assert (out[i, len(expected) :] == PAD).all()


@BOTH
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_beams_and_decoding_without_a_cache(family: Family, method: str) -> None:
    model = with_adapter(family.build(), family, method)
    fast = spf.accelerate(model)
    rows = ragged_rows(3)
    ids, mask = stack(rows, "left")
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    out = fast.generate(input_ids=ids, attention_mask=mask, **beams).view(3, 2, -1)
    for i, row in enumerate(rows):
        expected = model.generate(input_ids=row[None], attention_mask=ones(row), **beams)
        assert out[i, :, : expected.shape[1]].tolist() == expected.tolist()
    greedy = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert fast.generate(**greedy).tolist() == fast.generate(**greedy, use_cache=False).tolist()


@BOTH
def test_padded_decoder_inputs(family: Family) -> None:
    model = with_adapter(family.build(), family, "PREFIX_TUNING")
    fast = spf.accelerate(model)
    rows, starts = ragged_rows(3), ragged_rows(3, longest=6, seed=7)[::-1]
    ids, mask = stack(rows, "left")
    alone = [
        model(input_ids=r[None], attention_mask=ones(r), decoder_input_ids=s[None], labels=s[None])
        for r, s in zip(rows, starts, strict=True)
    ]
    counts = torch.tensor([len(start) for start in starts])
    expected = (torch.stack([a.loss for a in alone]) * counts).sum() / counts.sum()
    for side in ("left", "right"):
        decoder_ids, decoder_mask = stack(starts, side)
        output = fast(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=decoder_mask,
            labels=decoder_ids,
        )
        torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
        for i, a in enumerate(alone):
            ours = output.logits[i, columns(decoder_mask, i, 0)]
            torch.testing.assert_close(ours, a.logits[0], rtol=1e-5, atol=2e-5)


@BOTH
def test_prompt_per_row(family: Family, tmp_path: Any) -> None:
    base = family.build()
    fast = spf.EncoderDecoderSoftPromptModel(base)
    methods = {"soft": "PROMPT_TUNING", "multi": "MULTITASK_PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
    models: dict[str | None, Any] = {None: base}
    for seed, (name, method) in enumerate(methods.items()):
        models[name] = with_adapter(copy.deepcopy(base), family, method, seed=seed)
        models[name].save_pretrained(tmp_path / name)
        fast.load_prompt(name, tmp_path / name)
    names = ["prefix", None, "soft", "multi", "prefix"]
    rows = ragged_rows(3) + ragged_rows(2, seed=5)
    targets = ragged_rows(3, longest=6, seed=7)[::-1] + ragged_rows(2, longest=5, seed=8)
    ids, mask = stack(rows, "left")
    labels, _ = stack(targets, "right", fill=-100)
    tasks = torch.tensor([0, 1, 2, 2, 1])
    output = fast(input_ids=ids, attention_mask=mask, labels=labels, prompt=names, task_ids=tasks)
    text = fast.generate(
        input_ids=ids, attention_mask=mask, prompt=names, task_ids=tasks, max_new_tokens=6, do_sample=False
    )
    losses = []
    for i, (row, target, name) in enumerate(zip(rows, targets, names, strict=True)):
        task = {"task_ids": tasks[i : i + 1]} if name == "multi" else {}
        given = {"input_ids": row[None], "attention_mask": ones(row), **task}
        alone = models[name](**given, labels=target[None])
        theirs = alone.logits[0, -len(target) :]
        torch.testing.assert_close(output.logits[i, : len(target)], theirs, rtol=1e-5, atol=2e-5)
        losses.append(alone.loss * len(target))
        expected = models[name].generate(**given, max_new_tokens=6, do_sample=False)[0]
        assert text[i, : len(expected)].tolist() == expected.tolist()
    total = torch.stack(losses).sum() / sum(map(len, targets))
    torch.testing.assert_close(output.loss, total, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"])
def test_saved_adapter_round_trip(tmp_path: Any, family: Family, method: str) -> None:
    model = with_adapter(family.build(), family, method)
    model.save_pretrained(tmp_path / "theirs")
    fast = spf.EncoderDecoderSoftPromptModel.from_pretrained(family.build(), tmp_path / "theirs")
    fast.save_prompt("default", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(family.build(), tmp_path / "ours").eval()
    row, target = ragged_rows(1)[0][None], ragged_rows(1, seed=7)[0][None]
    task = task_of(method, 1)
    expected = model(input_ids=row, labels=target, **task)
    ours = fast(input_ids=row, labels=target, **task)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again(input_ids=row, labels=target, **task).logits, expected.logits, rtol=0, atol=0)


def skip_where_t5_drops_keywords(family: Family, fast: Any) -> None:
    """5.17's T5 keeps unknown keywords from its attention function, 5.23's does not; in between was not tried. There
    the prefix is expanded, exactly (the other tests of this file pass), but what follows is about sharing it."""
    if family is T5 and Version(transformers.__version__) < Version("5.23") and "expanded" in str(spf.explain(fast)):
        pytest.skip(f"transformers {transformers.__version__}: T5 drops keyword arguments, so its prefix is expanded")


@BOTH
def test_the_prefix_is_shared_and_the_paths_are_said(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(family.build(), family, "PREFIX_TUNING")
    fast = spf.accelerate(model)
    ids = torch.randint(5, VOCAB, (3, 5))
    shared = fast(input_ids=ids, labels=ids)
    text = fast.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    skip_where_t5_drops_keywords(family, fast)
    assert {layer.path for layer in spf.explain(fast).layers} == {"decoder: shared prefix"}
    assert len(spf.explain(fast).layers) == 3

    # The fallback, and a decoder that drops the keyword on its way, compute the same.
    monkeypatch.setattr(fast, "_why_expanded", "it is told to")
    torch.testing.assert_close(fast(input_ids=ids, labels=ids).logits, shared.logits, rtol=1e-5, atol=1e-5)
    assert fast.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist() == text.tolist()
    assert {(p.path, p.reason) for p in spf.explain(fast).layers} == {("decoder: expanded prefix", "it is told to")}
    stack_ = fast.base.get_decoder()
    for layer in stack_.block if family is T5 else stack_.layers:
        forward = layer.forward
        layer.forward = lambda *a, forward=forward, soft_prompt=None, **k: forward(*a, **k)
    for run in (
        lambda: fast.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist() == text.tolist(),
        lambda: torch.allclose(fast(input_ids=ids, labels=ids).logits, shared.logits, rtol=1e-5, atol=1e-5),
    ):
        monkeypatch.setattr(fast, "_why_expanded", None)
        assert run()
        assert {layer.path for layer in spf.explain(fast).layers} == {"decoder: expanded prefix"}


@BOTH
def test_eager_attention(family: Family) -> None:
    base = family.build()
    base.set_attn_implementation("eager")
    model = with_adapter(base, family, "PREFIX_TUNING")
    row, target = ragged_rows(1)[0][None], ragged_rows(1, seed=7)[0][None]
    expected = model(input_ids=row, labels=target).logits
    torch.testing.assert_close(spf.accelerate(model)(input_ids=row, labels=target).logits, expected)


@EVERY
def test_gradient_checkpointing_changes_nothing(family: Family, method: str) -> None:
    model = with_adapter(family.build(), family, method)
    fast = spf.accelerate(model).train()
    parameters = trained(model)
    ids, mask = stack(ragged_rows(3), "left")
    kwargs = {"input_ids": ids, "attention_mask": mask, "labels": ids, "task_ids": torch.arange(3)}
    expected = fast(**kwargs)
    skip_where_t5_drops_keywords(family, fast)
    gradient = gradients(expected.loss, parameters)
    fast.base.gradient_checkpointing_enable({"use_reentrant": False})
    again = fast(**kwargs)
    torch.testing.assert_close(again.logits, expected.logits, rtol=1e-6, atol=1e-6)
    assert_gradients_equal(gradients(again.loss, parameters), gradient)
    if "shared" not in str(spf.explain(fast)):
        return
    fast._why_expanded = "it is told to"
    with pytest.raises(ValueError, match="gradient checkpointing"):
        fast(**kwargs)


@BOTH
def test_attention_dropout_takes_a_path_that_has_dropout(family: Family) -> None:
    fast = spf.accelerate(with_adapter(family.build(), family, "PREFIX_TUNING"))
    ids = torch.randint(5, VOCAB, (3, 5))
    exact = fast(input_ids=ids, labels=ids).logits
    fast.train()
    attentions = [m for m in fast.base.modules() if getattr(m, "is_causal", False)]
    assert len(attentions) == 3
    for module in attentions:
        module.dropout = 1e-30  # the dropout path, dropping nothing
    torch.testing.assert_close(fast(input_ids=ids, labels=ids).logits, exact, rtol=1e-5, atol=1e-5)
    for module in attentions:
        module.dropout = 0.5
    assert not torch.allclose(fast(input_ids=ids, labels=ids).logits, exact, atol=1e-2)


# ---- bad input ---------------------------------------------------------------------------------------------------

IDS = torch.full((2, 4), 7)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"input_ids": IDS}, "decoder_input_ids: expected them"),
        ({"input_ids": IDS, "labels": IDS[:1]}, "labels: expected a tensor with 2 rows"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])},
         "attention_mask: row 0 has zeros between"),
        ({"input_ids": IDS, "labels": IDS, "decoder_attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])},
         "decoder_attention_mask: row 0 has zeros between"),
        ({"input_ids": IDS, "labels": torch.full((2, 22), 7)},
         "decoder_input_ids: 3 virtual tokens and 22.*max_position_embeddings=24"),
        ({"input_ids": torch.full((2, 25), 7), "labels": IDS},
         "input_ids: 0 virtual tokens and 25 own.*max_position_embeddings=24"),
        ({"input_ids": IDS, "labels": IDS, "past_key_values": object()}, "past_key_values: not supported"),
        ({"input_ids": IDS, "labels": IDS, "is_causal": True}, "is_causal: not supported"),
    ],
)  # fmt: skip
def test_bad_input_names_the_knob(kwargs: Any, words: str) -> None:
    fast = spf.accelerate(with_adapter(BART.build(), BART, "PREFIX_TUNING"))
    with pytest.raises(ValueError, match=words):
        fast(**kwargs)


def test_generate_refuses_what_it_would_get_wrong() -> None:
    fast = spf.accelerate(with_adapter(BART.build(), BART, "PREFIX_TUNING"))
    with pytest.raises(ValueError, match="cache_implementation"):
        fast.generate(input_ids=IDS, cache_implementation="static")
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        fast.generate(input_ids=IDS, decoder_attention_mask=torch.ones_like(IDS))
    with pytest.raises(ValueError, match="is_causal"):
        fast.generate(input_ids=IDS, is_causal=True)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        fast.generate(input_ids=IDS, prompt=["default", None], return_dict_in_generate=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens: 3 virtual tokens and 22 own"):
        fast.generate(input_ids=IDS, max_new_tokens=40, min_new_tokens=40, do_sample=False)


def test_prompts_that_do_not_fit_are_refused() -> None:
    base = BART.build()
    fast = spf.EncoderDecoderSoftPromptModel(base)
    with pytest.raises(ValueError, match=r"task_type.*CAUSAL_LM"):
        fast.add_prompt("lm", spf.SoftPrompt.for_model("PROMPT_TUNING", base, num_virtual_tokens=2))
    config = BART.config()
    config.decoder_layers = 2
    torch.manual_seed(0)
    fewer = with_adapter(BART.model(config), BART, "PREFIX_TUNING")
    with pytest.raises(ValueError, match="num_layers"):
        spf.accelerate(fewer)
    with pytest.raises(TypeError, match="encoder-decoder"):
        spf.EncoderSoftPromptModel(base)
