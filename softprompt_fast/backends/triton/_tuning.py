# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the kernels: tables that ship, measured by ``softprompt-fast tune``, picked by pure functions.

``tuned/<place>/<op>.json`` maps kernel -> key -> configuration, such as ``{"forward": {"d128-16bit": {"BLOCK_M": 128,
"num_warps": 8}}}``. A place is a device ("nvidia-h100-80gb-hbm3"), an architecture ("sm_90") or "default", which is
complete and fits the smallest GPU served. A key holds only what the kernel's speed depends on, and never a length: a
new length retunes nothing. A folder of the user's own, where ``softprompt-fast tune`` writes, is looked in before the
package's: SOFTPROMPT_FAST_TUNED, or ``softprompt_fast/tuned`` among the user's configuration files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Tunable",
    "choose",
    "configuration",
    "dump",
    "folders",
    "overridden",
    "served_by",
    "shipped",
    "table",
    "user_folder",
]

ENVIRONMENT_VARIABLE = "SOFTPROMPT_FAST_TUNED"
SHIPPED = Path(__file__).parent / "tuned"

Table = dict[str, dict[str, dict[str, Any]]]  # kernel -> key -> configuration


@dataclass(frozen=True)
class Tunable:
    """How one kernel is tuned: see :mod:`._tunables`, which has one for each."""

    kernel: str
    # Every key that a table may be asked for.
    keys: Sequence[str]
    # Configurations worth a measurement for a key. One that needs more than the GPU has is skipped.
    candidates: Callable[[str], Sequence[dict[str, Any]]]
    # Makes the tensors of a typical call for a key, larger than a GPU's caches, and returns the call. Its results do
    # not depend on the configuration beyond rounding.
    problem: Callable[[str, torch.device], Callable[[], Sequence[Tensor]]]


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
    """One file; empty where there is none.

    Raises:
        ValueError: it is no table. The message names the file.
    """
    path = folder / place / f"{op}.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not _is_table(found):
        raise ValueError(f'{path}: expected {{kernel: {{key: {{"BLOCK_...": number, "num_warps": number, ...}}}}}}')
    return found


def dump(table: Table) -> str:
    """A table as the text of its file: sorted, "d64" before "d128", and a configuration a line, so that a change reads
    well in a diff."""
    kernels = []
    for kernel, configurations in _sorted(table).items():
        lines = (f"  {json.dumps(key)}: {json.dumps(found)}" for key, found in configurations.items())
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def folders() -> list[Path]:
    """Where tables are looked for, the user's own before those that ship."""
    return [user_folder(), SHIPPED]


def user_folder() -> Path:
    own = os.environ.get(ENVIRONMENT_VARIABLE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "softprompt_fast" / "tuned"


def shipped(op: str, kernel: str, key: str, places: Sequence[str]) -> dict[str, Any]:
    """What a launch takes where the user has no table."""
    return choose([table(SHIPPED, place, op) for place in places], kernel, key)


def served_by(op: str, places: Sequence[str]) -> str:
    """The first file that has something for an op, for people: its path."""
    return next(str(f / p / f"{op}.json") for p in places for f in folders() if (f / p / f"{op}.json").is_file())


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
    found = choose([table(folder, place, op) for place in places for folder in folders()], kernel, key)
    expected = shipped(op, kernel, key, places)
    if sizes(found) != sizes(expected):
        own = user_folder() / "*" / f"{op}.json"
        raise ValueError(f"{own}: {kernel!r}, {key!r}: expected {', '.join(expected)}, found {', '.join(found)}")
    return found


def sizes(config: dict[str, Any]) -> set[str]:
    """The names that the kernel or its host code must be told: in capitals. What is not is an option of Triton's
    (num_warps, maxnreg, ...), which has a default."""
    return {name for name in config if name.isupper()}


def _is_table(found: Any) -> bool:
    kernels = found.values() if isinstance(found, dict) else [None]
    configs = [config for keys in kernels for config in (keys.values() if isinstance(keys, dict) else [None])]
    return all(isinstance(c, dict) and all(isinstance(x, (int, str)) for x in c.values()) for c in configs)


def _sorted(x: Any) -> Any:
    if not isinstance(x, dict):
        return x
    numbered = {tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)): name for name in x}
    return {name: _sorted(x[name]) for _, name in sorted(numbered.items())}
