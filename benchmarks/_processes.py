# SPDX-License-Identifier: Apache-2.0
"""Processes that measure (``_worker.py``), from outside: started with the package of one tree, asked, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAST = 30.0
"""Seconds that a process has to end by itself."""


class ProcessError(ValueError):
    """A process did not start, has ended or was too slow, and what it printed last."""


class Process:
    """One of them. Whatever is asked of one that has ended raises a `ProcessError`."""

    def __init__(
        self,
        name: str,
        tree: Path,
        cases: Path,
        log: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``cases``: the folder of the worker and of its cases. ``log``: for what the process prints."""
        self.name, self.tree, self.log = name, tree, log
        path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(cases / "_worker.py"), *arguments],
                cwd=tree,
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            ProcessError: it did not start, or found the package of another tree.
        """
        package = Path(self._read()["package"])
        if not package.resolve().is_relative_to(self.tree.resolve()):
            raise ProcessError(f"{self.name}: expected the package of {self.tree}, found {package}")

    def ask(self, request: str, /, *, limit: float | None = None, **arguments: Any) -> dict[str, Any]:
        """The answer, which may be ``{"error": why}``. ``limit``: seconds after which the process is ended.

        Raises:
            ProcessError: there is none.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading then says why
            print(json.dumps({request: arguments}), file=self.process.stdin, flush=True)
        if limit is None:
            return self._read()
        late = threading.Event()

        def end() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            return self._read()
        except ProcessError:
            if late.is_set():
                raise ProcessError(f"{self.name}: took longer than {limit:.0f} s") from None
            raise
        finally:
            timer.cancel()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ProcessError("\n".join([f"{self.name}: its process has ended:", *said[-5:]]))
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.communicate(timeout=LAST)  # closes its input, which is its sign to end
        self.process.kill()
        self.process.communicate()
