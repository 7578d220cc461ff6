# SPDX-License-Identifier: Apache-2.0
"""Plots of rows: how cost grows, where it helps (heat maps over B and P), and the roofline. SVG, the same bytes for
the same rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _suite import OURS, Row

COLOURS = {"ours": "#0072b2", "sdpa": "#d55e00", "hydragen": "#009e73", "expanded": "#d55e00", "peft": "#cc79a7"}
"""Of Okabe and Ito: told apart with any eyes."""


def draw(rows: Sequence[Row], folder: Path) -> list[tuple[Path, str]]:
    """Write those for which there are rows. Paths, and what each shows."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = (
        (
            "heat-decode",
            _heat_map("decode", "call"),
            "Decoding, attention alone: speed-up over the fastest peer",
        ),
        ("heat-generate", _heat_map("generate", "total"), "generate, whole model: speed-up over the fastest peer"),
        ("scaling", _curves, "How the time of a call grows with rows, virtual tokens, queries and prompts"),
        ("roofline", _roofline, "Ops against the machine's roofline, measured in the same rounds"),
    )
    drawn = []
    for name, plot, caption in pictures:
        figure = plot(rows)
        if figure is not None:
            path = folder / f"{name}.svg"
            _save(figure, path)
            drawn.append((path, caption))
    return drawn


def _figure(width: float, height: float, **grid: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "softprompt-fast", "svg.fonttype": "none", "font.size": 9})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(squeeze=False, **grid)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def fastest_peers(rows: Sequence[Row], what: str) -> dict[str, Row]:
    """Of every case the row of the fastest system that is not ours, and has a ratio."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.what == what and row.ratio is not None and row.system not in (OURS, "one-by-one"):
            best = found.get(row.case)
            if best is None or row.ratio["median"] < best.ratio["median"]:
                found[row.case] = row
    return found


def _heat_map(name: str, what: str) -> Callable[[Sequence[Row]], Any]:
    def plot(rows: Sequence[Row]) -> Any:
        import math

        scaling = [row for row in rows if row.set == "scaling" and re.fullmatch(rf"{name}-b\d+-p\d+", row.case)]
        best = {(row.work["B"], row.work["P"]): row.ratio["median"] for row in fastest_peers(scaling, what).values()}
        if len(best) < 2:
            return None
        batches, prefixes = (sorted({key[i] for key in best}) for i in (0, 1))
        logs = [[math.log2(best[b, p]) if (b, p) in best else math.nan for p in prefixes] for b in batches]
        figure, ((axes,),) = _figure(1.5 + 0.8 * len(prefixes), 1.3 + 0.45 * len(batches))
        most = max(1.0, *(abs(x) for line in logs for x in line if x == x))
        axes.imshow(logs, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
        for i, b in enumerate(batches):
            for j, p in enumerate(prefixes):
                if (b, p) in best:
                    light = abs(logs[i][j]) > 0.6 * most
                    axes.text(
                        j, i, f"{best[b, p]:.2f}x", ha="center", va="center", color="white" if light else "black"
                    )
        axes.set_xticks(range(len(prefixes)), prefixes)
        axes.set_yticks(range(len(batches)), batches)
        axes.set_xlabel("P, virtual tokens")
        axes.set_ylabel("B, rows")
        axes.set_title("blue: faster than the fastest peer")
        return figure

    return plot


#: Panels: axis, its label, the cases on it, and what is held fixed.
PANELS = (
    ("B", "B, rows (P 512)", r"decode-b\d+-p512"),
    ("P", "P, virtual tokens (B 32)", r"decode-b32-p\d+"),
    ("S", "S, queries a row (B 8, P 512)", r"queries-s\d+"),
    ("prompts", "prompts (B 32, P 256 each)", r"prompts-n\d+"),
)


def _curves(rows: Sequence[Row]) -> Any:
    scaling = [row for row in rows if row.set == "scaling" and row.seconds and row.what == "call"]
    chosen = [(axis, label, [r for r in scaling if re.fullmatch(cases, r.case)]) for axis, label, cases in PANELS]
    chosen = [panel for panel in chosen if len({row.case for row in panel[2]}) > 1]
    if not chosen:
        return None
    figure, grid = _figure(3.0 * len(chosen), 2.9, ncols=len(chosen))
    for axes, (axis, label, points) in zip(grid[0], chosen, strict=True):
        for system in dict.fromkeys(row.system for row in points):
            line = sorted((row for row in points if row.system == system), key=lambda row: row.work[axis])
            x = [row.work[axis] for row in line]
            low, middle, high = ([1e3 * row.seconds[q] for row in line] for q in ("p20", "median", "p80"))
            colour = COLOURS.get(system)
            axes.plot(x, middle, marker="o", markersize=3, label=system, color=colour)
            axes.fill_between(x, low, high, alpha=0.2, color=colour, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row.work[axis] for row in points})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("ms a call, p20 to p80")
    grid[0][0].legend(frameon=False)
    return figure


def _roofline(rows: Sequence[Row]) -> Any:
    points = [row for row in rows if row.set == "op" and row.seconds and row.rates and row.flops and row.bytes]
    if not points:
        return None
    flops, moved = (median(row.rates[what] for row in points) for what in ("flops", "bytes"))
    figure, ((axes,),) = _figure(5.2, 3.6)
    intensities = [row.flops / row.bytes for row in points]
    ends = [min(intensities) / 2, flops / moved, 2 * max(*intensities, flops / moved)]
    axes.plot(ends, [min(flops, x * moved) / 1e9 for x in ends], color="black", linewidth=1)
    for system in dict.fromkeys(row.system for row in points):
        line = [row for row in points if row.system == system]
        axes.scatter(
            [row.flops / row.bytes for row in line],
            [row.flops / row.seconds["median"] / 1e9 for row in line],
            s=18,
            label=system,
            color=COLOURS.get(system),
            marker="o" if system == OURS else "x",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flop a byte, every input read once")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"roof: {flops / 1e9:.0f} GFLOP/s, {moved / 1e9:.0f} GB/s")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    return figure
