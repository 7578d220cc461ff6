# SPDX-License-Identifier: Apache-2.0
"""Callbacks for transformers' Trainer: checkpoints that are whole or absent and hold an adapter that PEFT loads, and a
stop where the loss is no number.

Trainer writes a checkpoint file by file into its final place, so a killed run leaves one that looks like the others.
:class:`CommitCheckpoint` writes a marker with every file's digest last, once all of them are on disk; a checkpoint
counts when its marker is there and true (:func:`recover`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from softprompt_fast._io import atomic_write_bytes, sync_directory, sync_file
from softprompt_fast.errors import NonFiniteLossError

MARKER = "committed.json"


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Where Trainer keeps the checkpoint of a step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def commit(folder: Path) -> None:
    """Put every file of a checkpoint on disk, then the marker that makes it count.

    Raises:
        OSError: the disk is full, ...; the checkpoint then doesn't count.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    for path in files:
        sync_file(path)
    for directory in (*{path.parent for path in files}, folder.parent):
        sync_directory(directory)
    digests = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    atomic_write_bytes(folder / MARKER, json.dumps({"sha256": digests}, indent=2).encode())


def is_committed(folder: Path) -> bool:
    """Whether a checkpoint's marker is there and every file is the one that it was written for."""
    try:
        digests = json.loads((folder / MARKER).read_text(encoding="utf-8"))["sha256"]
        return bool(digests) and all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def recover(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole, or None; newer ones, half-written by a run that was killed, are removed.

    Pass it to ``trainer.train(resume_from_checkpoint=...)``. Checkpoints that were written without
    :class:`CommitCheckpoint` have no marker: don't call it on a folder that holds some.
    """
    for folder in _checkpoints(output_dir):
        if is_committed(folder):
            return folder
        shutil.rmtree(folder)
    return None


class CommitCheckpoint(TrainerCallback):
    """Makes Trainer's checkpoints atomic, and deletes old ones only once a newer one counts.

    Args:
        keep: how many of the newest checkpoints stay; the best one (``metric_for_best_model``) always does. Leave
            ``save_total_limit`` at None: Trainer would delete before the new checkpoint is safely on disk.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(self, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, found {keep}")
        self.keep = keep

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_total_limit is not None:
            raise ValueError(
                f"save_total_limit: expected None with CommitCheckpoint(keep=...), found {args.save_total_limit}"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank writes a file of its own
        if not state.is_world_process_zero:
            return
        commit(checkpoint_folder(args.output_dir, state.global_step))
        best = checkpoint_folder(args.output_dir, state.best_global_step or 0)
        for folder in _checkpoints(args.output_dir)[self.keep :]:
            if folder != best:
                # Without its marker first: a checkpoint that lacks files must never look whole.
                (folder / MARKER).unlink(missing_ok=True)
                shutil.rmtree(folder)


class SaveAdapter(TrainerCallback):
    """Puts the active prompt beside the state dict that Trainer writes for resuming, as a PEFT adapter:
    ``checkpoint-N/adapter_config.json``, ``adapter_model.safetensors``. Give it before :class:`CommitCheckpoint`."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            model.save_pretrained(checkpoint_folder(args.output_dir, state.global_step))


class StopOnNaN(TrainerCallback):
    """Ends training before the optimizer step that a NaN or infinite loss or gradient would have spoilt.

    The parameters, and every checkpoint, are then those of the last good step. It reads the loss of every step, which
    on a GPU waits for it, as logging does. Gradients are not looked at under fp16 (``args.fp16``), whose loss scaler
    expects some to overflow.

    Args:
        describe: turns the model inputs of a bad micro-batch into words for the message (which rows they are).

    Raises:
        NonFiniteLossError: from ``trainer.train()``; names the step and the batch.
    """

    def __init__(self, describe: Callable[[Mapping[str, Any]], str] | None = None) -> None:
        self._describe = describe
        self._batches: list[tuple[torch.Tensor, Mapping[str, Any]]] = []
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._release()  # of a call to train() that raised
        self._hook = model.register_forward_hook(self._note, with_kwargs=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        batches, self._batches = self._batches, []
        step = state.global_step + 1
        for number, (loss, inputs) in enumerate(batches, start=1):
            if not bool(torch.isfinite(loss)):
                self._stop(f"loss: {loss.item()}", step, f"micro-batch {number} of {len(batches)}", [inputs])
        if args.fp16:
            return
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                what = f"gradient of {name}: NaN or infinite"
                self._stop(what, step, f"{len(batches)} micro-batch(es)", [inputs for _, inputs in batches])

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is not None and loss.requires_grad:
            self._batches.append((loss.detach(), kwargs))

    def _stop(self, what: str, step: int, where: str, inputs: list[Mapping[str, Any]]) -> None:
        self._release()
        rows = "" if self._describe is None else f" ({'; '.join(map(self._describe, inputs))})"
        raise NonFiniteLossError(f"{what} at step {step}, {where}{rows}", step)

    def _release(self) -> None:
        self._batches = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders of Trainer's checkpoints, the newest step first."""
    found = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if folder.is_dir() and (step := re.fullmatch(r"\d+", folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))):
            found[int(step[0])] = folder
    return [found[step] for step in sorted(found, reverse=True)]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
