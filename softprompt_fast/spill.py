# SPDX-License-Identifier: Apache-2.0
"""Prefixes that left a bank's host memory for a folder: written there once and mapped from there."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from pathlib import Path

from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.versions import VERSIONS


class SpillFolder:
    """A folder inside `directory`, made when it is first needed, that goes with this object.

    Thread-safe.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._folder: Path | None = None
        self._lock = threading.Lock()

    def write(self, prefix: PrefixKV) -> tuple[PrefixKV, Path]:
        """`prefix` written to a folder of its own and mapped from there. OSError where it can't be written."""
        with self._lock:
            if self._folder is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="prompt-bank-", dir=self.directory))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            folder = self._folder / str(next(VERSIONS))
        try:
            prefix.save_pretrained(folder)
            return PrefixKV.from_pretrained(folder, verify=False), folder
        except BaseException:
            remove_folder(folder)
            raise


def remove_folder(folder: Path | None) -> None:
    # Whoever still reads a map of it keeps its content.
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
