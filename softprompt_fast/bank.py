# SPDX-License-Identifier: Apache-2.0
"""Many prompts over one base model: who is who, what is computed and kept where, and what a batch attends to.

A prompt's prefix goes through three tiers. Its source is what was given, or a directory. From that it is loaded or
compiled into *host* memory, where it stays as long as its budget lasts, or is mapped from a file. What batches attend
to is the *device* tier, an :class:`~softprompt_fast.arena.Arena`; a batch of one prompt does without where the host's
memory is the model's. Whoever uses a prefix *holds* it: it then stays what and where it is, whatever is added,
replaced or evicted meanwhile.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from softprompt_fast.arena import Arena
from softprompt_fast.backends import quantized
from softprompt_fast.errors import AdapterError, BankFullError, PrefixError, SoftPromptError
from softprompt_fast.packed import Compiled, Packed, Resident, RowPrompt, lay_out, pack
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt

logger = logging.getLogger("softprompt_fast")

#: Versions are unique in the process, not in a bank: a cache may be handed to another model that knows the same names.
_VERSIONS = itertools.count(1)
_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    # Fused optimizers write parameters without autograd's version counters noticing.
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def optimizer_steps() -> int:
    """Steps that ``torch.optim`` optimizers made in this process."""
    return _optimizer_steps


_PACKS_KEPT = 8
_NAMES_TOLD = 8


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


class Source(Protocol):
    """Where a prompt can be loaded from, again and again."""

    def load(self) -> SoftPrompt | PrefixKV:
        """The prompt, checked and frozen.

        Raises:
            OSError, ValueError: it can't be read, or is not for this model.
        """

    def num_tasks(self) -> int | None:
        """Tasks of a multitask prompt, None for others; reads no tensor."""

    def identity(self) -> Hashable:
        """Equal only while the content is."""


@dataclass(eq=False)
class _Entry:
    """One name's prompt: what was given, or where it is loaded from."""

    prompt: SoftPrompt | PrefixKV | None
    version: int
    source: Source | None = None
    seen: tuple[int, ...] = ()
    # Kept and not only their ids, which a new parameter may inherit from a dead one.
    parameters: tuple[torch.nn.Parameter, ...] = ()
    #: Of a source: what it was when it was first loaded, and its tasks once they are known ("?" before).
    identity: Hashable = None
    tasks: int | Literal["?"] | None = "?"
    #: Host bytes of a given prefix, and where it lies if it was spilled.
    nbytes: int = 0
    folder: Path | None = None
    slots: dict[int | None, _Slot] = field(default_factory=dict)


@dataclass(eq=False)
class _Slot:
    """One version of one prompt's (and task's) prefix, in whichever tiers it is."""

    key: RowPrompt
    entry: _Entry
    version: int
    refs: int = 0
    alive: bool = True  # the current version
    length: int = 0
    next_logits: torch.Tensor | None = None
    prefix: PrefixKV | None = None  # the host tier
    nbytes: int = 0  # what it takes there, beyond what was given
    folder: Path | None = None  # where it was spilled to
    spilling: bool = False
    arena: Arena | None = None  # the device tier, from entry `first` on
    first: int = 0
    alone: Packed | None = None  # `prefix` as a batch of one prompt takes it
    flight: Future[None] | None = None  # somebody loads, compiles or places it


_Tier = Literal["any", "host", "device"]


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """What is kept for later calls must not be an inference tensor: those can take part in no training graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Held:
    """One version of a prompt's prefix that stays what and where it is until :meth:`release`.

    Attributes:
        prompt: its name and task. version: see :meth:`PromptBank.version`. length: P.
        next_logits: ``[V]``, the logits that the last virtual token gives, or None where there are none.

    Also a context manager. Who forgets to release keeps the storage taken.
    """

    def __init__(self, bank: PromptBank, slot: _Slot) -> None:
        self._bank, self._slot = bank, slot
        self.prompt, self.version = slot.key, slot.version
        self.length, self.next_logits = slot.length, slot.next_logits
        self._released = False

    def release(self) -> None:
        """Let go of it; further calls do nothing."""
        self._bank._release(self)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class PromptBank:
    """Named prompts over one base model, compiled or loaded at first use and shared by every row after.

    Args:
        compile_prompt: ``(prompt, task) -> PrefixKV``; runs the frozen model once over a soft prompt.
        options: budgets and storage.
        device, dtype: of the model; :meth:`move` changes them.

    Thread-safe: prompts may be added, replaced and removed while other threads generate. A prefix is loaded or
    compiled by one thread while the others that want it wait, and nobody else does.
    """

    def __init__(
        self,
        compile_prompt: Callable[[SoftPrompt, int | None], PrefixKV],
        options: BankOptions | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._compile = compile_prompt
        self.options = options or BankOptions()
        self._device, self._dtype = torch.device(device), dtype
        self._entries: dict[str, _Entry] = {}
        self._slots: OrderedDict[_Slot, None] = OrderedDict()  # current versions, least recently used first
        self._held: set[_Slot] = set()
        self._pinned: set[RowPrompt] = set()
        self._packs: OrderedDict[tuple[torch.dtype, tuple[tuple[RowPrompt, int], ...]], Packed] = OrderedDict()
        self._arena: Arena | None = None
        self._host_bytes = 0
        self._folder: Path | None = None
        self._counts = dict.fromkeys(
            ("hits", "loads", "compilations", "placements", "evictions", "drops", "spills", "failures"), 0
        )
        self._lock = threading.RLock()
        #: Called, in whichever thread it happens, when a prefix in the device's storage was released by its last
        #: holder, unpinned or removed: who found no room (BankFullError) may try again. To be quick.
        self.listeners: set[Callable[[], None]] = set()

    # ---- names ---------------------------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    def __getitem__(self, name: str) -> SoftPrompt | PrefixKV:
        """The prompt called `name`; one that is registered is loaded, anew at every call.

        Raises:
            KeyError: there is none; the message lists some that there are.
            OSError, ValueError: it can't be loaded.
        """
        entry = self._entry(name)
        return entry.prompt if entry.prompt is not None else self._read(entry, name)

    def check_name(self, name: str) -> None:
        """KeyError if no prompt is called `name`; reads nothing."""
        self._entry(name)

    def is_registered(self, name: str) -> bool:
        """Whether prompt `name` is loaded from its directory when it is used, frozen."""
        return self._entry(name).source is not None

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        with self._lock:
            known = [repr(each) for each in itertools.islice(self._entries, _NAMES_TOLD)]
            more = len(self._entries) - len(known)
        told = ", ".join(known) + (f" and {more} more" if more else "")
        raise KeyError(f"prompt: unknown prompt {name!r}; known prompts: {told or 'none is loaded'}")

    def check_task(self, name: str, task: int | None) -> int | None:
        """The task of a multitask prompt; None for every other prompt, whose ``task_ids`` are ignored as in PEFT.

        Raises:
            ValueError: a multitask prompt without a task, or one that it does not have. TypeError: it is no integer.
            OSError: a registered prompt can't be read.
        """
        entry = self._entry(name)
        if entry.tasks == "?":
            assert entry.source is not None
            entry.tasks = entry.source.num_tasks()
        tasks = entry.tasks
        if not isinstance(tasks, int):
            return None
        if task is None:
            raise ValueError(f"task_ids: prompt {name!r} is a multitask prompt; give a task (0..{tasks - 1}) per row")
        if not isinstance(task, int):
            raise TypeError(f"task_ids: expected integers, found {task!r}")
        if not 0 <= task < tasks:
            raise ValueError(f"task_ids: prompt {name!r} has tasks 0..{tasks - 1}, found {task}")
        return task

    def add(self, name: str, prompt: SoftPrompt | PrefixKV, *, replace: bool = False) -> SoftPrompt | PrefixKV:
        """Put a prompt under `name`; returns it as it is kept. Running calls go on with the one before.

        Raises:
            ValueError: the name is taken and ``replace`` is False, or it is no non-empty string.
            BankFullError: a prefix does not fit ``host_bytes``, and there is no directory to put it in.
            OSError: it could not be written to the directory.
        """
        self._check_free(name, replace)
        entry = _Entry(prompt, next(_VERSIONS), tasks=_tasks_of(prompt))
        if isinstance(prompt, PrefixKV):
            entry.prompt = self._stored(prompt)
            self._make_room_for(name, entry)
        with self._lock:
            try:
                self._check_free(name, replace)
            except ValueError:
                _remove_folder(entry.folder)
                raise
            self._put(name, entry)
        assert entry.prompt is not None
        return entry.prompt

    def register(self, name: str, source: Source, *, replace: bool = False) -> None:
        """Put a prompt under `name` that is loaded when it is used first, and again after it was dropped.

        Raises:
            ValueError: the name is taken and ``replace`` is False, or it is no non-empty string.
        """
        with self._lock:
            self._check_free(name, replace)
            self._put(name, _Entry(None, next(_VERSIONS), source))

    def _check_free(self, name: str, replace: bool) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a non-empty string, found {name!r}")
        if name in self._entries and not replace:
            raise ValueError(f"name: a prompt called {name!r} is already loaded; pass replace=True to replace it")

    def _put(self, name: str, entry: _Entry) -> None:
        if name in self._entries:
            self._forget(self._entries[name])
        self._entries[name] = entry
        self._host_bytes += entry.nbytes

    def remove(self, name: str) -> None:
        """Drop a prompt and its prefix; running calls keep what they hold."""
        with self._lock:
            self._forget(self._entry(name))
            del self._entries[name]
            self._pinned = {key for key in self._pinned if key[0] != name}
        self._tell()

    def _forget(self, entry: _Entry) -> None:
        for slot in [*entry.slots.values()]:
            self._retire(slot)
        self._host_bytes -= entry.nbytes
        _remove_folder(entry.folder)
        self._packs.clear()

    def invalidate(self) -> None:
        """Forget every compiled prefix: the base model's weights, dtype or device changed."""
        with self._lock:
            for entry in self._entries.values():
                for slot in [*entry.slots.values()]:
                    self._retire(slot)
                entry.version = next(_VERSIONS)
            self._packs.clear()

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """The model is on another device, or computes in another dtype: all prefixes follow."""
        with self._lock:
            self._device, self._dtype = device, dtype
            self._arena = None
            for entry in self._entries.values():
                if isinstance(entry.prompt, PrefixKV):
                    entry.prompt = self._stored(entry.prompt)
                    self._host_bytes -= entry.nbytes
                    entry.nbytes = _bytes_kept(entry.prompt)
                    self._host_bytes += entry.nbytes
            self.invalidate()

    def version(self, name: str) -> int:
        """A number that changes whenever the content of prompt `name` does.

        In-place updates of its parameters (``load_state_dict``, most optimizers) are seen through the version counters
        that autograd keeps, and every step of a ``torch.optim`` optimizer counts as an update of all prompts that
        require grad; writes through ``.data`` are not seen: call :meth:`invalidate` after those. A directory is looked
        at when its prompt is registered and whenever it is loaded again.
        """
        return self._version(self._entry(name))

    def _version(self, entry: _Entry) -> int:
        if isinstance(entry.prompt, SoftPrompt):
            parameters = tuple(entry.prompt.parameters())
            steps = _optimizer_steps if any(p.requires_grad for p in parameters) else 0
            # Inference tensors have no counter; nothing but inference mode can write to them.
            seen = (steps, *(-1 if p.is_inference() else p._version for p in parameters))
            replaced = any(new is not old for new, old in zip(parameters, entry.parameters, strict=False))
            if seen != entry.seen or replaced:
                with self._lock:
                    if entry.seen:
                        entry.version = next(_VERSIONS)
                    entry.seen, entry.parameters = seen, parameters
        return entry.version

    # ---- holding -------------------------------------------------------------------------------------------------

    def hold(self, name: str, task: int | None = None) -> Held:
        """Load or compile a prompt's prefix if need be, and keep this version of it until it is released.

        Where there is a budget for the device, the prefix has its place in it when this returns: packing it with
        others that are held can't fail. Without one it gets its place once batches of several prompts were seen.
        Waits for whoever is loading the same prefix, and for nobody else.

        Args:
            name: of the prompt. task: of a multitask prompt; ignored for others.

        Raises:
            KeyError: there is no such prompt. ValueError, TypeError: it has no such task.
            OSError, AdapterError, PrefixError: this prompt can't be read, or is not for this model; the next call
                tries again.
            BankFullError: held and pinned prefixes take the device's budget; try again when one was released.
        """
        alone = self.options.device_bytes is None and self._is_on_host and self._arena is None
        return self._hold(name, self.check_task(name, task), "any" if alone else "device")

    def hold_all(self, prompts: Sequence[RowPrompt | None]) -> list[Held | None]:
        """For a call that packs and releases them: each row's prompt (checked by :meth:`check_task`), held where the
        batch will want it; None where it is None. All or none."""
        distinct = dict.fromkeys(prompt for prompt in prompts if prompt is not None)
        on_host = len(distinct) == 1 and self._is_on_host
        held: dict[RowPrompt | None, Held | None] = {None: None}
        with ExitStack() as stack:
            for prompt in distinct:
                held[prompt] = stack.enter_context(self._hold(*prompt, "any" if on_host else "device"))
            stack.pop_all()
        return [held[prompt] for prompt in prompts]

    def pack_held(self, held: Sequence[Held | None]) -> tuple[Packed | None, torch.Tensor | None]:
        """The prefixes of a batch, one per ROW (None: no prompt), in the storage where they are, without a copy.

        Returns:
            What the model takes as ``prompt`` and ``prompt_index``: the prefixes, and int32 ``[B]``, -1 for no prompt;
            ``(None, None)`` if no row has one. Valid until the first of them is released.

        Raises:
            BankFullError: there is a budget, and a prefix that was never placed in it finds no room.
        """
        slots = list(dict.fromkeys(each._slot for each in held if each is not None))
        if not slots:
            return None, None
        places = [0]
        packed = self._alone(slots[0]) if len(slots) == 1 else None
        if packed is None:
            for slot in slots:
                self._ready(slot, "device")
            arenas = {slot.arena for slot in slots}
            if len(arenas) > 1:
                raise RuntimeError("held: these prompts were held before and after the model was moved")
            residents = [Resident(s.key, s.version, s.first, s.length, s.next_logits) for s in slots]
            (arena,) = arenas
            assert arena is not None
            with _ordinary_tensors():
                packed, places = lay_out(arena.entries, residents)
        place = dict(zip(slots, places, strict=True))
        index = [-1 if each is None else place[each._slot] for each in held]
        return packed, torch.tensor(index, dtype=torch.int32, device=self._device)

    def pin(self, name: str, task: int | None = None) -> None:
        """Load a prompt and keep it, and what replaces it once that is used, where batches attend to it: it is never
        evicted. Until :meth:`unpin`, or its removal.

        Raises:
            As :meth:`hold`.
        """
        with self.hold(name, task) as held, self._lock:
            self._pinned.add(held.prompt)

    def unpin(self, name: str, task: int | None = None) -> None:
        """Take back a :meth:`pin`; nothing happens where there is none."""
        with self._lock:
            self._pinned -= {(name, task), (name, None)}  # only multitask prompts are pinned by task
        self._trim()
        self._tell()

    @property
    def _host_device(self) -> torch.device:
        return torch.device("cpu") if self.options.tiered else self._device

    @property
    def _is_on_host(self) -> bool:
        """Whether a batch of one prompt can attend to the host's copy."""
        return self._host_device.type == self._device.type

    def _hold(self, name: str, task: int | None, tier: _Tier) -> Held:
        with self._lock:
            entry = self._entry(name)
            version = self._version(entry)
            slot = entry.slots.get(task)
            if slot is not None and slot.version != version:
                self._retire(slot)
                slot = None
            if slot is None:
                slot = entry.slots[task] = _Slot((name, task), entry, version)
            slot.refs += 1
            self._held.add(slot)
            self._slots[slot] = None
            self._slots.move_to_end(slot)
        try:
            self._ready(slot, tier, count=True)
        except BaseException:
            self._let_go(slot)
            raise
        return Held(self, slot)

    def _release(self, held: Held) -> None:
        with self._lock:
            if held._released:
                return
            held._released = True
        self._let_go(held._slot)

    def _let_go(self, slot: _Slot) -> None:
        with self._lock:
            slot.refs -= 1
            freed = slot.refs == 0 and slot.arena is not None
            if slot.refs == 0:
                self._held.discard(slot)
                if not slot.alive or (slot.prefix is None and slot.arena is None):
                    self._retire(slot)
        self._trim()
        if freed:
            self._tell()

    def _tell(self) -> None:
        # Not under the lock: listeners have locks of their own.
        for listener in tuple(self.listeners):
            listener()

    def _retire(self, slot: _Slot) -> None:
        """`slot` is current no more; with its last hold it goes."""
        if slot.alive:
            slot.alive = False
            del slot.entry.slots[slot.key[1]]
            self._slots.pop(slot, None)
            if slot.refs and slot.prefix is slot.entry.prompt and slot.prefix is not None:
                # A given prefix counted with its entry, which may be gone before this.
                slot.nbytes = _bytes_kept(slot.prefix)
                self._host_bytes += slot.nbytes
        if slot.refs == 0:
            if slot.arena is not None:
                slot.arena.regions.free(slot.first)
                slot.arena = None
            self._drop(slot)

    def _drop(self, slot: _Slot) -> None:
        """Forget the host's copy of `slot`; what is in the arena keeps its prediction."""
        self._host_bytes -= slot.nbytes
        slot.prefix, slot.alone, slot.nbytes = None, None, 0
        if slot.arena is not None and slot.next_logits is not None:
            slot.nbytes = slot.next_logits.nbytes
            self._host_bytes += slot.nbytes
        _remove_folder(slot.folder)
        slot.folder = None

    # ---- from tier to tier ---------------------------------------------------------------------------------------

    def _ready(self, slot: _Slot, tier: _Tier, count: bool = False) -> PrefixKV | None:
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
            self._trim()
            return prefix

    def _abandon(self, slot: _Slot) -> None:
        """Forget a slot that has nothing."""
        if slot.alive and slot.prefix is None and slot.arena is None:
            self._retire(slot)

    def _bring(self, slot: _Slot, tier: _Tier) -> PrefixKV:
        prefix = slot.prefix
        if prefix is None:
            prefix = self._obtain(slot)
            with self._lock:
                slot.prefix = prefix
                slot.length, slot.next_logits = prefix.num_virtual_tokens, prefix.next_logits
                self._host_bytes -= slot.nbytes
                counted = prefix is slot.entry.prompt and slot.alive
                slot.nbytes = 0 if counted else _bytes_kept(prefix)
                self._host_bytes += slot.nbytes
        if tier == "device" and slot.arena is None:
            self._place(slot, prefix)
        return prefix

    def _obtain(self, slot: _Slot) -> PrefixKV:
        """The prefix of `slot`, from its source."""
        (name, task), entry = slot.key, slot.entry
        try:
            prompt = entry.prompt
            if prompt is None:
                prompt = self._read(entry, name, slot)
            if isinstance(prompt, PrefixKV) and prompt is entry.prompt:
                return prompt
            if isinstance(prompt, SoftPrompt):
                with _ordinary_tensors():
                    prompt = self._compile(prompt, task)
                with self._lock:
                    self._counts["compilations"] += 1
            with _ordinary_tensors():
                return self._stored(prompt)
        except SoftPromptError:
            raise
        except ValueError as error:
            raise PrefixError(f"prompt {name!r}: {error}") from error

    def _read(self, entry: _Entry, name: str, slot: _Slot | None = None) -> SoftPrompt | PrefixKV:
        """Load a registered prompt. `slot` gets a new version if it is not what was loaded before."""
        source = entry.source
        assert source is not None
        while True:
            identity = source.identity()
            with _ordinary_tensors():
                prompt = source.load()
            if source.identity() == identity:
                break
        with self._lock:
            self._counts["loads"] += 1
            if slot is None:
                return prompt
            if entry.identity != identity and slot.alive:
                if entry.identity is not None:
                    entry.version = slot.version = next(_VERSIONS)
                entry.identity = identity
            before, entry.tasks = entry.tasks, _tasks_of(prompt)
            if before not in ("?", entry.tasks):
                raise AdapterError(f"prompt {name!r}: its directory changed to a prompt of other tasks")
        return prompt

    def _stored(self, prefix: PrefixKV) -> PrefixKV:
        """A prefix as it is kept: on the host tier's device, in the model's dtype or in 8 bits."""
        prefix = prefix.to(device=self._host_device, dtype=self._dtype)
        dtype, block = self.options.dtype, self.options.block
        if dtype is None:
            return prefix
        if prefix.scales is not None:
            if prefix.dtype == dtype and prefix.scales.block % block == 0:
                return prefix
            prefix = prefix.dequantize(self._dtype)
        return prefix.quantize(block, dtype)

    def _place(self, slot: _Slot, prefix: PrefixKV) -> None:
        """Give `slot` a region of the arena and copy its prefix there."""
        with self._lock:
            arena = self._arena
            if arena is None:
                dtype, block = self.options.dtype, self.options.block
                arena = self._arena = Arena(
                    prefix,
                    self._device,
                    dtype or self._dtype,
                    block=None if dtype is None else block,
                    nbytes=self.options.device_bytes,
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

    def _region(self, arena: Arena, slot: _Slot) -> int:
        """A free region for `slot`, for which others that nobody holds are evicted, least recently used first."""
        while (first := arena.allocate(slot.length)) is None:
            idle = (s for s in self._slots if s.refs == 0 and s.arena is arena and s.key not in self._pinned)
            victim = next(idle, None)
            if victim is None:
                regions, needed = arena.regions, arena.regions.rounded(slot.length)
                raise BankFullError(
                    f"prompt {slot.key[0]!r}: its prefix needs {needed} entries ({needed * arena.entry_bytes:.0f} "
                    f"bytes) in one run, and of the {regions.capacity} that device_bytes={self.options.device_bytes} "
                    f"gives, {regions.taken_entries} are held by running calls or pinned"
                )
            regions_of, victim.arena = victim.arena, None
            assert regions_of is not None
            regions_of.regions.free(victim.first)
            self._counts["evictions"] += 1
            self._abandon(victim)
        return first

    # ---- the host's budget ---------------------------------------------------------------------------------------

    def _trim(self, reserved: int = 0) -> None:
        """Drop or spill what the host's budget, less `reserved` bytes, does not hold; not what only lies there and is
        in use."""
        if self.options.host_bytes is None:
            return
        while True:
            with self._lock:
                if self._host_bytes + reserved <= self.options.host_bytes:
                    return
                victim = next((slot for slot in self._slots if self._can_leave(slot)), None)
                if victim is None:
                    return
                prefix = victim.prefix
                assert prefix is not None
                if self.options.directory is None:
                    self._counts["drops"] += 1
                    self._drop(victim)
                    if victim.refs == 0:
                        self._abandon(victim)
                    continue
                victim.spilling = True
            try:
                mapped, folder = self._spilled(prefix)
            except OSError as error:
                logger.warning("prompt bank: dropped and not spilled to %s: %s", self.options.directory, error)
                mapped, folder = None, None
            with self._lock:
                victim.spilling = False
                if victim.prefix is not prefix:  # gone meanwhile
                    _remove_folder(folder)
                    continue
                self._drop(victim)
                if mapped is not None:
                    self._host_bytes -= victim.nbytes
                    victim.prefix, victim.folder, victim.nbytes = mapped, folder, 0
                    victim.next_logits = mapped.next_logits
                if mapped is None and victim.refs == 0:
                    self._counts["drops"] += 1
                    self._abandon(victim)

    def _can_leave(self, slot: _Slot) -> bool:
        if slot.prefix is None or slot.nbytes == 0 or slot.spilling or slot.flight is not None:
            return False
        return slot.arena is not None or (slot.refs == 0 and slot.key not in self._pinned)

    def _make_room_for(self, name: str, entry: _Entry) -> None:
        """Count a given prefix, or spill it where it does not fit."""
        prefix = entry.prompt
        assert isinstance(prefix, PrefixKV)
        entry.nbytes = _bytes_kept(prefix)
        budget = self.options.host_bytes
        if budget is None or entry.nbytes == 0:
            return
        self._trim(reserved=entry.nbytes)
        with self._lock:
            replaced = self._entries.get(name)
            taken = self._host_bytes - (0 if replaced is None else replaced.nbytes)
        if taken + entry.nbytes <= budget:
            return
        if self.options.directory is None:
            raise BankFullError(
                f"prompt {name!r}: its prefix takes {entry.nbytes} bytes, and of host_bytes={budget} {taken} are "
                "taken by prefixes that were given or are in use; a directory would take it"
            )
        entry.prompt, entry.folder = self._spilled(prefix)
        entry.nbytes = 0

    def _spilled(self, prefix: PrefixKV) -> tuple[PrefixKV, Path]:
        """`prefix` written to the bank's own folder and mapped from there. OSError where it can't be written."""
        with self._lock:
            if self._folder is None:
                assert self.options.directory is not None
                Path(self.options.directory).mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="prompt-bank-", dir=self.options.directory))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            folder = self._folder / str(next(_VERSIONS))
        try:
            prefix.save_pretrained(folder)
            mapped = PrefixKV.from_pretrained(folder, verify=False)
        except BaseException:
            _remove_folder(folder)
            raise
        with self._lock:
            self._counts["spills"] += 1
        return mapped, folder

    # ---- without the arena ---------------------------------------------------------------------------------------

    # Dynamo can't trace locks and hashes, and what is computed once needs no compiling.
    @torch.compiler.disable
    def prefix(self, name: str, task: int | None = None) -> PrefixKV:
        """The frozen prefix of a prompt as it is stored, computed at the first call and after every change of the
        prompt."""
        return self._resolve((name, task))[1]

    def _resolve(self, prompt: RowPrompt) -> tuple[int, PrefixKV]:
        """A prompt's version and its prefix, both of the same moment."""
        with self._hold(*prompt, "any") as held:
            prefix = self._ready(held._slot, "host")
            assert prefix is not None
            return held.version, prefix

    @torch.compiler.disable
    def packed(self, prompts: Iterable[RowPrompt], dtype: torch.dtype = torch.float32) -> Packed:
        """The frozen prefixes of `prompts` copied end to end (:func:`pack`), in no budget: for calls that are
        differentiated or traced. Without budgets the last few packs are kept."""
        prompts = tuple(prompts)
        versions, prefixes = zip(*map(self._resolve, prompts), strict=True)
        key = dtype, tuple(zip(prompts, versions, strict=True))
        with self._lock:
            packed = self._packs.get(key)
        if packed is None:
            with _ordinary_tensors():
                compiled = [Compiled.of(prefix.to(self._device)) for prefix in prefixes]
                packed = pack(prompts, versions, compiled, dtype)
        if self.options.tiered:
            return packed
        with self._lock:
            packed = self._packs.setdefault(key, packed)
            self._packs.move_to_end(key)
            while len(self._packs) > _PACKS_KEPT:
                self._packs.popitem(last=False)
        return packed

    # Dynamo would compile anew whatever sees a version, at every step of an optimizer.
    @torch.compiler.disable
    def pack(self, prompts: Sequence[RowPrompt], compiled: Sequence[Compiled], dtype: torch.dtype) -> Packed:
        """Prompts that the caller has run itself, with the versions that they have now (:func:`pack`)."""
        return pack(prompts, [self.version(name) for name, _ in prompts], compiled, dtype)

    def _alone(self, slot: _Slot) -> Packed | None:
        """A held prefix as a batch of one prompt attends to it in host memory; None where that is not the model's, or
        the prefix is in the arena alone."""
        with self._lock:
            prefix = slot.prefix
            if prefix is None or not self._is_on_host:
                return None
            if slot.alone is None:
                with _ordinary_tensors():
                    slot.alone = pack([slot.key], [slot.version], [Compiled.of(prefix)], self._dtype)
            return slot.alone

    # ---- metrics -------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, int | float]:
        """Counters (``_total``) since the bank was made, and what it holds now. Names that Prometheus takes.

        ``hits_total``: holds that found their prefix; ``loads_total``: directories read; ``compilations_total``:
        prompts run by the model; ``placements_total``: prefixes copied to the arena; ``evictions_total``: removed from
        it for others; ``drops_total``, ``spills_total``: host copies forgotten, and written to the directory;
        ``failures_total``: loads, compilations and placements that failed.

        ``prompts``: names; ``resident_prefixes``, ``held_prefixes``, ``pinned_prefixes``: prefixes in the arena, in
        use, pinned; ``device_bytes``: of the arena in use, ``device_capacity_bytes``: all of it; ``host_bytes``: of
        prefixes kept in host memory (mapped ones count nothing).
        """
        with self._lock:
            arena = self._arena
            found: dict[str, int | float] = {f"{name}_total": count for name, count in self._counts.items()}
            found |= {
                "prompts": len(self._entries),
                "resident_prefixes": 0 if arena is None else len(arena.regions),
                "held_prefixes": len(self._held),
                "pinned_prefixes": len(self._pinned),
                "device_bytes": 0 if arena is None else int(arena.regions.taken_entries * arena.entry_bytes),
                "device_capacity_bytes": 0 if arena is None else arena.nbytes,
                "host_bytes": self._host_bytes,
            }
            return found


def _tasks_of(prompt: SoftPrompt | PrefixKV | None) -> int | None:
    if isinstance(prompt, SoftPrompt) and prompt.method == "MULTITASK_PROMPT_TUNING":
        return int(prompt.config["num_tasks"])
    return None


def _bytes_kept(prefix: PrefixKV) -> int:
    """Bytes of host memory; a mapped file's pages are the system's to drop."""
    return 0 if prefix.is_mapped else prefix.nbytes


def _remove_folder(folder: Path | None) -> None:
    # Whoever still reads a map of it keeps its content.
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
