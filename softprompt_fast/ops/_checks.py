# SPDX-License-Identifier: Apache-2.0
"""Argument checks that several ops share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def describe(x: Tensor) -> str:
    """Dtype, shape and device, for an error message."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def check_index(name: str, index: Tensor | None, size: int | None, device: torch.device) -> None:
    """An index tensor is int32 or int64, ``[size]`` (None: offsets, two or more), and on ``device``."""
    if index is None:
        return
    fits = index.dim() == 1 and (index.shape[0] == size if size is not None else index.shape[0] >= 2)
    if not fits or index.dtype not in (torch.int32, torch.int64) or index.device != device:
        length = "N + 1" if size is None else size
        raise ValueError(f"{name}: expected int32 or int64 [{length}] on {device}, found {describe(index)}")


def check_offsets(name: str, offsets: Tensor | None, packed: int) -> tuple[int, int]:
    """Offsets that lie in host memory rise within 0..packed. Returns the number of pieces and the longest."""
    if offsets is None:
        return 1, packed
    values = offsets.tolist()
    if values[0] < 0 or values[-1] > packed or any(a > b for a, b in pairwise(values)):
        raise ValueError(f"{name}: expected rising values within 0..{packed}, found {values}")
    return len(values) - 1, max(b - a for a, b in pairwise(values))


def check_range(name: str, index: Tensor | None, low: int, high: int) -> None:
    """The values of an index that lies in host memory are within low..high."""
    if index is not None and index.numel():
        values = index.tolist()
        if min(values) < low or max(values) > high:
            raise ValueError(f"{name}: expected values within {low}..{high}, found {values}")
