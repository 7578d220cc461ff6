# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer, TRL's SFTTrainer and Accelerate's loops drive the model as they drive a PEFT model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments, set_seed

import softprompt_fast as spf
from softprompt_fast import SoftPromptModel
from softprompt_fast.integrations.trainer_callbacks import SaveAdapter
from tests.models import VOCAB_SIZE, make_base, make_prompt, make_rows, relative_error
from tests.test_accumulation import Counter


@pytest.fixture(autouse=True)
def _no_state_of_other_loops() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_peft(length: int = 5) -> PeftModel:
    set_seed(3)
    return get_peft_model(make_base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))


def rows(count: int = 14) -> list[dict[str, Tensor]]:
    """Each row alone in its batch, PEFT and this package give the same: neither pads."""
    return [{"input_ids": ids, "labels": ids} for ids in make_rows([4 + i % 3 for i in range(count)])]


def answered(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Rows whose first token is no label, as collators that pack leave it, of lengths from 2 to 12."""
    found = []
    for i, row in enumerate(rows):
        ids = row["input_ids"].repeat(3)[: 2 + 5 * i % 11]
        found.append({"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])})
    return found


def collate(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def padded(name: str, value: int) -> Tensor:
        columns = [row[name] for row in features]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    mask = [{"mask": torch.ones_like(row["input_ids"])} for row in features]
    lengths = [row["mask"] for row in mask]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True),
    }


def make_trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    callbacks, metrics = options.pop("callbacks", None), options.pop("compute_metrics", None)
    return Trainer(
        model,
        TrainingArguments(**(defaults | options)),
        data_collator=collate,
        train_dataset=rows(),
        eval_dataset=rows(6),
        callbacks=callbacks,
        compute_metrics=metrics,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model: Any) -> Tensor:
    weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    assert len(weights) == 1
    return weights[0]


def test_as_with_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same losses at every step, same prompt at the end, and one run of the prompt a step; 14 rows in steps of four
    leave an incomplete one at the end of each epoch."""
    found = []
    for ours in (False, True):
        model: Any = make_peft()
        if ours:
            model = spf.accelerate(model)
            runs = Counter(model, monkeypatch)
        trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=4)
        trainer.train()
        found.append((losses(trainer), trained(model)))
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(norms) == 8 and min(norms) > 0
    assert runs() == (8, 8)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert relative_error(found[1][1], found[0][1]) <= 1e-4


def test_a_checkpoint_holds_what_trains(tmp_path: Path) -> None:
    model = spf.accelerate(make_peft())
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    make_trainer(model, tmp_path, callbacks=[SaveAdapter()], **options).train()
    state = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert list(state) == ["prompts.prompt_default.embedding.weight"]
    assert torch.equal(next(iter(state.values())), trained(model))
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "checkpoint-3")
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, trained(model))


def test_a_state_dict_is_what_trains() -> None:
    base = make_base()
    base.lm_head.weight = base.get_input_embeddings().weight
    model = SoftPromptModel(base, freeze_base=False)
    model.add_prompt("t", make_prompt(base))
    base.requires_grad_(False)
    prompt = ["prompts.prompt_t.embedding.weight"]
    assert list(model.state_dict()) == prompt
    assert list(torch.nn.Sequential(model).state_dict()) == ["0." + prompt[0]]
    base.get_input_embeddings().requires_grad_(True)  # tied: one tensor, one name
    trains = ["base.model.embed_tokens.weight", *prompt]
    assert list(model.state_dict()) == trains
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert (base.lm_head.weight == 0.5).all() and (trained(model.prompts) == 0.5).all()
    for name in trains:
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            model.load_state_dict({other: tensor for other, tensor in state.items() if other != name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"prompts.prompt_other.embedding.weight": state[prompt[0]]})
    whole = {f"base.{name}": torch.zeros_like(tensor) for name, tensor in base.state_dict().items()}
    model.load_state_dict(state | whole)  # weights that don't train are welcome
    assert all((parameter == 0).all() for parameter in base.parameters())


def test_label_smoothing_shifts_the_labels(tmp_path: Path) -> None:
    model = spf.accelerate(make_peft())
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.1)
    batch = collate(rows(3))
    found = trainer.compute_loss(model.train(), dict(batch))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_bf16(tmp_path: Path) -> None:
    """Autocast through Trainer, with accumulation: the losses of float32 up to bf16's noise."""
    found = []
    for bf16 in (False, True):
        trainer = make_trainer(
            spf.accelerate(make_peft()), tmp_path, gradient_accumulation_steps=2, max_steps=3, bf16=bf16
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-2) and found[1] != found[0]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_resumed_run_is_an_uninterrupted_one(wrapped: bool, tmp_path: Path) -> None:
    def make() -> Any:
        if wrapped:
            return spf.accelerate(make_peft())
        model = SoftPromptModel(make_base())
        model.add_prompt("t", make_prompt(model.base))
        return model

    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    whole = make_trainer(make(), tmp_path / "whole", **options)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 4

    interrupted = make_trainer(make(), tmp_path / "parts", callbacks=[Stop()], **options)
    interrupted.train()
    resumed = make_trainer(make(), tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert losses(resumed)[-5:] == pytest.approx(losses(whole)[-5:], rel=1e-6)
    assert relative_error(trained(resumed.model), trained(whole.model)) <= 1e-6


def test_evaluation_metrics_and_the_best_model(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def accuracy(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        labels, guesses = prediction.label_ids[:, 1:], prediction.predictions[:, :-1].argmax(-1)
        return {"accuracy": float((guesses == labels)[labels != -100].mean())}

    model = spf.accelerate(make_peft())
    trainer = make_trainer(
        model,
        tmp_path,
        max_steps=6,
        learning_rate=3.0,  # worse and worse: the best is no longer the last
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        per_device_eval_batch_size=3,
        compute_metrics=accuracy,
    )
    trainer.train()
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(history) == 3 and min(history) < history[-1]
    assert seen == [(6, 6, VOCAB_SIZE)] * 3
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert torch.equal(next(iter(best.values())), trained(model))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(history), rel=1e-6)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = spf.accelerate(make_peft())
        options = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        trainer = make_trainer(model, tmp_path, gradient_checkpointing=checkpointing, **options)
        trainer.train()
        found.append((losses(trainer), trained(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert relative_error(found[1][1], found[0][1]) <= 1e-6


def test_padded_rows_accumulate_to_the_same_step(tmp_path: Path) -> None:
    """Four rows in one batch, or in four: one loss over all of their tokens, one gradient."""
    found = []
    for batch, steps in ((4, 1), (1, 4)):
        model = spf.accelerate(make_peft())
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 4}
        make_trainer(model, tmp_path, **options).train()
        found.append(trained(model))
    assert relative_error(found[1], found[0]) <= 1e-5


def test_rows_flattened_by_transformers(tmp_path: Path) -> None:
    """``DataCollatorWithFlattening``: all rows of a batch in one, as if they were padded."""
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    found = []
    for flat in (False, True):
        model = spf.accelerate(make_peft())
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
        trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=6, **options)
        trainer.train_dataset, trainer.eval_dataset = answered(rows()), answered(rows(6))
        if flat:
            trainer.data_collator = flatten
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        found.append((losses(trainer) + norms, trainer.evaluate()["eval_loss"], trained(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert relative_error(found[1][2], found[0][2]) <= 1e-5


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``accumulate``, clipping, an epoch that ends inside a step, and ``save_state``."""
    found = []
    for ours in (False, True):
        accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
        model: Any = make_peft()
        if ours:
            model = spf.accelerate(model)
            runs = Counter(model, monkeypatch)
        model.train()
        loader = torch.utils.data.DataLoader(rows(10), batch_size=1, collate_fn=collate)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        found.append(trained(model))
    assert runs() == (3, 3)
    assert relative_error(found[1], found[0]) <= 1e-4
    accelerator.save_state(str(tmp_path))
    assert sum(os.path.getsize(path) for path in tmp_path.glob("model*")) < 4 * found[1].numel() + 1000
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(trained(model), found[1])


def test_what_an_ended_loop_left_announced_counts_no_more() -> None:
    """A plain loop after one of Accelerate's that was broken off."""
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    model = spf.accelerate(make_peft()).train()
    batches = list(accelerator.prepare(torch.utils.data.DataLoader(rows(3), batch_size=1, collate_fn=collate)))
    accelerator.gradient_state._set_sync_gradients(False)
    model(**batches[0]).loss.backward()
    assert next(p for p in model.parameters() if p.requires_grad).grad.abs().sum() > 0


def make_sft(model: Any, folder: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.test_pipeline import make_tokenizer

    data = options.pop("data", None) or [{"input_ids": row["input_ids"]} for row in rows()]
    data = datasets.Dataset.from_list([{name: ids.tolist() for name, ids in row.items()} for row in data])
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "max_steps": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    args = trl.SFTConfig(**(defaults | options))
    return trl.SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer("right"))


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft", "gradient_checkpointing": False}], ids=["nll", "dft"])
def test_sft_as_with_peft(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for ours in (False, True):
        model: Any = make_peft()
        if ours:
            model = spf.accelerate(model)
            runs = Counter(model, monkeypatch)
        trainer = make_sft(model, tmp_path / str(ours), gradient_accumulation_steps=4, **options)
        trainer.train()
        keys = ("loss", "mean_token_accuracy", "entropy", "grad_norm", "num_tokens")
        logs = [entry[key] for entry in trainer.state.log_history if "loss" in entry for key in keys]
        found.append((logs, trainer.evaluate()["eval_loss"], trained(model)))
    assert runs() == (4, 4)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    assert relative_error(found[1][2], found[0][2]) <= 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
        {"packing": True, "max_length": 16},
    ],
    ids=["padding-free", "padded to a multiple", "packed"],
)
def test_sft_of_packed_rows(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole dataset is one batch, so that packing changes nothing but where its rows stand."""
    found = []
    for packed in (False, True):
        model = spf.accelerate(make_peft())
        runs = Counter(model, monkeypatch)
        common = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "data": answered(rows())}
        trainer = make_sft(model, tmp_path / str(packed), **common, **(options if packed else {}))
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("position_ids" in batch) == packed and len(batch["input_ids"]) == (14 if not packed else 1)
        trainer.train()
        assert runs() == (4, 4)
        keys = ("loss", "mean_token_accuracy", "entropy", "grad_norm")
        logs = [entry[key] for entry in trainer.state.log_history if "loss" in entry for key in keys]
        found.append((logs, trainer.evaluate()["eval_loss"], trained(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert relative_error(found[1][2], found[0][2]) <= 1e-5


def test_sft_resumes_with_its_best_model(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    whole = make_sft(spf.accelerate(make_peft()), tmp_path, load_best_model_at_end=True, **options)
    whole.train()
    resumed = make_sft(spf.accelerate(make_peft()), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


def test_sft_with_a_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    model = SoftPromptModel(make_base())
    model.add_prompt("c", make_prompt(model.base, "CPT"))
    with pytest.raises(ValueError, match="CPT has a loss of its own"):
        make_sft(model, tmp_path).train()
