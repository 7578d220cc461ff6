# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast train``: what it learns and leaves, what a kill costs it, and what it refuses."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState, TrainingArguments

from softprompt_fast import PrefixKV, SoftPromptModel, _io
from softprompt_fast.cli._session import Exit
from softprompt_fast.errors import NonFiniteLossError
from softprompt_fast.integrations import trainer_callbacks
from softprompt_fast.integrations.peft import load_adapter
from softprompt_fast.integrations.trainer_callbacks import CommitCheckpoint, commit, is_committed, recover
from softprompt_fast.prompt import METHODS
from softprompt_fast.train import data
from softprompt_fast.train import run as training
from softprompt_fast.train.data import Columns, Example, Row
from tests.models import Oracle, make_model, make_prompt, make_rows
from tests.test_cli import ROOT, WORDS, assert_failed, call, save_base

STEPS, INTERVAL = 24, 4
SAVED = "<prefix>"  # stands for the folder of one, which a parameter can't know


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def write_reviews(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Rows whose target is one word of their input: something a prompt can teach the tiny base."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            mood, label = rng.choice([("good", "positive"), ("bad", "negative")])
            words = rng.choices(["the", "film", "is", "a"], k=rng.randint(1, 9))
            text = " ".join(["Review :", *words, mood, "Sentiment :"])
            file.write(json.dumps({"prompt": text, "completion": label}) + "\n")
    return path


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("data") / "reviews.jsonl")


def arguments(base: Path, reviews: Path, output: Path, *more: object) -> list[str]:
    """A command line; options given in `more` win, as the last one does."""
    args = ["train", reviews, "-o", output, "--base", base, "-P", 4, "--batch-size", 4, "--steps", STEPS]
    args += ["--save-every", INTERVAL, "--eval-every", 2 * INTERVAL, "--no-tensorboard", *more]
    return [str(arg) for arg in args]


@pytest.fixture(scope="module")
def finished(base: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished")
    result = call(*arguments(base, reviews, output, "--json", "--tensorboard"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == report_of(output)
    return output


def report_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def losses_of(output: Path) -> list[float]:
    return [entry["loss"] for entry in report_of(output)["curve"]["train"]]


def adapter_of(output: Path) -> torch.Tensor:
    return load_file(output / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]


# ---- what a run leaves ------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_results(base: Path, reviews: Path, finished: Path):
    report = report_of(finished)
    train, validation = report["curve"]["train"], report["curve"]["validation"]
    assert [entry["step"] for entry in train] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in validation] == [0, 8, 16, 24]
    assert report["final"]["loss"] < 0.7 * validation[0]["loss"]
    assert report["final"]["loss"] == pytest.approx(min(entry["loss"] for entry in validation), rel=1e-5)
    assert report["data"]["train"]["rows"] + report["data"]["validation"]["rows"] == 60
    assert report["trained_parameters"] == 4 * 32 and report["stopped"] == "all steps"
    assert report["training_seconds"] > 0 and report["peak_memory_bytes"] > 1e8
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")

    # Adapter and prefix are the same prompt, and the report's numbers are what they give.
    model = SoftPromptModel.from_pretrained(str(base), finished / "adapter", prompt_name="adapter")
    model.add_prompt("prefix", PrefixKV.from_pretrained(finished / "prefix", base_model=model.base))
    _, held_out = data.split_rows(data.read_rows(str(reviews)), 0.1, 0)
    ids = [[WORDS.index(word) for word in f"{row.input} {row.target}".split()] for row in held_out]
    examples = [Example(row.line, tokens, len(tokens) - 1) for row, tokens in zip(held_out, ids, strict=True)]
    for name in ("adapter", "prefix"):
        found = training.score(model, name, examples, partial(data.collate, pad_token_id=0), 3)
        assert found.loss == pytest.approx(report["final"]["loss"], rel=1e-5)
        assert found.accuracy == found.row_accuracy == report["final"]["accuracy"]


def test_peft_loads_the_adapter(base: Path, finished: Path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    row = torch.tensor([[2, 3, 4, 5]])
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), finished / "adapter").eval()
    ours = SoftPromptModel.from_pretrained(str(base), finished / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=row).logits, theirs(input_ids=row).logits[:, 4:])


def test_tensorboard_shows_the_run(finished: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second", "eval/loss", "eval/accuracy"} <= set(tags)
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses_of(finished))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, base: Path, reviews: Path, tmp_path: Path):
    more = {"CPT": ["--init", "examples:3"], "MULTITASK_PROMPT_TUNING": ["--init", "vocab"]}
    more["CARTRIDGE"] = ["--init", "text:the film is good", "-P", 4]
    more["P_TUNING"] = ["--option", "encoder_reparameterization_type=LSTM", "--option", "encoder_hidden_size=16"]
    rate = 0.1 if method in ("PREFIX_TUNING", "CARTRIDGE") else 0.02  # their values are of order one
    options = ["--method", method.lower().replace("_", "-"), "--learning-rate", rate, *more.get(method, [])]
    result = call(*arguments(base, reviews, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    assert report["method"] == method
    assert report["final"]["loss"] < 0.9 * report["curve"]["validation"][0]["loss"]
    prompt = load_adapter(tmp_path / "out" / "adapter")
    assert prompt.method == method and prompt.num_virtual_tokens == report["num_virtual_tokens"]


def test_training_goes_on_from_another_prompt(base: Path, reviews: Path, finished: Path, tmp_path: Path):
    start = ["--init", f"prompt:{finished / 'adapter'}", "--steps", 2, "--schedule", "constant"]
    result = call(*arguments(base, reviews, tmp_path / "out", *start))
    assert result.exit_code == 0, result.output
    before = report_of(tmp_path / "out")["curve"]["validation"][0]
    assert before["loss"] == pytest.approx(report_of(finished)["final"]["loss"], rel=1e-6)


@pytest.mark.parametrize("method", ["CARTRIDGE", "PREFIX_TUNING"])
def test_training_goes_on_from_keys_and_values(method: str, base: Path, reviews: Path, finished: Path, tmp_path: Path):
    """Those of a prompt of another method: its labels follow own tokens, so that they say all it says."""
    start = ["--init", f"prompt:{finished / 'prefix'}", "--method", method, "--steps", 6, "--learning-rate", 0.1]
    result = call(*arguments(base, reviews, tmp_path / "out", *start))
    assert result.exit_code == 0, result.output
    before = report_of(tmp_path / "out")["curve"]["validation"][0]
    assert before["loss"] == pytest.approx(report_of(finished)["final"]["loss"], rel=1e-5)
    saved = load_adapter(tmp_path / "out" / "adapter")
    begun = PrefixKV.from_pretrained(finished / "prefix")
    assert saved.method == method
    for (key, _), start_key in zip(saved.key_values(), begun.keys, strict=True):
        kept = 1 if method == "CARTRIDGE" else 0
        assert torch.equal(key[:, :kept], start_key[:, :kept])
        assert (key[:, kept:] != start_key[:, kept:]).any(dim=-1).all()


def test_accumulated_batches_equal_one_large_batch(base: Path, tmp_path: Path):
    """Rows of very different numbers of labels: a mean of means would differ."""
    rng = random.Random(3)
    rows = [" ".join(rng.choices(WORDS[2:], k=rng.randint(1, 12))) for _ in range(32)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    common = ["--validation", 0, "--steps", 3, "--schedule", "constant"]
    for name, batch, accumulate in (("large", 8, 1), ("small", 2, 4)):
        options = [*common, "--batch-size", batch, "--accumulate", accumulate]
        result = call(*arguments(base, path, tmp_path / name, *options))
        assert result.exit_code == 0, result.output
    assert losses_of(tmp_path / "small") == pytest.approx(losses_of(tmp_path / "large"), rel=1e-5)
    torch.testing.assert_close(adapter_of(tmp_path / "small"), adapter_of(tmp_path / "large"), rtol=1e-3, atol=1e-5)


def test_early_stopping_ends_the_run_once(base: Path, reviews: Path, tmp_path: Path):
    args = arguments(base, reviews, tmp_path, "--patience", 2, "--learning-rate", 0, "--eval-every", 2)
    assert call(*args).exit_code == 0
    report = report_of(tmp_path)
    assert (report["stopped"], report["steps"]) == ("early stopping", 6)  # the first evaluation, and two no better
    (tmp_path / "report.json").unlink()  # killed before it was written
    assert call(*args, "--resume").exit_code == 0
    assert (report_of(tmp_path)["stopped"], report_of(tmp_path)["steps"]) == ("early stopping", 6)


def test_a_finished_run_is_not_trained_again(base: Path, reviews: Path, finished: Path, tmp_path: Path):
    before = adapter_of(finished)
    assert call(*arguments(base, reviews, finished, "--resume")).exit_code == 0
    assert len(losses_of(finished)) == STEPS and torch.equal(adapter_of(finished), before)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_score_equals_each_row_alone(method: str):
    """Rows of one token too: behind an embedding prompt their only token is predicted by the prompt."""
    oracle = Oracle()
    prompt = make_prompt(oracle.base, method, length=5)
    model = make_model(prompts={"p": prompt})
    embeds = prompt.kind == "embedding"
    lengths = [1, 9, 4, 2, 6] if embeds else [2, 9, 4, 3, 6]
    examples = [
        Example(i, row.tolist(), (i % 2) if embeds and len(row) > 1 else (0 if embeds else 1))
        for i, row in enumerate(make_rows(lengths))
    ]
    total, right, labels, rows = 0.0, 0, 0, 0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor(example.ids)
            logits = oracle.logits(ids, prompt)[-len(ids) - 1 if embeds else -len(ids) :]
            first = example.given if embeds else example.given - 1
            predicted, wanted = logits[first:-1], ids[example.given :]
            total += cross_entropy(predicted, wanted, reduction="sum").item()
            hits = predicted.argmax(dim=1) == wanted
            right, labels, rows = right + int(hits.sum()), labels + len(wanted), rows + bool(hits.all())
    for batch_size in (1, 2, 5):
        found = training.score(model, "p", examples, partial(data.collate, pad_token_id=0), batch_size)
        assert found.loss == pytest.approx(total / labels, rel=1e-5)
        assert (found.accuracy, found.row_accuracy) == (right / labels, rows / len(examples))


# ---- a run that is killed, interrupted or spoilt ----------------------------------------------------------------


def _train_slowly(args: list[str], ends: bool) -> None:
    """Body of a process: steps take a while, and so does every file of a checkpoint. ``ends=False``: it waits to be
    killed before its report."""
    torch.set_num_threads(1)
    save, step = torch.save, training.PromptTrainer.training_step
    if not ends:
        training.report.collect = lambda **_: time.sleep(600)

    def slow_save(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        time.sleep(0.03)

    def slow_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.01)
        return step(*args, **kwargs)

    torch.save, training.PromptTrainer.training_step = slow_save, slow_step
    sys.stdout = sys.stderr = open(args.pop(), "w")  # noqa: SIM115
    from softprompt_fast.cli.app import app

    app(args)


@pytest.fixture(scope="module")
def start_process() -> Callable[..., Any]:
    """Starts a command line as a process of its own; forked from one that has done the slow imports only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["softprompt_fast.train.run", "softprompt_fast.train.report"])

    def start(args: list[str], log: Path, ends: bool = True) -> Any:
        process = context.Process(target=_train_slowly, args=([*args, str(log)], ends))
        process.start()
        return process

    return start


def wait_for(condition: Callable[[], object], process: Any, log: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        assert process.is_alive(), log.read_text()
        time.sleep(0.002)


def test_killed_again_and_again_it_ends_as_if_it_never_was(
    base: Path, reviews: Path, finished: Path, tmp_path: Path, start_process: Callable[..., Any]
):
    output, log = tmp_path / "out", tmp_path / "log"
    args = arguments(base, reviews, output, "--resume")
    rng = random.Random(1)

    def steps(committed: bool) -> list[int]:
        found = [p for p in output.glob("checkpoint-*") if (p / trainer_callbacks.MARKER).exists() == committed]
        return [int(p.name.rpartition("-")[2]) for p in found]

    half_written = 0
    for in_the_middle_of_a_write in (False, True, True, False, True):
        newest = max([0, *steps(committed=True)])
        if newest == STEPS:
            break  # on a busy machine a kill may come late
        process = start_process(args, log, ends=False)
        # It goes on from the newest checkpoint; what stands there half-written goes first.
        if in_the_middle_of_a_write:
            wait_for(lambda newest=newest: max([0, *steps(committed=False)]) > newest, process, log)
        else:
            wait_for(lambda newest=newest: max([0, *steps(committed=True)]) > newest, process, log)
            time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        half_written += in_the_middle_of_a_write and bool(steps(committed=False))
        assert max([0, *steps(committed=True)]) >= newest, "a checkpoint that counted is gone"
    assert half_written >= 1, "no kill hit a checkpoint that was being written"

    assert not (output / "report.json").exists()
    process = start_process(args, log)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    assert report_of(output)["resumed_from"] >= INTERVAL
    assert losses_of(output) == losses_of(finished)
    assert torch.equal(adapter_of(output), adapter_of(finished))
    assert not steps(committed=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(
    number: signal.Signals,
    base: Path,
    reviews: Path,
    finished: Path,
    tmp_path: Path,
    start_process: Callable[..., Any],
):
    output, log = tmp_path / "out", tmp_path / "log"
    args = arguments(base, reviews, output, "--save-every", 1000)
    process = start_process(args, log)
    wait_for((output / "checkpoint-8").exists, process, log)  # every evaluation leaves one
    os.kill(process.pid, number)
    process.join(60)
    said = " ".join(log.read_text().split())
    assert process.exitcode == Exit.INTERRUPTED, said
    assert "interrupted after step" in said and "--resume" in said and "Traceback" not in said
    assert recover(output) is not None and not (output / "report.json").exists()
    assert_failed(call(*args), Exit.INPUT, "holds a run already", "--resume")
    assert call(*args, "--resume").exit_code == 0
    assert losses_of(output) == losses_of(finished)
    assert torch.equal(adapter_of(output), adapter_of(finished))


def test_a_loss_that_is_no_number_stops_the_run(base: Path, reviews: Path, tmp_path: Path):
    result = call(*arguments(base, reviews, tmp_path, "--learning-rate", 1e38, "--save-every", 1, "--warmup", 4))
    assert_failed(result, Exit.INPUT, "at step", "reviews.jsonl, lines", "smaller --learning-rate")
    message = " ".join(result.stderr.split())
    step = int(message.partition(" at step ")[2].split(",")[0])
    last = recover(tmp_path)
    assert last == tmp_path / f"checkpoint-{step - 1}" and f"the last good checkpoint is {last}" in message
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last / "model.safetensors").values())
    lines = [int(line) for line in message.partition("lines ")[2].partition(")")[0].split(", ")]
    assert len(lines) >= 4 and all(1 <= line <= 60 for line in lines)


class _Spoilt(torch.nn.Linear):
    """Where x is negative its loss is fine and its gradient NaN."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.where(x[0, 0] > 0, super().forward(x).sum(), 0 * super().forward(x).abs().sqrt().sum())}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("inf"), r"^loss: nan at step 7, micro-batch 2 of 2 \(\['x'\]\)$"),
        (-1.0, r"^gradient of weight: NaN or infinite at step 7, 2 micro-batch\(es\) \(\['x'\]; \['x'\]\)$"),
    ],
)
def test_a_loss_or_gradient_that_is_no_number_stops_trainer(value: float, said: str):
    module = _Spoilt(2, 2)
    torch.nn.init.zeros_(module.weight)
    torch.nn.init.zeros_(module.bias)
    stop = trainer_callbacks.StopOnNaN(lambda inputs: f"{sorted(inputs)}")
    settings = TrainingArguments("unused", report_to="none")
    state, control = TrainerState(global_step=6), TrainerControl()
    stop.on_train_begin(settings, state, control, model=module)
    for x in (torch.ones(1, 2), torch.full((1, 2), value)):
        module(x=x)["loss"].backward()
    with pytest.raises(NonFiniteLossError, match=said) as raised:
        stop.on_pre_optimizer_step(settings, state, control, model=module)
    assert raised.value.step == 7 and not module._forward_hooks


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "PREFIX_TUNING"], "method: begun with PROMPT_TUNING, found PREFIX_TUNING"),
        (["-P", 5], "num_virtual_tokens: begun with 4, found 5"),
        (["--seed", 1], "seed: begun with 0, found 1"),
        (["--learning-rate", 0.5], "learning_rate: begun with None, found 0.5"),
    ],
)
def test_another_run_is_not_resumed(options: list[object], named: str, base: Path, reviews: Path, finished: Path):
    result = call(*arguments(base, reviews, finished, *options, "--resume"))
    assert_failed(result, Exit.INPUT, "not the run that was begun there", named)


def test_another_base_or_dataset_is_not_resumed(base: Path, reviews: Path, finished: Path, tmp_path: Path):
    weights = save_base(tmp_path / "other") / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    result = call(*arguments(tmp_path / "other", reviews, finished, "--resume"))
    assert_failed(result, Exit.INPUT, "base model (fingerprint): begun with")
    other = write_reviews(tmp_path / "reviews.jsonl", seed=1)
    assert_failed(call(*arguments(base, other, finished, "--resume")), Exit.INPUT, "training data (sha256")
    # The same content elsewhere is the same run.
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(reviews.read_bytes())
    assert call(*arguments(base, moved, finished, "--resume")).exit_code == 0


# ---- checkpoints ------------------------------------------------------------------------------------------------


def fake_checkpoint(output: Path, step: int) -> Path:
    folder = trainer_callbacks.checkpoint_folder(output, step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_only_a_whole_checkpoint_counts(tmp_path: Path):
    good, altered, short, unmarked = (fake_checkpoint(tmp_path, step) for step in (8, 9, 10, 11))
    for folder in (good, altered, short):
        commit(folder)
        assert is_committed(folder)
    (altered / "model.safetensors").write_bytes(b"weightz")
    (short / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-best").mkdir()  # not one of Trainer's
    assert not any(map(is_committed, (altered, short, unmarked)))
    assert recover(tmp_path) == good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-8", "checkpoint-best"]
    assert recover(tmp_path / "nothing") is None


def test_old_checkpoints_go_once_a_newer_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    callback, control = CommitCheckpoint(keep=1), TrainerControl()
    settings = TrainingArguments(str(tmp_path), report_to="none")
    for step in (1, 2, 3):
        fake_checkpoint(tmp_path, step)
        callback.on_save(settings, TrainerState(global_step=step, best_global_step=1), control)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    fake_checkpoint(tmp_path, 4)
    monkeypatch.setattr(trainer_callbacks, "atomic_write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        callback.on_save(settings, TrainerState(global_step=4), control)
    assert recover(tmp_path) == tmp_path / "checkpoint-3"


def test_commit_checkpoint_refuses_what_would_defeat_it(tmp_path: Path):
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        CommitCheckpoint(keep=0)
    settings = TrainingArguments(str(tmp_path), save_total_limit=2, report_to="none")
    with pytest.raises(ValueError, match="save_total_limit: expected None"):
        CommitCheckpoint().on_train_begin(settings, TrainerState(), TrainerControl())


# ---- data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *"abcdefghij"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def encoded(tokenizer: PreTrainedTokenizerFast, rows: list[Row], **options: Any) -> data.Encoded:
    return data.encode(rows, tokenizer, source="rows", **{"max_length": 6, **options})


def test_rows_become_tokens_with_labels(tokenizer: PreTrainedTokenizerFast):
    rows = [Row(1, "a b", "c"), Row(2, None, "a b c"), Row(3, "", "d"), Row(4, "a b c d e f", "g h", 2)]
    found = encoded(tokenizer, rows)
    assert [(e.line, e.ids, e.given, e.task) for e in found.examples] == [
        (1, [3, 4, 5, 2], 2, 0),
        (2, [3, 4, 5, 2], 0, 0),
        (3, [6, 2], 0, 0),
        (4, [6, 7, 8, 9, 10, 2], 3, 2),  # cut from the left, the target is whole
    ]
    assert (found.cut, found.dropped) == (1, 0)
    assert [e.given for e in encoded(tokenizer, rows, first_is_predicted=False).examples] == [2, 1, 1, 3]
    assert encoded(tokenizer, rows[:1], end_of_text=False).examples[0].ids == [3, 4, 5]
    assert encoded(tokenizer, rows, too_long="drop").dropped == 1
    assert encoded(tokenizer, [Row(1, "a", "a b c d e f g")]).examples[0].ids == [3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="rows: more than 6 tokens: line 4: 9 tokens"):
        encoded(tokenizer, rows, too_long="refuse")
    with pytest.raises(ValueError, match="no row is left"):
        encoded(tokenizer, rows[3:], too_long="drop")
    with pytest.raises(ValueError, match="line 7: no token of it can be labelled"):
        encoded(tokenizer, [Row(7, None, "a")], end_of_text=False, first_is_predicted=False)


def test_a_bos_token_is_kept_and_never_labelled(tokenizer: PreTrainedTokenizerFast):
    assert data._cut([1, 3, 4, 5, 6], [7, 8], 5, 1) == ([1, 5, 6], [7, 8])
    assert data._cut([1, 3], [4, 5, 6, 7], 3, 1) == ([1], [4, 5])
    assert data._cut([3, 4], [5, 6, 7], 3, None) == ([], [5, 6, 7])
    found = encoded(tokenizer, [Row(1, None, "<bos> a b")])
    assert found.examples[0].given == 1


def test_collate_pads_right_and_labels_targets_only():
    batch = data.collate([Example(1, [3, 4, 5], 2), Example(2, [6, 7], 0, 3)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 5], [6, 7, -100]]
    assert batch["task_ids"].tolist() == [0, 3]
    assert data.lines_of(batch, [Example(8, [6, 7], 0), Example(5, [3, 4, 5], 2)]) == [5, 8]


def test_held_out_rows_depend_on_content_and_seed():
    rows = [Row(line, None, f"text {line % 40}") for line in range(1, 81)]
    train, held_out = data.split_rows(rows, 0.25, seed=0)
    assert len(held_out) == 20 and len(train) == 60
    assert not {row.target for row in train} & {row.target for row in held_out}
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {r.line for r in data.split_rows(shuffled, 0.25, seed=0)[1]} == {r.line for r in held_out}
    assert {r.line for r in data.split_rows(rows, 0.25, seed=1)[1]} != {r.line for r in held_out}
    assert data.split_rows(rows, 0, seed=0) == (rows, [])
    with pytest.raises(ValueError, match="leaves none to train on"):
        data.split_rows(rows[:1], 0.1, seed=0)


def test_csv_and_jsonl_hold_the_same_rows(tmp_path: Path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"q": "a, \\"b\\"", "a": "c\\nd", "t": 1}\n\n{"q": "", "a": "é", "t": "0"}\n', encoding="utf-8")
    table = tmp_path / "rows.csv"
    table.write_text('q,a,t\n"a, ""b""","c\nd",1\n,é,0\n', encoding="utf-8-sig")
    columns = Columns("q", "a", "t")
    found = [data.read_rows(str(path), columns) for path in (lines, table)]
    assert [[(r.input, r.target, r.task) for r in rows] for rows in found] == [
        [('a, "b"', "c\nd", 1), ("", "é", 0)]
    ] * 2
    assert [[row.line for row in rows] for rows in found] == [[1, 3], [3, 4]]


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert data.read_rows("someone/rows", split="test") == [Row(1, None, "a"), Row(2, None, "b")]
    assert asked == [("someone/rows", "test")]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("d.jsonl", "", ["expected at least one row"]),
        ("d.jsonl", '{"prompt": "a"}', ["expected column prompt and completion, or text; found prompt"]),
        ("d.jsonl", '{"text": "a"}\n{"text": \n[1]\n{"text": 3}\n{"text": ""}\n{"texts": "a"}',
         ["line 2: no valid JSON", "line 3: expected a JSON object", "line 4: text: expected text, found 3",
          "line 5: text: empty", "line 6: text: expected text, found nothing"]),
        ("d.jsonl", "\n".join(['{"text": "a"}', *["x"] * 9]), ["line 6", "and 4 more"]),
        ("d.csv", "text\na,b\n", ["line 2: expected 1 fields, found more"]),
        ("d.csv", 'text\n"a', ["no valid CSV"]),
        ("d.csv", b"text\n\xff", ["expected UTF-8"]),
        ("d.txt", "a", ["expected a file named .jsonl or .csv"]),
    ],
)  # fmt: skip
def test_bad_rows_are_named(name: str, content: str | bytes, parts: list[str], base: Path, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = call(*arguments(base, path, tmp_path / "out"))
    assert_failed(result, Exit.INPUT, name, *parts)
    assert not (tmp_path / "out" / "run.json").exists()


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--method", "LORA"], ["--method", "PROMPT_TUNING", "LORA"]),
        (["--schedule", "sine"], ["--schedule", "cosine"]),
        (["--too-long", "x"], ["--too-long", "cut, drop, refuse"]),
        (["--option", "x"], ["--option", "NAME=VALUE"]),
        (["--dtype", "int8"], ["--dtype", "float32"]),
        (["--epochs", 0, "--batch-size", 0], ["--batch-size"]),
    ],
)
def test_wrong_command_lines(options: list[object], parts: list[str], base: Path, reviews: Path, tmp_path: Path):
    assert_failed(call(*arguments(base, reviews, tmp_path, *options)), Exit.USAGE, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--option", "encoder_hidden_size=8"], ["encoder_hidden_size", "PROMPT_TUNING"]),
        (["--input-column", "question"], ["expected column question", "found prompt, completion"]),
        (["--task-column", "task"], ["task", "found prompt, completion"]),
        (["--init", "words"], ["init: expected random", "'words'"]),
        (["--init", "text:"], ["init: expected words after text:"]),
        (["--init", "vocab", "--method", "P_TUNING"], ["init:", "P_TUNING"]),
        (["--init", f"prompt:{SAVED}"], ["holds keys and values, which only CARTRIDGE and PREFIX_TUNING train"]),
        (
            ["--init", f"prompt:{SAVED}", "--method", "CARTRIDGE", "-P", 5],
            ["expected num_virtual_tokens 5", "found 4"],
        ),
        (["--method", "CPT"], ["init: CPT starts from examples:N"]),
        (["--method", "CARTRIDGE", "--init", "text:the film"], ["a text of 4 tokens or more, found 2"]),
        (["--method", "CARTRIDGE", "-P", 1], ["nothing of its 1 virtual token(s) is trainable"]),
        (["--max-length", 600], ["max_length: expected 2 to 508 own tokens behind 4 virtual ones, found 600"]),
        (["--validation", "1.5"], ["validation: expected a dataset or a share"]),
        (["--too-long", "refuse", "--max-length", 6], ["more than 6 tokens: line"]),
        (["--too-long", "drop", "--max-length", 2], ["no row is left"]),
    ],
)
def test_what_does_not_fit(
    options: list[object], parts: list[str], base: Path, reviews: Path, finished: Path, tmp_path: Path
):
    options = [str(option).replace(SAVED, str(finished / "prefix")) for option in options]
    assert_failed(call(*arguments(base, reviews, tmp_path, *options)), Exit.INPUT, *parts)


def test_multitask_rows_name_their_task(base: Path, tmp_path: Path):
    path = tmp_path / "tasks.jsonl"
    rows = [{"prompt": "the film", "completion": word, "t": i % 3} for i, word in enumerate(["good", "bad", "is"] * 8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    args = arguments(base, path, tmp_path / "out", "--method", "MULTITASK_PROMPT_TUNING", "--task-column", "t")
    assert_failed(call(*args), Exit.INPUT, "expected a task from 0 to 0", "--option num_tasks=N")
    done = call(*args, "--option", "num_tasks=3", "--init", "vocab", "--option", "num_ranks=2", "--validation", 0)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").glob("prefix*")} == {"prefix-0", "prefix-1", "prefix-2"}


def test_files_that_are_not_there(base: Path, reviews: Path, tmp_path: Path):
    assert_failed(call(*arguments(base, tmp_path / "no.jsonl", tmp_path / "a")), Exit.IO, "no.jsonl")
    assert_failed(call(*arguments(tmp_path / "no-base", reviews, tmp_path / "b")), Exit.IO, "no-base")
    missing = ["--init", f"prompt:{tmp_path / 'no-adapter'}"]
    assert_failed(call(*arguments(base, reviews, tmp_path / "c", *missing)), Exit.IO, "no-adapter")


def test_a_name_that_is_neither_a_file_nor_a_dataset(
    base: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    datasets = pytest.importorskip("datasets")

    def load(name: str, split: str) -> Any:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for options in ([], ["--validation", "reviws"]):
        result = call(*arguments(base, "reviws" if not options else reviews, tmp_path, *options))
        assert_failed(result, Exit.IO, "reviws: no such file, and no dataset of the hub", "Couldn't reach")


def test_an_output_that_is_a_file_or_in_use(base: Path, reviews: Path, tmp_path: Path):
    assert_failed(call(*arguments(base, reviews, reviews)), Exit.IO, "expected a directory")
    lock = training.FileLock(tmp_path / ".lock")
    with lock:
        assert_failed(call(*arguments(base, reviews, tmp_path)), Exit.IO, "another process trains in this folder")


def test_checkpoints_of_another_program_are_left_alone(base: Path, reviews: Path, tmp_path: Path):
    theirs = fake_checkpoint(tmp_path, 7)
    result = call(*arguments(base, reviews, tmp_path, "--resume"))
    assert_failed(result, Exit.INPUT, "holds checkpoints of another program")
    assert theirs.is_dir() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("place", ["weights", "optimizer", "marker"])
def test_disk_full(place: str, base: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any, **kwargs: Any) -> None:
        if place == "optimizer":
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")  # what torch makes of it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = {"weights": ("safetensors.torch.save_file"), "optimizer": "torch.save"}
    if place == "marker":
        monkeypatch.setattr(_io, "sync_file", full)
        monkeypatch.setattr(trainer_callbacks, "sync_file", full)
        (tmp_path / "run.json").write_text("{}")  # writing it would fail first
        monkeypatch.setattr(training, "_check_same", lambda *args: None)
    else:
        monkeypatch.setattr(where[place], full)
    result = call(*arguments(base, reviews, tmp_path, "--resume"))
    assert_failed(result, Exit.IO, "could not be written" if place == "optimizer" else os.strerror(errno.ENOSPC))
    assert recover(tmp_path) is None


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard"])
def test_a_missing_package_is_named(package: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = call("train", "x.jsonl", "-o", tmp_path / "out", "--base", base)
    assert_failed(result, Exit.IO, package, "softprompt-fast[train]")
    assert not (tmp_path / "out").exists()


def test_a_process_without_accelerate(tmp_path: Path):
    code = "import sys; sys.modules['accelerate'] = None; from softprompt_fast.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "x.jsonl", "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.IO, done.stderr
    assert "accelerate" in json.loads(done.stdout)["error"] and "softprompt-fast[train]" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- a real model -----------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_model_learns_sentiment(tmp_path: Path):
    from softprompt_fast.demo import assets, sentiment

    path = tmp_path / "reviews.jsonl"
    rows = [r for r in sentiment.for_training(assets.load_reviews()) if len(r.text.split()) <= 8][:40]
    parts = [(sentiment.TEMPLATE.format(r.text), " positive" if r.positive else " negative") for r in rows]
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in parts))
    args = [
        "train",
        path,
        "-o",
        tmp_path / "out",
        "--steps",
        4,
        "--batch-size",
        8,
        "--no-eos",
        "--warmup",
        0,
        "--json",
    ]
    result = call(*args)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["final"]["loss"] < report["curve"]["validation"][0]["loss"]
    assert report["data"]["train"]["labels"] == report["data"]["train"]["rows"] == 36  # one token a label
