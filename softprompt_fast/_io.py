# SPDX-License-Identifier: Apache-2.0
"""Files that are either the old version or the new one, whole, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on leaving without an error it takes `path`'s place, on disk.

    The temporary file is in the same directory because only a rename within one file system is atomic. If the block
    or the write-back to disk (fsync) raises, `path` stays as it was and the temporary file goes. A killed process
    leaves the temporary file (``.NAME.XXXXXXXX.tmp``) behind, never a half-written `path`.

    Raises:
        OSError: whatever writing raised, e.g. ENOSPC when the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        # Without this a crash of the machine may leave a renamed file with no content: renames overtake data.
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` by `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def make_directory(path: str | os.PathLike[str]) -> Path:
    """`path` as a directory, made with its parents if need be.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"save_directory: expected a directory, found a file: {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def sync_file(path: str | os.PathLike[str]) -> None:
    """Put a file's content on disk (fsync)."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Put a directory's entries (a rename) on disk; where none can be opened (Windows) the system does it."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def identity(*paths: Path) -> Hashable:
    """Which files, and which version of each, stand under `paths` now; those that don't exist count too."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except FileNotFoundError:
            found.append(None)
    return tuple(found)


def read_one_version(read: Callable[[], _T], *paths: Path) -> _T:
    """``read()``, of one and the same version of `paths`, also while a writer replaces them: again where one changed.

    Raises:
        OSError: they were replaced again and again. Further, what ``read()`` raises.
    """
    for _ in range(100):
        before = identity(*paths)
        try:
            found = read()
        except Exception:
            if identity(*paths) == before:
                raise
            continue
        if identity(*paths) == before:
            return found
    raise OSError(f"{paths[0]}: replaced again and again while it was read")
