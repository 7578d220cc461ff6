# SPDX-License-Identifier: Apache-2.0
"""A training run from end to end: data, prompt, transformers' Trainer, checkpoints, adapter, prefix, report."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from softprompt_fast._io import atomic_write_bytes, make_directory
from softprompt_fast.demo import assets
from softprompt_fast.errors import NonFiniteLossError
from softprompt_fast.integrations.head import vocab_size
from softprompt_fast.integrations.trainer_callbacks import CommitCheckpoint, StopOnNaN, checkpoint_folder, recover
from softprompt_fast.integrations.transformers import position_limit
from softprompt_fast.model import SoftPromptModel
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.train import data, report, start
from softprompt_fast.train.data import Columns, Encoded, Example

PROMPT_NAME = "trained"
RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
#: Bytes of logits that one batch of an evaluation may make.
EVALUATION_LOGITS = 1 << 28


@dataclass(frozen=True)
class Settings:
    """What a run does. All of it but `FREE` must be the same when a run is resumed.

    Attributes:
        base: folder, hub name or ``"demo"``.
        data: file or hub name; `validation`: the same, or a share of the rows to hold out (``"0"``: none).
        learning_rate: None: the method's in `start.LEARNING_RATES`.
        warmup: steps (>= 1) or share of all steps (< 1).
        steps: optimizer steps; None: `epochs` passes over the data.
        batch_size, accumulate: rows a batch, and batches an optimizer step.
        max_length: own tokens a row; None: 512, or what the base's positions leave.
        eval_every, save_every: optimizer steps; None: a tenth of the run. Every evaluation is also a checkpoint.
        patience: evaluations in a row without a better loss after which it stops; None: never.
        keep: newest checkpoints that stay on disk, beside the best.
    """

    data: str
    base: str = assets.DEMO_MODEL
    validation: str = "0.1"
    columns: Columns = field(default_factory=Columns)
    split: str = "train"
    method: str = "PROMPT_TUNING"
    num_virtual_tokens: int | None = None
    init: str = "random"
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.03
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 16
    accumulate: int = 1
    max_length: int | None = None
    too_long: str = "cut"
    end_of_text: bool = True
    dtype: str = "float32"
    seed: int = 0
    eval_every: int | None = None
    save_every: int | None = None
    patience: int | None = None
    checkpointing: bool = False
    tensorboard: bool = True
    keep: int = 2


#: What may differ when a run is resumed. The base and the data are compared by their content, not by their names.
FREE = ("base", "data", "validation", "columns", "split", "tensorboard", "keep")


class RunInterrupted(KeyboardInterrupt):
    """The run was asked to end (Ctrl-C, SIGTERM) and has: its checkpoint is on disk."""


def run(output: Path, settings: Settings, console: Console, *, resume: bool = False) -> dict[str, Any]:
    """Train one prompt; leaves ``adapter/``, ``prefix/``, ``report.json``, ``report.png`` and checkpoints in `output`.

    Args:
        output: folder to write to, made if need be.
        settings: see :class:`Settings`.
        console: gets the progress bar and the tables.
        resume: go on from the newest whole checkpoint in `output`, or begin if there is none.

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: data, prompt or options don't fit; `output` holds a run and `resume` is False; a resumed run
            differs from what was begun (names what).
        NonFiniteLossError: the loss turned NaN or infinite.
        RunInterrupted: Ctrl-C or SIGTERM; a checkpoint was written first.
        OSError: something can't be read or written, or another process trains in `output`.
        ModuleNotFoundError: a package of the extra ``train`` is missing (see `train.check_packages`).
    """
    started = time.perf_counter()
    output = make_directory(output)
    if (output / RUN_FILE).exists() and not resume:
        raise ValueError(f"{output}: holds a run already; go on with it (--resume) or choose another folder")
    if not (output / RUN_FILE).exists() and any(output.glob("checkpoint-*")):
        # Theirs have no marker, so they would be taken for half-written ones of ours and removed.
        raise ValueError(f"{output}: holds checkpoints of another program; choose another folder")
    try:
        lock = FileLock(output / ".lock").acquire(timeout=0)
    except Timeout:
        raise OSError(f"{output}: another process trains in this folder") from None
    with lock:
        return _run(output, settings, console, started)


def _run(output: Path, settings: Settings, console: Console, started: float) -> dict[str, Any]:
    rows, held_out = _read(settings)
    base, tokenizer = assets.load_model(settings.base, console.print)
    model = SoftPromptModel(base.to(getattr(torch, settings.dtype)))
    encoded, prompt = _encode(rows, held_out, settings, model, tokenizer)
    train, validation = encoded
    model.add_prompt(PROMPT_NAME, prompt)
    if settings.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    _check_same(output / RUN_FILE, _identity(settings, model, prompt.num_virtual_tokens, train, validation))
    checkpoint = recover(output)
    arguments = _arguments(output, settings, len(train.examples), bool(validation.examples), prompt.method, checkpoint)
    for line in _announce(settings, arguments, train, validation, prompt, checkpoint):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    collate = partial(data.collate, pad_token_id=tokenizer.pad_token_id)
    counted = train.examples + validation.examples
    with Interrupts() as interrupts, _progress(console) as progress:
        callbacks: list[TrainerCallback] = [
            _Watch(progress, interrupts),
            CommitCheckpoint(settings.keep),
            StopOnNaN(lambda batch: f"{settings.data}, lines {_list(data.lines_of(batch, counted))}"),
        ]
        if settings.patience is not None and validation.examples:
            callbacks.append(EarlyStoppingCallback(settings.patience))
        if settings.tensorboard:
            callbacks.append(_tensorboard(output))
        trainer = PromptTrainer(
            model, arguments, train_dataset=train.examples, eval_dataset=validation.examples or None,
            data_collator=collate, callbacks=callbacks,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if prompt.method == "CPT":
            trainer.model_accepts_loss_kwargs = False  # its loss is a mean over virtual tokens too
        try:
            if checkpoint is not None and _is_last(checkpoint):
                trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except NonFiniteLossError as error:
            last = recover(output)
            kept = "no checkpoint was written before" if last is None else f"the last good checkpoint is {last}"
            raise NonFiniteLossError(f"{error}; {kept}; a smaller --learning-rate may help", error.step) from error
    state = trainer.state
    if interrupts.asked and state.global_step < state.max_steps:
        raise RunInterrupted(
            f"interrupted after step {state.global_step} of {state.max_steps}; its checkpoint is in {output}: give "
            "the same command with --resume to go on"
        )

    if state.best_global_step:
        best = load_file(checkpoint_folder(output, state.best_global_step) / SAFE_WEIGHTS_NAME)
        model.load_state_dict(best)
    model.eval()
    tasks: Sequence[int | None] = [None]
    if prompt.method == "MULTITASK_PROMPT_TUNING":
        tasks = sorted({example.task for example in train.examples})
    model.save_prompt(PROMPT_NAME, output / "adapter")
    for task in tasks:
        folder = output / ("prefix" if task is None else f"prefix-{task}")
        model.compile_prompt(PROMPT_NAME, task=task).save_pretrained(folder)
    final = None
    if validation.examples:
        # What is measured is what is on disk, as whoever loads it will have it.
        model.load_prompt("saved", output / "adapter")
        final = score(model, "saved", validation.examples, collate, arguments.per_device_eval_batch_size)
    result = report.collect(
        settings=asdict(settings),
        state=state,
        prompt=prompt,
        counts={"train": _counts(train), "validation": _counts(validation)},
        final=None if final is None else asdict(final),
        stopped="early stopping" if state.global_step < state.max_steps else "all steps",
        resumed_from=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        wall_seconds=time.perf_counter() - started,
    )
    atomic_write_bytes(output / "report.json", json.dumps(result, indent=2).encode())
    report.picture(result, output / "report.png")
    console.print(report.table(result))
    console.print(f"adapter, prefix, report.json and report.png are in {output}", soft_wrap=True)
    return result


# ---- data and prompt ------------------------------------------------------------------------------------------------


def _read(settings: Settings) -> tuple[list[data.Row], list[data.Row]]:
    rows = data.read_rows(settings.data, settings.columns, split=settings.split)
    try:
        share = float(settings.validation)
    except ValueError:
        return rows, data.read_rows(settings.validation, settings.columns, split=settings.split)
    if not 0 <= share < 1:
        raise ValueError(f"validation: expected a dataset or a share from 0 to below 1, found {settings.validation}")
    return data.split_rows(rows, share, settings.seed)


def _encode(
    rows: list[data.Row], held_out: list[data.Row], settings: Settings, model: SoftPromptModel, tokenizer: Any
) -> tuple[tuple[Encoded, Encoded], Any]:
    """Both datasets as tokens, and the prompt; whose length says how many tokens a row may have."""
    options: dict[str, Any] = {"too_long": settings.too_long, "end_of_text": settings.end_of_text}
    options["first_is_predicted"] = settings.method not in ("PREFIX_TUNING", "CARTRIDGE")
    limit = position_limit(model.base)

    def encode(rows: list[data.Row], source: str, virtual: int) -> Encoded:
        room = sys.maxsize if limit is None else limit.positions - virtual
        length = min(512, room) if settings.max_length is None else settings.max_length
        if not 1 < length <= room:
            raise ValueError(
                f"max_length: expected 2 to {room} own tokens behind {virtual} virtual ones, found {length}"
            )
        return data.encode(rows, tokenizer, source=source, max_length=length, **options)

    # CPT's context is made of rows, which are cut as for a prompt of no length.
    context = encode(rows, settings.data, 0).examples if settings.method == "CPT" else []
    prompt = start.initial_prompt(
        settings.method, model, tokenizer, context, init=settings.init, seed=settings.seed,
        num_virtual_tokens=settings.num_virtual_tokens, options=settings.options,
    )  # fmt: skip
    if not any(parameter.numel() for parameter in prompt.parameters() if parameter.requires_grad):
        raise ValueError(f"{prompt.method}: nothing of its {prompt.num_virtual_tokens} virtual token(s) is trainable")
    train = encode(rows, settings.data, prompt.num_virtual_tokens)
    where = settings.data if _is_share(settings.validation) else settings.validation
    validation = encode(held_out, where, prompt.num_virtual_tokens) if held_out else Encoded([], 0, 0)
    if prompt.method == "MULTITASK_PROMPT_TUNING":
        wrong = [e for e in train.examples + validation.examples if not 0 <= e.task < prompt.config["num_tasks"]]
        if wrong:
            raise ValueError(
                f"{settings.data}: line {wrong[0].line}: expected a task from 0 to {prompt.config['num_tasks'] - 1} "
                f"(--option num_tasks=N), found {wrong[0].task}"
            )
    return (train, validation), prompt


def _is_share(validation: str) -> bool:
    try:
        return float(validation) >= 0
    except ValueError:
        return False


def _counts(encoded: Encoded) -> dict[str, int]:
    labels = sum(len(example.ids) - example.given for example in encoded.examples)
    return {"rows": len(encoded.examples), "labels": labels, "cut": encoded.cut, "dropped": encoded.dropped}


def _announce(
    settings: Settings,
    arguments: TrainingArguments,
    train: Encoded,
    validation: Encoded,
    prompt: SoftPrompt,
    checkpoint: Path | None,
) -> Iterator[str]:
    for name, encoded in (("to train on", train), ("held out", validation)):
        if encoded.examples:
            found = _counts(encoded)
            notes = [f"{found[what]} too long and {what}" for what in ("cut", "dropped") if found[what]]
            yield f"{found['rows']} rows {name}, {found['labels']} labels" + "".join(f"; {note}" for note in notes)
    scaled = settings.init == "random" and prompt.method == "PROMPT_TUNING"
    yield (
        f"{prompt.method}: {prompt.num_virtual_tokens} virtual tokens, start: {settings.init}"
        + (" at the scale of the base's embeddings (PEFT's own: --init normal)" if scaled else "")
        + f", learning rate {arguments.learning_rate:g}"
    )
    if settings.patience is not None and not validation.examples:
        yield "early stopping is off: no row is held out"
    if checkpoint is not None:
        yield f"going on from {checkpoint}"


def _list(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines)) or "unknown"


# ---- resuming -------------------------------------------------------------------------------------------------------


def _identity(
    settings: Settings, model: SoftPromptModel, num_virtual_tokens: int, train: Encoded, validation: Encoded
) -> dict[str, Any]:
    """What makes two runs the same run."""
    fixed = {name: value for name, value in asdict(settings).items() if name not in FREE}
    return {
        **fixed,
        "num_virtual_tokens": num_virtual_tokens,
        "base model (fingerprint)": model.base_fingerprint,
        "training data (sha256 of its tokens)": train.digest,
        "validation data (sha256 of its tokens)": validation.digest,
    }


def _check_same(path: Path, identity: dict[str, Any]) -> None:
    """Write `identity` to `path`, or compare it with what an earlier session wrote there."""
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        atomic_write_bytes(path, json.dumps(identity, indent=2).encode())
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        differs = [name for name in {**begun, **identity} if begun.get(name) != identity.get(name)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: altered or damaged ({error})") from error
    if differs:
        what = "; ".join(f"{name}: begun with {begun.get(name)}, found {identity.get(name)}" for name in differs)
        raise ValueError(f"{path.parent}: this is not the run that was begun there: {what}")


def _is_last(checkpoint: Path) -> bool:
    """Whether all steps were taken, or early stopping had ended them, and only the report was still to come."""
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    if state.global_step >= state.max_steps:
        return True
    if (early := state.stateful_callbacks.get(EarlyStoppingCallback.__name__)) is None:
        return False
    return early["attributes"]["early_stopping_patience_counter"] >= early["args"]["early_stopping_patience"]


# ---- Trainer --------------------------------------------------------------------------------------------------------


def _arguments(
    output: Path, settings: Settings, rows: int, evaluates: bool, method: str, checkpoint: Path | None
) -> TrainingArguments:
    per_epoch = math.ceil(math.ceil(rows / settings.batch_size) / settings.accumulate)
    total = settings.steps or max(1, round(settings.epochs * per_epoch))
    rate = settings.learning_rate
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        max_steps=total,
        learning_rate=start.LEARNING_RATES.get(method, start.DEFAULT_LEARNING_RATE) if rate is None else rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=0.0,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_every or max(1, total // 10),
        eval_on_start=evaluates and checkpoint is None,
        save_strategy="steps",
        save_steps=settings.save_every or max(1, total // 10),
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or Trainer would wrap the model in DataParallel
    return arguments


class PromptTrainer(Trainer):
    """transformers' Trainer with an evaluation that counts tokens, and speed in its logs."""

    control: TrainerControl
    _step_started: float | None = None
    _tokens = 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
            raise OSError(f"{self.args.output_dir}: the checkpoint could not be written: {error}") from error

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if count is not None:
            # Trainer leaves out the first token's label, which a soft prompt predicts.
            count = sum((batch["labels"] != data.IGNORE).sum() for batch in batches).to(device)
        return batches, count

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self._step_started is None:
            self._step_started = time.perf_counter()
        self._tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._step_started is not None:
            seconds = time.perf_counter() - self._step_started  # Trainer has read the loss: the step is done
            logs |= {"seconds": seconds, "tokens": self._tokens, "tokens_per_second": self._tokens / seconds}
            self._step_started, self._tokens = None, 0
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        found = score(self.model, PROMPT_NAME, examples, self.data_collator, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in asdict(found).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Watch(TrainerCallback):
    """Moves the progress bar, saves what was evaluated, and ends the run when it is asked to."""

    def __init__(self, progress: Progress, interrupts: Interrupts) -> None:
        self._progress, self._interrupts = progress, interrupts
        self._bar = progress.add_task("training", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._bar, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._interrupts.asked:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step > 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            text = f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:.0f} tokens/s"
            self._progress.update(self._bar, completed=state.global_step, description=text)


class Interrupts:
    """While open, Ctrl-C and SIGTERM only set `asked`; a second one raises KeyboardInterrupt at once."""

    asked = False

    def __enter__(self) -> Interrupts:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt("interrupted twice: only the last checkpoint is there")
        self.asked = True


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield progress


def _tensorboard(output: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(output / "tensorboard")))


# ---- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well labels are predicted: ``loss`` in nats a label, ``accuracy``: share of labels that are the likeliest
    token, ``row_accuracy``: share of rows all of whose labels are (greedy decoding then gives the target)."""

    loss: float
    accuracy: float
    row_accuracy: float


@torch.no_grad()
def score(model: SoftPromptModel, prompt: str, examples: Sequence[Example], collate: Any, batch_size: int) -> Score:
    """Loss and accuracies over all labels of `examples` behind `prompt`; no batch or padding changes them.

    The loss is the mean cross-entropy of the labels, for CPT as well (whose training loss also counts its context).
    """
    model.eval()
    soft_prompt = model.get_prompt(prompt)
    multitask = not isinstance(soft_prompt, PrefixKV) and soft_prompt.method == "MULTITASK_PROMPT_TUNING"
    by_length = sorted(examples, key=lambda example: len(example.ids))
    widest = max(len(example.ids) - example.given for example in examples) + 1
    rows = max(1, min(batch_size, EVALUATION_LOGITS // (4 * vocab_size(model.base) * widest)))
    total, right, labels, right_rows = 0.0, 0, 0, 0
    for first in range(0, len(by_length), rows):
        part = by_length[first : first + rows]
        batch = {name: tensor.to(model.device) for name, tensor in collate(part).items()}
        targets = batch.pop("labels")
        columns = (targets[:, 1:] != data.IGNORE).any(dim=0).nonzero()[:, 0]
        if columns.numel() == 0:
            columns = torch.zeros(1, dtype=torch.long, device=model.device)
        logits = model(**batch, prompt=prompt, logits_to_keep=columns, use_cache=False).logits.float()
        for row, example in enumerate(part):
            own = targets[row, columns + 1] if targets.shape[1] > 1 else targets[row, :0]
            known = own != data.IGNORE
            predicted, wanted = logits[row, : len(own)][known], own[known]
            if example.given == 0:  # by the last virtual token
                next_logits = model.compile_prompt(prompt, task=example.task if multitask else None).next_logits
                assert next_logits is not None
                predicted = torch.cat([next_logits[None].float(), predicted])
                wanted = torch.cat([targets[row, :1], wanted])
            hits = predicted.argmax(dim=1) == wanted
            total += cross_entropy(predicted, wanted, reduction="sum").item()
            right, labels, right_rows = right + int(hits.sum()), labels + len(wanted), right_rows + bool(hits.all())
    return Score(total / labels, right / labels, right_rows / len(examples))
