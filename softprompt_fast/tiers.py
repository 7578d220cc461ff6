# SPDX-License-Identifier: Apache-2.0
"""Where prefixes are: brought from their source to host memory and on to the device, each within its budget."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from softprompt_fast.arena import Arena
from softprompt_fast.backends import quantized
from softprompt_fast.catalogue import Catalogue, Entry, Slot, ordinary_tensors
from softprompt_fast.errors import BankFullError, PrefixError, SoftPromptError
from softprompt_fast.packed import RowPrompt
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.spill import SpillFolder, remove_folder

logger = logging.getLogger("softprompt_fast")

#: Where a prefix is wanted; "any": wherever it is.
Tier = Literal["any", "host", "device"]


@dataclass(frozen=True)
class BankOptions:
    """How much a :class:`PromptBank` keeps, where, and in which dtype.

    Attributes:
        device_bytes: storage for prefixes on the model's device, allocated once, at the first use; the least recently
            used prefix that nobody holds makes room. None: it grows, by doubling, and nothing is evicted.
        host_bytes: prefixes kept in host memory. Beyond it, compiled and loaded ones are dropped, least recently used
            first, and computed again when they are wanted. None: all are kept.
        directory: where to put what does not fit `host_bytes` instead: written there once and mapped from there. In a
            folder of its own that goes with the bank.
        dtype: store prefixes as ``torch.int8`` or ``torch.float8_e4m3fn`` (:meth:`PrefixKV.quantize`); None: as the
            model computes, and 8-bit ones as they are where they serve a batch alone.
        block: tokens that share a scale, with `dtype`.

    With any of the first three, off the CPU, prefixes live in host memory and on the device only within the storage.

    Raises:
        ValueError: a budget or a block that is not positive, or another dtype.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    directory: str | Path | None = None
    dtype: torch.dtype | None = None
    block: int = 16

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes"):
            given = getattr(self, name)
            if given is not None and (not isinstance(given, int) or given < 0):
                raise ValueError(f"{name}: expected a number of bytes or None, found {given!r}")
        if self.dtype is not None and self.dtype not in quantized.LARGEST:
            raise ValueError(f"dtype: expected None, torch.int8 or torch.float8_e4m3fn, found {self.dtype!r}")
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block: expected a number of tokens > 0, found {self.block!r}")

    @property
    def tiered(self) -> bool:
        """Whether memory is bounded anywhere."""
        return (self.device_bytes, self.host_bytes, self.directory) != (None, None, None)


class Tiers:
    """The host's and the device's memory of one bank.

    Args:
        catalogue: whose prompts are kept. options: the budgets.
        compile_prompt: of :class:`~softprompt_fast.bank.PromptBank`.
        device, dtype: of the model.
        lock: the bank's, which covers its tables. counts: the bank's counters.

    Attributes:
        slots: current versions of prefixes, least recently used first.
        pinned: which of them are never evicted.
        arena: the device tier, once something was placed.
        host_bytes: of prefixes in host memory.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        compile_prompt: Callable[[SoftPrompt, int | None], PrefixKV],
        options: BankOptions,
        device: torch.device,
        dtype: torch.dtype,
        lock: threading.RLock,
        counts: dict[str, int],
    ) -> None:
        self._catalogue, self._compile, self._options = catalogue, compile_prompt, options
        self.device, self.dtype = device, dtype
        self._lock, self._counts = lock, counts
        self.slots: OrderedDict[Slot, None] = OrderedDict()
        self.pinned: set[RowPrompt] = set()
        self.arena: Arena | None = None
        self.host_bytes = 0
        self._spill = None if options.directory is None else SpillFolder(options.directory)

    @property
    def _host_device(self) -> torch.device:
        return torch.device("cpu") if self._options.tiered else self.device

    @property
    def is_on_host(self) -> bool:
        """Whether a batch of one prompt can attend to the host's copy."""
        return self._host_device.type == self.device.type

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Given prefixes follow the model; all others are for who invalidates them."""
        self.device, self.dtype = device, dtype
        self.arena = None
        for entry in self._catalogue.entries.values():
            if isinstance(entry.prompt, PrefixKV):
                entry.prompt = self.stored(entry.prompt)
                self.host_bytes -= entry.nbytes
                entry.nbytes = bytes_kept(entry.prompt)
                self.host_bytes += entry.nbytes

    def count(self, entry: Entry) -> None:
        """`entry`, for which :meth:`make_room_for` has made room, is in the catalogue."""
        self.host_bytes += entry.nbytes

    def forget(self, entry: Entry) -> None:
        """`entry` is replaced or removed; running calls keep what they hold."""
        for slot in [*entry.slots.values()]:
            self.retire(slot)
        self.host_bytes -= entry.nbytes
        remove_folder(entry.folder)

    def use(self, slot: Slot) -> None:
        """`slot` is the most recently used one."""
        self.slots[slot] = None
        self.slots.move_to_end(slot)

    def retire(self, slot: Slot) -> None:
        """`slot` is current no more; with its last hold it goes."""
        if slot.alive:
            slot.alive = False
            del slot.entry.slots[slot.key[1]]
            self.slots.pop(slot, None)
            if slot.refs and slot.prefix is slot.entry.prompt and slot.prefix is not None:
                # A given prefix counted with its entry, which may be gone before this.
                slot.nbytes = bytes_kept(slot.prefix)
                self.host_bytes += slot.nbytes
        if slot.refs == 0:
            if slot.arena is not None:
                slot.arena.regions.free(slot.first)
                slot.arena = None
            self._drop(slot)

    def _drop(self, slot: Slot) -> None:
        """Forget the host's copy of `slot`; what is in the arena keeps its prediction."""
        self.host_bytes -= slot.nbytes
        slot.prefix, slot.alone, slot.nbytes = None, None, 0
        if slot.arena is not None and slot.next_logits is not None:
            slot.nbytes = slot.next_logits.nbytes
            self.host_bytes += slot.nbytes
        remove_folder(slot.folder)
        slot.folder = None

    # ---- from tier to tier ---------------------------------------------------------------------------------------

    def ready(self, slot: Slot, tier: Tier, count: bool = False) -> PrefixKV | None:
        """Bring a held slot to `tier`, or wait for the thread that does. Returns the host's copy if there is one."""
        while True:
            with self._lock:
                prefix, placed = slot.prefix, slot.arena is not None
                if {"any": prefix is not None or placed, "host": prefix is not None, "device": placed}[tier]:
                    self._counts["hits"] += count
                    return prefix
                count = False
                flight, mine = slot.flight, slot.flight is None
                if flight is None:
                    flight = slot.flight = Future()
            if not mine:
                flight.result()
                continue
            try:
                prefix = self._bring(slot, tier)
            except BaseException as error:
                with self._lock:
                    slot.flight = None
                    self._counts["failures"] += 1
                    self._abandon(slot)  # who asks from now on tries again
                if isinstance(error, Exception) and not isinstance(error, BankFullError):
                    flight.set_exception(error)
                else:
                    flight.set_result(None)  # no room, or interrupted: no reason for who wants less, or later
                raise
            with self._lock:
                slot.flight = None
            flight.set_result(None)
            self.trim()
            return prefix

    def _abandon(self, slot: Slot) -> None:
        """Forget a slot that has nothing."""
        if slot.alive and slot.prefix is None and slot.arena is None:
            self.retire(slot)

    def _bring(self, slot: Slot, tier: Tier) -> PrefixKV:
        prefix = slot.prefix
        if prefix is None:
            prefix = self._obtain(slot)
            with self._lock:
                slot.prefix = prefix
                slot.length, slot.next_logits = prefix.num_virtual_tokens, prefix.next_logits
                self.host_bytes -= slot.nbytes
                counted = prefix is slot.entry.prompt and slot.alive
                slot.nbytes = 0 if counted else bytes_kept(prefix)
                self.host_bytes += slot.nbytes
        if tier == "device" and slot.arena is None:
            self._place(slot, prefix)
        return prefix

    def _obtain(self, slot: Slot) -> PrefixKV:
        """The prefix of `slot`, from its source."""
        (name, task), entry = slot.key, slot.entry
        try:
            prompt = entry.prompt
            if prompt is None:
                prompt = self._catalogue.read(entry, name, slot)
            if isinstance(prompt, PrefixKV) and prompt is entry.prompt:
                return prompt
            if isinstance(prompt, SoftPrompt):
                with ordinary_tensors():
                    prompt = self._compile(prompt, task)
                with self._lock:
                    self._counts["compilations"] += 1
            with ordinary_tensors():
                return self.stored(prompt)
        except SoftPromptError:
            raise
        except ValueError as error:
            raise PrefixError(f"prompt {name!r}: {error}") from error

    def stored(self, prefix: PrefixKV) -> PrefixKV:
        """A prefix as it is kept: on the host tier's device, in the model's dtype or in 8 bits."""
        prefix = prefix.to(device=self._host_device, dtype=self.dtype)
        dtype, block = self._options.dtype, self._options.block
        if dtype is None:
            return prefix
        if prefix.scales is not None:
            if prefix.dtype == dtype and prefix.scales.block % block == 0:
                return prefix
            prefix = prefix.dequantize(self.dtype)
        return prefix.quantize(block, dtype)

    def _place(self, slot: Slot, prefix: PrefixKV) -> None:
        """Give `slot` a region of the arena and copy its prefix there."""
        with self._lock:
            arena = self.arena
            if arena is None:
                dtype, block = self._options.dtype, self._options.block
                arena = self.arena = Arena(
                    prefix,
                    self.device,
                    dtype or self.dtype,
                    block=None if dtype is None else block,
                    nbytes=self._options.device_bytes,
                )
            first = self._region(arena, slot)
        try:
            arena.write(first, prefix)
        except BaseException:
            with self._lock:
                arena.regions.free(first)
            raise
        with self._lock:
            slot.arena, slot.first = arena, first
            self._counts["placements"] += 1

    def _region(self, arena: Arena, slot: Slot) -> int:
        """A free region for `slot`, for which others that nobody holds are evicted, least recently used first."""
        while (first := arena.allocate(slot.length)) is None:
            idle = (s for s in self.slots if s.refs == 0 and s.arena is arena and s.key not in self.pinned)
            victim = next(idle, None)
            if victim is None:
                regions, needed = arena.regions, arena.regions.rounded(slot.length)
                raise BankFullError(
                    f"prompt {slot.key[0]!r}: its prefix needs {needed} entries ({needed * arena.entry_bytes:.0f} "
                    f"bytes) in one run, and of the {regions.capacity} that device_bytes={self._options.device_bytes} "
                    f"gives, {regions.taken_entries} are held by running calls or pinned"
                )
            regions_of, victim.arena = victim.arena, None
            assert regions_of is not None
            regions_of.regions.free(victim.first)
            self._counts["evictions"] += 1
            self._abandon(victim)
        return first

    # ---- the host's budget ---------------------------------------------------------------------------------------

    def trim(self, reserved: int = 0) -> None:
        """Drop or spill what the host's budget, less `reserved` bytes, does not hold; not what only lies there and is
        in use."""
        if self._options.host_bytes is None:
            return
        while True:
            with self._lock:
                if self.host_bytes + reserved <= self._options.host_bytes:
                    return
                victim = next((slot for slot in self.slots if self._can_leave(slot)), None)
                if victim is None:
                    return
                prefix = victim.prefix
                assert prefix is not None
                if self._spill is None:
                    self._counts["drops"] += 1
                    self._drop(victim)
                    if victim.refs == 0:
                        self._abandon(victim)
                    continue
                victim.spilling = True
            try:
                mapped, folder = self._spilled(self._spill, prefix)
            except OSError as error:
                logger.warning("prompt bank: dropped and not spilled to %s: %s", self._spill.directory, error)
                mapped, folder = None, None
            with self._lock:
                victim.spilling = False
                if victim.prefix is not prefix:  # gone meanwhile
                    remove_folder(folder)
                    continue
                self._drop(victim)
                if mapped is not None:
                    self.host_bytes -= victim.nbytes
                    victim.prefix, victim.folder, victim.nbytes = mapped, folder, 0
                    victim.next_logits = mapped.next_logits
                if mapped is None and victim.refs == 0:
                    self._counts["drops"] += 1
                    self._abandon(victim)

    def _can_leave(self, slot: Slot) -> bool:
        if slot.prefix is None or slot.nbytes == 0 or slot.spilling or slot.flight is not None:
            return False
        return slot.arena is not None or (slot.refs == 0 and slot.key not in self.pinned)

    def make_room_for(self, name: str, entry: Entry) -> None:
        """Count a given prefix, or spill it where it does not fit."""
        prefix = entry.prompt
        assert isinstance(prefix, PrefixKV)
        entry.nbytes = bytes_kept(prefix)
        budget = self._options.host_bytes
        if budget is None or entry.nbytes == 0:
            return
        self.trim(reserved=entry.nbytes)
        with self._lock:
            replaced = self._catalogue.entries.get(name)
            taken = self.host_bytes - (0 if replaced is None else replaced.nbytes)
        if taken + entry.nbytes <= budget:
            return
        if self._spill is None:
            raise BankFullError(
                f"prompt {name!r}: its prefix takes {entry.nbytes} bytes, and of host_bytes={budget} {taken} are "
                "taken by prefixes that were given or are in use; a directory would take it"
            )
        entry.prompt, entry.folder = self._spilled(self._spill, prefix)
        entry.nbytes = 0

    def _spilled(self, spill: SpillFolder, prefix: PrefixKV) -> tuple[PrefixKV, Path]:
        mapped = spill.write(prefix)
        with self._lock:
            self._counts["spills"] += 1
        return mapped


def bytes_kept(prefix: PrefixKV) -> int:
    """Bytes of host memory; a mapped file's pages are the system's to drop."""
    return 0 if prefix.is_mapped else prefix.nbytes
