# SPDX-License-Identifier: Apache-2.0
"""Which query sees which key, as few runs of keys and as few masks as will do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Part:
    """Queries against a run of keys ``[start, stop)``, of the packed prefixes (``shared``) or of each row's own."""

    shared: bool
    start: int
    stop: int
    rows: Tensor | None = None  # which rows of the batch; None: all
    hidden: Tensor | None = None  # bool [b or 1, S, stop - start]: True where a query does not see a key
    bias: Tensor | None = None  # [b or 1, Hq or 1, S or 1, stop - start]
    causal: bool = False  # query i sees the first i + 1 keys of the run

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def plain(self) -> bool:
        """Every query of every row sees the whole run."""
        return self.rows is None and self.hidden is None and self.bias is None and not self.causal


@dataclass(slots=True)
class Visibility:
    """The arguments of prefix_attention that say which query sees which key, and the parts that follow from them.

    On a CPU the values of the ranges are read, so that most calls need no mask. Elsewhere reading would wait for the
    device, and whatever could be hidden is hidden by a mask.
    """

    batch: int
    queries: int
    own: int
    packed: int
    device: torch.device
    prefix_offsets: Tensor | None
    prefix_index: Tensor | None
    own_start: Tensor | None
    own_end: Tensor | None
    query_start: Tensor | None
    causal: bool
    window: int | None
    bias: Tensor | None

    @property
    def reads_values(self) -> bool:
        return self.device.type == "cpu"

    def parts(self) -> list[Part]:
        """At most one part of own keys, first, then the prefixes'."""
        return self._own_parts() + self._prefix_parts()

    def _own_parts(self) -> list[Part]:
        if self.own == 0:
            return []
        if not self.reads_values:
            masked = self.causal or self.own_start is not None or self.own_end is not None
            return [self._own_part(0, self.own, masked)]
        starts = [0] if self.own_start is None else self.own_start.tolist()
        ends = [self.own] if self.own_end is None else self.own_end.tolist()
        firsts = [self.own - self.queries] if self.query_start is None else self.query_start.tolist()
        first_min, first_max = min(firsts), max(firsts)
        start, stop = min(starts), max(ends)
        if self.causal:
            stop = min(stop, first_max + self.queries)
        if self.window is not None:
            start = max(start, first_min - self.window + 1)
        if stop <= start:
            return []
        causal = False
        masked = max(starts) > start
        if not self.causal:
            masked |= min(ends) < stop
        elif self.queries == 1:
            masked |= first_min + 1 < stop
        else:
            # Row ends need no mask: a query at or beyond its row's end is padding, and one before it stops at itself.
            causal = first_min == first_max == start and self.bias is None
            masked |= not causal
        if self.window is not None:
            masked |= first_max + self.queries - 1 - start >= self.window
        return [self._own_part(start, stop, masked, causal and not masked)]

    def _own_part(self, start: int, stop: int, masked: bool, causal: bool = False) -> Part:
        hidden = None
        if masked:
            key = torch.arange(start, stop, device=self.device)
            position = self._position()[..., None]
            first, end = self._column(self.own_start, 0), self._column(self.own_end, self.own)
            hidden = ((key < first) | (key >= end))[:, None]
            if self.causal:
                hidden = hidden | (key > position)
            if self.window is not None:
                hidden = hidden | (position - key >= self.window)
        bias = None if self.bias is None else self.bias[..., self.bias.shape[-1] - self.own :][..., start:stop]
        return Part(False, start, stop, hidden=hidden, bias=bias, causal=causal)

    def _prefix_parts(self) -> list[Part]:
        if self.packed == 0:
            return []
        if self.prefix_offsets is None and self.prefix_index is None:
            return self._prefix_part(0, self.packed, None)
        if not self.reads_values:
            return [self._pack_part()]
        offsets = [0, self.packed] if self.prefix_offsets is None else self.prefix_offsets.tolist()
        if self.prefix_index is None:
            return self._prefix_part(offsets[0], offsets[1], None)
        rows_of: dict[int, list[int]] = {}
        for row, prefix in enumerate(self.prefix_index.tolist()):
            if prefix >= 0:
                rows_of.setdefault(prefix, []).append(row)
        parts: list[Part] = []
        for prefix, rows in rows_of.items():
            chosen = None if len(rows) == self.batch else torch.tensor(rows)
            parts += self._prefix_part(offsets[prefix], offsets[prefix + 1], chosen)
        return parts

    def _prefix_part(self, start: int, stop: int, rows: Tensor | None) -> list[Part]:
        length, skipped, hidden = stop - start, 0, None
        if self.window is not None and length:
            absolute = self._absolute(length)
            if rows is not None and absolute.shape[0] > 1:
                absolute = absolute[rows]
            masked = True
            if self.reads_values:
                first, last = (int(x) for x in absolute.aminmax())
                skipped = min(max(first - self.window + 1, 0), length)
                masked = last - skipped >= self.window
            if masked:
                hidden = absolute[..., None] - torch.arange(skipped, length, device=self.device) >= self.window
        if skipped == length:
            return []
        bias = None
        if self.bias is not None:
            bias = self.bias[..., skipped:length]
            if rows is not None and bias.shape[0] > 1:
                bias = bias[rows]
        return [Part(True, start + skipped, stop, rows=rows, hidden=hidden, bias=bias)]

    def _pack_part(self) -> Part:
        """Every row against the whole pack, other rows' prefixes hidden: more arithmetic, but no value is read."""
        # Made on the device: a copy from the host would break the capture of a CUDA graph.
        offsets, index = self.prefix_offsets, self.prefix_index
        if offsets is None:
            offsets = torch.arange(0, self.packed + 1, self.packed, device=self.device)
        if index is None:
            index = torch.zeros(1, dtype=torch.int64, device=self.device)
        used = index.clamp(min=0)
        first = offsets[:-1][used][:, None]
        length = (offsets[1:] - offsets[:-1])[used].where(index >= 0, 0)[:, None]  # [B or 1, 1]
        entry = torch.arange(self.packed, device=self.device) - first  # [B or 1, L], counted in the row's prefix
        hidden = ((entry < 0) | (entry >= length))[:, None]
        if self.window is not None:
            hidden = hidden | (self._absolute(length)[..., None] - entry[:, None] >= self.window)
        bias = self.bias
        if bias is not None:
            columns = entry.clamp(0, bias.shape[-1] - self.own - 1)[:, None, None]
            rows = max(bias.shape[0], columns.shape[0])
            bias = bias.expand(rows, -1, -1, -1).gather(-1, columns.expand(rows, *bias.shape[1:3], -1))
        return Part(True, 0, self.packed, hidden=hidden, bias=bias)

    def _absolute(self, length: int | Tensor) -> Tensor:
        """Each query's place in "prefix, then own tokens from own_start": [B or 1, S]."""
        return length + self._position() - self._column(self.own_start, 0)

    def _position(self) -> Tensor:
        """Each query's place among its row's own keys: [B or 1, S]."""
        return self._column(self.query_start, self.own - self.queries) + torch.arange(self.queries, device=self.device)

    def _column(self, values: Tensor | None, default: int) -> Tensor:  # [B, 1] or [1, 1]
        if values is None:
            return torch.full((1, 1), default, device=self.device)
        return values.to(torch.int64)[:, None]
