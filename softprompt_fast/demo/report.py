# SPDX-License-Identifier: Apache-2.0
"""The demo's results for people: a table in the terminal and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from softprompt_fast.demo.compare import OURS, PEFT

if TYPE_CHECKING:
    from softprompt_fast.demo.run import Result


def tables(result: Result) -> list[Table]:
    learned = Table("held-out accuracy", "", title=f"{result.held_out} reviews the prompt was not trained on")
    learned.add_row("no prompt", f"{result.accuracy_bare:.3f}")
    learned.add_row("random prompt, before training", f"{result.accuracy_before:.3f}")
    learned.add_row("after training", f"[bold]{result.accuracy_after:.3f}[/bold]")
    same = result.agreement
    learned.add_row("predictions equal to PEFT's", f"{same.equal} of {same.rows}")
    learned.add_row("largest difference of a label's logit", f"{same.max_logit_difference:.1e}")

    timed = Table(
        "system",
        "to first token",
        "tokens/s",
        "prefix memory",
        "against PEFT",
        "same text",
        title=f"{result.rows_timed} rows of {result.own_tokens_timed} tokens behind {result.num_virtual_tokens} "
        f"virtual tokens, {result.new_tokens_timed} new tokens each",
    )
    peft = next(timing for timing in result.timings if timing.system == PEFT)
    for t in result.timings:
        timed.add_row(
            f"[bold]{t.system}[/bold]" if t.system == OURS else t.system,
            f"{t.seconds_to_first_token * 1e3:.0f} ms",
            f"{t.tokens_per_second:.1f}",
            f"{t.prefix_bytes / 1e6:.2f} MB",
            f"{peft.seconds_to_first_token / t.seconds_to_first_token:.2f}x to first token, "
            f"{t.tokens_per_second / peft.tokens_per_second:.2f}x tokens/s",
            "yes" if t.same_tokens else "no",
        )
    return [learned, timed]


def picture(result: Result, path: Path) -> None:
    """Loss curve, accuracies and the three timings as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand, not pyplot: no display is needed and no global state is touched.
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1)
    curve, bars = top.subplots(1, 2, width_ratios=[2, 1])

    losses = result.losses
    curve.plot(range(1, len(losses) + 1), losses, color="#b0b0b0", linewidth=1, label="each step")
    width = min(10, len(losses))
    means = [sum(losses[i - width : i]) / width for i in range(width, len(losses) + 1)]
    curve.plot(range(width, len(losses) + 1), means, color="#1f77b4", linewidth=2, label=f"mean of {width} steps")
    curve.set(title="Training loss at the label", xlabel="step", ylabel="nats", ylim=(0, None))
    curve.legend()

    accuracies = {
        "no prompt": result.accuracy_bare,
        "random prompt": result.accuracy_before,
        "trained": result.accuracy_after,
    }
    drawn = bars.bar(list(accuracies), list(accuracies.values()), color=["#d0d0d0", "#b0b0b0", "#1f77b4"])
    bars.bar_label(drawn, fmt="%.3f")
    bars.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    bars.set(title=f"Accuracy on {result.held_out} held-out reviews", ylim=(0, 1))

    systems = [t.system for t in result.timings]
    colors = ["#1f77b4" if system == OURS else "#b0b0b0" for system in systems]
    measures = [
        ("Time to first token (ms, less is better)", [t.seconds_to_first_token * 1e3 for t in result.timings], "%.0f"),
        ("Tokens per second (more is better)", [t.tokens_per_second for t in result.timings], "%.1f"),
        ("Prefix memory (MB, less is better)", [t.prefix_bytes / 1e6 for t in result.timings], "%.2f"),
    ]
    for axes, (title, values, number) in zip(bottom.subplots(1, 3), measures, strict=True):
        axes.bar_label(axes.bar(systems, values, color=colors), fmt=number)
        axes.set(title=title, ylim=(0, max(values) * 1.15))
    same = result.agreement
    figure.suptitle(
        f"One soft prompt of {result.num_virtual_tokens} virtual tokens; {same.equal} of {same.rows} held-out "
        f"predictions equal PEFT's, logits within {same.max_logit_difference:.1e}"
    )
    figure.savefig(path, dpi=120)
