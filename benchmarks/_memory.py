# SPDX-License-Identifier: Apache-2.0
"""This process's memory: one policy of the allocator for all systems, and what a call takes at its peak.

Where malloc gets a large block from is luck: from a hole that earlier calls left in the heap, or, where none is large
enough, from the kernel, which fills each page of it with zeros when it is first touched, in every call anew. A result
of 38 MB then costs 9,505 page faults and its operator a multiple of its time (``prompt_concat`` of B 32, P 512: 15 ms
instead of 1.4). So the processes that measure keep what is freed, as jemalloc and tcmalloc do, which PyTorch's tuning
guide recommends.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEEP, DEFAULT = {-4: 0, -1: -1}, {-4: 65536, -1: 128 << 10}
"""Of glibc's ``mallopt``: M_MMAP_MAX, how many blocks may be mapped, to be unmapped when freed; M_TRIM_THRESHOLD, how
many bytes at the heap's end are given back."""


GIVE_BACK = "--give-back"
"""The argument of a worker that measures memory."""


class Unavailable(RuntimeError):
    """Why this platform can't say."""


def glibc() -> Any:
    """Raises: Unavailable: the C library is another."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        raise Unavailable("needs Linux and glibc")
    return ctypes.CDLL(None)


def allocator() -> str:
    """For a row: which allocator, with which policy."""
    try:
        glibc()
    except Unavailable:
        return f"{platform.system()}'s, as it is"
    return f"glibc {platform.libc_ver()[1]}, which keeps what is freed"


def keep_freed_memory(keep: bool = True) -> None:
    """From here on, freed blocks of any size stay with this process for the next ones; or large ones are given back,
    as by glibc's defaults, but of the same size throughout."""
    for option, value in (KEEP if keep else DEFAULT).items():
        if not glibc().mallopt(option, value):
            raise Unavailable(f"mallopt({option}, {value}) is refused")


def resident() -> dict[str, int]:
    """Bytes resident "now", and at most so far or since the last :func:`peak_beyond` ("peak").

    Raises:
        Unavailable: no Linux.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        raise Unavailable("needs Linux's /proc/self/status") from None
    sizes = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines) if "kB" in size}
    return {"now": 1024 * sizes["VmRSS"], "peak": 1024 * sizes["VmHWM"]}


def peak_beyond(call: Callable[[], Any]) -> int:
    """Bytes that a call takes at its peak beyond what is resident before it.

    The kernel's high-water mark is set back before (``/proc/self/clear_refs``): a process for every system would have
    to load the model again. What was freed earlier must have been given back, and large blocks must be mapped, or the
    holes between live blocks count as well: ``keep_freed_memory(False)`` from the start.

    Raises:
        Unavailable: no Linux with glibc, or the mark can't be set back.
    """
    gc.collect()
    glibc().malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise Unavailable(f"/proc/self/clear_refs: {error.strerror}") from None
    before = resident()["now"]
    call()
    return max(0, resident()["peak"] - before)
