# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA kernels for the emulator of csrc/cuda/emulator.h: an extension that any C++ compiler makes and that
takes CPU tensors. conftest.py sets SOFTPROMPT_FAST_CUDA_EMULATED to it, so that backend "cuda" runs in every test."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from softprompt_fast._version import __version__

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]


def compiler() -> list[str] | None:
    """The command of the C++ compiler; None if there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if shutil.which(command[0]) else None


def library() -> tuple[Path | None, str]:
    """The extension, built when a source has changed, and "built"; or None and the reason why there is none."""
    command = compiler()
    if command is None:
        return None, "no C++ compiler on this machine"
    try:
        import pybind11
    except ImportError:
        return None, "pybind11 is not installed"
    sources = sorted(p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in (".cpp", ".cu"))
    sources.append(ROOT / "csrc" / "torch_abi.cpp")
    read = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h", ".cuh"))
    text = b"".join(p.read_bytes() for p in read if p.parent.name not in ("cpu", "tests"))
    key = hashlib.sha256(repr([text, command, FLAGS, __version__, sys.version]).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_emulated"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / key / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with FileLock(folder / "lock"):
        if target.is_file():
            return target, "built"
        for old in folder.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
        target.parent.mkdir()
        includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        macros = ["-DSOFTPROMPT_FAST_EMULATED", f'-DSOFTPROMPT_FAST_VERSION="{__version__}"']
        macros.append('-DSOFTPROMPT_FAST_CUDA_ARCHS="emulated"')

        def compiled(source: Path) -> subprocess.CompletedProcess[str]:
            out = ["-x", "c++", "-c", str(source), "-o", str(target.parent / f"{source.name}.o")]
            call = [*command, *FLAGS, *includes, *macros, *out]
            return subprocess.run(call, capture_output=True, text=True, check=False)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(compiled, sources))
        if not any(one.returncode for one in done):
            link = [*command, "-shared", *map(str, target.parent.glob("*.o")), "-o", str(target)]
            done.append(subprocess.run(link, capture_output=True, text=True, check=False))
        if any(one.returncode for one in done):
            return None, "the kernels do not compile: " + "".join(one.stderr for one in done)
        return target, "built"
