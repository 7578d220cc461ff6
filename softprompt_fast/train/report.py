# SPDX-License-Identifier: Apache-2.0
"""A training run's results: plain data, a table in the terminal and one picture."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from softprompt_fast._io import atomic_path
from softprompt_fast._version import __version__

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerState

    from softprompt_fast.prompt import SoftPrompt


def peak_memory() -> int | None:
    """Bytes: of the GPU's allocations where there is a GPU, else the process's peak resident set; None: unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def collect(
    *, settings: dict[str, Any], state: TrainerState, prompt: SoftPrompt, counts: dict[str, Any], **facts: Any
) -> dict[str, Any]:
    """What ``report.json`` holds. Curves come from Trainer's log, which checkpoints carry: they cover every session of
    a resumed run. Times are seconds, memory bytes, losses nats a label.

    Args:
        settings: of the run. state: Trainer's, at the end. prompt: the trained SoftPrompt. counts: of the data.
        facts: taken over as they are; ``wall_seconds`` of this session.
    """
    train = [entry for entry in state.log_history if "loss" in entry]
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    seconds, tokens = sum(entry["seconds"] for entry in train), sum(entry["tokens"] for entry in train)
    return {
        "settings": settings,
        "data": counts,
        "method": prompt.method,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "trained_parameters": sum(p.numel() for p in prompt.parameters() if p.requires_grad),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "training_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory_bytes": peak_memory(),
        "curve": {
            "train": [
                {key: entry[key] for key in ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second")}
                for entry in train
            ],
            "validation": [
                {key: entry[name] for key, name in (("step", "step"), *((n, f"eval_{n}") for n in _SCORES))}
                for entry in evaluations
            ],
        },
        "versions": {
            "softprompt-fast": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        },
        **facts,
    }


_SCORES = ("loss", "accuracy", "row_accuracy")


def table(result: dict[str, Any]) -> Table:
    """What :func:`collect` gave, for a terminal."""
    shown = Table(show_header=False, title=f"{result['method']}, {result['num_virtual_tokens']} virtual tokens")
    train, validation = result["curve"]["train"], result["curve"]["validation"]
    shown.add_row("optimizer steps", f"{result['steps']} ({result['stopped']})")
    if train:
        shown.add_row("training loss, first and last step", f"{train[0]['loss']:.4f}, {train[-1]['loss']:.4f}")
    if (final := result["final"]) is not None:
        begun = validation[0] if validation and validation[0]["step"] == 0 else None
        for name, label in zip(_SCORES, ("loss", "accuracy of labels", "rows all right"), strict=True):
            before = f"{begun[name]:.4f} before, " if begun else ""
            shown.add_row(f"held-out {label}", f"{before}[bold]{final[name]:.4f}[/bold] of step {result['best_step']}")
    speed = f", {result['tokens_per_second']:.0f} tokens/s" if result["tokens_per_second"] else ""
    shown.add_row("time of all steps", f"{result['training_seconds']:.1f} s{speed}")
    if result["peak_memory_bytes"] is not None:
        shown.add_row("peak memory of this session", f"{result['peak_memory_bytes'] / 1e9:.2f} GB")
    return shown


def picture(result: dict[str, Any], path: Path) -> None:
    """Loss, accuracy and speed against the step, and a line with time and memory, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand, not pyplot: no display is needed and no global state is touched.
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, speed = figure.subplots(1, 3)
    train, validation = result["curve"]["train"], result["curve"]["validation"]

    def draw(axes: Any, entries: list[dict[str, Any]], name: str, **style: Any) -> None:
        axes.plot([entry["step"] for entry in entries], [entry[name] for entry in entries], **style)

    draw(loss, train, "loss", color="#b0b0b0", linewidth=1, label="training, each step")
    if validation:
        draw(loss, validation, "loss", color="#1f77b4", marker="o", label="held out")
        draw(accuracy, validation, "accuracy", color="#1f77b4", marker="o", label="labels")
        draw(accuracy, validation, "row_accuracy", color="#ff7f0e", marker="s", label="rows all right")
        accuracy.legend()
        if result["best_step"]:
            loss.axvline(result["best_step"], color="black", linewidth=0.8, linestyle=":", label="kept")
    else:
        accuracy.text(0.5, 0.5, "no row was held out", ha="center", va="center", transform=accuracy.transAxes)
    loss.set(title="Loss", xlabel="step", ylabel="nats a label", ylim=(0, None))
    loss.legend()
    accuracy.set(title="Accuracy on held-out rows", xlabel="step", ylim=(0, 1.02))
    draw(speed, train, "tokens_per_second", color="#1f77b4", linewidth=1)
    speed.set(title="Own tokens per second", xlabel="step", ylim=(0, None))
    memory = result["peak_memory_bytes"]
    figure.suptitle(
        f"{result['method']}, {result['num_virtual_tokens']} virtual tokens: {result['steps']} steps in "
        f"{result['training_seconds']:.1f} s" + (f", peak memory {memory / 1e9:.2f} GB" if memory is not None else "")
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
