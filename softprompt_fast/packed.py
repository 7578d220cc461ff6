# SPDX-License-Identifier: Apache-2.0
"""The prefixes that one batch attends to, as the kernels take them: one tensor of keys and one of values a layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from softprompt_fast.arena import Entries
from softprompt_fast.prefix_kv import PrefixKV, Scales

#: A prompt as a row asks for it: its name, and the task of a multitask prompt.
RowPrompt = tuple[str, int | None]


@dataclass(frozen=True)
class Packed:
    """The distinct prefixes of one batch, in one tensor of keys and one of values a layer.

    A *place* is a run of entries, by which ``prefix_index`` names a row's prefix: a prefix of the batch or, in an
    arena, what lies between two of them. No row names such a gap; its prompt is None, its length 0.

    Attributes:
        prompts: which prompt each place is, in order; None for a gap.
        versions: for each, a number that changes whenever the prompt's content does; 0 for a gap.
        keys, values: per layer ``[Hkv, L, D]``.
        starts: the first entry of each place.
        lengths: virtual tokens of each prefix.
        offsets: int32 ``[N + 1]``, the bounds of the places, None for a single prefix of L entries.
        lengths_tensor: int64 ``[N + 1]``, the lengths and a final 0 that index -1 picks.
        next_logits: per place ``[V]``, the logits that the last virtual token gives, or None where there are none
            (prefix tuning, cartridges: they are keys and values, no token that predicts).
        virtual_logits: per prefix ``[P, V]`` when asked for (CPT's loss), else None.
        scales: of all entries where they are 8-bit (every prefix starts at a multiple of their block), else None.
    """

    prompts: tuple[RowPrompt | None, ...]
    versions: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: torch.Tensor | None
    lengths_tensor: torch.Tensor
    next_logits: tuple[torch.Tensor | None, ...]
    virtual_logits: tuple[torch.Tensor | None, ...] = ()
    scales: Scales | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether there may be entries that belong to no prefix of the batch."""
        return self.offsets is not None and self.keys[0].shape[1] != sum(self.lengths)

    def floating(self, place: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values ``[Hkv, P, D]`` of prefix `place`, layer after layer: dequantised to `dtype` where they are
        8-bit, else views."""
        first = self.starts[place]
        last = first + self.lengths[place]
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            key, value = key[:, first:last], value[:, first:last]
            if self.scales is not None:
                key, value = self.scales.dequantize(layer, key, value, dtype, first)
            yield key, value

    def dense(self, dtype: torch.dtype) -> Packed:
        """The same places without entries between them, copied: for attention whose cost is that of all entries.
        8-bit entries become `dtype`."""
        if not self.is_sparse:
            return self
        copies = [[*self.floating(place, dtype)] for place, length in enumerate(self.lengths) if length]
        keys, values = (
            tuple(torch.cat([pair[i] for pair in layer], dim=1) for layer in zip(*copies, strict=True)) for i in (0, 1)
        )
        bounds = [0, *itertools.accumulate(self.lengths)]
        offsets = torch.tensor(bounds, dtype=torch.int32, device=keys[0].device)
        return replace(self, keys=keys, values=values, starts=tuple(bounds[:-1]), offsets=offsets, scales=None)


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
        starts=tuple(itertools.accumulate(lengths, initial=0))[:-1],
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


@dataclass(frozen=True)
class Resident:
    """A prefix in an arena: entries ``[first, first + length)``."""

    prompt: RowPrompt
    version: int
    first: int
    length: int
    next_logits: torch.Tensor | None


def lay_out(entries: Entries, residents: Sequence[Resident]) -> tuple[Packed, list[int]]:
    """Distinct prefixes of one arena as a batch attends to them, without a copy: one as views of its own entries,
    several among all entries. Also the place of each.

    Example: regions 32..48 and 0..16 have the places 2 and 0 of three, with offsets 0, 16, 32, 48.
    """
    device = entries.keys[0].device
    places: list[Resident | None] = []
    bounds: list[int] = []
    for resident in sorted(residents, key=lambda each: each.first):
        if bounds and bounds[-1] < resident.first:
            places.append(None)
            bounds.append(resident.first)
        bounds = bounds or [resident.first]
        places.append(resident)
        bounds.append(resident.first + resident.length)
    keys, values, scales = entries
    starts, offsets = tuple(bounds[:-1]), None
    if len(residents) == 1:
        first, last = bounds
        keys, values = (tuple(x[:, first:last] for x in tensors) for tensors in (keys, values))
        if scales is not None:
            blocks = slice(first // scales.block, -(-last // scales.block))
            key_scales, value_scales = (
                tuple(x[:, blocks].contiguous() for x in tensors) for tensors in (scales.keys, scales.values)
            )
            scales = Scales(key_scales, value_scales, scales.block)
        starts = (0,)
    else:
        offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    lengths = tuple(0 if place is None else place.length for place in places)
    packed = Packed(
        prompts=tuple(None if place is None else place.prompt for place in places),
        versions=tuple(0 if place is None else place.version for place in places),
        keys=keys,
        values=values,
        starts=starts,
        lengths=lengths,
        offsets=offsets,
        lengths_tensor=torch.tensor([*lengths, 0], device=device),
        next_logits=tuple(None if place is None else place.next_logits for place in places),
        virtual_logits=(None,) * len(places),
        scales=scales,
    )
    place_of = {id(place): i for i, place in enumerate(places) if place is not None}
    return packed, [place_of[id(resident)] for resident in residents]
