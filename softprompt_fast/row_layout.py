# SPDX-License-Identifier: Apache-2.0
"""Where the real tokens of padded rows stand, and moving them to one edge and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from softprompt_fast.losses import IGNORE


@dataclass(frozen=True)
class RowLayout:
    """Where each row's own tokens stand: among the caller's ``width`` columns, and packed into ``packed`` ones.

    Attributes:
        length: int64 ``[B]``, own tokens of each row. shift: int64 ``[B]``, caller's column minus packed column.
        width, packed: columns of the caller (S), and of the longest row.
        at_end: packed rows end at the last column instead of starting at the first.
        common_shift: the shift if all rows have the same, so that packing is a slice; else None.
        full: no row has any padding.
    """

    length: Tensor
    shift: Tensor
    width: int
    packed: int
    at_end: bool
    common_shift: int | None
    full: bool

    @classmethod
    def of(
        cls, mask: Tensor | None, shape: Sequence[int], device: torch.device, *, at_end: bool = False, name: str
    ) -> RowLayout:
        """Read the layout off a padding mask ``[B, S]`` (None: nothing is padding).

        Raises:
            ValueError: `mask` (called `name` in the message) has another shape, a row with holes, or an empty row.
        """
        batch, width = shape
        if mask is None:
            zeros = torch.zeros(batch, dtype=torch.long, device=device)
            return cls(zeros + width, zeros, width, width, at_end, 0, True)
        if tuple(mask.shape) != (batch, width):
            raise ValueError(f"{name}: expected shape {[batch, width]}, found {list(mask.shape)}")
        mask = mask.to(device) != 0
        length, start = mask.sum(1), mask.int().argmax(1)
        column = torch.arange(width, device=device)
        holes = mask.ne((column >= start[:, None]) & (column < (start + length)[:, None])).any(1)
        packed = int(length.max())
        for rows, problem in ((holes, "zeros between its ones; only padding at its ends"), (length == 0, "no ones")):
            if rows.any():
                row = int(rows.nonzero()[0])
                raise ValueError(f"{name}: row {row} has {problem}" + (" is supported" if rows is holes else ""))
        shift = start + length - packed if at_end else start
        common = int(shift[0]) if bool((shift == shift[0]).all()) else None
        return cls(length, shift, width, packed, at_end, common, bool((length == width).all()))

    def pack(self, values: Tensor) -> Tensor:
        """``[B, S, ...]`` -> ``[B, packed, ...]``; padding columns hold arbitrary values of the row."""
        if self.common_shift is not None and 0 <= self.common_shift <= self.width - self.packed:
            return values[:, self.common_shift : self.common_shift + self.packed]
        column = torch.arange(self.packed, device=values.device) + self.shift[:, None]
        return _take_columns(values, column)

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """``[B, front + packed, ...]`` -> ``[B, S, ...]``: drops what stands in front, `fill` at padding columns."""
        values = values[:, values.shape[1] - self.packed :]
        if self.full:
            return values
        column = torch.arange(self.width, device=values.device) - self.shift[:, None]
        inside = self._inside(column)
        values = _take_columns(values, column)
        return values.masked_fill(~inside.view(*inside.shape, *(1,) * (values.dim() - 2)), fill)

    def pack_labels(self, labels: Tensor, front: int) -> Tensor:
        """Labels ``[B, S]`` packed, with -100 at padding columns and at `front` columns before."""
        column = torch.arange(self.packed, device=labels.device).expand(len(labels), -1)
        return pad(self.pack(labels).masked_fill(~self._inside(column), IGNORE), (front, 0), value=IGNORE)

    def mask(self, front: int) -> Tensor:
        """1 where a packed row, with `front` virtual tokens before its own, is no padding: ``[B, front + packed]``."""
        column = torch.arange(front + self.packed, device=self.length.device)
        inside = column >= self.first[:, None] if self.at_end else column < front + self.length[:, None]
        return inside.long()

    def positions(self, front: int, offset: int = 0) -> Tensor:
        """Position of every packed token in its row alone, counted from `offset`: int64 ``[B, front + packed]``."""
        column = torch.arange(front + self.packed, device=self.length.device)
        return (column - self.first[:, None]).clamp(min=0) + offset

    @property
    def first(self) -> Tensor:
        """Packed column at which each row starts: int64 ``[B]``."""
        return self.packed - self.length if self.at_end else torch.zeros_like(self.length)

    def _inside(self, column: Tensor) -> Tensor:
        return (column >= self.first[:, None]) & (column < (self.first + self.length)[:, None])


def _take_columns(values: Tensor, column: Tensor) -> Tensor:
    row = torch.arange(len(values), device=values.device)[:, None]
    return values[row, column.clamp(0, values.shape[1] - 1)]
