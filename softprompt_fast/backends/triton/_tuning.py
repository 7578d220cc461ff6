# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the kernels: tables that ship, measured by ``softprompt-fast tune``, picked by pure functions.

``tuned/<place>/<op>.json`` maps kernel -> key -> configuration, such as ``{"forward": {"d128-16bit": {"BLOCK_M": 128,
"num_warps": 8}}}``. A place is a device ("nvidia-h100-80gb-hbm3"), an architecture ("sm_90") or "default", which is
complete and fits the smallest GPU served. A key holds only what the kernel's speed depends on, and never a length: a
new length retunes nothing. SOFTPROMPT_FAST_TUNED names a folder that is looked in before the package's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["ENVIRONMENT_VARIABLE", "choose", "configuration", "folders", "overridden", "table"]

ENVIRONMENT_VARIABLE = "SOFTPROMPT_FAST_TUNED"
SHIPPED = Path(__file__).parent / "tuned"

Table = dict[str, dict[str, dict[str, Any]]]  # kernel -> key -> configuration
_overrides: dict[tuple[str, str], dict[str, Any]] = {}


def choose(tables: Sequence[Table], kernel: str, key: str) -> dict[str, Any]:
    """The configuration of the first table that has one for the key.

    Example: ``choose([{}, {"forward": {"d64-16bit": {"BLOCK_M": 64}}}], "forward", "d64-16bit") == {"BLOCK_M": 64}``.
    """
    for candidate in tables:
        found = candidate.get(kernel, {}).get(key)
        if found is not None:
            return found
    raise KeyError(f"no tuned table has {kernel!r} for {key!r}, not even the default one")


def configuration(op: str, kernel: str, key: str, places: tuple[str, ...]) -> dict[str, Any]:
    """What a launch adds to its arguments: block sizes, num_warps, num_stages."""
    override = _overrides.get((op, kernel))
    return _chosen(op, kernel, key, places) if override is None else override


def table(folder: Path, place: str, op: str) -> Table:
    """One file; empty where there is none."""
    path = folder / place / f"{op}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def folders() -> list[Path]:
    """Where tables are looked for, the user's own before those that ship."""
    own = os.environ.get(ENVIRONMENT_VARIABLE)
    return [*([Path(own)] if own else []), SHIPPED]


@contextmanager
def overridden(op: str, kernel: str, config: dict[str, Any]) -> Iterator[None]:
    """Within it a kernel runs with ``config``, whatever the tables say: for tuning and for tests."""
    before = _overrides.get((op, kernel))
    _overrides[op, kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[op, kernel]
        else:
            _overrides[op, kernel] = before


@cache
def _chosen(op: str, kernel: str, key: str, places: tuple[str, ...]) -> dict[str, Any]:
    return choose([table(folder, place, op) for place in places for folder in folders()], kernel, key)
