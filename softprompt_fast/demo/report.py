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
        title=f"{result.rows_timed} rows of {result.own_tokens_timed} tokens, {result.new_tokens_timed} new each; "
        "x is against PEFT"
    )
    for heading in ("virtual\ntokens", "system", "first token", "tokens/s", "prefix\nmemory", "same\ntext"):
        timed.add_column(heading, no_wrap=True)
    for t in result.timings:
        if t.system == PEFT:
            peft = t
            timed.add_section()
        timed.add_row(
            str(t.num_virtual_tokens) if t.system == PEFT else "",
            f"[bold]{t.system}[/bold]" if t.system == OURS else t.system,
            f"{t.seconds_to_first_token * 1e3:.0f} ms {peft.seconds_to_first_token / t.seconds_to_first_token:.1f}x",
            f"{t.tokens_per_second:.1f} {t.tokens_per_second / peft.tokens_per_second:.1f}x",
            f"{t.prefix_bytes / 1e6:.1f} MB",
            "yes" if t.same_tokens else "no",
        )
    return [learned, timed]


def picture(result: Result, path: Path) -> None:
    """Loss curve, accuracies and the three timings as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand, not pyplot: no display is needed and no global state is touched.
    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 6)
    curve, bars = figure.add_subplot(grid[0, :4]), figure.add_subplot(grid[0, 4:])

    losses = result.losses
    curve.plot(range(1, len(losses) + 1), losses, color="#b0b0b0", linewidth=1, label="each step")
    width = min(10, max(1, len(losses) // 2))
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

    for row, length in enumerate(dict.fromkeys(t.num_virtual_tokens for t in result.timings), start=1):
        timings = [t for t in result.timings if t.num_virtual_tokens == length]
        systems = [t.system.replace(" ", "\n") for t in timings]
        colors = ["#1f77b4" if t.system == OURS else "#b0b0b0" for t in timings]
        measures = [
            ("Time to first token (ms, less is better)", [t.seconds_to_first_token * 1e3 for t in timings], "%.0f"),
            ("Tokens per second (more is better)", [t.tokens_per_second for t in timings], "%.1f"),
            ("Prefix memory (MB, less is better)", [t.prefix_bytes / 1e6 for t in timings], "%.1f"),
        ]
        for column, (title, values, number) in enumerate(measures):
            axes = figure.add_subplot(grid[row, 2 * column : 2 * column + 2])
            axes.bar_label(axes.bar(systems, values, color=colors), fmt=number)
            axes.set(title=title, ylim=(0, max(values) * 1.15))
            if column == 0:
                axes.set_ylabel(f"{length} virtual tokens")
    same = result.agreement
    figure.suptitle(
        f"One soft prompt of {result.num_virtual_tokens} virtual tokens; {same.equal} of {same.rows} held-out "
        f"predictions equal PEFT's, logits within {same.max_logit_difference:.1e}"
    )
    figure.savefig(path, dpi=120)
