# SPDX-License-Identifier: Apache-2.0
"""The report: parts of Markdown pages that are made of rows, between marks. ``docs/benchmarks.md`` is the page, for
the rows of benchmarks/results and, with ``softprompt-fast bench --report``, for those of a run of one's own.

    python benchmarks/report.py
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from _bases import DEMO
from _harness import ROOT, shown
from _suite import OURS, SETS, SYSTEMS, Row, duration, size

PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
REASONS = ROOT / "benchmarks" / "losses.json"
Pictures = Sequence[tuple[Path, str]]


def begin(name: str) -> str:
    return f"<!-- generated: {name} -->"


def end(name: str) -> str:
    return f"<!-- end: {name} -->"


def fill(text: str, parts: dict[str, str]) -> str:
    """A page with its parts replaced.

    Raises:
        ValueError: a part is marked that there is not, or a mark has no end.
    """
    for name in re.findall(r"<!-- generated: (\S+) -->", text):
        if name not in parts:
            raise ValueError(f"no part is called {name}; there are {', '.join(parts)}")
        before, _, rest = text.partition(begin(name))
        _, found, after = rest.partition(end(name))
        if not found:
            raise ValueError(f"expected the line {end(name)}")
        text = f"{before}{begin(name)}\n{parts[name].strip()}\n{end(name)}{after}"
    return text


def parts(rows: Sequence[Row], pictures: Pictures = (), folder: Path = PAGE.parent) -> dict[str, str]:
    """Name -> Markdown. ``folder``: where the page lies, for the addresses of pictures."""
    images = [f"![{caption}]({os.path.relpath(path, folder)})\n\n*{caption}.*" for path, caption in pictures]
    return {
        "help": does_it_help(rows),
        "losses": losses(rows),
        **{name: table(rows, name) for name in SETS if name != "scaling"},
        "pictures": "\n\n".join(images) or "None: the run had no scaling cases, or `--plot` was not given.",
        "systems": "\n".join(f"* `{name}`: {said}." for name, said in SYSTEMS.items()),
        "setting": "\n".join(f"* {line}" for line in settings(rows)),
    }


def settings(rows: Iterable[Row]) -> list[str]:
    """Machines, versions, allocators and commits, each once."""
    found = {}
    for row in rows:
        packages = ", ".join(
            f"{name} {row.versions[name]}" for name in ("torch", "transformers", "peft") if name in row.versions
        )
        where = "; ".join(filter(None, (row.device, packages, row.allocator)))
        found[f"{where}; commit {(row.commit or 'unknown')[:10]}"] = None
    return list(found)


# -- parts ------------------------------------------------------------------------------------------------------------


def by_case(rows: Iterable[Row]) -> dict[str, dict[tuple[str, str], Row]]:
    """Case's id -> (system, what) -> row; sorted by what a case works on."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        found.setdefault(f"{row.set}/{row.case}", {})[row.system, row.what] = row
    return found


def sizes(work: dict[str, Any]) -> str:
    """Such as "B 8, P 128, S 16, new 32"."""
    names = ("prompts", "B", "P", "S", "T", "new", "micro-batches", "micro-batches of PEFT")
    said = [f"{name} {_size(work[name])}" for name in names if work.get(name) and (name, work[name]) != ONE]
    return ", ".join(said)


ONE = ("micro-batches", 1)


def _size(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def cell(rows: dict[tuple[str, str], Row], system: str, what: str) -> str:
    row = rows.get((system, what))
    if row is None:
        skipped = rows.get((system, ""))
        return "not run" if skipped is not None and skipped.skipped else ""
    return shown(row.ratio) if row.ratio else "no ratio: results differ" if row.withheld else ""


def does_it_help(rows: Sequence[Row]) -> str:
    """A line for every whole model at a batch, a prefix and a number of new tokens."""
    whole = (row for row in rows if row.set in ("model", "scaling") and "base" in row.work)
    chosen = [row for row in whole if "B" in row.work]  # a GPU's have a page of their own
    systems = [
        name
        for name in ("peft", "expanded", "static-compiled", "vllm")
        if any(r.system == name and r.ratio for r in chosen)
    ]
    lines = []
    cases = sorted(by_case(chosen).values(), key=lambda case: _key(next(iter(case.values())).work))
    for case in cases:
        ours = case.get((OURS, "total"))
        if ours is None:
            continue
        work = ours.work
        base = {"demo": "SmolLM2-135M"}.get(work["base"], work["base"])
        line = [base, *(str(work[name]) for name in ("B", "P", "S", "new")), duration(ours.seconds)]
        line.append(tokens_a_second(ours))
        lines.append([*line, *(cell(case, name, "total") for name in systems), cell(case, "expanded", "first-token")])
    if not lines:
        return "The run had no whole model: `softprompt-fast bench model`."
    header = ["model", "B", "P", "S", "new", "ours", "new tokens/s", *(f"faster than `{name}`" for name in systems)]
    return grid([*header, "first token, than `expanded`"], lines)


def _key(work: dict[str, Any]) -> tuple[Any, ...]:
    return (work["base"] != "demo", work["base"], work["B"], work["P"], work.get("new", 0))


def table(rows: Sequence[Row], name: str) -> str:
    """All rows of a set. What a turn takes of memory stands beside its whole time, and so do its tokens a second."""
    rows = [row for row in rows if row.set == name]
    more = {
        "new tokens/s": any(row.work.get("new") for row in rows),
        "memory": any(row.what == "memory" for row in rows),
    }
    lines = []
    for case in by_case(row for row in rows if row.what != "memory").values():
        first = next(iter(case.values()))
        title = f"`{first.case}`: {sizes(first.work)}"
        for row in case.values():
            ratio = shown(row.ratio) if row.ratio else f"none: {row.withheld}" if row.withheld else ""
            seconds = duration(row.seconds) if row.seconds else f"not run: {row.skipped}"
            roof = f"{row.roofline['median']:.0%}" if row.roofline else ""
            line = [title, f"`{row.system}`", row.what, seconds, ratio, roof]
            whole = row.what == "total"
            if more["new tokens/s"]:
                line.append(tokens_a_second(row) if whole else "")
            if more["memory"]:
                line += memory_cells(rows, row) if whole else ["", ""]
            lines.append(line)
            title = ""
    if not lines:
        return f"The run had none: `softprompt-fast bench {name}`."
    header = ["work", "system", "what", "time, median (p20 to p80)", "ours is faster by", "of the roofline"]
    header += ["new tokens/s"] if more["new tokens/s"] else []
    return grid([*header, *(["peak memory", "times ours"] if more["memory"] else [])], lines)


def tokens_a_second(row: Row) -> str:
    return f"{row.work['B'] * row.work['new'] / row.seconds['median']:.0f}" if row.seconds and "B" in row.work else ""


def memory_cells(rows: Iterable[Row], of: Row) -> list[str]:
    """What a system's turn takes at its peak, and that over ours."""
    found = next((row for row in rows if row.what == "memory" and row.parts[:3] == of.parts[:3]), None)
    if found is None or found.memory is None:
        return ["" if found is None else f"not measured: {found.skipped}", ""]
    return [size(found.memory["bytes"]), f"{found.memory['ratio']:.2f}" if "ratio" in found.memory else ""]


def losing(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.ratio is not None and row.ratio["median"] < 1]


def losses(rows: Sequence[Row], reasons: dict[str, str] | None = None) -> str:
    """Every row in which a peer is faster, with the reason that benchmarks/losses.json has for its id."""
    reasons = json.loads(REASONS.read_text(encoding="utf-8")) if reasons is None else reasons
    lines = []
    for row in sorted(losing(rows), key=lambda row: row.ratio["median"]):
        why = next(
            (why for pattern, why in reasons.items() if fnmatch.fnmatchcase(row.id, pattern)), "not explained yet"
        )
        low, high = (row.ratio[side] for side in ("low", "high"))
        sure = "" if high < 1 else "; may be noise"
        lines.append([f"`{row.id}`", f"{shown(row.ratio)}", f"{low:.2f} to {high:.2f}{sure}", why])
    if not lines:
        return "In no row of these."
    return grid(["row", "ratio", "95% of the median", "why"], lines)


def disagreeing(first: Iterable[Row], second: Iterable[Row]) -> tuple[int, list[str]]:
    """How many rows have a ratio in both runs, and those whose intervals do not overlap, in words."""
    other = {row.id: row.ratio for row in second if row.ratio is not None}
    count, said = 0, []
    for row in first:
        if row.ratio is None or row.id not in other:
            continue
        count += 1
        a, b = row.ratio, other[row.id]
        if a["high"] < b["low"] or b["high"] < a["low"]:
            said.append(f"{row.id}: {shown(a)}, then {shown(b)}")
    return count, said


# -- pages ------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[Row], pictures: Pictures = ()) -> None:
    """The page for a run of one's own: that of docs/, with these rows in it."""
    text = PAGE.read_text(encoding="utf-8")
    nothing = dict.fromkeys(extra_parts(), "Not part of `softprompt-fast bench`: see docs/benchmarks.md.")
    path.parent.mkdir(parents=True, exist_ok=True)
    filled = fill(text, {**nothing, **parts(rows, pictures, path.parent)})
    path.write_text(filled, encoding="utf-8")


def extra_parts() -> dict[str, Callable[[], str]]:
    """What the page shows of scripts with measures of their own: memory and accuracy of training, servers' load."""
    import bench_serve
    import bench_train

    return {"training": bench_train.report, "serving": bench_serve.report}


def headline(rows: Sequence[Row]) -> str:
    """README's: the whole models, in as few columns as possible."""
    chosen = [
        row for row in rows if row.set in ("model", "train", "serve") and row.what == "total" and "B" in row.work
    ]
    lines = []
    for case in by_case(chosen).values():
        peers = [row for row in case.values() if row.ratio is not None and row.system != "one-by-one"]
        if not peers or (OURS, "total") not in case:
            continue
        best = min(peers, key=lambda row: row.ratio["median"])
        peft = next((row for row in peers if row.system.startswith("peft")), None)
        work = {"model": "generate", "train": "a training step", "serve": "many prompts"}[best.set]
        method = best.work.get("method", "PROMPT_TUNING")
        work += "" if method == "PROMPT_TUNING" else f" ({method.replace('_', ' ').lower()})"
        base = best.work.get("base", DEMO)
        work += "" if base == DEMO else f", {base}"
        over = f"{shown(best.ratio)}, `{best.system}`" if best is not peft else ""
        lines.append([work, sizes(best.work), shown(peft.ratio) if peft else "", over])
    return grid(["SmolLM2-135M, or as said", "sizes", "faster than PEFT", "than the fastest other"], lines)


def pages(rows: Sequence[Row], pictures: Pictures) -> dict[Path, str]:
    """What docs/benchmarks.md and the README should say."""
    found = {**parts(rows, pictures), **{name: make() for name, make in extra_parts().items()}}
    found["headline"] = headline(rows)
    return {path: fill(path.read_text(encoding="utf-8"), found) for path in (PAGE, README)}
