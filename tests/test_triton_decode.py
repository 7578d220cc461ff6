# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels for few queries a row, in the interpreter: what the op's own tests are too small for. Several
tiles, several splits, many prompts, quantised prefixes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from softprompt_fast.backends.quantized import quantize
from softprompt_fast.backends.triton import _prefix_attention_common as common
from softprompt_fast.backends.triton import _prefix_attention_decode as decode
from softprompt_fast.backends.triton import _tuning
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import AttentionInputs, assert_within_noise, attention_inputs, guarded, poisoned_memory
from tests.ops.test_prefix_attention import LAYOUTS

MANY = {
    "batch": 13, "q_heads": 3, "kv_heads": 1, "prefix": 75, "prefix_offsets": [2, 21, 21, 40, 73],
    "prefix_index": [3, -1, 0, 2, 3, 0, 0, -1, 1, 2, 3, 2, 0],
}  # fmt: skip
# Interpreted, a tile has up to 32 stacked queries, a block 16 keys, and 4 multiprocessors ask for splits.
CASES: dict[str, dict[str, Any]] = {
    "tiles": {"batch": 15, "q_heads": 3, "kv_heads": 1, "queries": 2, "prefix": 40},
    "prefix splits": {"batch": 2, "q_heads": 2, "kv_heads": 1, "queries": 1, "prefix": 150},
    # Enough queries that the error of one of them does not make the mean.
    "prefix splits of many": {"batch": 2, "q_heads": 2, "kv_heads": 1, "queries": 8, "prefix": 150},
    "own splits": {"batch": 1, "q_heads": 2, "kv_heads": 1, "queries": 3, "own": 150, "prefix": 0},
    "both splits": {"batch": 2, "q_heads": 3, "kv_heads": 1, "queries": 1, "own": 70, "prefix": 70, "sinks": True},
    "filled part": {
        "batch": 2, "q_heads": 2, "kv_heads": 1, "queries": 2, "own": 150, "query_start": [3, 77],
        "own_start": [0, 30], "own_end": [5, 79],
    },
    "window splits": {
        "batch": 2, "q_heads": 2, "kv_heads": 1, "queries": 2, "own": 90, "prefix": 90, "sliding_window": 97
    },
    "own alone": {"batch": 9, "queries": 1, "prefix": 0, "sinks": True},
    "own tiles": {"batch": 3, "q_heads": 8, "kv_heads": 1, "queries": 9, "own": 40},
    "many": MANY,
    "many decode": {**MANY, "queries": 1, "own_start": [i % 7 for i in range(13)]},
    "many window": {**MANY, "sliding_window": 12, "sinks": True, "queries": 3},
    "many bias": {**MANY, "bias": (13, 1, 3, 33 + 7), "queries": 3, "softcap": 2.0},
    "many unused": {**MANY, "prefix_index": [-1] * 13},
    "many, index only": {**MANY, "prefix_offsets": None, "prefix_index": [0, -1] * 6 + [0]},
    "negative scale": {"scale": -0.3, "queries": 1},
    "wide head": {"head_dim": 200, "v_dim": 70, "queries": 1, "batch": 2},
}  # fmt: skip


def arguments(inputs: AttentionInputs) -> list[Any]:
    o = inputs.options
    index = ("prefix_offsets", "prefix_index", "own_start", "own_end", "query_start")
    options = [o.get("scale", inputs.query.shape[-1] ** -0.5), o.get("causal", True)]
    more = (
        "sliding_window",
        "softcap",
        "sinks",
        "bias",
        "prefix_key_scale",
        "prefix_value_scale",
        "prefix_scale_block",
        "max_prefix_length",
    )
    return [*inputs.tensors, *(o.get(n) for n in index), *options, *(o.get(n) for n in more)]


def run(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_memory():
        return decode.forward(*arguments(inputs))


def check(found: tuple[torch.Tensor, torch.Tensor], exact: AttentionInputs, plain: AttentionInputs) -> None:
    """Against the oracle in float64; where a query is padding, only that it is finite."""
    real = plain.real_queries()
    assert found[0].isfinite().all() and not found[1].isnan().any()
    results = (found, reference(*exact.tensors, **exact.options), plain.baseline())
    for which, mask in ((0, real), (1, real[..., 0])):
        assert_within_noise(*(x[which].masked_fill(~mask, 0.0) for x in results), ("out", "lse")[which])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, dtype: torch.dtype) -> None:
    inputs = attention_inputs(dtype=dtype, **CASES[name])
    check(run(inputs), inputs.to(torch.float64), inputs)


def quantized(inputs: AttentionInputs, dtype: torch.dtype, block: int) -> tuple[AttentionInputs, AttentionInputs]:
    """The inputs with an 8-bit prefix, and with what that stands for in float64."""
    options, entries, meant = {**inputs.options, "prefix_scale_block": block}, [], []
    for name, x in (("key", inputs.prefix_key), ("value", inputs.prefix_value)):
        small, scale = quantize(x, block, dtype)
        stored = torch.full([n + 2 for n in x.shape], 127 if dtype == torch.int8 else math.nan).to(dtype)
        entries.append(stored[1:-1, 1:-1, 1:-1].copy_(small))
        options[f"prefix_{name}_scale"] = guarded(scale.shape, order=(1, 0)).copy_(scale)
        meant.append(small.double() * scale.double().repeat_interleave(block, 1)[:, : x.shape[1], None])
    exact = replace(inputs.to(torch.float64), prefix_key=meant[0], prefix_value=meant[1])
    return replace(inputs, prefix_key=entries[0], prefix_value=entries[1], options=options), exact


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["prefix splits of many", "many decode", "many window"])
def test_quantized_prefix(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    inputs, exact = quantized(attention_inputs(dtype=dtype, **CASES[name]), stored, 8)
    check(run(inputs), exact, exact.to(dtype))


def test_small_values_of_a_quantized_prefix() -> None:
    """In float16 a probability times a scale of 1e-6 would lose its digits."""
    inputs = attention_inputs(dtype=torch.float16, batch=2, queries=1, own=0, causal=False, prefix=150)
    inputs.prefix_value.mul_(1e-4)
    inputs, exact = quantized(inputs, torch.int8, 8)
    check(run(inputs), exact, exact.to(torch.float16))


@pytest.mark.parametrize("hint", [0, 33, 10**6])
@pytest.mark.parametrize("name", ["prefix splits of many", "many decode"])
def test_a_hint_changes_no_result(name: str, hint: int) -> None:
    """However wrong it is."""
    inputs = attention_inputs(**CASES[name])
    hinted = replace(inputs, options={**inputs.options, "max_prefix_length": hint})
    check(run(hinted), inputs.to(torch.float64), inputs)


def test_free_room_of_an_arena_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prefixes far apart: as many shares as their own length asks for."""
    inputs = attention_inputs(
        batch=2, q_heads=2, kv_heads=1, queries=1, prefix=700, prefix_offsets=[0, 20, 650, 680], prefix_index=[0, 2]
    )
    keys, splits = [], decode.splits
    monkeypatch.setattr(decode, "splits", lambda *given: keys.append(given[1]) or splits(*given))
    for hint, counted in ((None, 234), (30, 30), (0, 1), (10**6, 700)):
        run(replace(inputs, options={**inputs.options, "max_prefix_length": hint}))
        assert keys[-2] == counted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["both splits", "many window"])
def test_strides_change_no_bit(name: str, layout: str) -> None:
    inputs = attention_inputs(**CASES[name])
    views = [LAYOUTS[layout](x) for x in inputs.tensors]
    dense = [x.contiguous() for x in views]
    found, want = (run(AttentionInputs(*tensors, inputs.options)) for tensors in (views, dense))
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


@pytest.mark.parametrize("name", ["both splits", "filled part", "many window"])
def test_other_rows_change_no_bit(name: str) -> None:
    inputs = attention_inputs(**CASES[name])
    want = run(inputs)
    for x in inputs.tensors[:3]:
        x[1:] = torch.randn_like(x[1:]) * 100
    found = run(inputs)
    assert torch.equal(found[0][0], want[0][0]) and torch.equal(found[1][0], want[1][0])


def test_extreme_scores() -> None:
    inputs = attention_inputs(queries=2, prefix=40, scale=300.0)
    found, want = run(inputs), reference(*inputs.to(torch.float64).tensors, scale=300.0)
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 23])
def test_rows_in_the_order_of_their_prefixes(batch: int, dtype: torch.dtype) -> None:
    index = torch.randint(-1, 4, (batch,), dtype=dtype)
    with poisoned_memory():
        order = common.rows_by_prefix(index)
    assert order.dtype == torch.int32 and torch.equal(order.long(), torch.argsort(index, stable=True))


def test_every_shape_has_a_configuration() -> None:
    for arch in (80, 90, 100):
        for dim in (16, 32, 64, 128, 256):
            for size in (2, 4):
                for stacked in (1, 16, 17, 64, 1000):
                    for plain in (True, False):
                        key = decode.tuning_key(dim, 16, size, stacked, plain)
                        config = _tuning.configuration(decode.OP, "decode", key, (f"sm_{arch}", "default"))
                        assert 16 <= config["BLOCK_M"] <= 128 and config["BLOCK_N"] >= 16
            assert _tuning.configuration(decode.OP, "combine", f"d{dim}", (f"sm_{arch}", "default"))


def test_tuning_key() -> None:
    assert decode.tuning_key(100, 64, 2, 256, True) == "d128-16bit-m128"
    assert decode.tuning_key(64, 200, 4, 3, True) == "d256-32bit-m16"
    assert decode.tuning_key(8, 8, 2, 33, False) == "d16-16bit-m64-general"


def test_prefixes_in_use() -> None:
    """Gaps of an arena are no prefixes, and there are never more than rows."""
    assert decode.prefixes_in_use(63, 256, 8192, 100) == 32
    assert decode.prefixes_in_use(63, 3, 8192, 100) == 3
    assert decode.prefixes_in_use(63, 256, 6000, 100) == 63
    assert decode.prefixes_in_use(63, 256, 8192, None) == 63
    assert decode.prefixes_in_use(0, 4, 0, None) == decode.prefixes_in_use(1, 4, 100, 0) == 1


def test_an_arenas_gaps_choose_no_smaller_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attention_inputs(
        batch=12, q_heads=4, kv_heads=1, queries=1, prefix=700, prefix_offsets=[0, 20, 650, 680],
        prefix_index=[0, 2] * 6,
    )  # fmt: skip
    keys, tuning_key = [], decode.tuning_key
    monkeypatch.setattr(decode, "tuning_key", lambda *given: keys.append(given[3]) or tuning_key(*given))
    for hint in (None, 30):
        run(replace(inputs, options={**inputs.options, "max_prefix_length": hint}))
    assert keys == [16, 24]


def test_own_rows() -> None:
    assert decode.own_rows(4, 128) == 16
    assert decode.own_rows(32, 64) == 32
    assert decode.own_rows(126, 64) == 64


def test_splits() -> None:
    assert decode.splits(16, 8192, 132, 256) == 8  # 64 rows, 4 grouped and 8 key/value heads, tiles of 128
    assert decode.splits(16, 1024, 132, 256) == 4
    assert decode.splits(512, 128, 264, 256) == 1  # its own keys
    assert decode.splits(8, 8192, 264, 256) == 32  # one row
    assert decode.splits(8, 128, 264, 256) == 1
    assert decode.splits(1, 10**6, 264, 256) == decode.MAX_SPLITS
    assert decode.splits(8, 0, 264, 256) == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 200_000), st.integers(1, 600), st.sampled_from([16, 256]))
def test_splits_are_sound(programs: int, keys: int, wanted: int, least: int) -> None:
    count = decode.splits(programs, keys, wanted, least)
    assert 1 <= count <= decode.MAX_SPLITS
    assert count == 1 or (programs * count <= wanted and (count - 1) * least < keys)
