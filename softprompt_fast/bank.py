# SPDX-License-Identifier: Apache-2.0
"""Many prompts over one base model: who is who, what is computed and kept where, and what a batch attends to.

A prompt's prefix goes through three tiers. Its source is what was given, or a directory. From that it is loaded or
compiled into *host* memory, where it stays as long as its budget lasts, or is mapped from a file. What batches attend
to is the *device* tier, an :class:`~softprompt_fast.arena.Arena`; a batch of one prompt does without where the host's
memory is the model's. Whoever uses a prefix *holds* it: it then stays what and where it is, whatever is added,
replaced or evicted meanwhile.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch

from softprompt_fast.catalogue import Catalogue, Entry, Slot, Source, ordinary_tensors, tasks_of
from softprompt_fast.packed import Compiled, Packed, Resident, RowPrompt, lay_out, pack
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.spill import remove_folder
from softprompt_fast.tiers import BankOptions, Tier, Tiers
from softprompt_fast.versions import VERSIONS

__all__ = ["BankOptions", "Held", "PromptBank", "Source"]

_PACKS_KEPT = 8


class Held:
    """One version of a prompt's prefix that stays what and where it is until :meth:`release`.

    Attributes:
        prompt: its name and task. version: see :meth:`PromptBank.version`. length: P.
        next_logits: ``[V]``, the logits that the last virtual token gives, or None where there are none.

    Also a context manager. Who forgets to release keeps the storage taken.
    """

    def __init__(self, bank: PromptBank, slot: Slot) -> None:
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
        self.options = options or BankOptions()
        self._lock = threading.RLock()
        self._counts = dict.fromkeys(
            ("hits", "loads", "compilations", "placements", "evictions", "drops", "spills", "failures"), 0
        )
        self._catalogue = Catalogue(self._lock, self._counts)
        self._tiers = Tiers(
            self._catalogue, compile_prompt, self.options, torch.device(device), dtype, self._lock, self._counts
        )
        self._held: set[Slot] = set()
        self._packs: OrderedDict[tuple[torch.dtype, tuple[tuple[RowPrompt, int], ...]], Packed] = OrderedDict()
        #: Called, in whichever thread it happens, when a prefix in the device's storage was released by its last
        #: holder, unpinned or removed: who found no room (BankFullError) may try again. To be quick.
        self.listeners: set[Callable[[], None]] = set()

    # ---- names ---------------------------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self._catalogue.entries

    def __len__(self) -> int:
        return len(self._catalogue.entries)

    @property
    def names(self) -> list[str]:
        with self._lock:
            return list(self._catalogue.entries)

    def __getitem__(self, name: str) -> SoftPrompt | PrefixKV:
        """The prompt called `name`; one that is registered is loaded, anew at every call.

        Raises:
            KeyError: there is none; the message lists some that there are.
            OSError, ValueError: it can't be loaded.
        """
        entry = self._catalogue.entry(name)
        return entry.prompt if entry.prompt is not None else self._catalogue.read(entry, name)

    def check_name(self, name: str) -> None:
        """KeyError if no prompt is called `name`; reads nothing."""
        self._catalogue.entry(name)

    def is_registered(self, name: str) -> bool:
        """Whether prompt `name` is loaded from its directory when it is used, frozen."""
        return self._catalogue.entry(name).source is not None

    def check_task(self, name: str, task: int | None) -> int | None:
        """The task of a multitask prompt; None for every other prompt, whose ``task_ids`` are ignored as in PEFT.

        Raises:
            ValueError: a multitask prompt without a task, or one that it does not have. TypeError: it is no integer.
            OSError: a registered prompt can't be read.
        """
        return self._catalogue.check_task(name, task)

    def add(self, name: str, prompt: SoftPrompt | PrefixKV, *, replace: bool = False) -> SoftPrompt | PrefixKV:
        """Put a prompt under `name`; returns it as it is kept. Running calls go on with the one before.

        Raises:
            ValueError: the name is taken and ``replace`` is False, or it is no non-empty string.
            BankFullError: a prefix does not fit ``host_bytes``, and there is no directory to put it in.
            OSError: it could not be written to the directory.
        """
        self._catalogue.check_free(name, replace)
        entry = Entry(prompt, next(VERSIONS), tasks=tasks_of(prompt))
        if isinstance(prompt, PrefixKV):
            entry.prompt = self._tiers.stored(prompt)
            self._tiers.make_room_for(name, entry)
        with self._lock:
            try:
                self._catalogue.check_free(name, replace)
            except ValueError:
                remove_folder(entry.folder)
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
            self._catalogue.check_free(name, replace)
            self._put(name, Entry(None, next(VERSIONS), source))

    def _put(self, name: str, entry: Entry) -> None:
        if name in self._catalogue.entries:
            self._forget(self._catalogue.entries[name])
        self._catalogue.entries[name] = entry
        self._tiers.count(entry)

    def remove(self, name: str) -> None:
        """Drop a prompt and its prefix; running calls keep what they hold."""
        with self._lock:
            self._forget(self._catalogue.entry(name))
            del self._catalogue.entries[name]
            self._tiers.pinned = {key for key in self._tiers.pinned if key[0] != name}
        self._tell()

    def _forget(self, entry: Entry) -> None:
        self._tiers.forget(entry)
        self._packs.clear()

    def invalidate(self) -> None:
        """Forget every compiled prefix: the base model's weights, dtype or device changed."""
        with self._lock:
            for entry in self._catalogue.entries.values():
                for slot in [*entry.slots.values()]:
                    self._tiers.retire(slot)
                entry.version = next(VERSIONS)
            self._packs.clear()

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """The model is on another device, or computes in another dtype: all prefixes follow."""
        with self._lock:
            self._tiers.move(device, dtype)
            self.invalidate()

    def version(self, name: str) -> int:
        """A number that changes whenever the content of prompt `name` does.

        In-place updates of its parameters (``load_state_dict``, most optimizers) are seen through the version counters
        that autograd keeps, and every step of a ``torch.optim`` optimizer counts as an update of all prompts that
        require grad; writes through ``.data`` are not seen: call :meth:`invalidate` after those. A directory is looked
        at when its prompt is registered and whenever it is loaded again.
        """
        return self._catalogue.version(self._catalogue.entry(name))

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
        alone = self.options.device_bytes is None and self._tiers.is_on_host and self._tiers.arena is None
        return self._hold(name, self.check_task(name, task), "any" if alone else "device")

    def hold_all(self, prompts: Sequence[RowPrompt | None]) -> list[Held | None]:
        """For a call that packs and releases them: each row's prompt (checked by :meth:`check_task`), held where the
        batch will want it; None where it is None. All or none."""
        distinct = dict.fromkeys(prompt for prompt in prompts if prompt is not None)
        on_host = len(distinct) == 1 and self._tiers.is_on_host
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
                self._tiers.ready(slot, "device")
            arenas = {slot.arena for slot in slots}
            if len(arenas) > 1:
                raise RuntimeError("held: these prompts were held before and after the model was moved")
            residents = [Resident(s.key, s.version, s.first, s.length, s.next_logits) for s in slots]
            (arena,) = arenas
            assert arena is not None
            with ordinary_tensors():
                packed, places = lay_out(arena.entries, residents)
        place = dict(zip(slots, places, strict=True))
        index = [-1 if each is None else place[each._slot] for each in held]
        return packed, torch.tensor(index, dtype=torch.int32, device=self._tiers.device)

    def pin(self, name: str, task: int | None = None) -> None:
        """Load a prompt and keep it, and what replaces it once that is used, where batches attend to it: it is never
        evicted. Until :meth:`unpin`, or its removal.

        Raises:
            As :meth:`hold`.
        """
        with self.hold(name, task) as held, self._lock:
            self._tiers.pinned.add(held.prompt)

    def unpin(self, name: str, task: int | None = None) -> None:
        """Take back a :meth:`pin`; nothing happens where there is none."""
        with self._lock:
            self._tiers.pinned -= {(name, task), (name, None)}  # only multitask prompts are pinned by task
        self._tiers.trim()
        self._tell()

    def _hold(self, name: str, task: int | None, tier: Tier) -> Held:
        with self._lock:
            entry = self._catalogue.entry(name)
            version = self._catalogue.version(entry)
            slot = entry.slots.get(task)
            if slot is not None and slot.version != version:
                self._tiers.retire(slot)
                slot = None
            if slot is None:
                slot = entry.slots[task] = Slot((name, task), entry, version)
            slot.refs += 1
            self._held.add(slot)
            self._tiers.use(slot)
        try:
            self._tiers.ready(slot, tier, count=True)
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

    def _let_go(self, slot: Slot) -> None:
        with self._lock:
            slot.refs -= 1
            freed = slot.refs == 0 and slot.arena is not None
            if slot.refs == 0:
                self._held.discard(slot)
                if not slot.alive or (slot.prefix is None and slot.arena is None):
                    self._tiers.retire(slot)
        self._tiers.trim()
        if freed:
            self._tell()

    def _tell(self) -> None:
        # Not under the lock: listeners have locks of their own.
        for listener in tuple(self.listeners):
            listener()

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
            prefix = self._tiers.ready(held._slot, "host")
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
            with ordinary_tensors():
                compiled = [Compiled.of(prefix.to(self._tiers.device)) for prefix in prefixes]
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

    def _alone(self, slot: Slot) -> Packed | None:
        """A held prefix as a batch of one prompt attends to it in host memory; None where that is not the model's, or
        the prefix is in the arena alone."""
        with self._lock:
            prefix = slot.prefix
            if prefix is None or not self._tiers.is_on_host:
                return None
            if slot.alone is None:
                with ordinary_tensors():
                    slot.alone = pack([slot.key], [slot.version], [Compiled.of(prefix)], self._tiers.dtype)
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
            arena = self._tiers.arena
            found: dict[str, int | float] = {f"{name}_total": count for name, count in self._counts.items()}
            found |= {
                "prompts": len(self._catalogue.entries),
                "resident_prefixes": 0 if arena is None else len(arena.regions),
                "held_prefixes": len(self._held),
                "pinned_prefixes": len(self._tiers.pinned),
                "device_bytes": 0 if arena is None else int(arena.regions.taken_entries * arena.entry_bytes),
                "device_capacity_bytes": 0 if arena is None else arena.nbytes,
                "host_bytes": self._tiers.host_bytes,
            }
            return found
