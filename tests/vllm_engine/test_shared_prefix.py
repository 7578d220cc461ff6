# SPDX-License-Identifier: Apache-2.0
"""The attention backend that reads a shared prefix once: which rows share what, its numbers, and an engine's texts."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as kernels
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from softprompt_fast import PrefixKV
from tests.vllm_engine.engine import run
from tests.vllm_engine.tiny import Base, make_rows

NEW = 40
HEADS, KV_HEADS, DIM = 4, 2, 32


@pytest.fixture(scope="module")
def backend() -> Any:
    """The module, without what its import does to engines of this process."""
    module = importlib.import_module("softprompt_fast.integrations.vllm.shared_prefix")
    AttentionBackendEnum.CPU_ATTN.clear_override()
    return module


def starts_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def find(backend: Any, tables: list[list[int]], lengths: list[int], counts: list[int], block_size: int = 32) -> Any:
    width = max(map(len, tables))
    table = torch.tensor([[*row, *[0] * (width - len(row))] for row in tables], dtype=torch.int32)
    return backend.find_shared(table, torch.tensor(lengths), starts_of(counts), block_size)


# ------------------------------------------------------------------ who shares what


def test_rows_that_share_and_rows_that_do_not(backend: Any) -> None:
    """The example of the docstring, and a second group whose rows have more tokens in the step."""
    tables = [[5, 6, 1, 2], [5, 6, 3], [7, 8, 9], [20, 21, 22, 23], [20, 21, 22, 24]]
    shared, others = find(backend, tables, [100, 70, 90, 98, 99], [1, 1, 1, 2, 1])
    assert others == [2]
    assert shared.prefix_blocks.tolist() == [5, 6, 20, 21, 22]
    assert shared.prefix_offsets.tolist() == [0, 64, 160]
    assert shared.prefix_index.tolist() == [0, 0, 1, 1]
    assert shared.own_end.tolist() == [36, 6, 2, 3]
    assert shared.query_start.tolist() == [35, 5, 0, 2]
    assert shared.own_blocks[:, 0].tolist() == [1, 3, 23, 24] and shared.own_blocks[0].tolist() == [1, 2]
    assert shared.tokens.tolist() == [[0, 0], [1, 1], [3, 4], [5, 5]]
    assert shared.real.tolist() == [[True, False], [True, False], [True, True], [True, False]]


@pytest.mark.parametrize(
    ("tables", "lengths", "counts"),
    [
        ([[1, 2, 3], [4, 5, 6]], [70, 70], [1, 1]),  # nothing
        ([[1, 2, 3]], [70], [1]),  # a row alone
        ([[1, 2, 3], [1, 4, 5]], [70, 70], [1, 1]),  # one block of 32: less than LEAST_SHARED
        ([[1, 2, 3], [1, 2, 3]], [66, 66], [3, 3]),  # the second block is filled in this very step
        ([[1, 2, 3], [1, 4, 3]], [80, 80], [1, 1]),  # equal again behind a difference
        ([[1, 2, 3], [1, 2, 4]] + [[1, 2, 5]] * 2, [90, 65, 65, 65], [25, 1, 1, 1]),  # padding: 100 queries for 28
    ],
    ids=["nothing", "alone", "short", "not computed", "behind", "padding"],
)
def test_too_little_is_shared(backend: Any, tables: list[Any], lengths: list[int], counts: list[int]) -> None:
    assert find(backend, tables, lengths, counts) is None


def test_a_block_that_this_step_fills_is_own(backend: Any) -> None:
    """What a row has not computed yet can't be read before its own keys are there; sharing ends with the shortest."""
    shared, others = find(backend, [[1, 2, 3, 4], [1, 2, 3, 5]], [97, 96], [1, 1])
    assert not others and shared.prefix_blocks.tolist() == [1, 2]
    assert shared.own_end.tolist() == [33, 32] and shared.own_blocks.tolist() == [[3, 4], [3, 5]]


# ------------------------------------------------------------------ its numbers


def expected(query: Tensor, key: Tensor, value: Tensor, softcap: float) -> Tensor:
    """Attention of a row's last S tokens to all of its own, in float64: ``[S, Hq, D]``."""
    key, value = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    scores = torch.einsum("shd,thd->hst", query.double(), key) / math.sqrt(DIM)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    length, count = len(key), len(query)
    later = torch.arange(length) > torch.arange(length - count, length)[:, None]
    return torch.einsum("hst,thd->shd", scores.masked_fill(later, -math.inf).softmax(-1), value)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("block_size", [32, 128])
def test_its_numbers(backend: Any, block_size: int, softcap: float, dtype: torch.dtype, tolerance: float) -> None:
    """Two groups, rows of several lengths and queries; slots that nobody wrote hold NaN. The cache is written by
    vLLM's own kernel, so that a layout of another version can't go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    full = 128 // block_size * block_size
    prefixes = [[1 + i for i in range(full // block_size)], [10 + i for i in range(2 * full // block_size)]]
    own = [5, 1, 140, 33, 2]
    counts = [3, 1, 2, 2, 2]
    group = [0, 0, 1, 1, 1]
    tables, next_block = [], 30
    for g, length in zip(group, own, strict=True):
        taken = -(-length // block_size)
        tables.append([*prefixes[g], *range(next_block, next_block + taken)])
        next_block += taken
    lengths = [len(prefixes[g]) * block_size + length for g, length in zip(group, own, strict=True)]
    cache = torch.full((next_block, KV_HEADS, block_size, 2 * DIM), math.nan, dtype=dtype)
    shape = (next_block * block_size, KV_HEADS, DIM)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    slots = [
        torch.tensor([row[i // block_size] * block_size + i % block_size for i in range(length)])
        for row, length in zip(tables, lengths, strict=True)
    ]
    written = torch.cat(slots).unique()
    halves = cache.view(next_block, KV_HEADS, 2 * block_size, DIM).chunk(2, dim=2)
    kernels.cpu_attn_reshape_and_cache(keys[written], values[written], *halves, written, "vec")
    query = torch.randn((sum(counts), HEADS, DIM), generator=generator).to(dtype)

    shared, others = find(backend, tables, lengths, counts, block_size)
    assert not others and shared.prefix_offsets.numel() == 3
    output = torch.full_like(query, math.nan)
    impl = SimpleNamespace(scale=1 / math.sqrt(DIM), logits_soft_cap=softcap)
    backend.SharedPrefixImpl._attend(impl, shared, query, cache, output)

    rows = query.split(counts)
    wanted = [expected(row, keys[slot], values[slot], softcap) for row, slot in zip(rows, slots, strict=True)]
    torch.testing.assert_close(output.double(), torch.cat(wanted), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ an engine


def test_texts_of_an_engine(
    base: Base, folder: Path, prefixes: dict[str, PrefixKV], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows behind three prompts long enough to share, behind short ones, behind none, and with a text in common that
    is no prompt; 96 tokens a step, so that steps mix rows that begin with rows that go on."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("SHARED_CALLS", str(calls))
    names = ["p100", "p128", "p512", "p100", "p512", "p20", "int8", None]
    asked = [(row, names[i % len(names)]) for i, row in enumerate(make_rows(32, seed=3))]
    text = make_rows(1, seed=5, longest=2)[0] * 70
    asked += [(text + row, None) for row in make_rows(4, seed=6)]
    options = {
        "max_model_len": 768,
        "max_num_batched_tokens": 96,
        "worker_extension_cls": "tests.vllm_engine.counted.CountedWorker",
    }
    answers, _ = run(base.folder, folder, tmp_path, options, asked, NEW)
    exact = {name: prefix.dequantize() for name, prefix in prefixes.items()}
    assert answers == [base.greedy(row, exact.get(name), NEW) for row, name in asked]
    rows, groups, queries = zip(*(map(int, line.split()) for line in calls.read_text().splitlines()), strict=True)
    # Three prompts and the text; every row of theirs; and not in decoding alone.
    assert max(groups) == 4 and max(rows) == 24 and max(queries) > 1
