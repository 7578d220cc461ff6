# SPDX-License-Identifier: Apache-2.0
"""Python processes that need not import again what takes seconds to import: a process that does nothing else imports
it once for all tests of a worker, and is forked for each."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

IMPORTED = [
    "hypothesis", "peft", "pytest", "softprompt_fast.model", "torch.utils.benchmark", "transformers.trainer",
    "transformers.models.llama.modeling_llama",
]  # fmt: skip


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run(code: str, *arguments: str, cwd: Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """``python -c code *arguments`` in a folder: how it ended, and what it said."""
    with tempfile.TemporaryDirectory() as folder:
        said = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = _context().Process(target=_main, args=(code, arguments, cwd, said))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(code, timeout)
        texts = (Path(path).read_text(encoding="utf-8") if os.path.exists(path) else "" for path in said)
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _main(code: str, arguments: tuple[str, ...], cwd: Path, said: list[str]) -> None:
    for descriptor, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
