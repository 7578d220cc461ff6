# SPDX-License-Identifier: Apache-2.0
"""The prompts of a bank by name: what was given, or where it is loaded from, and the version of its content."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from softprompt_fast.arena import Arena
from softprompt_fast.errors import AdapterError
from softprompt_fast.packed import Packed, RowPrompt
from softprompt_fast.prefix_kv import PrefixKV
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.versions import VERSIONS, optimizer_steps

_NAMES_TOLD = 8


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
class Entry:
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
    slots: dict[int | None, Slot] = field(default_factory=dict)


@dataclass(eq=False)
class Slot:
    """One version of one prompt's (and task's) prefix, in whichever tiers it is."""

    key: RowPrompt
    entry: Entry
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


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """What is kept for later calls must not be an inference tensor: those can take part in no training graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Catalogue:
    """Who is who in a bank. It keeps no prefix: who replaces or drops an entry sees to its slots.

    Args:
        lock: the bank's, which covers its tables. counts: the bank's counters.
    """

    def __init__(self, lock: threading.RLock, counts: dict[str, int]) -> None:
        self.entries: dict[str, Entry] = {}
        self._lock, self._counts = lock, counts

    def entry(self, name: str) -> Entry:
        """The entry called `name`; KeyError, which lists some names that there are, if there is none."""
        entry = self.entries.get(name)
        if entry is not None:
            return entry
        with self._lock:
            known = [repr(each) for each in itertools.islice(self.entries, _NAMES_TOLD)]
            more = len(self.entries) - len(known)
        told = ", ".join(known) + (f" and {more} more" if more else "")
        raise KeyError(f"prompt: unknown prompt {name!r}; known prompts: {told or 'none is loaded'}")

    def check_free(self, name: str, replace: bool) -> None:
        """ValueError if `name` is no name, or is taken and not to be replaced."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a non-empty string, found {name!r}")
        if name in self.entries and not replace:
            raise ValueError(f"name: a prompt called {name!r} is already loaded; pass replace=True to replace it")

    def check_task(self, name: str, task: int | None) -> int | None:
        """See :meth:`PromptBank.check_task`."""
        entry = self.entry(name)
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

    def version(self, entry: Entry) -> int:
        """A number that changes whenever the content of `entry` does (:meth:`PromptBank.version`)."""
        if isinstance(entry.prompt, SoftPrompt):
            parameters = tuple(entry.prompt.parameters())
            steps = optimizer_steps() if any(p.requires_grad for p in parameters) else 0
            # Inference tensors have no counter; nothing but inference mode can write to them.
            seen = (steps, *(-1 if p.is_inference() else p._version for p in parameters))
            replaced = any(new is not old for new, old in zip(parameters, entry.parameters, strict=False))
            if seen != entry.seen or replaced:
                with self._lock:
                    if entry.seen:
                        entry.version = next(VERSIONS)
                    entry.seen, entry.parameters = seen, parameters
        return entry.version

    def read(self, entry: Entry, name: str, slot: Slot | None = None) -> SoftPrompt | PrefixKV:
        """Load a registered prompt. `slot` gets a new version if it is not what was loaded before."""
        source = entry.source
        assert source is not None
        while True:
            identity = source.identity()
            with ordinary_tensors():
                prompt = source.load()
            if source.identity() == identity:
                break
        with self._lock:
            self._counts["loads"] += 1
            if slot is None:
                return prompt
            if entry.identity != identity and slot.alive:
                if entry.identity is not None:
                    entry.version = slot.version = next(VERSIONS)
                entry.identity = identity
            before, entry.tasks = entry.tasks, tasks_of(prompt)
            if before not in ("?", entry.tasks):
                raise AdapterError(f"prompt {name!r}: its directory changed to a prompt of other tasks")
        return prompt


def tasks_of(prompt: SoftPrompt | PrefixKV | None) -> int | None:
    if isinstance(prompt, SoftPrompt) and prompt.method == "MULTITASK_PROMPT_TUNING":
        return int(prompt.config["num_tasks"])
    return None
