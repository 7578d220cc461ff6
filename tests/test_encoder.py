# SPDX-License-Identifier: Apache-2.0
"""Encoders and task heads over causal backbones, against PEFT on each row alone and unpadded."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from encoder_families import (
    ENCODERS,
    METHODS,
    PAD,
    VIRTUAL,
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
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.row_layout import RowLayout
from tests.device import cpu_only, randint, seeded

BERT_CLASSIFIER = ENCODERS[0]


def family(name: str) -> Family:
    return next(f for f in ENCODERS if f.name == name)


def row_alone(model: peft.PeftModel, row: Tensor, method: str, task: int, **labels: Tensor) -> Any:
    """PEFT on one row. Labels come in own positions, and PEFT's embedding methods want virtual ones counted."""
    front = 0 if "PREFIX" in method or method == "CARTRIDGE" else VIRTUAL
    kwargs: dict[str, Any] = {name: value + front for name, value in labels.items() if name.endswith("positions")}
    if (of_tokens := labels.get("labels")) is not None:
        front = front if of_tokens.dim() == 2 else 0
        kwargs["labels"] = torch.nn.functional.pad(of_tokens, (front, 0), value=-100)
    if method.startswith("MULTITASK"):
        kwargs["task_ids"] = torch.tensor([task])
    return model(input_ids=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **kwargs)


def labels_of(task: str, rows: list[Tensor]) -> list[dict[str, Tensor]]:
    """Random labels of each row, in own positions."""
    generator = seeded(3)
    if task == "SEQ_CLS":
        return [{"labels": randint(0, 3, (1,), generator=generator)} for _ in rows]
    if task == "TOKEN_CLS":
        return [{"labels": randint(0, 3, (1, len(row)), generator=generator)} for row in rows]
    if task == "QUESTION_ANS":
        names = ("start_positions", "end_positions")
        return [{name: randint(0, len(row), (1,), generator=generator) for name in names} for row in rows]
    return [{} for _ in rows]


def batched_labels(task: str, labels: list[dict[str, Tensor]], mask: Tensor | None, width: int) -> dict[str, Tensor]:
    batch = {}
    for name in labels[0]:
        if task == "TOKEN_CLS":
            # At padding stands a real class, not -100: padding must not count by itself.
            batch[name] = torch.full((len(labels), width), 1)
            for i, row in enumerate(labels):
                batch[name][i, columns(mask, i, width)] = row[name][0]
        else:
            first = [columns(mask, i, width).start if name.endswith("positions") else 0 for i in range(len(labels))]
            batch[name] = torch.cat([row[name] for row in labels]) + torch.tensor(first)
    return batch


def assert_rows_equal(output: Any, alone: list[Any], mask: Tensor | None, width: int) -> None:
    for i, expected in enumerate(alone):
        own = columns(mask, i, width)
        for name in ("logits", "last_hidden_state", "start_logits", "end_logits", "pooler_output"):
            if name not in expected:
                continue
            ours, theirs = output[name][i], expected[name][0]
            if name not in ("pooler_output",) and not (name == "logits" and theirs.dim() == 1):
                length = own.stop - own.start
                assert len(ours) == width
                ours, theirs = ours[own], theirs[-length:]
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=2e-5, msg=lambda m, i=i, n=name: f"row {i} {n}: {m}"
            )


# QUESTION_ANS and FEATURE_EXTRACTION: PEFT 0.21 doesn't hand task_ids to multitask prompts there, and raises.
CASES = [
    (f, method)
    for f in ENCODERS
    for method in METHODS
    if not (method.startswith("MULTITASK") and f.task in ("QUESTION_ANS", "FEATURE_EXTRACTION"))
]


def assert_equals_peft_on_each_row_alone(family: Family, method: str) -> set[str]:
    """The paths that its layers take."""
    model = with_adapter(family.build(), family, method)
    fast = spf.accelerate(model)
    parameters = trained(model)
    for batch, side in layouts():
        rows = ragged_rows(batch)
        ids, mask = stack(rows, side)
        if side == "none":
            rows = list(ids)
        width = ids.shape[1]
        labels = labels_of(family.task, rows)
        tasks = torch.arange(batch) % 3
        alone = [row_alone(model, row, method, int(t), **lab) for row, t, lab in zip(rows, tasks, labels, strict=True)]
        kwargs = batched_labels(family.task, labels, mask, width)
        output = fast(input_ids=ids, attention_mask=mask, task_ids=tasks, **kwargs)
        assert_rows_equal(output, alone, mask, width)
        if labels[0]:
            weights = torch.tensor([float(len(row)) if family.task == "TOKEN_CLS" else 1.0 for row in rows])
            expected = (torch.stack([a.loss for a in alone]) * weights).sum() / weights.sum()
            torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
        else:
            weight = torch.randn(width, 32)
            shares = [
                (a.last_hidden_state[0, -len(r) :] * weight[: len(r)]).sum() for a, r in zip(alone, rows, strict=True)
            ]
            expected = torch.stack(shares).sum()
            own = [columns(mask, i, width) for i in range(batch)]
            output.loss = sum(
                (output.last_hidden_state[i, c] * weight[: c.stop - c.start]).sum() for i, c in enumerate(own)
            )
        assert_gradients_equal(gradients(output.loss, parameters), gradients(expected, parameters))
    return {layer.path for layer in spf.explain(fast).layers}


SHARED, IN_EVERY_ROW = {"shared prefix"}, {"virtual tokens in every row"}


@pytest.mark.parametrize(("family", "method"), CASES, ids=[f"{f.name}-{m}" for f, m in CASES])
def test_equals_peft_on_each_row_alone(family: Family, method: str) -> None:
    causal = family.name.startswith(("Llama", "GPT2")) and family.task != "QUESTION_ANS"
    shared = causal or method.startswith(("PREFIX_TUNING", "CARTRIDGE"))
    assert assert_equals_peft_on_each_row_alone(family, method) == (SHARED if shared else IN_EVERY_ROW)


@pytest.mark.parametrize(("method", "path"), [("PROMPT_TUNING", IN_EVERY_ROW), ("PREFIX_TUNING", SHARED)])
@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaModel"])
def test_a_decoder_that_its_config_makes_an_encoder(name: str, method: str, path: set[str]) -> None:
    causal = family(name)

    def config() -> Any:
        found = causal.config()
        found.is_causal = False  # its attention modules say True all the same
        return found

    assert assert_equals_peft_on_each_row_alone(Family(causal.model, config, causal.task), method) == path


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
@pytest.mark.parametrize("method", ["P_TUNING", "PREFIX_TUNING"])
def test_adapter_directory_brings_its_head_and_leaves_the_base_alone(tmp_path: Any, name: str, method: str) -> None:
    of = family(name)
    model = with_adapter(of.build(), of, method)
    model.save_pretrained(tmp_path / "theirs")
    rows = ragged_rows(3)
    alone = [row_alone(model, row, method, 0) for row in rows]

    base = of.build()
    before = copy.deepcopy(base.state_dict())
    ids, mask = stack(rows, "left")
    plain = [base(input_ids=row[None]).logits[0] for row in rows]
    fast = spf.EncoderSoftPromptModel.from_pretrained(base, tmp_path / "theirs", prompt_name="a.b")
    assert_rows_equal(fast(input_ids=ids, attention_mask=mask), alone, mask, ids.shape[1])
    torch.testing.assert_close(fast(input_ids=ids, attention_mask=mask, prompt=None).logits, torch.stack(plain))
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())

    fast.save_prompt("a.b", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(of.build(), tmp_path / "ours").eval()
    for row, expected in zip(rows, alone, strict=True):
        torch.testing.assert_close(row_alone(again, row, method, 0).logits, expected.logits, rtol=0, atol=0)


def test_prompt_per_row_with_heads_of_their_own() -> None:
    # One base, three adapters with a head each, and a row without any.
    base = BERT_CLASSIFIER.build()
    methods = {"p": "P_TUNING", "k": "PREFIX_TUNING", "c": "CARTRIDGE"}
    fast = spf.EncoderSoftPromptModel(base)
    models = {}
    for seed, (name, method) in enumerate(methods.items()):
        models[name] = with_adapter(copy.deepcopy(base), BERT_CLASSIFIER, method, seed=seed)
        fast.add_prompt(name, spf.accelerate(models[name]).get_prompt("default"))
    rows = ragged_rows(3) + ragged_rows(2, seed=5)
    names = ["k", None, "p", "k", "c"]
    ids, mask = stack(rows, "left")
    labels = torch.tensor([0, 1, 2, 0, 1])
    output = fast(input_ids=ids, attention_mask=mask, labels=labels, prompt=names, output_hidden_states=True)
    alone = [
        base(input_ids=row[None], labels=label[None])
        if name is None
        else row_alone(models[name], row, methods[name], 0, labels=label[None])
        for row, name, label in zip(rows, names, labels, strict=True)
    ]
    assert_rows_equal(output, alone, mask, ids.shape[1])
    torch.testing.assert_close(output.loss, torch.stack([a.loss for a in alone]).mean(), rtol=1e-5, atol=1e-6)
    assert [tuple(h.shape) for h in output.hidden_states] == [(5, ids.shape[1], 32)] * 3


def test_multi_label_targets_whose_width_is_the_number_of_tokens() -> None:
    # [B, 3] float targets of a 3-label head, with 3 tokens a row: they are no token labels.
    model = with_adapter(BERT_CLASSIFIER.build(), BERT_CLASSIFIER, "PREFIX_TUNING")
    fast = spf.accelerate(model)
    ids = torch.randint(5, VOCAB, (2, 3))
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    alone = torch.stack(
        [model(input_ids=row[None], labels=lab[None]).loss for row, lab in zip(ids, labels, strict=True)]
    )
    torch.testing.assert_close(fast(input_ids=ids, labels=labels).loss, alone.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("name", ["BertForTokenClassification", "GPT2ForTokenClassification"])
def test_token_types_and_input_embeddings(name: str, method: str) -> None:
    of = family(name)
    model = with_adapter(of.build(), of, method)
    fast = spf.accelerate(model)
    rows = ragged_rows(3)
    types = [torch.arange(len(row)) % 2 for row in rows]
    ids, mask = stack(rows, "left")
    alone = [model(input_ids=r[None], token_type_ids=t[None]) for r, t in zip(rows, types, strict=True)]
    embeds = model.get_base_model().get_input_embeddings()(ids)
    stacked = stack(types, "left", fill=0)[0]
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        assert_rows_equal(fast(**given, attention_mask=mask, token_type_ids=stacked), alone, mask, ids.shape[1])


def test_classifier_without_a_pad_token_runs_any_batch() -> None:
    of = family("LlamaForSequenceClassification")
    model = with_adapter(of.build(), of, "PREFIX_TUNING")
    model.config.pad_token_id = None
    fast = spf.accelerate(model)
    rows = ragged_rows(3)
    ids, mask = stack(rows, "right")
    alone = [row_alone(model, row, "PREFIX_TUNING", 0) for row in rows]
    assert_rows_equal(fast(input_ids=ids, attention_mask=mask), alone, mask, ids.shape[1])


@pytest.mark.parametrize("method", ["MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_fallback_is_exact_and_said(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = family(name)
    model = with_adapter(of.build(), of, method)
    rows = ragged_rows(3)
    ids, mask = stack(rows, "left")
    alone = [row_alone(model, row, method, i) for i, row in enumerate(rows)]
    monkeypatch.setattr(hooks, "install", lambda base: "it is told to")
    fast = spf.accelerate(model)
    output = fast(input_ids=ids, attention_mask=mask, task_ids=torch.arange(3))
    assert_rows_equal(output, alone, mask, ids.shape[1])
    paths = {(layer.path, layer.reason) for layer in spf.explain(fast).layers}
    if method == "PREFIX_TUNING":
        assert paths == {("expanded prefix", "it is told to")}
    elif name.startswith("Llama"):
        assert paths == {("virtual tokens in every row", "it is told to")}


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_one_prefix_whatever_the_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = family("LlamaForSequenceClassification")
    fast = spf.accelerate(with_adapter(of.build(), of, method))
    seen: list[tuple[int, ...]] = []
    attention = hooks.prefix_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, **kwargs: Any) -> Any:
        seen.append((len(query), *prefix_key.shape, *prefix_value.shape))
        return attention(query, key, value, prefix_key, prefix_value, **kwargs)

    monkeypatch.setattr(hooks, "prefix_attention", spy)
    for batch in (1, 5):
        seen.clear()
        fast(input_ids=torch.randint(5, VOCAB, (batch, 4)))
        assert seen == [(batch, 2, VIRTUAL, 8, 2, VIRTUAL, 8)] * 2  # two layers, two key/value heads of 8


def test_a_row_that_ends_in_the_pad_token() -> None:
    # With pad = end-of-text a row may well end in it. PEFT pools that token behind an embedding prompt, and the last
    # other one behind a prefix.
    of = family("GPT2ForSequenceClassification")
    row = torch.tensor([9, 8, 7, PAD])
    ids, mask = stack([row, row[:3]], "left")
    for method in ("PROMPT_TUNING", "PREFIX_TUNING"):
        model = with_adapter(of.build(), of, method)
        alone = [row_alone(model, r, method, 0) for r in (row, row[:3])]
        assert_rows_equal(spf.accelerate(model)(input_ids=ids, attention_mask=mask), alone, mask, 4)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("name", ["BertForTokenClassification", "LlamaForSequenceClassification"])
def test_training_a_loaded_adapter_trains_prompt_and_head(tmp_path: Any, name: str, method: str) -> None:
    of = family(name)
    theirs = with_adapter(of.build(), of, method)
    theirs.save_pretrained(tmp_path)  # PEFT refuses to load a prompt for training; this doesn't
    base = of.build().requires_grad_(False)
    fast = spf.EncoderSoftPromptModel.from_pretrained(base, tmp_path, trainable=True)
    ids = torch.stack(ragged_rows(1) * 2)
    labels = torch.tensor([2, 0]) if of.task == "SEQ_CLS" else torch.randint(0, 3, ids.shape)
    front = VIRTUAL if of.task == "TOKEN_CLS" and method == "PROMPT_TUNING" else 0
    their_labels = torch.nn.functional.pad(labels, (front, 0), value=-100) if front else labels
    before = fast(input_ids=ids, labels=labels).loss.item()
    for model, kwargs in ((fast, {"labels": labels}), (theirs, {"labels": their_labels})):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        model(input_ids=ids, **kwargs).loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
    after = fast(input_ids=ids, labels=labels).loss
    assert after.item() < before
    torch.testing.assert_close(after, theirs(input_ids=ids, labels=their_labels).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["RobertaForTokenClassification", "GPT2ForSequenceClassification"])
def test_eager_attention(name: str) -> None:
    of = family(name)
    base = of.build()
    base.set_attn_implementation("eager")
    model = with_adapter(base, of, "PREFIX_TUNING")
    rows = ragged_rows(3)
    ids, mask = stack(rows, "left")
    alone = [row_alone(model, row, "PREFIX_TUNING", 0) for row in rows]
    assert_rows_equal(spf.accelerate(model)(input_ids=ids, attention_mask=mask), alone, mask, ids.shape[1])


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_gradient_checkpointing_changes_nothing(name: str, method: str) -> None:
    of = family(name)
    model = with_adapter(of.build(), of, method)
    fast = spf.accelerate(model).train()
    parameters = trained(model)
    ids, mask = stack(ragged_rows(3), "left")
    kwargs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    expected = gradients(fast(**kwargs).loss, parameters)
    fast.base.gradient_checkpointing_enable({"use_reentrant": False})
    assert_gradients_equal(gradients(fast(**kwargs).loss, parameters), expected)


def test_a_model_that_drops_the_keyword_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    model = with_adapter(BERT_CLASSIFIER.build(), BERT_CLASSIFIER, "PREFIX_TUNING")
    fast = spf.accelerate(model)
    for layer in fast.base.bert.encoder.layer:
        forward = layer.forward
        layer.forward = lambda *a, forward=forward, soft_prompt=None, **k: forward(*a, **k)
    rows = ragged_rows(1)
    alone = [row_alone(model, row, "PREFIX_TUNING", 0) for row in rows]
    with caplog.at_level("WARNING", "softprompt_fast"):
        output = fast(input_ids=rows[0][None])
    assert_rows_equal(output, alone, None, len(rows[0]))
    assert "keyword" in caplog.text
    assert {layer.path for layer in spf.explain(fast).layers} == {"expanded prefix"}


def test_attention_dropout_takes_a_path_that_has_dropout() -> None:
    config = family("BertModel").config()
    config.attention_probs_dropout_prob = 0.5
    torch.manual_seed(0)
    of = family("BertModel")
    model = with_adapter(transformers.BertModel(config), of, "PREFIX_TUNING")
    fast = spf.accelerate(model)
    ids = torch.randint(5, VOCAB, (2, 6))
    exact = fast(input_ids=ids).last_hidden_state
    fast.train()
    dropped = fast(input_ids=ids).last_hidden_state
    for module in fast.base.modules():
        if hasattr(module, "attention_head_size"):
            module.dropout.p = 1e-30  # the dropout path, dropping nothing
    torch.testing.assert_close(fast(input_ids=ids).last_hidden_state, exact, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dropped, exact, atol=1e-2)


def test_half_precision_keeps_rows_independent() -> None:
    of = family("BertModel")
    model = with_adapter(of.build(), of, "PREFIX_TUNING").to(torch.bfloat16)
    fast = spf.accelerate(model)
    rows = ragged_rows(3)
    ids, mask = stack(rows, "left")
    output = fast(input_ids=ids, attention_mask=mask)
    assert output.last_hidden_state.dtype == torch.bfloat16
    for i, row in enumerate(rows):
        expected = row_alone(model, row, "PREFIX_TUNING", 0).last_hidden_state[0].float()
        ours = output.last_hidden_state[i, columns(mask, i, ids.shape[1])].float()
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.05)


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fast() -> Any:
    return spf.accelerate(with_adapter(BERT_CLASSIFIER.build(), BERT_CLASSIFIER, "MULTITASK_PROMPT_TUNING"))


IDS = torch.full((2, 4), 7)


@cpu_only
@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"input_ids": IDS}, ValueError, "task_ids"),
        ({"input_ids": IDS, "task_ids": torch.tensor([0, 9])}, IndexError, "task_ids"),
        ({"input_ids": IDS, "task_ids": torch.tensor([0])}, ValueError, "task_ids.*2 rows"),
        ({"input_ids": IDS, "prompt": "legal"}, KeyError, "unknown prompt 'legal'; known prompts: 'default'"),
        ({"input_ids": IDS, "prompt": ["default"]}, ValueError, r"prompt: expected one name per row \(2 rows\)"),
        ({"input_ids": IDS, "prompt": 3}, TypeError, "prompt"),
        ({"input_ids": IDS, "prompt": None, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])}, ValueError,
         "attention_mask: row 1 has zeros between"),
        ({"input_ids": IDS, "prompt": None, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, ValueError,
         "attention_mask: row 1 has no ones"),
        ({"input_ids": IDS, "prompt": None, "attention_mask": torch.ones(2, 5)}, ValueError,
         "attention_mask: expected"),
        ({"input_ids": IDS[:0], "prompt": None}, ValueError, "input_ids: expected"),
        ({"prompt": None}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS + VOCAB, "task_ids": torch.tensor([0, 1])}, IndexError, ""),
        ({"input_ids": IDS, "task_ids": torch.tensor([0, 1]), "position_ids": IDS}, ValueError, "position_ids"),
        ({"input_ids": IDS, "prompt": None, "output_attentions": True}, ValueError, "output_attentions"),
        ({"input_ids": IDS, "prompt": None, "is_causal": False}, ValueError, "is_causal: not supported"),
        ({"input_ids": torch.full((1, 22), 7), "task_ids": torch.tensor([0])}, ValueError,
         "3 virtual tokens and 22 own tokens make 25 positions.*24"),
    ],
)  # fmt: skip
def test_bad_input_names_the_knob(fast: Any, kwargs: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fast(**kwargs)


def test_roberta_has_fewer_positions_than_its_config_says() -> None:
    of = family("RobertaModel")
    fast = spf.accelerate(with_adapter(of.build(), of, "PREFIX_TUNING"))
    longest = 24 - (PAD + 1) - VIRTUAL
    assert fast(input_ids=torch.full((1, longest), 7)).last_hidden_state.shape[1] == longest
    with pytest.raises(ValueError, match="max_position_embeddings"):
        fast(input_ids=torch.full((1, longest + 1), 7))


def test_prompts_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    small = BERT_CLASSIFIER.build()
    config = BERT_CLASSIFIER.config()
    config.hidden_size = 48
    model = with_adapter(transformers.BertForSequenceClassification(config), BERT_CLASSIFIER, "PROMPT_TUNING")
    model.save_pretrained(tmp_path / "wide")
    fast = spf.EncoderSoftPromptModel(small)
    with pytest.raises(ValueError, match=r"token_dim.*32.*48"):
        fast.load_prompt("wide", tmp_path / "wide")

    config = BERT_CLASSIFIER.config()
    config.num_labels = 5
    model = with_adapter(transformers.BertForSequenceClassification(config), BERT_CLASSIFIER, "PROMPT_TUNING")
    model.save_pretrained(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"modules_to_save: classifier\..*the base has \[3.*the adapter \[5"):
        fast.load_prompt("labels", tmp_path / "labels")
    assert fast.prompt_names == []

    prompt = spf.SoftPrompt.for_model("PROMPT_TUNING", small, num_virtual_tokens=2)  # task_type CAUSAL_LM
    with pytest.raises(ValueError, match="task_type"):
        fast.add_prompt("lm", prompt)
    with pytest.raises(TypeError, match="encoder-decoder"):
        spf.EncoderSoftPromptModel(transformers.T5ForConditionalGeneration(transformers.T5Config(**_TINY_T5)))


_TINY_T5 = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


def test_a_prefix_that_peft_would_ignore_is_refused() -> None:
    # T5's encoder drops past_key_values, so PEFT computes without the prefix and says nothing.
    base = transformers.T5EncoderModel(transformers.T5Config(**_TINY_T5, is_encoder_decoder=False)).eval()
    model = peft.get_peft_model(base, METHODS["PREFIX_TUNING"]("FEATURE_EXTRACTION")).eval()
    ids = torch.randint(5, 11, (1, 4))
    theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.equal(theirs, base(input_ids=ids).last_hidden_state)
    with pytest.raises(ValueError, match="past_key_values"):
        spf.accelerate(model)


def test_what_peft_refuses_still_raises_there() -> None:
    """The record of what PEFT 0.21 has not; if this fails, there are cases to add above."""
    with pytest.raises(ValueError, match="CAUSAL_LM"):
        peft.CPTConfig(task_type="SEQ_CLS", cpt_token_ids=[1], cpt_mask=[1], cpt_tokens_type_mask=[4])
    ids = torch.full((1, 4), 7)
    for name in ("BertForQuestionAnswering", "BertModel"):
        of = family(name)
        model = with_adapter(of.build(), of, "MULTITASK_PROMPT_TUNING")
        with pytest.raises(ValueError, match="task_ids"):
            model(input_ids=ids, task_ids=torch.tensor([0]))
        fast = spf.accelerate(model)  # ours takes them
        assert torch.isfinite(next(iter(fast(input_ids=ids, task_ids=torch.tensor([0])).values()))).all()


# ---- row layout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_row_layout_round_trip(side: str, extra: int, at_end: bool) -> None:
    ids, mask = stack(ragged_rows(3), side)
    if mask is not None:  # padding at both ends, in every row
        ids, mask = (torch.nn.functional.pad(x, (extra, extra)) for x in (ids, mask))
    layout = RowLayout.of(mask, ids.shape, ids.device, at_end=at_end, name="attention_mask")
    packed = layout.pack(ids)
    inside = layout.mask(0).bool()
    real = torch.ones_like(ids) if mask is None else mask
    assert packed.shape[1] == layout.packed == int(real.sum(1).max())
    assert layout.full == (mask is None)
    assert torch.equal(packed[inside], ids[real.bool()])
    assert torch.equal(layout.unpack(packed), ids * real)
    assert torch.equal(layout.positions(2)[:, 2:][inside], torch.cat([torch.arange(n) + 2 for n in real.sum(1)]))
    labels = layout.pack_labels(ids, 2)
    assert torch.equal(labels[:, 2:][inside], ids[real.bool()]) and int((labels != -100).sum()) == int(real.sum())
