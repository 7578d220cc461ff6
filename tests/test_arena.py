# SPDX-License-Identifier: Apache-2.0
"""The arena: which entries are whose, what is written there, and that nobody else's are read."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from softprompt_fast import PrefixKV
from softprompt_fast.arena import Arena, Regions
from softprompt_fast.ops import prefix_attention
from softprompt_fast.packed import Resident, lay_out

CPU = torch.device("cpu")


def make_prefix(length: int, seed: int = 0, heads: int = 2, dim: int = 4) -> PrefixKV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = ([torch.randn(heads, length, dim, generator=generator) for _ in range(2)] for _ in range(2))
    return PrefixKV(keys, values, method="TEST", fingerprint="none")


@pytest.mark.parametrize("align", [1, 16])
def test_regions_never_overlap_and_come_back(align: int) -> None:
    draw, regions, taken = random.Random(align), Regions(1000, align), {}
    assert regions.capacity == 1000 // align * align
    for step in range(3000):
        if taken and draw.random() < 0.5:
            first = draw.choice([*taken])
            regions.free(first)
            del taken[first]
        else:
            length = draw.randint(1, 120)
            first = regions.allocate(length)
            mine = set() if first is None else set(range(first, first + regions.rounded(length)))
            if first is None:
                # Right to refuse: no run of free entries is long enough.
                used = sorted((f, f + n) for f, n in taken.items())
                bounds = [(0, 0), *used, (regions.capacity, regions.capacity)]
                gaps = [after[0] - before[1] for before, after in pairwise(bounds)]
                assert max(gaps) < regions.rounded(length)
            else:
                assert first % align == 0 and max(mine) < regions.capacity
                assert not any(f in mine or first in range(f, f + n) for f, n in taken.items())
                taken[first] = regions.rounded(length)
        assert regions.taken_entries == sum(taken.values()) and len(regions) == len(taken)
        if step == 1500:
            regions.extend(1600)
            assert regions.capacity == 1600
    for first in taken:
        regions.free(first)
    assert regions.free_entries == regions.capacity and regions.allocate(regions.capacity) == 0
    with pytest.raises(KeyError):
        regions.free(5)


def test_the_smallest_run_that_fits_is_taken() -> None:
    regions = Regions(150)
    starts = [regions.allocate(n) for n in (10, 30, 10, 20, 10)]
    regions.free(starts[1])
    regions.free(starts[3])
    assert regions.allocate(20) == starts[3] and regions.allocate(15) == starts[1]


def test_growth_keeps_places_and_what_is_read() -> None:
    arena = Arena(make_prefix(1), CPU, torch.float32)
    prefixes = [make_prefix(length, seed) for seed, length in enumerate((5, 3, 9, 17))]
    firsts = []
    for prefix in prefixes:
        first = arena.allocate(prefix.num_virtual_tokens)
        arena.write(first, prefix)
        firsts.append(first)
        if len(firsts) == 2:
            before = arena.entries
    assert before is not arena.entries
    for entries, count in ((before, 2), (arena.entries, 4)):
        for first, prefix in list(zip(firsts, prefixes, strict=True))[:count]:
            at = slice(first, first + prefix.num_virtual_tokens)
            assert torch.equal(entries.keys[1][:, at], prefix.keys[1])
            assert torch.equal(entries.values[0][:, at], prefix.values[0])


def test_a_fixed_size_is_kept() -> None:
    entry = 2 * 2 * 2 * 4 * 4  # layers, keys and values, heads, D, bytes
    arena = Arena(make_prefix(1), CPU, torch.float32, nbytes=20 * entry + 5)
    assert arena.nbytes == 20 * entry and arena.entries.keys[0].shape == (2, 20, 4)
    assert arena.allocate(21) is None and arena.allocate(12) == 0 and arena.allocate(9) is None
    assert arena.nbytes == 20 * entry


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("block", [4, 8])
def test_8_bit_entries(kind: torch.dtype, block: int) -> None:
    """Of a multiple of the arena's block: the same numbers. Into floating entries: what they stand for."""
    prefixes = [make_prefix(length, length).quantize(block, kind) for length in (10, 8, 5)]
    eight, floats = Arena(prefixes[0], CPU, kind, block=4), Arena(prefixes[0], CPU, torch.float32)
    residents = []
    for i, prefix in enumerate(prefixes):
        first = eight.allocate(prefix.num_virtual_tokens)
        eight.write(first, prefix)
        residents.append(Resident((str(i), None), i + 1, first, prefix.num_virtual_tokens, None))
        at = floats.allocate(prefix.num_virtual_tokens)
        floats.write(at, prefix)
        assert torch.equal(floats.entries.keys[0][:, at : at + prefix.num_virtual_tokens], prefix.dequantize().keys[0])
    packed, places = lay_out(eight.entries, residents)
    assert packed.scales is not None and packed.scales.block == 4
    (single, _), dense = lay_out(eight.entries, residents[1:2]), packed.dense(torch.float32)
    for place, prefix in zip(places, prefixes, strict=True):
        want = prefix.dequantize()
        for pack in (packed, dense):
            for layer, (key, value) in enumerate(pack.floating(place, torch.float32)):
                assert torch.equal(key, want.keys[layer]) and torch.equal(value, want.values[layer])
    for layer, (key, _) in enumerate(single.floating(0, torch.float32)):
        assert torch.equal(key, prefixes[1].dequantize().keys[layer])


def test_places_with_gaps() -> None:
    arena = Arena(make_prefix(1), CPU, torch.float32, nbytes=100 * 128)
    lengths = (16, 16, 16, 5, 7)
    residents = [Resident((str(i), None), i + 1, arena.allocate(n), n, None) for i, n in enumerate(lengths)]
    packed, places = lay_out(arena.entries, [residents[2], residents[0], residents[4]])
    assert packed.offsets.tolist() == [0, 16, 32, 48, 53, 60] and places == [2, 0, 4]
    assert packed.lengths == (16, 0, 16, 0, 7) and packed.prompts[1] is None and packed.is_sparse
    assert packed.lengths_tensor[[*places, -1]].tolist() == [16, 16, 7, 0]
    assert packed.keys[0].data_ptr() == arena.entries.keys[0].data_ptr()
    first_two, places = lay_out(arena.entries, residents[:2])
    assert first_two.offsets.tolist() == [0, 16, 32] and places == [0, 1]
    alone, places = lay_out(arena.entries, residents[3:4])
    assert alone.offsets is None and places == [0] and alone.starts == (0,) and alone.lengths == (5,)
    assert alone.keys[1].data_ptr() == arena.entries.keys[1][:, 48:].data_ptr()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("window", [None, 7])
def test_entries_between_are_not_read(backend: str, queries: int, window: int | None) -> None:
    """They are whatever the memory held: NaN must do no harm."""
    generator = torch.Generator().manual_seed(queries)
    arena = Arena(make_prefix(1), CPU, torch.float32, nbytes=300 * 128)
    for x in (*arena.entries.keys, *arena.entries.values):
        x.fill_(float("nan"))
    prefixes = [make_prefix(length, length) for length in (13, 70, 1, 33)]
    residents = []
    for i, prefix in enumerate(prefixes):
        arena.allocate(3 * i + 1)
        first = arena.allocate(prefix.num_virtual_tokens)
        arena.write(first, prefix)
        residents.append(Resident((str(i), None), 1, first, prefix.num_virtual_tokens, None))
    packed, places = lay_out(arena.entries, residents)
    index = torch.tensor([places[i] for i in (3, 0, 1, 1, 2)] + [-1], dtype=torch.int32)
    query = torch.randn(6, 4, queries, 4, generator=generator)
    key, value = (torch.randn(6, 2, queries, 4, generator=generator) for _ in range(2))
    dense = packed.dense(torch.float32)
    found, want = (
        prefix_attention(
            query, key, value, pack.keys[0], pack.values[0], prefix_offsets=pack.offsets, prefix_index=index,
            sliding_window=window, backend=backend,
        )
        for pack in (packed, dense)
    )  # fmt: skip
    assert torch.equal(found, want) and found.isfinite().all()
