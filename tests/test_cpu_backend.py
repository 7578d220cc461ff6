# SPDX-License-Identifier: Apache-2.0
"""The C++ backend as a whole: memory it may not touch, threads, allocations, bad calls, instruction sets, compilers.

What each op computes has its tests in tests/ops; under AddressSanitizer both run as ``make sanitize``.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sanitize import check, compiler, overlay, python, sanitized

import softprompt_fast
from softprompt_fast import ops
from softprompt_fast.backends import native, native_ops
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import AttentionInputs, attention_inputs, poisoned_memory
from tests.random_tensors import strided

ROOT = Path(__file__).parent.parent
EXTENSION, REASON = native.load()
ISAS = EXTENSION.available_isas() if EXTENSION else ["any"]
THREADS = 8
#: Where the package under test is: not in ROOT in a run of sanitize.py.
HERE = Path(softprompt_fast.__file__).parent.parent

needs_extension = pytest.mark.skipif(EXTENSION is None, reason=f"C++ extension: {REASON}")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no GCC or Clang on this machine")
needs_clang = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="the Python package ziglang, a Clang, is not installed"
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    if EXTENSION is None:
        pytest.skip(f"C++ extension: {REASON}")
    before = EXTENSION.isa()
    EXTENSION.use_isa(request.param)
    yield request.param
    EXTENSION.use_isa(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(inputs: AttentionInputs, backend: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return ops.prefix_attention(*inputs.tensors, **inputs.options, return_lse=True, backend=backend)


# ---- memory ---------------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: Callable[..., Any]) -> AttentionInputs:
    batch, kv_heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    queries, head_dim, v_dim = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    own = queries + draw(st.sampled_from([0, 1, 7, 64, 90]))
    lengths = draw(st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 150]), min_size=1, max_size=3))
    starts = [draw(st.integers(0, own)) for _ in range(batch)]
    options: dict[str, Any] = {
        "own_start": starts,
        "own_end": [draw(st.integers(start, own)) for start in starts],
        "query_start": [draw(st.integers(0, own - queries)) for _ in range(batch)],
        "prefix_offsets": [sum(lengths[:n]) for n in range(len(lengths) + 1)],
        "prefix_index": [draw(st.integers(-1, len(lengths) - 1)) for _ in range(batch)],
    }
    options = {name: torch.tensor(values) for name, values in options.items() if draw(st.booleans())}
    if "prefix_offsets" not in options:
        options.pop("prefix_index", None)
    if draw(st.booleans()):
        options["sliding_window"] = draw(st.integers(1, 200))
    elif draw(st.booleans()):
        options["causal"] = False
    if draw(st.booleans()):
        options["softcap"] = 2.0
    if draw(st.booleans()):
        options["sinks"] = torch.randn(kv_heads * groups)
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, kv_heads * groups, queries)]
        options["bias"] = draw(strided((*shape, sum(lengths) + own)))
    return AttentionInputs(
        draw(strided((batch, kv_heads * groups, queries, head_dim))),
        draw(strided((batch, kv_heads, own, head_dim))),
        draw(strided((batch, kv_heads, own, v_dim))),
        draw(strided((kv_heads, sum(lengths), head_dim))),
        draw(strided((kv_heads, sum(lengths), v_dim))),
        options,
    )


def rounding(inputs: AttentionInputs) -> float:
    """A bound on the rounding error of out and lse in float32, whatever the order of the sums (Higham, 2002, chapter
    3): a score is off by at most (D + 8) eps |scale| |q| |k|, a softmax of N scores that are off by e by 2 e + N eps.
    Layouts are tested against it; tests/ops hold the accuracy itself to that of PyTorch's own attention."""
    eps, (query, key, value, prefix_key, prefix_value) = torch.finfo(torch.float32).eps, inputs.tensors
    head_dim = query.shape[-1]
    keys, values = (torch.cat([x.flatten(), y.flatten()]).abs() for x, y in ((key, prefix_key), (value, prefix_value)))
    score = head_dim**0.5 * query.abs().max() * keys.max() + 1.0
    bias = inputs.options.get("bias")
    if bias is not None:
        score = score + bias.abs().max()
    count = key.shape[2] + prefix_key.shape[1]
    return ((2 * (head_dim + 8) * score + count) * eps * (1.0 + values.max())).item()


@needs_extension
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(inputs=calls(), which=st.sampled_from(ISAS), threads=st.integers(1, 2))
def test_any_shape_and_strides(inputs: AttentionInputs, which: str, threads: int) -> None:
    exact = inputs.to(torch.float64)
    want_out, want_lse = reference(*exact.tensors, **exact.options)
    before = EXTENSION.isa()
    EXTENSION.use_isa(which)
    torch.set_num_threads(threads)
    try:
        with poisoned_memory():
            out, lse = run(inputs)
    finally:
        EXTENSION.use_isa(before)
        torch.set_num_threads(1)
    assert out.isfinite().all() and not lse.isnan().any()
    real, bound = inputs.real_queries(), rounding(inputs)
    torch.testing.assert_close((out * real).double(), want_out * real, rtol=0, atol=bound)
    hidden = ~real[..., 0]
    lse, want_lse = (x.masked_fill(hidden, 0.0).double() for x in (lse, want_lse))
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v_dim", [1, 16, 37])
def test_results_end_where_they_end(isa: str, dtype: torch.dtype, v_dim: int, two_threads: None) -> None:
    """The memory of out and lse is taken from the middle of buffers; what stands before and behind stays."""
    inputs = attention_inputs(batch=3, queries=5, own=70, v_dim=v_dim, prefix=130, dtype=dtype)
    want = run(inputs)
    guard, buffers, found = 64, [], []
    for result in want:
        buffers.append(torch.full((result.numel() + 2 * guard,), 7.0, dtype=result.dtype))
        found.append(buffers[-1].as_strided(result.shape, result.stride(), guard))
    attention = torch.ops.softprompt_fast.prefix_attention_cpu.out
    assert attention(*inputs.tensors, *(None,) * 6, True, *(None,) * 8, out=found[0], lse=found[1])
    for x, y, buffer in zip(found, want, buffers, strict=True):
        assert torch.equal(x, y)
        assert (buffer[:guard] == 7.0).all() and (buffer[-guard:] == 7.0).all()


def test_a_nan_stays_in_its_row_and_shows(isa: str) -> None:
    """Rows share blocks, scratch and a softmax kernel; a NaN in one may not reach another, nor vanish."""
    for options in ({}, {"softcap": 2.0}, {"sinks": True}, {"queries": 1, "own": 900, "batch": 1}):
        clean = attention_inputs(**{"batch": 3, "prefix": 300, **options})
        want, want_lse = run(clean)
        clean.query[0, 1, 0] = float("nan")
        out, lse = run(clean)
        assert out[0, 1, 0].isnan().all() and lse[0, 1, 0].isnan()
        out[0, 1, 0], lse[0, 1, 0] = want[0, 1, 0], want_lse[0, 1, 0]
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    state, empty = (torch.randn(2, 5), torch.zeros(2)), (torch.zeros(2, 5), torch.full((2,), -torch.inf))
    for lse_a, lse_b in ((float("nan"), 0.0), (0.0, float("nan")), (-torch.inf, float("nan"))):
        lses = torch.tensor([lse_a, 0.0]), torch.tensor([lse_b, 0.0])
        out, lse = ops.merge_states(state[0], lses[0], empty[0], lses[1], backend="cpu")
        assert out[0].isnan().all() and lse[0].isnan() and out[1].isfinite().all() and lse[1].isfinite()


# ---- threads --------------------------------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [
    {"batch": 8, "queries": 1, "own": 12, "prefix": 300, "head_dim": 32},
    {"batch": 1, "queries": 1, "own": 9, "prefix": 3000, "head_dim": 64},
    {"batch": 2, "queries": 40, "own": 40, "prefix": 130, "head_dim": 24},
    {"batch": 1, "queries": 130, "own": 130, "prefix": 0, "head_dim": 48},
    {"batch": 5, "queries": 3, "own": 11, "prefix": 64, "head_dim": 17, "dtype": torch.bfloat16},
    {"batch": 1, "queries": 1, "own": 1700, "prefix": 1700, "head_dim": 40, "sliding_window": 2500},
    {"batch": 32, "queries": 1, "own": 32, "prefix": 128, "head_dim": 64, "sinks": True},
    {"batch": 3, "queries": 17, "own": 33, "prefix": 257, "head_dim": 65, "prefix_index": [0, -1, 0]},
]


def forward_and_gradients(inputs: AttentionInputs) -> tuple[torch.Tensor, ...]:
    out, lse = run(inputs)
    grads = torch.autograd.grad((out, lse), inputs.gradient_inputs, (torch.ones_like(out), torch.ones_like(lse)))
    return (out.detach(), lse.detach(), *grads)


def test_concurrent_calls(isa: str, two_threads: None) -> None:
    """Python threads with shapes of their own, each of which splits into threads again."""
    inputs = [attention_inputs(**shape).requires_grad_() for shape in SHAPES]
    assert len(inputs) == THREADS
    alone = [forward_and_gradients(x) for x in inputs]
    start = threading.Barrier(THREADS)

    def work(first: int) -> list[str]:
        torch.set_num_threads(2)  # each thread has its own count
        start.wait()
        different = []
        for turn in range(2 * THREADS):
            which = (first + turn) % THREADS
            found = forward_and_gradients(inputs[which])
            different += [f"shape {which}" for x, y in zip(found, alone[which], strict=True) if not torch.equal(x, y)]
        return different

    with ThreadPoolExecutor(THREADS) as pool:
        assert not [wrong for found in pool.map(work, range(THREADS)) for wrong in found]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_deterministic_for_a_number_of_threads(shape: int, threads: int) -> None:
    if EXTENSION is None:
        pytest.skip(f"C++ extension: {REASON}")
    inputs = attention_inputs(**SHAPES[shape]).requires_grad_()
    exact = inputs.to(torch.float64)
    want, want_lse = reference(*exact.tensors, **exact.options)
    torch.set_num_threads(threads)
    try:
        first = forward_and_gradients(inputs)
        for _ in range(5):
            assert all(map(torch.equal, forward_and_gradients(inputs), first))
    finally:
        torch.set_num_threads(1)
    # Other splits of the keys, other sums: equal within rounding, to be seen from the exact result.
    bound = rounding(inputs.to(torch.float32))
    bound += torch.finfo(inputs.query.dtype).eps * want.abs().max().item()
    torch.testing.assert_close(first[0].double(), want, rtol=0, atol=bound)
    torch.testing.assert_close(first[1].double(), want_lse, rtol=0, atol=bound)


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="ThreadSanitizer is taken from a GCC or Clang on Linux")
@pytest.mark.slow
def test_no_data_race(tmp_path: Path) -> None:
    """ThreadSanitizer over the kernels without Python and OpenMP: see csrc/tests/concurrent_calls.cpp. A run in which
    the workspace is shared between threads must fail, or it would prove nothing."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = [*compiler(), "-fsanitize=thread", str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    objects = compile_kernels(tmp_path, "-O1 -g -fsanitize=thread")

    def build_and_run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        parallel = tmp_path / f"{name}.o"
        # Renamed: the harness brings its own parallel_tasks.
        flags = ("-Dparallel_tasks=parallel_tasks_of_openmp", *flags)
        compile_file(ROOT / "csrc/cpu/parallel.cpp", parallel, "-O1 -g -fsanitize=thread", *flags)
        program = [*compiler(), "-fsanitize=thread", *map(str, objects), str(parallel), "-o", str(tmp_path / name)]
        subprocess.run(program, check=True, capture_output=True, text=True)
        return subprocess.run([str(tmp_path / name)], capture_output=True, text=True, check=False)

    done = build_and_run("kernels")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    assert "portable: 0 of" in done.stdout
    planted = build_and_run("planted", "-Dthread_local=static")
    assert planted.returncode != 0 and "ThreadSanitizer: data race" in planted.stderr


def compile_kernels(folder: Path, flags: str) -> list[Path]:
    """The torch-free sources that prefix_attention needs, except parallel.cpp, and the harness; two at a time."""
    names = ["cpu/dispatch.cpp", "cpu/features.cpp", "cpu/prefix_attention.cpp", "tests/concurrent_calls.cpp"]
    sources = [*map(ROOT.joinpath("csrc").joinpath, names), *(ROOT / "csrc/cpu").glob("isa_*.cpp")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source, target: compile_file(source, target, flags), sources, objects))
    return objects


def isa_flags() -> dict[str, str]:
    """setup.py's flags of each instruction set's file."""
    code = (ROOT / "setup.py").read_text(encoding="utf-8").rsplit("\nsetup(", 1)[0]
    scope: dict[str, Any] = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile(code, "setup.py", "exec"), scope)
    return scope["ISA_FLAGS"]


def compile_file(source: Path, target: Path, flags: str, *more: str, using: list[str] | None = None) -> None:
    command = [*(using or compiler() or []), "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno"]
    command += ["-Wall", "-Wextra", "-Werror", *shlex.split(flags), *more]
    command += ["-c", str(source), "-o", str(target)]
    if not any(part.startswith("aarch64") for part in command):
        command += shlex.split(isa_flags().get(source.name, ""))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- allocations ----------------------------------------------------------------------------------------------------


def test_a_decode_step_allocates_nothing_after_the_first(isa: str, two_threads: None) -> None:
    """Own keys grow as in a decode loop: scratch is sized by blocks, not by lengths, as long as keys are not split."""
    with torch.no_grad():
        for batch in (32, 1):
            inputs = attention_inputs(batch, 9, 3, 1, 64, 64, prefix=512)

            def step(own: int, inputs: AttentionInputs = inputs) -> None:
                query, key, value, *prefix = inputs.tensors
                ops.prefix_attention(query, key[:, :, :own], value[:, :, :own], *prefix, backend="cpu")

            step(64)
            before = EXTENSION.workspace_allocations()
            for own in range(1, 65):
                step(own)
            assert EXTENSION.workspace_allocations() == before


@needs_extension
def test_a_large_workspace_is_given_back() -> None:
    """A long prefill's scratch does not stay for ever: the next small call allocates anew."""
    small = attention_inputs(batch=1, queries=1)
    run(small)
    before = EXTENSION.workspace_allocations()
    run(small)
    assert EXTENSION.workspace_allocations() == before


# ---- bad calls ------------------------------------------------------------------------------------------------------


def bad_calls(count: int, seed: int, folder: Path = HERE, **environment: str) -> tuple[int, str]:
    process = python(folder, "-X", "faulthandler", "tests/bad_calls.py", str(count), str(seed), **environment)
    said, _ = process.communicate()
    return process.returncode, said


@needs_extension
def test_ten_thousand_bad_calls() -> None:
    status, said = bad_calls(10_000, 0, OMP_NUM_THREADS="1")
    assert status == 0, said
    assert re.search(
        r"^1000\d calls of prefix_attention, merge_states, prompt_concat, prompt_qkv; 0 wrong$", said, re.M
    )


def attention(**changes: Any) -> None:
    """A call of the C++ op that is good but for the changes."""
    x, prefix = torch.zeros(1, 2, 3, 8), torch.zeros(2, 4, 8)
    names = ("offsets", "index", "own_start", "own_end", "query_start")
    call: dict[str, Any] = dict.fromkeys(names) | {
        **{"query": x, "key": x, "value": x, "prefix_key": prefix, "prefix_value": prefix},
        **{"scale": 1.0, "causal": True, "window": None, "softcap": None, "sinks": None, "bias": None},
        **{"key_scale": None, "value_scale": None, "block": None, "longest": None},
        **{"out": torch.zeros(1, 2, 3, 8), "lse": torch.zeros(1, 2, 3)},
    } | changes  # fmt: skip
    order = ["query", "key", "value", "prefix_key", "prefix_value", *names, "scale", "causal", "window", "softcap"]
    order += ["sinks", "bias", "key_scale", "value_scale", "block", "longest"]
    results = {name: call[name] for name in ("out", "lse")}
    done = torch.ops.softprompt_fast.prefix_attention_cpu.out(*(call[name] for name in order), **results)
    native_ops.served(EXTENSION, done)


INT8 = {name: torch.zeros(2, 4, 8, dtype=torch.int8) for name in ("prefix_key", "prefix_value")}
SCALES = {name: torch.ones(2, 2) for name in ("key_scale", "value_scale")}


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 8)}, r"query: expected \[B, Hq, S, D\] .*, found float32 \[2, 3, 8\] on cpu"),
        ({"query": torch.zeros(1, 3, 3, 8)}, "query: expected a multiple of value's 2 heads, found 3"),
        ({"query": torch.zeros(1, 2, 3, 8, dtype=torch.float64)}, "key: does not fit the others"),
        ({"query": torch.zeros(1, 2, 3, 8).to_sparse()}, "strided tensors|Sparse"),
        ({"key": torch.zeros(1, 2, 2, 8)}, r"key: does not fit the others, found float32 \[1, 2, 2, 8\]"),
        ({"value": torch.zeros(1, 2, 3, 8).half()}, "value: does not fit the others, found float16"),
        ({"prefix_key": INT8["prefix_key"]}, "prefix_key: does not fit the others, found int8"),
        ({"prefix_value": torch.zeros(2, 5, 8)}, r"prefix_value: does not fit .*, found float32 \[2, 5, 8\]"),
        (INT8 | SCALES, "scales: expected two tensors and a block > 0, or none of them"),
        (INT8 | SCALES | {"block": 0}, "scales: expected two tensors and a block > 0"),
        (INT8 | SCALES | {"block": 4}, r"prefix_key_scale: does not fit the others, found float32 \[2, 2\]"),
        (SCALES | {"block": 2}, "prefix_key: expected int8 beside scales, found float32"),
        (INT8 | {"key_scale": torch.ones(4, 2)[::2], "value_scale": torch.ones(2, 2), "block": 2},
         "prefix_key_scale: expected dense float32"),
        ({"out": torch.zeros(1, 2, 3, 7)}, r"out: does not fit the others, found float32 \[1, 2, 3, 7\]"),
        ({"out": torch.zeros(1, 2, 3, 8).half()}, "out: expected the dtype of query, found float16"),
        ({"lse": torch.zeros(1, 3, 2).transpose(1, 2)}, "lse: expected dense float32"),
        ({"lse": torch.zeros(1, 2, 3, dtype=torch.float64)}, "lse: no kernel reads another dtype"),
        ({"sinks": torch.zeros(3)}, r"sinks: expected \[2\], found float32 \[3\]"),
        ({"sinks": torch.zeros(2).half()}, "sinks: expected dense float32, found float16"),
        ({"window": 0}, "sliding_window: expected none, or > 0 and causal, found 0"),
        ({"window": 3, "causal": False}, "sliding_window: expected none, or > 0 and causal, found 3"),
        ({"softcap": float("nan")}, "softcap: expected none or > 0, found nan"),
        ({"longest": -1}, "max_prefix_length: expected none or >= 0, found -1"),
        ({"offsets": torch.zeros(1, dtype=torch.int32)}, r"prefix_offsets: expected \[N \+ 1\], found int32 \[1\]"),
        ({"offsets": torch.tensor([0, 5])}, "prefix_offsets: expected values within 0..4, found 5 in place 1"),
        ({"offsets": torch.tensor([1, 0])}, "prefix_offsets: expected rising values, found 0 behind 1"),
        ({"index": torch.tensor([1])}, "prefix_index: expected values within -1..0, found 1 in place 0"),
        ({"index": torch.tensor([2**40])}, "prefix_index: expected values .*, found 1099511627776"),
        ({"index": torch.tensor([0, 0])}, r"prefix_index: expected int32 or int64 \[1\] .*, found int64 \[2\]"),
        ({"index": torch.tensor([0.0])}, "prefix_index: expected int32 or int64 .*, found float32"),
        ({"own_start": torch.tensor([-1])}, "own_start: expected values within 0..3, found -1 in place 0"),
        ({"own_end": torch.tensor([4])}, "own_end: expected values within 0..3, found 4 in place 0"),
        ({"bias": torch.zeros(1, 1, 1, 6)}, r"bias: does not fit the others, found float32 \[1, 1, 1, 6\]"),
        ({"bias": torch.zeros(1, 1, 1, 4), "offsets": torch.tensor([0, 2])}, "bias: expected at least 2 columns"),
    ],
)  # fmt: skip
def test_bad_calls_of_the_op(change: dict[str, Any], message: str) -> None:
    attention()
    with pytest.raises((ValueError, RuntimeError), match=message):
        attention(**change)


@needs_extension
@pytest.mark.parametrize("position", [-(2**63), -5, 2**63 - 1])
def test_positions_far_out(position: int) -> None:
    """query_start is not bounded by the op: a query may stand anywhere, and sees all own keys or none."""
    inputs = attention_inputs(batch=1, queries=3, own=7)
    out, lse = run(AttentionInputs(*inputs.tensors, {"query_start": torch.tensor([position])}))
    own_end = torch.tensor([7 if position > 0 else 0])
    want, want_lse = run(AttentionInputs(*inputs.tensors, {"own_end": own_end, "query_start": torch.tensor([40])}))
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


@needs_extension
def test_the_plan_refuses_what_it_cannot_divide() -> None:
    for sizes in ((0, 1, 1, 1, 1), (1, 0, 1, 1, 1), (1, 1, 0, 1, 1), (1, 1, 1, -1, 1)):
        with pytest.raises(ValueError, match=r"sizes: expected .*, found"):
            EXTENSION.plan_prefix_attention(*sizes)
    with pytest.raises(ValueError, match=r"threads: expected 1..\d+, found 0"):
        EXTENSION.plan_prefix_attention(1, 1, 1, 1, 0)


# ---- instruction sets -----------------------------------------------------------------------------------------------

USE = """
import torch
from softprompt_fast import info, ops
x = torch.zeros(1, 1, 3, 8)
ops.prefix_attention(x, x, x, x[0], x[0], backend="cpu")
print(info.collect()["extension"]["cpu_isa"])
"""


@needs_extension
@pytest.mark.parametrize("name", [*ISAS, "auto", ""])
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    process = python(HERE, "-c", USE, SOFTPROMPT_FAST_CPU_ISA=name)
    assert process.communicate()[0].strip() == (name if name in ISAS else ISAS[0])


@needs_extension
def test_the_environment_names_no_instruction_set() -> None:
    message = f"environment SOFTPROMPT_FAST_CPU_ISA: expected one of auto, {', '.join(ISAS)} on this processor, "
    process = python(HERE, "-c", USE, SOFTPROMPT_FAST_CPU_ISA="avx1024")
    said, _ = process.communicate()
    assert process.returncode != 0 and f"ValueError: {message}found 'avx1024'" in said
    process = python(HERE, "-m", "softprompt_fast.cli", "info", SOFTPROMPT_FAST_CPU_ISA="avx1024", COLUMNS="500")
    said, _ = process.communicate()
    assert process.returncode == 3 and f"{message}found 'avx1024'" in said, said


@needs_extension
def test_the_instruction_sets_that_a_processor_has() -> None:
    features = native.cpu_features()
    assert ISAS[-1] == "portable"
    assert ("avx2" in ISAS) == all(features.get(name, False) for name in ("avx2", "fma", "f16c"))
    assert ("avx512" in ISAS) == all(features.get(f"avx512{name}", False) for name in ("f", "bw", "dq", "vl"))
    assert ("neon" in ISAS) == features.get("neon", False)
    with pytest.raises(ValueError, match=r"isa: expected one of auto, .*, found 'avx1024'"):
        EXTENSION.use_isa("avx1024")


# ---- compilers ------------------------------------------------------------------------------------------------------

ZIG = [sys.executable, "-m", "ziglang", "c++"]


@needs_clang
def test_the_kernels_compile_for_neon(tmp_path: Path) -> None:
    """With another compiler for another processor; warnings are errors. Bindings are slow to optimise."""
    flags = [f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    flags += [f'-DSOFTPROMPT_FAST_{name}="none"' for name in ("VERSION", "FLAGS", "TORCH", "CUDA")]
    sources = [ROOT / "csrc/registration.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]

    def run(source: Path) -> None:
        how = "-O3" if source.stem.startswith("isa_") else "-O0"
        target = tmp_path / f"{source.stem}.o"
        compile_file(source, target, how, *flags, using=[*ZIG, "-target", "aarch64-linux-gnu"])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, sources))
    # The file of another architecture holds one function, which returns null; kernels are some hundred kB.
    kernels = {path.stem for path in tmp_path.glob("isa_*.o") if path.stat().st_size > 50_000}
    assert kernels == {"isa_neon", "isa_portable"}


@needs_clang
@needs_extension
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="one target is named here")
def test_an_extension_by_clang_without_openmp(tmp_path: Path) -> None:
    """Another compiler's kernels compute the same, and one thread does where there is no OpenMP."""
    folder = overlay(tmp_path, CXX=shlex.join([*ZIG, "-target", "x86_64-linux-gnu"]), CXXFLAGS="-Werror")
    code = "from softprompt_fast.backends import native; print(native.status(), native.build_info())"
    said, _ = python(folder, "-c", code).communicate()
    assert "(True, 'loaded')" in said and "clang" in said and "-fopenmp" not in said, said
    for isa in ISAS:
        status, said = bad_calls(1000, 1, folder, SOFTPROMPT_FAST_CPU_ISA=isa)
        assert status == 0, said


# ---- sanitizers -----------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded, as Linux does it")
def test_some_calls_under_the_sanitizers(tmp_path: Path) -> None:
    """Every kernel and instruction set under AddressSanitizer and UBSan; ``make sanitize`` runs all op tests so."""
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("this is such a run")
    folder, environment = sanitized(ROOT / "build" / "sanitize")
    check(folder, environment)
    for isa in ISAS:
        status, said = bad_calls(1500, 2, folder, SOFTPROMPT_FAST_CPU_ISA=isa, **environment)
        assert status == 0, said
