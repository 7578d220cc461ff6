# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and shared memory of every kernel variant in use, compiled for GPUs that need not be here.

``python -m tests.triton_resources`` compiles the calls of tests/triton_variants.py and compares them with
tests/triton_resources.json; ``--write`` rewrites that file, ``--entries`` compiles every entry of every shipped tuned
table instead, ``--only REGEX`` some of either. It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import triton

from softprompt_fast.backends.triton import _tuning
from tests import triton_offline, triton_variants

TABLE = Path(__file__).with_suffix(".json")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
REWRITE = "python -m tests.triton_resources --write"

Rows = dict[str, list[Any]]  # "variant | architecture | kernel" -> a value per column


# ---- the table --------------------------------------------------------------------------------------------------


def read() -> tuple[str, Rows]:
    """The version of Triton that the table was written with, and its rows."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return table["triton"], table["rows"]


def write(rows: Rows) -> None:
    """A row a line, so that a change reads well in a diff."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows, key=_natural))
    columns = json.dumps(triton_offline.COLUMNS)
    head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "columns": {columns},\n "rows": {{\n'
    TABLE.write_text(f"{head}{lines}\n }}\n}}\n", encoding="utf-8")


def in_brief(rows: Rows) -> str:
    """The table of docs/kernels.md."""
    lines = ["| call | kernel | registers | shared | warps | tensor cores |", "|---|---|---|---|---|---|"]
    for name in sorted(rows, key=_natural):
        title, arch, kernel = name.split(" | ")
        if arch == "sm_90" and " bf16" in title and set(re.findall(r" (d\d+) ", title)) <= {"d128"}:
            registers, _, shared, warps, units = rows[name]
            columns = title, f"`{kernel}`", registers, f"{shared / 1024:.0f} KB", warps, units or "none"
            lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)


def documented(text: str, brief: str) -> str:
    """docs/kernels.md with another table."""
    start, end = "<!-- resources -->\n", "<!-- /resources -->"
    before, _, rest = text.partition(start)
    return f"{before}{start}{brief}\n{end}{rest.partition(end)[2]}"


def beyond_limits(rows: Rows) -> list[str]:
    """Spills, and more shared memory than a chip has."""
    wrong = []
    for name, row in rows.items():
        found = triton_offline.Resources(*row)
        arch = name.split(" | ")[1]
        if found.spills:
            wrong.append(f"{name}: {found.spills} instructions spill to local memory: take smaller blocks")
        if found.shared > triton_offline.SHARED_LIMIT[arch]:
            wrong.append(
                f"{name}: {found.shared} bytes of shared memory, {arch} has {triton_offline.SHARED_LIMIT[arch]}"
            )
    return wrong


def without_tensor_cores(rows: Rows) -> list[str]:
    """Variants of 16-bit products in which no kernel uses tensor cores, or on sm_90 none uses wgmma."""
    products = {v.title: v.architectures for v in triton_variants.variants() if v.products}
    wrong = []
    for title, architectures in products.items():
        for arch in architectures:
            used = {unit for name, row in rows.items() if name.startswith(f"{title} | {arch} |") for unit in row[-1:]}
            if not any(used):
                wrong.append(f"{title} on {arch}: no kernel uses tensor cores")
    return wrong


def differences(found: Rows, table: Rows) -> list[str]:
    """How what was compiled differs from the table, by the same version of Triton; empty where it does not."""
    wrong = [f"{name}: not in the table" for name in found.keys() - table.keys()]
    wrong += [f"{name}: in the table, but nothing launches it" for name in table.keys() - found.keys()]
    for name in found.keys() & table.keys():
        for column, now, before in zip(triton_offline.COLUMNS, found[name], table[name], strict=True):
            if now != before:
                grown = not isinstance(now, str) and now > before
                wrong.append(f"{name}: {column} {'grew' if grown else 'changed'}, {before!r} -> {now!r}")
    return sorted(wrong, key=_natural)


def _natural(text: str) -> list[tuple[int, str]]:
    """ "d64" before "d128"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


# ---- compiling --------------------------------------------------------------------------------------------------


def tasks(entries: bool) -> Iterator[tuple[str, str]]:
    """What can be compiled apart: (title, architecture)."""
    if entries:
        yield from ((title, arch) for title, (arch, _) in triton_variants.entries().items())
        return
    for variant in triton_variants.variants():
        yield from ((variant.title, arch) for arch in variant.architectures)


def compiled(task: tuple[str, str]) -> Rows:
    title, arch = task
    calls = {v.title: v.call for v in triton_variants.variants()}
    call = calls[title] if title in calls else triton_variants.entries()[title][1]
    rows: Rows = {}
    seen: set[str] = set()
    for launch in triton_offline.record(call, arch):
        key = triton_offline.specialisation(launch, arch)
        if key in seen:
            continue
        seen.add(key)
        names = (f"{title} | {arch} | {launch.name}{suffix}" for suffix in ("", *(f" {n}" for n in range(2, 99))))
        rows[next(name for name in names if name not in rows)] = triton_offline.compile_launch(launch, arch).row()
    return rows


def compile_all(chosen: list[tuple[str, str]], processes: int) -> tuple[Rows, list[str]]:
    """Their rows, and the tasks that launched nothing or did not compile."""
    rows: Rows = {}
    failed: list[str] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for task, future in [(task, pool.submit(compiled, task)) for task in chosen]:
            try:
                found = future.result()
            except Exception as error:
                failed.append(f"{' | '.join(task)}: {type(error).__name__}: {str(error).strip()[-300:]}")
                continue
            if not found:
                failed.append(f"{' | '.join(task)}: launches nothing")
            rows |= found
    return rows, failed


def specialisations(lengths: Iterable[int] = range(500, 566)) -> dict[str, list[str]]:
    """What each of the calls whose lengths grow makes Triton compile on sm_90, all lengths together."""
    found: dict[str, list[str]] = {}
    for title, call in triton_variants.growing().items():
        launches = [x for n in lengths for x in triton_offline.record(partial(call, n), "sm_90")]
        keys = {triton_offline.specialisation(launch, "sm_90"): launch.name for launch in launches}
        found[title] = sorted(keys.values())
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    parser.add_argument("--entries", action="store_true", help="every entry of every shipped tuned table")
    parser.add_argument("--only", default="", metavar="REGEX", help="those whose title matches")
    parser.add_argument("--json", action="store_true", help="print {rows, failed} and judge nothing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--specialisations", action="store_true", help="how often growing lengths compile, as JSON")
    parser.add_argument("--format", action="store_true", help="sort the shipped tuned tables, compile nothing")
    options = parser.parse_args(arguments)
    if options.format:
        for path in _tuning.SHIPPED.rglob("*.json"):
            path.write_text(_tuning.dump(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    if options.specialisations:
        print(json.dumps(specialisations()))
        return 0
    chosen = [task for task in tasks(options.entries) if re.search(options.only, " | ".join(task))]
    started = time.perf_counter()
    rows, wrong = compile_all(chosen, options.processes)
    if options.json:
        print(json.dumps({"rows": rows, "failed": wrong}))
        return 0
    for name in sorted(rows, key=_natural):
        print(f"{name}: " + ", ".join(f"{c} {v}" for c, v in zip(triton_offline.COLUMNS, rows[name], strict=True)))
    wrong += beyond_limits(rows)
    if not options.entries:
        wrong += without_tensor_cores(rows) if not options.only else []
        version, table = read() if TABLE.is_file() else ("", {})
        if options.write and not wrong:
            kept = (
                {name: row for name, row in table.items() if not re.search(options.only, name)} if options.only else {}
            )
            write(kept | rows)
            text = documented(DOCUMENT.read_text(encoding="utf-8"), in_brief(kept | rows))
            DOCUMENT.write_text(text, encoding="utf-8")
        elif version == triton.__version__:
            wanted = {name: row for name, row in table.items() if re.search(options.only, name)}
            if changes := differences(rows, wanted):
                wrong += [*changes, f"if that is meant: {REWRITE}"]
    print(f"{len(rows)} kernels of {len(chosen)} calls in {time.perf_counter() - started:.0f} s")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
