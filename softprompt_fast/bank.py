# SPDX-License-Identifier: Apache-2.0
"""Many prompts over one base model: who is who, what is compiled, and what a batch attends to."""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from softprompt_fast.prefix_kv import PrefixKV, Scales
from softprompt_fast.prompt import SoftPrompt

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


#: A prompt as a row asks for it: its name, and the task of a multitask prompt.
RowPrompt = tuple[str, int | None]

_PACKS_KEPT = 8


@dataclass(frozen=True)
class Packed:
    """The distinct prefixes of one batch, packed end to end.

    Attributes:
        prompts: which prompt each packed prefix is, in order.
        versions: for each, a number that changes whenever the prompt's content does.
        keys, values: per layer ``[Hkv, L, D]``.
        lengths: virtual tokens of each prefix; ``sum(lengths) == L``.
        offsets: int32 ``[N + 1]``, None for a single prefix.
        lengths_tensor: int64 ``[N + 1]``, the lengths and a final 0 that index -1 picks.
        next_logits: per prefix ``[V]``, the logits that the last virtual token gives, or None where there are none
            (prefix tuning, cartridges: they are keys and values, no token that predicts).
        virtual_logits: per prefix ``[P, V]`` when asked for (CPT's loss), else None.
        scales: of the whole pack where it is 8-bit (every offset is a multiple of their block), else None.
    """

    prompts: tuple[RowPrompt, ...]
    versions: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...]
    offsets: torch.Tensor | None
    lengths_tensor: torch.Tensor
    next_logits: tuple[torch.Tensor | None, ...]
    virtual_logits: tuple[torch.Tensor | None, ...] = ()
    scales: Scales | None = None

    def floating(self, place: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values ``[Hkv, P, D]`` of prefix `place`, layer after layer: dequantised to `dtype` where they are
        8-bit, else views."""
        first = sum(self.lengths[:place])
        last = first + self.lengths[place]
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            key, value = key[:, first:last], value[:, first:last]
            if self.scales is not None:
                key, value = self.scales.dequantize(layer, key, value, dtype, first)
            yield key, value


@dataclass(frozen=True)
class Compiled:
    """One prompt's prefix with its graph (training) or without: ``keys``/``values`` per layer ``[Hkv, P, D]``."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    next_logits: torch.Tensor | None
    virtual_logits: torch.Tensor | None = None
    scales: Scales | None = None

    @classmethod
    def of(cls, prefix: PrefixKV) -> Compiled:
        return cls(prefix.keys, prefix.values, prefix.next_logits, scales=prefix.scales)

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]


def pack(
    prompts: Sequence[RowPrompt],
    versions: Sequence[int],
    compiled: Sequence[Compiled],
    dtype: torch.dtype = torch.float32,
) -> Packed:
    """Lay prefixes end to end along their tokens; a single one is not copied.

    A pack has one dtype: beside floating prefixes, 8-bit ones are dequantised to theirs, and beside 8-bit ones of
    another kind all are, to `dtype`.
    """
    layers = range(len(compiled[0].keys))
    lengths = tuple(c.length for c in compiled)
    device = compiled[0].keys[0].device
    if len(compiled) == 1:
        keys, values, scales, offsets = compiled[0].keys, compiled[0].values, compiled[0].scales, None
    else:
        floating = next((c.keys[0].dtype for c in compiled if c.scales is None), None)
        if floating is not None or len({c.keys[0].dtype for c in compiled}) > 1:
            dtype = dtype if floating is None else floating
            compiled = [_dequantized(c, dtype) for c in compiled]
        keys = tuple(torch.cat([c.keys[i] for c in compiled], dim=1) for i in layers)
        values = tuple(torch.cat([c.values[i] for c in compiled], dim=1) for i in layers)
        scales = _packed_scales([c.scales for c in compiled if c.scales is not None], lengths)
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return Packed(
        prompts=tuple(prompts),
        versions=tuple(versions),
        keys=keys,
        values=values,
        lengths=lengths,
        offsets=offsets,
        lengths_tensor=torch.tensor([*lengths, 0], device=device),
        next_logits=tuple(c.next_logits for c in compiled),
        virtual_logits=tuple(c.virtual_logits for c in compiled),
        scales=scales,
    )


def _dequantized(compiled: Compiled, dtype: torch.dtype) -> Compiled:
    if compiled.scales is None:
        return compiled
    pairs = [
        compiled.scales.dequantize(layer, key, value, dtype)
        for layer, (key, value) in enumerate(zip(compiled.keys, compiled.values, strict=True))
    ]
    keys, values = zip(*pairs, strict=True)
    return Compiled(keys, values, compiled.next_logits, compiled.virtual_logits)


def _packed_scales(scales: Sequence[Scales], lengths: Sequence[int]) -> Scales | None:
    """The scales of prefixes end to end, for the largest block that divides all of theirs and every offset: no block
    straddles two prefixes. Example: blocks of 16 over 100 and 50 tokens become blocks of ``gcd(16, 16, 100) = 4``."""
    if not scales:
        return None
    block = math.gcd(*(s.block for s in scales), *lengths[:-1])

    def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        split = (
            part.repeat_interleave(s.block // block, dim=1)[:, : -(-length // block)]
            for part, s, length in zip(parts, scales, lengths, strict=True)
        )
        return torch.cat([*split], dim=1)

    return Scales(
        tuple(joined(parts) for parts in zip(*(s.keys for s in scales), strict=True)),
        tuple(joined(parts) for parts in zip(*(s.values for s in scales), strict=True)),
        block,
    )


@dataclass
class _Entry:
    prompt: SoftPrompt | PrefixKV
    version: int
    seen: tuple[int, ...] = ()
    # Kept and not only their ids, which a new parameter may inherit from a dead one.
    parameters: tuple[torch.nn.Parameter, ...] = ()


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """What is kept for later calls must not be an inference tensor: those can take part in no training graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class PromptBank:
    """Named prompts over one base model, compiled at first use and shared by every row after.

    Args:
        compile_prompt: ``(prompt, task) -> PrefixKV``; runs the frozen model once over a soft prompt.

    Thread-safe: prompts may be added, replaced and removed while other threads generate. A prompt is compiled by one
    thread while the others that want it wait.
    """

    def __init__(self, compile_prompt: Callable[[SoftPrompt, int | None], PrefixKV]) -> None:
        self._compile = compile_prompt
        self._entries: dict[str, _Entry] = {}
        self._compiled: dict[RowPrompt, tuple[int, PrefixKV]] = {}
        self._packs: OrderedDict[tuple[torch.dtype, tuple[tuple[RowPrompt, int], ...]], Packed] = OrderedDict()
        self._lock = threading.RLock()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def __getitem__(self, name: str) -> SoftPrompt | PrefixKV:
        """The prompt called `name`.

        Raises:
            KeyError: there is none; the message lists those that there are.
        """
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(repr(n) for n in self._entries) or "none is loaded"
            raise KeyError(f"prompt: unknown prompt {name!r}; known prompts: {known}")
        return entry.prompt

    def check_task(self, name: str, task: int | None) -> int | None:
        """The task of a multitask prompt; None for every other prompt, whose ``task_ids`` are ignored as in PEFT.

        Raises:
            ValueError: a multitask prompt without a task, or one that it does not have. TypeError: it is no integer.
        """
        prompt = self[name]
        if prompt.method != "MULTITASK_PROMPT_TUNING" or isinstance(prompt, PrefixKV):
            return None
        tasks = prompt.config["num_tasks"]
        if task is None:
            raise ValueError(f"task_ids: prompt {name!r} is a multitask prompt; give a task (0..{tasks - 1}) per row")
        if not isinstance(task, int):
            raise TypeError(f"task_ids: expected integers, found {task!r}")
        if not 0 <= task < tasks:
            raise ValueError(f"task_ids: prompt {name!r} has tasks 0..{tasks - 1}, found {task}")
        return task

    def add(self, name: str, prompt: SoftPrompt | PrefixKV, *, replace: bool = False) -> None:
        """Put a prompt under `name`.

        Raises:
            ValueError: the name is taken and ``replace`` is False, or it is no non-empty string.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a non-empty string, found {name!r}")
        with self._lock:
            if name in self._entries and not replace:
                raise ValueError(f"name: a prompt called {name!r} is already loaded; pass replace=True to replace it")
            self._forget(name)
            self._entries[name] = _Entry(prompt, next(_VERSIONS))

    def remove(self, name: str) -> None:
        """Drop a prompt and its prefix; a call under way keeps what it started with."""
        self[name]
        with self._lock:
            del self._entries[name]
            self._forget(name)

    def _forget(self, name: str) -> None:
        for key in [key for key in self._compiled if key[0] == name]:
            del self._compiled[key]
        self._packs.clear()

    def invalidate(self) -> None:
        """Forget every compiled prefix: the base model's weights, dtype or device changed."""
        with self._lock:
            for entry in self._entries.values():
                entry.version = next(_VERSIONS)
            self._compiled.clear()
            self._packs.clear()

    def map_prefixes(self, move: Callable[[PrefixKV], PrefixKV]) -> None:
        """Replace every stored :class:`PrefixKV` by ``move(prefix)`` (device or dtype changes)."""
        with self._lock:
            for entry in self._entries.values():
                if isinstance(entry.prompt, PrefixKV):
                    entry.prompt = move(entry.prompt)
        self.invalidate()

    def version(self, name: str) -> int:
        """A number that changes whenever the content of prompt `name` does.

        In-place updates of its parameters (``load_state_dict``, most optimizers) are seen through the version counters
        that autograd keeps, and every step of a ``torch.optim`` optimizer counts as an update of all prompts that
        require grad; writes through ``.data`` are not seen: call :meth:`invalidate` after those.
        """
        entry = self._entries[name]
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

    def prefix(self, name: str, task: int | None = None) -> PrefixKV:
        """The frozen prefix of a prompt, computed at the first call and after every change of the prompt."""
        return self._resolve(name, task)[1]

    # Dynamo can't trace locks and hashes, and what is computed once needs no compiling.
    @torch.compiler.disable
    def _resolve(self, name: str, task: int | None) -> tuple[int, PrefixKV]:
        """A prompt's version and its prefix, both of the same moment."""
        with self._lock:
            prompt, version = self[name], self.version(name)
            if isinstance(prompt, PrefixKV):
                return version, prompt
            known = self._compiled.get((name, task))
            if known is None or known[0] != version:
                with _ordinary_tensors():
                    known = self._compiled[name, task] = (version, self._compile(prompt, task))
            return known

    @torch.compiler.disable
    def packed(self, prompts: Iterable[RowPrompt], dtype: torch.dtype = torch.float32) -> Packed:
        """The frozen prefixes of `prompts` packed end to end (:func:`pack`); the last few packs are kept."""
        prompts = tuple(prompts)
        versions, prefixes = zip(*(self._resolve(*prompt) for prompt in prompts), strict=True)
        key = dtype, tuple(zip(prompts, versions, strict=True))
        with self._lock:
            packed = self._packs.get(key)
            if packed is None:
                compiled = [Compiled.of(prefix) for prefix in prefixes]
                with _ordinary_tensors():
                    packed = self._packs[key] = pack(prompts, versions, compiled, dtype)
                while len(self._packs) > _PACKS_KEPT:
                    self._packs.popitem(last=False)
            self._packs.move_to_end(key)
            return packed

    # Dynamo would compile anew whatever sees a version, at every step of an optimizer.
    @torch.compiler.disable
    def pack(self, prompts: Sequence[RowPrompt], compiled: Sequence[Compiled], dtype: torch.dtype) -> Packed:
        """Prompts that the caller has run itself, with the versions that they have now (:func:`pack`)."""
        return pack(prompts, [self.version(name) for name, _ in prompts], compiled, dtype)
