# SPDX-License-Identifier: Apache-2.0
"""One packed storage for many prefixes, in which they come and go without moving each other.

Every layer has one tensor of keys and one of values; a prefix takes a run of entries (a region) of all of them. So a
batch needs no copy: its ``prefix_offsets`` are the bounds of the regions that it uses, and what lies between two of
them is a piece that no row's ``prefix_index`` names.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from softprompt_fast.prefix_kv import PrefixKV, Scales


class Regions:
    """Which runs of the entries ``0..capacity`` are taken. Best fit, so that long free runs stay; neighbours coalesce.

    Args:
        capacity: entries; rounded down to `align`. align: regions start and end at its multiples.
    """

    def __init__(self, capacity: int, align: int = 1) -> None:
        self._align = align
        self.capacity = capacity - capacity % align
        self._taken: dict[int, int] = {}
        #: Free runs ``(first, length)`` by their first entry: none empty, no two adjacent.
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []

    def __len__(self) -> int:
        """How many regions there are."""
        return len(self._taken)

    @property
    def free_entries(self) -> int:
        return sum(length for _, length in self._free)

    @property
    def taken_entries(self) -> int:
        return self.capacity - self.free_entries

    def rounded(self, length: int) -> int:
        """The entries that a region of `length` takes."""
        return -(-length // self._align) * self._align

    def allocate(self, length: int) -> int | None:
        """The first entry of a new region of at least `length`; None if no free run is long enough."""
        length = self.rounded(length)
        fits = [(run, i) for i, (_, run) in enumerate(self._free) if run >= length]
        if length == 0 or not fits:
            return None
        run, i = min(fits)
        first = self._free[i][0]
        if run == length:
            del self._free[i]
        else:
            self._free[i] = first + length, run - length
        self._taken[first] = length
        return first

    def free(self, first: int) -> None:
        """Give back the region that begins at `first`; KeyError if none does."""
        length = self._taken.pop(first)
        i = bisect_left(self._free, (first, 0))
        if i < len(self._free) and self._free[i][0] == first + length:
            length += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == first:
            i -= 1
            first, before = self._free.pop(i)
            length += before
        self._free.insert(i, (first, length))

    def extend(self, capacity: int) -> None:
        """Add the entries from the old capacity to the new one."""
        first, length = self.capacity, capacity - capacity % self._align - self.capacity
        if length > 0:
            self.capacity += length
            self._taken[first] = length
            self.free(first)


class Entries(NamedTuple):
    """All of an arena's entries: per layer ``[Hkv, C, D]`` and ``[Hkv, C, Dv]``, with scales where they are 8-bit."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    scales: Scales | None


class Arena:
    """Storage for prefixes of one model in one dtype.

    Args:
        like: a prefix whose number of layers, heads and dimensions all others share.
        device: of the entries. dtype: of the entries: floating, or that of 8-bit prefixes.
        block: entries that share a scale, to whose multiples regions are aligned; None: floating.
        nbytes: allocate as many entries as this many bytes hold, now, and never more; None: grow by doubling. Entries
            that were never written cost address space only (on the CPU).

    Regions are given and taken under the caller's lock; :meth:`write` has one of its own, for it takes long. A region
    keeps its entries through growth: the old tensors stay as they were for whoever still reads them.
    """

    def __init__(
        self,
        like: PrefixKV,
        device: torch.device,
        dtype: torch.dtype,
        *,
        block: int | None = None,
        nbytes: int | None = None,
    ) -> None:
        self.device, self.dtype, self.block = device, dtype, block
        self._shapes = tuple(
            (key.shape[0], key.shape[2], value.shape[2]) for key, value in zip(like.keys, like.values, strict=True)
        )
        #: A layer's keys and values, and its share of two scales.
        entry = sum(heads * (key_dim + value_dim) for heads, key_dim, value_dim in self._shapes) * dtype.itemsize
        self.entry_bytes = float(entry)
        if block is not None:
            self.entry_bytes += sum(heads * 2 * 4 for heads, _, _ in self._shapes) / block
        self.fixed = nbytes is not None
        capacity = 0 if nbytes is None else int(nbytes / self.entry_bytes)
        self.regions = Regions(capacity, block or 1)
        self._lock = threading.Lock()
        self.entries = self._allocated(self.regions.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, used or not."""
        return int(self.regions.capacity * self.entry_bytes)

    def allocate(self, length: int) -> int | None:
        """The first entry of a new region; None if none fits, which happens where the size is fixed only."""
        first = self.regions.allocate(length)
        if first is None and not self.fixed and length > 0:
            capacity = self.regions.capacity
            self.regions.extend(capacity + max(capacity, self.regions.rounded(length)))
            first = self.regions.allocate(length)
        return first

    def write(self, first: int, prefix: PrefixKV) -> None:
        """Copy a prefix into the region at `first`: floating ones into floating entries, 8-bit ones (of a block that
        is a multiple of the arena's) into either."""
        last = first + prefix.num_virtual_tokens
        # What is kept for later calls must not be inference tensors; no graph can reach it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            # Calls that used the region before may still be queued, and other streams don't wait for this copy.
            _synchronize(self.device)
            if self.entries.keys[0].shape[1] < last:
                self._grow()
            keys, values, scales = self.entries
            for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
                if prefix.scales is not None and scales is None:
                    key, value = prefix.scales.dequantize(layer, key, value, self.dtype)
                keys[layer][:, first:last].copy_(key)
                values[layer][:, first:last].copy_(value)
            if scales is not None and prefix.scales is not None:
                repeats = prefix.scales.block // scales.block
                blocks = slice(first // scales.block, -(-last // scales.block))
                for ours, theirs in ((scales.keys, prefix.scales.keys), (scales.values, prefix.scales.values)):
                    for to, scale in zip(ours, theirs, strict=True):
                        wide = scale.repeat_interleave(repeats, dim=1)
                        to[:, blocks].copy_(wide[:, : blocks.stop - blocks.start])
            _synchronize(self.device)

    def _grow(self) -> None:
        old, new = self.entries, self._allocated(self.regions.capacity)
        for before, after in ((old.keys, new.keys), (old.values, new.values)):
            for x, y in zip(before, after, strict=True):
                y[:, : x.shape[1]] = x
        if old.scales is not None and new.scales is not None:
            for before, after in ((old.scales.keys, new.scales.keys), (old.scales.values, new.scales.values)):
                for x, y in zip(before, after, strict=True):
                    y[:, : x.shape[1]] = x
        self.entries = new

    def _allocated(self, capacity: int) -> Entries:
        # Kernels on the CPU read no entry outside of the regions in use; elsewhere one may, only to weigh it with 0.
        make = torch.empty if self.device.type == "cpu" else torch.zeros

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return make(shape, dtype=dtype, device=self.device)

        with torch.inference_mode(False):
            keys = tuple(empty(heads, capacity, dim) for heads, dim, _ in self._shapes)
            values = tuple(empty(heads, capacity, dim) for heads, _, dim in self._shapes)
            if self.block is None:
                return Entries(keys, values, None)
            key_scales, value_scales = (
                tuple(empty(heads, capacity // self.block, dtype=torch.float32) for heads, _, _ in self._shapes)
                for _ in range(2)
            )
            return Entries(keys, values, Scales(key_scales, value_scales, self.block))


def _synchronize(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
