# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and instructions of every CUDA kernel, compiled for GPUs that need not be here.

``python -m tests.cuda_resources`` compiles every instance in ``csrc/cuda/*.cu`` for ARCHITECTURES and compares it with
tests/cuda_resources.json; ``--write`` rewrites that file, ``--arch`` and ``--only REGEX`` (file names) do a part.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
TABLE = Path(__file__).with_suffix(".json")
REWRITE = "python -m tests.cuda_resources --write"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
COLUMNS = ("registers", "spilled bytes", "stack bytes", "instructions")
#: Instructions worth seeing, by the name in SASS: tensor cores, asynchronous copies, their loads, wide accesses.
INSTRUCTIONS = {
    "HMMA": "mma",
    "HGMMA": "wgmma",
    "LDGSTS": "cp.async",
    "LDSM": "ldmatrix",
    "LDG.E.128": "ld.128",
    "STG.E.128": "st.128",
}
#: Among a kernel's instructions: its wgmma run one by one.
SERIALIZED = "serialized"
#: What a kernel, by a regular expression, must have of them.
MEANT = {
    r"^(merge_states|prompt_concat)\w*<(.*\b8|float, 4)>$": {"ld.128", "st.128"},
    r"^prefix_attention_decode<": {"mma", "cp.async", "ldmatrix"},
    r"^prefix_attention_decode<.*true>": {"wgmma"},
    r"^prompt_qkv<": {"mma", "ld.128", "st.128"},
}
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]

#: Files for one architecture alone, by the end of their stem: what setup.py defines for them.
SPECIAL = {"sm_90a": "-DSOFTPROMPT_FAST_SM90A"}

Rows = dict[str, list[Any]]  # "file | kernel | architecture" -> a value per column


def missing() -> str | None:
    """Why nothing can be compiled here."""
    if shutil.which("nvcc") is None:
        return "no nvcc on the path"
    return None if shutil.which("c++filt") else "no c++filt on the path"


def disassembler() -> Path | None:
    """nvdisasm of the toolkit or, where it has none, of Triton."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.is_file() else None


def compiler() -> str:
    """The version that a table is of: another compiler, other numbers."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]  # type: ignore[index]


def demangled(names: list[str]) -> dict[str, str]:
    """Short: ``merge_states<BFloat16, 8>``, without namespaces, casts and arguments."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    short = {}
    for name, full in zip(names, done.stdout.splitlines(), strict=True):
        text = re.sub(r"softprompt_fast::|cuda::|\(anonymous namespace\)::|^void |\((?:bool|int)\)", "", full)
        short[name] = text[: text.index(">(") + 1] if ">(" in text else text.partition("(")[0]
    return short


def compiled(source: Path, arch: str) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        special = [SPECIAL[arch]] if source.stem.endswith(tag(arch)) else []
        command = ["nvcc", *FLAGS, f"-arch={arch}", *special, str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {arch}: {done.stderr}")
        used = instructions(cubin)
    for name in serialized(done.stderr):
        used.setdefault(name, set()).add(SERIALIZED)
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    names = demangled([name for name, *_ in found]) if found else {}
    return {
        f"{source.name} | {names[name]} | {arch}": [
            int(registers), int(stores) + int(loads), int(stack), " ".join(sorted(used.get(name, ())))
        ]
        for name, stack, stores, loads, registers in found
    }  # fmt: skip


def serialized(said: str) -> list[str]:
    """Mangled kernels in which ptxas makes asynchronous products wait for one another: it says so where it sees that
    their registers are in use."""
    return re.findall(r"wgmma\S* instructions are serialized .* function '(\w+)'", said)


def instructions(cubin: Path) -> dict[str, set[str]]:
    """Mangled kernel -> which of INSTRUCTIONS it has. Empty without a disassembler."""
    binary = disassembler()
    if binary is None:
        return {}
    text = subprocess.run([str(binary), "--print-code", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.match(r"[^\s,]+", section)
        assert name is not None
        codes = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:\.[A-Z0-9_]+)*", section))
        found[name[0]] = {
            short for code, short in INSTRUCTIONS.items() if any(has(operation, code) for operation in codes)
        }
    return found


def has(operation: str, code: str) -> bool:
    """Whether an operation is `code` with any modifiers between its parts: LDG.E.128.CONSTANT is LDG.E.128."""
    parts = operation.split(".")
    return parts[0] == code.split(".")[0] and set(code.split(".")) <= set(parts)


def tag(arch: str) -> str:
    """The end of the stem of a file for this architecture alone."""
    return "_" + arch.replace("_", "")


def suits(source: Path, arch: str) -> bool:
    return source.stem.endswith(tag(arch)) or not source.stem.endswith(tuple(map(tag, SPECIAL)))


def compile_all(architectures: tuple[str, ...], only: str, processes: int) -> Rows:
    sources = [s for s in sorted(SOURCES.glob("*.cu")) if re.search(only, s.name)]
    tasks = [(s, a) for s in sources for a in architectures if suits(s, a)]
    rows: Rows = {}
    with ThreadPoolExecutor(processes) as pool:
        for found in pool.map(lambda task: compiled(*task), tasks):
            rows |= found
    return rows


def read() -> tuple[str, Rows]:
    """The compiler that the table is of, and its rows."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return table["nvcc"], table["rows"]


def write(rows: Rows) -> None:
    """A row a line, so that a change reads well in a diff."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    head = f'{{\n "nvcc": {json.dumps(compiler())},\n "columns": {json.dumps(COLUMNS)},\n "rows": {{\n'
    TABLE.write_text(f"{head}{lines}\n }}\n}}\n", encoding="utf-8")


def faults(rows: Rows) -> list[str]:
    """Spills, and instructions that are meant to be there and are not."""
    wrong = []
    for name, (_, spilled, _, used) in rows.items():
        if spilled:
            wrong.append(f"{name}: {spilled} bytes are spilled to local memory")
        if SERIALIZED in used.split():
            wrong.append(f"{name}: its wgmma are serialized")
        for pattern, meant in MEANT.items():
            kernel = name.split(" | ")[1]
            lacking = meant - set(used.split())
            if re.search(pattern, kernel) and lacking and disassembler() is not None:
                wrong.append(f"{name}: it should have {', '.join(sorted(lacking))}, found {used or 'none'}")
    return wrong


def differences(found: Rows, table: Rows) -> list[str]:
    """How what was compiled differs from the table, by the same compiler; empty where it does not."""
    wrong = [f"{name}: not in the table" for name in found.keys() - table.keys()]
    wrong += [f"{name}: in the table, but no kernel's" for name in table.keys() - found.keys()]
    for name in found.keys() & table.keys():
        for column, now, before in zip(COLUMNS, found[name], table[name], strict=True):
            if now != before:
                wrong.append(f"{name}: {column} changed, {before!r} -> {now!r}")
    return sorted(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", metavar="REGEX", help="files whose name matches")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if why := missing():
        parser.error(why)
    started = time.perf_counter()
    rows = compile_all(tuple(options.arch), options.only, options.processes)
    for name in sorted(rows):
        print(f"{name}: " + ", ".join(f"{c} {v}" for c, v in zip(COLUMNS, rows[name], strict=True)))
    wrong = faults(rows)

    def chosen(name: str) -> bool:
        file, _, arch = name.split(" | ")
        return arch in options.arch and re.search(options.only, file) is not None

    version, table = read() if TABLE.is_file() else ("", {})
    if options.write and not wrong:
        write({name: row for name, row in table.items() if not chosen(name)} | rows)
    elif version == compiler():
        changes = differences(rows, {name: row for name, row in table.items() if chosen(name)})
        wrong += [*changes, f"if that is meant: {REWRITE}"] if changes else []
    print(f"{len(rows)} kernels in {time.perf_counter() - started:.0f} s")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
