# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel for few queries a row: what the op's own tests are too small for. Several tiles, several splits,
many prompts, every size of head, quantised prefixes, and random calls. On a CPU it is emulated
(csrc/cuda/emulator.h)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

pytest.importorskip("softprompt_fast.backends.cuda.prefix_attention", exc_type=ImportError)

from softprompt_fast.backends.cuda import _runtime
from softprompt_fast.backends.cuda import prefix_attention as cuda
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import AttentionInputs, attention_inputs, poisoned_memory
from tests import cuda_emulated
from tests.device import ON_GPU
from tests.ops.test_prefix_attention import LAYOUTS
from tests.test_triton_decode import CASES, MANY, arguments, check, quantized
from tests.test_triton_random import Bounds, attention_calls, choosing, exactly, random_calls

DTYPES = [torch.bfloat16, torch.float16]
# Tiles are of 16 queries or of 128 (of 64 with heads of 256), shares of at least 128 keys, and 8 blocks run at a time.
LARGER: dict[str, dict[str, Any]] = {
    "two large tiles": {"batch": 9, "q_heads": 8, "kv_heads": 1, "queries": 2, "own": 3, "prefix": 150},
    "tiles of whole rows": {"batch": 6, "q_heads": 5, "kv_heads": 1, "queries": 10, "own": 12, "prefix": 70},
    "a row of two tiles": {"batch": 2, "q_heads": 10, "kv_heads": 1, "queries": 16, "own": 20, "prefix": 90},
    "a row of two tiles, many prompts": {
        "batch": 5, "q_heads": 10, "kv_heads": 1, "queries": 16, "own": 20, "prefix": 300,
        "prefix_offsets": [0, 130, 130, 300], "prefix_index": [2, -1, 0, 1, 2], "sinks": True,
    },
    "every split": {"batch": 1, "q_heads": 2, "kv_heads": 1, "queries": 2, "own": 700, "prefix": 900},
    "gaps between prompts": {
        "batch": 7, "q_heads": 4, "kv_heads": 2, "queries": 1, "prefix": 420, "own": 9,
        "prefix_offsets": [3, 140, 150, 290, 400, 410], "prefix_index": [3, 0, 3, 2, -1, 0, 3],
    },
    "window within a share": {
        "batch": 3, "q_heads": 6, "kv_heads": 1, "queries": 4, "own": 40, "prefix": 300, "sliding_window": 190,
        "own_start": [0, 11, 39],
    },
}  # fmt: skip

# Few rows with few keys: one item has a row's own keys and then its prefix. 8 blocks run at a time, so up to 4 items.
TOGETHER: dict[str, dict[str, Any]] = {
    "one prompt": {"batch": 2, "q_heads": 8, "kv_heads": 2, "queries": 1, "own": 64, "prefix": 128},
    "more own keys than prefix": {"batch": 1, "q_heads": 4, "kv_heads": 2, "queries": 3, "own": 130, "prefix": 33},
    "no own keys": {"batch": 3, "q_heads": 2, "kv_heads": 1, "queries": 1, "own": 0, "prefix": 150, "causal": False},
    "one of each": {"batch": 2, "queries": 1, "own": 1, "prefix": 1, "sinks": True},
    "prompts, a row without": {
        "batch": 4, "q_heads": 3, "kv_heads": 1, "queries": 2, "own": 70, "prefix": 128, "softcap": 3.0,
        "prefix_offsets": [1, 66, 66, 127], "prefix_index": [2, -1, 0, 1], "sinks": True,
    },
    "window across": {
        "batch": 3, "q_heads": 3, "kv_heads": 1, "queries": 4, "own": 70, "prefix": 100, "sliding_window": 81,
        "own_start": [0, 11, 69],
    },
    "window that ends before the prefix": {
        "batch": 2, "q_heads": 2, "kv_heads": 1, "queries": 2, "own": 40, "prefix": 100, "sliding_window": 20,
    },
    "own ranges": {
        "batch": 3, "q_heads": 2, "kv_heads": 1, "queries": 2, "own": 130, "prefix": 64, "query_start": [3, 77, 0],
        "own_start": [0, 30, 5], "own_end": [5, 79, 5],
    },
    "a large tile": {
        "batch": 3, "q_heads": 9, "kv_heads": 1, "queries": 7, "own": 70, "prefix": 75, "sinks": True,
        "prefix_offsets": [0, 10, 75], "prefix_index": [1, -1, 0],
    },
    "an arena": {
        "batch": 2, "q_heads": 4, "kv_heads": 1, "queries": 1, "own": 30, "prefix": 900,
        "prefix_offsets": [5, 85, 700, 890], "prefix_index": [0, 2], "max_prefix_length": 190,
    },
}  # fmt: skip


@pytest.fixture(params=["wgmma", "mma"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Large tiles on a warpgroup's products, where the device has them, and on a warp's."""
    if request.param == "wgmma" and ON_GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a warpgroup's products are for compute capability 9.0")
    before = _runtime._cuda.use_wgmma(request.param == "wgmma")
    yield request.param
    _runtime._cuda.use_wgmma(before)


# Prefix items of 8 blocks of keys and more, whose results others merge. The emulated device runs 8 blocks at a time.
LATE: dict[str, dict[str, Any]] = {
    "one share": {"batch": 3, "q_heads": 8, "kv_heads": 4, "queries": 1, "own": 9, "prefix": 520, "sinks": True},
    "several shares": {"batch": 9, "q_heads": 3, "kv_heads": 1, "queries": 2, "own": 70, "prefix": 2112},
    "prompts, rows without": {
        "batch": 6, "q_heads": 8, "kv_heads": 4, "queries": 1, "own": 20, "prefix": 900, "max_prefix_length": 600,
        "prefix_offsets": [0, 600, 600, 900], "prefix_index": [0, -1, 2, 0, 1, 2],
    },
}  # fmt: skip


def run(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_memory(), choosing(stack_queries=True):
        return cuda.forward(*arguments(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if "bias" not in CASES[n]])
def test_forward(name: str, dtype: torch.dtype) -> None:
    inputs = attention_inputs(dtype=dtype, **CASES[name])
    check(run(inputs), inputs.to(torch.float64), inputs)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("name", LARGER)
def test_larger(name: str, head_dim: int, products: str) -> None:
    """With both sizes of large tiles."""
    if head_dim == 256 and products == "wgmma":
        pytest.skip("heads of 256 have no warpgroup's products")
    inputs = attention_inputs(dtype=torch.bfloat16, head_dim=head_dim, **LARGER[name])
    check(run(inputs), inputs.to(torch.float64), inputs)


# Tiles of 66 to 128 queries, which a warpgroup takes, against one block of keys to seven.
@pytest.mark.parametrize("prefix", [1, 64, 65, 128, 200, 447])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 150}, {"softcap": 3.0, "sinks": True}], ids=str)
@pytest.mark.parametrize(("head_dim", "v_dim"), [(128, 128), (64, 40), (100, 128)])
def test_tiles_of_a_warpgroup(head_dim: int, v_dim: int, options: dict[str, Any], prefix: int, products: str) -> None:
    batch = 11 + prefix % 7
    inputs = attention_inputs(
        dtype=DTYPES[prefix % 2], batch=batch, q_heads=6, kv_heads=1, queries=1, own=5, prefix=prefix,
        head_dim=head_dim, v_dim=v_dim, **options,
    )  # fmt: skip
    check(run(inputs), inputs.to(torch.float64), inputs)


def test_a_warpgroup_is_used() -> None:
    """Whose products add up in another order, so that something differs in some bit."""
    inputs = attention_inputs(
        dtype=torch.bfloat16, batch=20, q_heads=6, kv_heads=1, queries=1, own=5, prefix=500, head_dim=128
    )
    if ON_GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a warpgroup's products are for compute capability 9.0")
    before = _runtime._cuda.use_wgmma(True)
    try:
        found = run(inputs)[1]
        _runtime._cuda.use_wgmma(False)
        assert not torch.equal(found, run(inputs)[1])
    finally:
        _runtime._cuda.use_wgmma(before)


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("name", LATE)
def test_late_merges(name: str, head_dim: int) -> None:
    """Blocks run in any order, so that merge items come before what they wait for, and after it."""
    inputs = attention_inputs(dtype=torch.bfloat16, head_dim=head_dim, **LATE[name])
    want = inputs.to(torch.float64)
    first = run(inputs)
    check(first, want, inputs)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(run(inputs), first, strict=True))
    if not ON_GPU:  # in memory that can be read here
        assert not any(any((ctypes.c_uint * n).from_address(at)) for at, n in _runtime._cuda.counters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TOGETHER)
def test_together(name: str, dtype: torch.dtype) -> None:
    """And so without a workspace."""
    inputs = attention_inputs(dtype=dtype, **TOGETHER[name])
    check(run(inputs), inputs.to(torch.float64), inputs)
    assert _runtime._cuda.last_workspace() == 0


@pytest.mark.parametrize(
    ("change", "apart"),
    [({}, False), ({"own": 129}, True), ({"prefix": 193}, True), ({"batch": 5}, True), ({"prefix": 0}, False)],
    ids=str,
)
def test_what_is_together(change: dict[str, int], apart: bool) -> None:
    """Up to four blocks of 64 keys, where two items a row have places on the emulated device's 8."""
    sizes = {"batch": 4, "own": 128, "prefix": 128, **change}
    given = (sizes["batch"], 2, 1, 1, sizes["own"], sizes["prefix"], 16, 16, 1, sizes["prefix"])
    device = torch.cuda.current_device() if ON_GPU else 0
    asked = _runtime._cuda.prefix_attention_workspace(given, False, False, device)
    if not ON_GPU or "batch" not in change:
        assert bool(asked) == apart


def test_8_bit_prefixes_are_never_together() -> None:
    inputs = attention_inputs(dtype=torch.bfloat16, **TOGETHER["one prompt"])
    run(quantized(inputs, torch.int8, 8)[0])
    assert _runtime._cuda.last_workspace() > 0


@pytest.mark.parametrize(
    ("name", "value", "tests"),
    [
        ("TILE", "64", "test_larger"),
        ("TILE", "16", "test_larger"),
        ("PREFIX_BLOCKS", "7", "test_larger"),
        ("TOGETHER", "0", "test_forward"),
        ("TOGETHER", "9", "test_forward"),
        ("LATE", "1", "test_larger"),
    ],
)
def test_settings_of_measurements(name: str, value: str, tests: str) -> None:
    """What a GPU may turn out to do better with: read once, so in a process of its own."""
    named, some = f"{Path(__file__).name}::{tests}", {"test_larger": "64", "test_forward": "bfloat16"}[tests]
    code = f"import pytest; raise SystemExit(pytest.main(['tests/{named}', '-q', '-n', '0', '-k', '{some}']))"
    done = python(code, **{f"SOFTPROMPT_FAST_CUDA_{name}": value})
    assert done.returncode == 0, done.stdout + done.stderr


def test_settings_that_no_kernel_has() -> None:
    code = "import tests.conftest, softprompt_fast.backends.cuda._runtime as runtime\n"
    code += "runtime._cuda.prefix_attention_workspace((2, 4, 2, 1, 9, 30, 16, 16, 1, 30), False, False, 0)"
    for tile in ("24", "256", "many"):
        done = python(code, SOFTPROMPT_FAST_CUDA_TILE=tile)
        assert f"CUDA_TILE: expected a multiple of 16 up to 128, found {tile}" in done.stderr
    done = python(code, SOFTPROMPT_FAST_CUDA_PREFIX_BLOCKS="0")
    assert "CUDA_PREFIX_BLOCKS: expected a multiple of 1 up to" in done.stderr
    done = python(code, SOFTPROMPT_FAST_CUDA_TOGETHER="-1")
    assert "CUDA_TOGETHER: expected a multiple of 1 up to" in done.stderr


def test_prefix_blocks_decide_how_many_shares_there_are() -> None:
    """Of a prefix of 900 entries beside 16 own items, which fill the emulated device."""
    code = "import tests.conftest, softprompt_fast.backends.cuda._runtime as runtime\n"
    code += "print(runtime._cuda.prefix_attention_workspace((16, 1, 1, 1, 9, 900, 16, 16, 1, 900), False, False, 0))"
    few, many = (int(python(code, SOFTPROMPT_FAST_CUDA_PREFIX_BLOCKS=n).stdout) for n in ("1", "4"))
    assert few * 5 == many * 2  # slots: own keys, and 1 or 4 shares


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cuda_emulated.ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 64, 65, 96, 100, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    inputs = attention_inputs(dtype=torch.float16, **{**CASES["many window"], "head_dim": head_dim})
    check(run(inputs), inputs.to(torch.float64), inputs)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 20, 96, 256])
@pytest.mark.parametrize("name", ["prefix splits of many", "many decode", "many window"])
def test_quantized_prefix(name: str, head_dim: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    """The stored entries are a view whose rows are not where 16 bytes can be copied; dense ones give the same."""
    inputs = attention_inputs(dtype=dtype, **{**CASES[name], "head_dim": head_dim})
    inputs, exact = quantized(inputs, stored, 8)
    found = run(inputs)
    check(found, exact, exact.to(dtype))
    dense = AttentionInputs(*(x.contiguous() for x in inputs.tensors), inputs.options)
    for x, y in zip(run(dense), found, strict=True):
        assert torch.equal(x, y)


def test_small_values_of_a_quantized_prefix() -> None:
    """In float16 a weight times a scale of 1e-6 would lose its digits."""
    inputs = attention_inputs(dtype=torch.float16, batch=2, queries=1, own=0, causal=False, prefix=150)
    inputs.prefix_value.mul_(1e-4)
    inputs, exact = quantized(inputs, torch.int8, 8)
    check(run(inputs), exact, exact.to(torch.float16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["both splits", "many window"])
def test_strides_change_no_bit(name: str, layout: str) -> None:
    inputs = attention_inputs(dtype=torch.bfloat16, **CASES[name])
    views = [LAYOUTS[layout](x) for x in inputs.tensors]
    found, want = (run(AttentionInputs(*xs, inputs.options)) for xs in (views, [x.contiguous() for x in views]))
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


@pytest.mark.parametrize("name", ["both splits", "filled part", "many window"])
def test_other_rows_change_no_bit(name: str) -> None:
    inputs = attention_inputs(dtype=torch.bfloat16, **CASES[name])
    want = run(inputs)
    for x in inputs.tensors[:3]:
        x[1:] = torch.randn_like(x[1:]) * 100
    found = run(inputs)
    assert torch.equal(found[0][0], want[0][0]) and torch.equal(found[1][0], want[1][0])


@pytest.mark.parametrize(("batch", "prefixes"), [(300, 7), (33, 20), (200, 170)])
def test_many_rows_and_prompts(batch: int, prefixes: int) -> None:
    """More rows than are sorted together; a run and one more; more prompts than threads. Lengths of 0 to 2 blocks."""
    lengths = torch.randint(0, 6, (prefixes,)) + (torch.rand(prefixes) < 0.1) * 70
    offsets = [0, *lengths.cumsum(0).tolist()]
    index = torch.randint(-1, prefixes, (batch,)).tolist()
    inputs = attention_inputs(
        batch, 1, 1, queries=1, own=2, prefix=offsets[-1], prefix_offsets=offsets, prefix_index=index,
        dtype=torch.bfloat16,
    )  # fmt: skip
    check(run(inputs), inputs.to(torch.float64), inputs)


def test_calls_leave_the_counters_at_zero() -> None:
    """And so give the same bits, whatever call came before, in any order of their blocks."""
    inputs = attention_inputs(dtype=torch.bfloat16, **MANY)
    first = run(inputs)
    counters = _runtime._cuda.counters()
    assert counters
    if not ON_GPU:  # in memory that can be read here
        assert not any(any((ctypes.c_uint * count).from_address(at)) for at, count in counters)
    run(attention_inputs(dtype=torch.bfloat16, **LARGER["every split"]))
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(run(inputs), first, strict=True))


def test_extreme_scores() -> None:
    inputs = attention_inputs(queries=2, prefix=40, scale=300.0, dtype=torch.bfloat16)
    found, want = run(inputs), reference(*inputs.to(torch.float64).tensors, scale=300.0)
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-5, atol=1e-3)


def test_infinite_values_show() -> None:
    inputs = attention_inputs(queries=1, prefix=40, dtype=torch.bfloat16)
    inputs.prefix_value[:, 3, 5] = torch.inf
    out, lse = run(inputs)
    assert out[..., 5].isinf().all() and lse.isfinite().all()
    inputs.prefix_key[:, 3] = torch.nan
    assert all(x.isnan().all() for x in run(inputs))


@random_calls
@given(inputs=attention_calls(dtypes=DTYPES, biased=False))
def test_random_calls(inputs: AttentionInputs) -> None:
    results = run(inputs)
    exact, real = exactly(inputs), inputs.real_queries()
    assert results[0].isfinite().all() and not results[1].isnan().any()
    bounds = Bounds(exact, inputs.query.dtype, "prefix_scale_block" in inputs.options)
    bounds.hold(results, reference(*exact.tensors, **exact.options), real)


@pytest.mark.parametrize(
    ("case", "dtype", "served"),
    [
        ({"queries": 16, "own": 16}, torch.bfloat16, True),
        ({"queries": 1, "sinks": True, "softcap": 2.0}, torch.float16, True),
        ({"queries": 40, "own": 40}, torch.bfloat16, False),
        ({"queries": 1}, torch.float32, False),
        ({"queries": 1, "bias": (1, 1, 1, 13)}, torch.bfloat16, False),
        ({"queries": 1, "v_dim": 0}, torch.bfloat16, False),
    ],
)
def test_who_serves(case: dict, dtype: torch.dtype, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries in 16 bits are the CUDA kernel's, the rest of the backend's calls Triton's; both are right."""
    inputs = attention_inputs(dtype=dtype, **case)
    assert cuda.reasons(*arguments(inputs)) == []
    calls: list[tuple] = []
    forward = cuda.triton.forward
    monkeypatch.setattr(cuda.triton, "forward", lambda *args: calls.append(args) or forward(*args))
    with poisoned_memory():
        check(cuda.forward(*arguments(inputs)), inputs.to(torch.float64), inputs)
    assert bool(calls) != served


@pytest.mark.parametrize(
    ("head_dim", "v_dim", "kilobytes", "taken"),
    [(128, 128, 99, True), (128, 129, 99, False), (129, 8, 99, False), (256, 256, 163, True), (64, 64, 48, False)],
)
def test_shared_memory_decides_who_serves(head_dim: int, v_dim: int, kilobytes: int, taken: bool) -> None:
    assert cuda.takes(1, 4, head_dim, v_dim, torch.bfloat16, False, kilobytes << 10) == taken


def test_wide_heads_on_a_small_gpu_are_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(cuda.triton, "forward", lambda *args: calls.append(args))
    monkeypatch.setattr(cuda._runtime, "shared_bytes", lambda device: 99 << 10)
    for head_dim in (128, 136):
        cuda.forward(*arguments(attention_inputs(dtype=torch.bfloat16, queries=1, head_dim=head_dim)))
    assert [args[0].shape[-1] for args in calls] == [136]


@pytest.mark.parametrize("hint", [0, 33, 10**6])
@pytest.mark.parametrize("name", ["gaps between prompts", "every split", "an arena"])
def test_a_hint_changes_no_result(name: str, hint: int) -> None:
    """However wrong it is."""
    inputs = attention_inputs(dtype=torch.bfloat16, **{**LARGER, **TOGETHER}[name])
    hinted = AttentionInputs(*inputs.tensors, {**inputs.options, "max_prefix_length": hint})
    check(run(hinted), inputs.to(torch.float64), inputs)


def test_free_room_of_an_arena_takes_no_workspace() -> None:
    """Short prefixes far apart: as many shares as their own length asks for, and the same bits as side by side."""
    dense = attention_inputs(
        batch=5, q_heads=2, kv_heads=1, queries=1, own=3, prefix=150, prefix_offsets=[0, 20, 150],
        prefix_index=[0, 1, 0, 0, 0], dtype=torch.bfloat16,
    )  # fmt: skip
    pairs = [torch.full((1, 5000, 16), torch.nan, dtype=torch.bfloat16) for _ in range(2)]
    for pack, x in zip(pairs, dense.tensors[3:], strict=True):
        pack[:, 7:27], pack[:, 4000:4130] = x[:, :20], x[:, 20:]
    places = {"prefix_offsets": torch.tensor([7, 27, 4000, 4130]), "prefix_index": torch.tensor([0, 2, 0, 0, 0])}
    found, asked = [], []
    for hint in (130, None):
        options = {**dense.options, **places, "max_prefix_length": hint}
        found.append(run(AttentionInputs(*dense.tensors[:3], *pairs, options)))
        asked.append(_runtime._cuda.last_workspace())
    assert 2 * asked[0] < asked[1]
    assert all(torch.equal(x, y) for x, y in zip(found[0], run(dense), strict=True))


def test_what_neither_serves() -> None:
    wide = attention_inputs(dtype=torch.bfloat16, head_dim=257)
    assert cuda.reasons(*arguments(wide)) == ["it takes head dimensions up to 256, found 257 and 257"]
    assert cuda.reasons(*arguments(attention_inputs(dtype=torch.float64)))
    biased = attention_inputs(dtype=torch.bfloat16, bias=(1, 1, 1, 13))
    biased.options["bias"].requires_grad_()
    assert cuda.reasons(*arguments(biased)) == ["it gives no gradient for bias"]


@pytest.mark.skipif(cuda_emulated.compiler() is None, reason="no C++ compiler on this machine")
def test_plans(tmp_path: Path) -> None:
    """csrc/tests/prefix_attention_plan_test.cpp: every key that a query sees is in one item, and other promises."""
    program = tmp_path / "plan_test"
    source = str(cuda_emulated.ROOT / "csrc" / "tests" / "prefix_attention_plan_test.cpp")
    command = [*(cuda_emulated.compiler() or []), *cuda_emulated.FLAGS, source, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program), "1000000", "1"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
