# SPDX-License-Identifier: Apache-2.0
"""The own tokens' keys and values of rows that come and go while they decode together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt_fast.cache import GrowingLayer, OwnTokenCache
from softprompt_fast.packed import Packed
from softprompt_fast.rows import Claim


class BatchCache(OwnTokenCache):
    """A cache whose rows end at one column, "now", whatever their length, so that a step appends one column.

    A row's own tokens are the columns from its start to the end, and the model is told each row's start
    (``own_start``); what lies before it is never looked at. So a row joins by one copy to the right edge, leaves by
    the last row's move into its place, and nothing else moves. Columns that no row uses any more are dropped when the
    buffers are full, which costs less than one column's copy a step: they are kept twice as long as the longest row.

    Args:
        num_layers: attention layers of the base.
        max_rows: rows that there will be at most.

    Attributes:
        starts: each row's first column.
        end: the column after the last.
        own_start: int32 ``[B]``, `starts` as the model takes them.
        packed, index: what the rows attend to, as :meth:`settle` was told.
    """

    def __init__(self, num_layers: int, max_rows: int) -> None:
        super().__init__(num_layers)
        self._max_rows = max_rows
        self._keys: list[Tensor] = []  # per layer [rows, Hkv, columns, D]
        self._values: list[Tensor] = []
        self.starts: list[int] = []
        self.end = 0
        self.own_start: Tensor | None = None
        self.packed: Packed | None = None
        self.index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def join(self, cache: OwnTokenCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Add `rows` of another cache as the last rows.

        Args:
            cache: their own tokens so far, padded on the left to one width W >= 1.
            rows: which of its rows. lengths: own tokens of each.
        """
        width = cache.get_seq_length()
        new = [(layer.keys, layer.values) for layer in cache.layers]
        first, last = len(self.starts), len(self.starts) + len(rows)
        if not self._keys:
            self._keys = [_buffer(keys, last, 2 * (width + 1)) for keys, _ in new]
            self._values = [_buffer(values, last, 2 * (width + 1)) for _, values in new]
        self._make_room(last, width)
        if self.end < width:
            self._shift(width - self.end)
        place = slice(first, last), slice(None), slice(self.end - width, self.end)
        everyone = list(rows) == list(range(new[0][0].shape[0]))
        for keys, values, (new_keys, new_values) in zip(self._keys, self._values, new, strict=True):
            keys[place] = new_keys if everyone else new_keys[list(rows)]
            values[place] = new_values if everyone else new_values[list(rows)]
        self.starts += [self.end - length for length in lengths]

    def leave(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = len(self.starts) - 1
        if row != last:
            used = slice(self.starts[last], self.end)
            for buffer in (*self._keys, *self._values):
                buffer[row, :, used] = buffer[last, :, used]
            self.starts[row] = self.starts[last]
        self.starts.pop()
        if not self.starts:
            self._keys, self._values, self.end = [], [], 0
            self.packed = self.index = None

    def settle(self, packed: Packed | None, index: Tensor | None) -> None:
        """Ready for steps, after rows have come or gone.

        Args:
            packed: the rows' prefixes. index: int32 ``[B]``, which one is a row's.
        """
        rows = len(self.starts)
        self.packed, self.index = packed, index
        self.own_start = torch.tensor(self.starts, dtype=torch.int32, device=self._keys[0].device)
        for layer, keys, values in zip(self.layers, self._keys, self._values, strict=True):
            assert isinstance(layer, GrowingLayer)
            layer.hold(keys[:rows], values[:rows], self.end)
        self.soft_prompt_claim = Claim.of(packed, index, self.own_start)

    def step(self) -> None:
        """Make room for one more column, which the model then writes."""
        if self.end == self._keys[0].shape[2]:
            self._make_room(len(self.starts))
            self.settle(self.packed, self.index)
        self.end += 1

    def _make_room(self, rows: int, width: int = 0) -> None:
        """Have room for so many rows, for columns up to `width` and for one more than there are."""
        held_rows, _, held_columns, _ = self._keys[0].shape
        if held_rows >= rows and held_columns > max(self.end, width):
            return
        first = min(self.starts, default=self.end)
        needed = max(self.end - first, width) + 1
        if held_rows >= rows and held_columns >= 2 * needed:
            self._shift(-first)
            return
        held_rows = held_rows if held_rows >= rows else min(max(rows, 2 * held_rows), max(rows, self._max_rows))
        used = slice(0, len(self.starts)), slice(None), slice(first, self.end)
        for buffers in (self._keys, self._values):
            for i, buffer in enumerate(buffers):
                grown = _buffer(buffer, held_rows, 2 * needed)
                grown[used[0], :, : self.end - first] = buffer[used]
                buffers[i] = grown
        self.starts = [start - first for start in self.starts]
        self.end -= first

    def _shift(self, by: int) -> None:
        """Move all rows by so many columns, to the right or (negative) to the left."""
        if self.starts:
            first = min(self.starts)
            rows = slice(0, len(self.starts))
            overlaps = abs(by) < self.end - first
            for buffer in (*self._keys, *self._values):
                moved = buffer[rows, :, first : self.end]
                buffer[rows, :, first + by : self.end + by] = moved.clone() if overlaps else moved
        self.starts = [start + by for start in self.starts]
        self.end += by


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    # Zeros and not whatever is there: some backends multiply what they mask by 0, and NaN would stay.
    return like.new_zeros(rows, like.shape[1], columns, like.shape[3])
