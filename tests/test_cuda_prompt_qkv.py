# SPDX-License-Identifier: Apache-2.0
"""prompt_qkv's CUDA kernel for few rows against the float64 reference, at widths that its 16-byte loads divide
(others are Triton's, which tests/ops has), and the norm of heads behind it. On a CPU they are emulated."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.backends import heuristics, native
from softprompt_fast.backends._registry import BackendError
from softprompt_fast.backends.norm import Norm
from softprompt_fast.testing import assert_within_noise, guarded, poisoned_memory
from tests.device import cpu_only

module, reason = native.load_cuda()
pytestmark = pytest.mark.skipif(module is None, reason=f"CUDA kernels: {reason}")
NAMES = ("query", "key", "value", "residual")
VOCABULARY = 11
DTYPES = [torch.bfloat16, torch.float16]
CASES: dict[str, dict[str, Any]] = {
    "hidden states": {},
    "one weight": {"apart": False},
    "bias": {"bias": True},
    "no norm": {"norm": "none"},
    "rms without weight": {"weighted": False},
    "gemma": {"norm_offset": 1.0},
    "layer": {"norm": "layer", "bias": True},
    "layer without weight": {"norm": "layer", "weighted": False},
    "no rotation": {"rotation": 0},
    "partial rotation": {"rotation": 4},
    "interleaved": {"interleaved": True},
    "interleaved partial": {"interleaved": True, "rotation": 6},
    "positions per row": {"per_row": True},
    "other value size": {"v_dim": 6},
    "many columns": {"q_heads": 12, "kv_heads": 3, "head_dim": 20},
    "prompt and ids": {"prompt": 5},
    "prompt and embeddings": {"prompt": 5, "ids": False},
    "padded, scaled": {"prompt": 5, "own_start": [0, 1, 4], "scale": 2.0, "prompt_scale": 3.0},
    "packed, layer": {"prompt": 5, "prompt_offsets": [0, 2, 5], "prompt_index": [1, -1, 0], "norm": "layer"},
    "right side": {"prompt": 5, "prompt_offsets": [0, 2, 5], "prompt_index": [1, -1, 0], "padding_side": "right"},
    "two tiles": {"batch": 5, "tokens": 5},
    "four tiles": {"batch": 7, "tokens": 7},
    "two blocks of rows": {"batch": 10, "tokens": 10, "width": 40},
    "all rows": {"batch": 128, "tokens": 1, "width": 8},
    "one chunk": {"width": 8},
    "more chunks than warps": {"width": 552},
    "one row": {"batch": 1, "tokens": 1},
}


def make(dtype: torch.dtype, **change: Any) -> dict[str, Any]:
    """Keyword arguments of ``prompt_qkv``."""
    made = {
        "batch": 3, "tokens": 4, "width": 72, "q_heads": 4, "kv_heads": 2, "head_dim": 8, "norm": "rms", "bias": False,
        "weighted": True, "per_row": False, "prompt": None, "ids": True, "apart": True, **change,
    }  # fmt: skip
    batch, tokens, width, prompt, dim = (made.pop(k) for k in ("batch", "tokens", "width", "prompt", "head_dim"))
    rotation, v_dim = made.pop("rotation", dim), made.pop("v_dim", dim)
    rows = [made["q_heads"] * dim, made["kv_heads"] * dim, made["kv_heads"] * v_dim]
    rows = rows if made.pop("apart") else [sum(rows)]
    weights = [torch.randn(n, width).mul(width**-0.5).to(dtype) for n in rows]
    biases = [torch.randn(n).to(dtype) for n in rows]
    call: dict[str, Any] = {"weight": weights if len(rows) == 3 else weights[0]}
    if made.pop("bias"):
        call["bias"] = biases if len(rows) == 3 else biases[0]
    if made.pop("weighted") and made["norm"] != "none":
        call["norm_weight"] = torch.randn(width).to(dtype)
        if made["norm"] == "layer":
            call["norm_bias"] = torch.randn(width).to(dtype)
    ids, length = made.pop("ids"), tokens
    call["tokens"] = torch.randn(batch, tokens, width).to(dtype)
    if prompt is not None:
        call["prompt"] = torch.randn(prompt, width).to(dtype)
        length += 3 if "prompt_offsets" in made else prompt
        if ids:
            call["table"] = torch.randn(VOCABULARY, width).to(dtype)
            call["tokens"] = torch.randint(0, VOCABULARY, (batch, tokens))
    per_row = made.pop("per_row")
    if rotation:
        angles = torch.randn(batch if per_row else 1, length, rotation, dtype=torch.float64)
        call["cos"], call["sin"] = angles.cos().to(dtype), angles.sin().to(dtype)
    made = {k: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for k, v in made.items()}
    return {**call, **made}


def widened(x: Any) -> Any:
    if isinstance(x, list):
        return [widened(y) for y in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms that the backend took."""
    from softprompt_fast.backends.cuda import prompt_qkv

    taken: list[str] = []
    kernel, other = prompt_qkv.into_cache, prompt_qkv.many_rows.forward
    monkeypatch.setattr(prompt_qkv, "into_cache", lambda *args: (taken.append("kernel"), kernel(*args))[1])
    monkeypatch.setattr(prompt_qkv.many_rows, "forward", lambda *args: (taken.append("other"), other(*args))[1])
    return taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, dtype: torch.dtype, calls: list[str]) -> None:
    call = make(dtype, **CASES[name])
    with poisoned_memory():
        found = ops.prompt_qkv(**call, backend="cuda")
    assert calls == ["kernel"]
    oracle = ops.prompt_qkv(**{k: widened(v) for k, v in call.items()}, backend="reference")
    plain = ops.prompt_qkv(**call, backend="torch")
    for what, x, y, z in zip(NAMES, found, oracle, plain, strict=True):
        assert x.dtype == dtype
        assert_within_noise(x, y, z, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_rows_do_not_overflow(dtype: torch.dtype) -> None:
    """Before its norm a row may be near fp16's limit, and its square beyond."""
    call = make(dtype, norm_offset=1.0)
    call["tokens"] = (call["tokens"] * 1e4).clamp(-6e4, 6e4)
    found = ops.prompt_qkv(**call, backend="cuda")
    oracle = ops.prompt_qkv(**{k: widened(v) for k, v in call.items()}, backend="reference")
    plain = ops.prompt_qkv(**call, backend="torch")
    for what, x, y, z in zip(NAMES, found, oracle, plain, strict=True):
        assert_within_noise(x, y, z, what)


def test_keys_and_values_go_where_they_stay() -> None:
    """Into views of a cache, whose other entries stay as they were; without a residual."""
    from softprompt_fast.backends.cuda import prompt_qkv

    call = make(torch.bfloat16)
    want = ops.prompt_qkv(**call, backend="cuda")
    cache = torch.full((2, 3, 2, 9, 8), 7.0).to(torch.bfloat16)  # [key or value, B, Hkv, T, D]
    key, value = cache[0, :, :, 3:7], cache[1, :, :, 3:7]
    query = torch.empty(3, 4, 4, 8, dtype=torch.bfloat16)
    layer = (4, 2, "rms", call["norm_weight"], None, 0.0, 1e-6, call["cos"], call["sin"], False)
    rows = (call["tokens"], None, None, None, None, None, 0, 1.0, 1.0, True)
    prompt_qkv.into_cache(*rows, call["weight"], None, *layer, query, key, value, None)
    for x, y in zip((query, key, value), want, strict=False):
        assert torch.equal(x, y)
    assert cache[:, :, :, :3].eq(7).all() and cache[:, :, :, 7:].eq(7).all()


def into_static(start: int, capacity: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Keys and values of 4 tokens appended behind `start` in a cache of `capacity`, and what they should be."""
    from softprompt_fast.backends.cuda import prompt_qkv

    call = make(torch.bfloat16)
    want = ops.prompt_qkv(**call, backend="cuda")
    cache = torch.full((2, 3, 2, capacity, 8), 7.0).to(torch.bfloat16)  # [key or value, B, Hkv, T, D]
    query = torch.empty(3, 4, 4, 8, dtype=torch.bfloat16)
    layer = (4, 2, "rms", call["norm_weight"], None, 0.0, 1e-6, call["cos"], call["sin"], False)
    rows = (call["tokens"], None, None, None, None, None, 0, 1.0, 1.0, True)
    results = (query, cache[0], cache[1], None, torch.tensor([start]))
    prompt_qkv.into_cache(*rows, call["weight"], None, *layer, *results)
    assert torch.equal(query, want[0])
    return want[1:3], cache


@pytest.mark.parametrize("start", [0, 3, 5])
def test_a_static_cache_is_filled_where_a_tensor_says(start: int) -> None:
    want, cache = into_static(start, 9)
    for x, y in zip(cache, want, strict=True):
        assert torch.equal(x[:, :, start : start + 4], y)
        assert x[:, :, :start].eq(7).all() and x[:, :, start + 4 :].eq(7).all()


@cpu_only
@pytest.mark.parametrize("start", [6, -1])
def test_a_static_cache_without_room_is_an_assertion_and_no_wild_store(start: int) -> None:
    """On a GPU it ends the process's use of the device, so it is tested here alone."""
    with pytest.raises(RuntimeError, match="a static cache has no room for the new tokens"):
        into_static(start, 9)


# ---- heads with a norm ----------------------------------------------------------------------------------------------

NORMED: dict[str, dict[str, Any]] = {
    "hidden states": {},
    "token ids": {"prompt": 0},
    "prompt and ids, padded": {"prompt": 5, "own_start": [0, 1, 4]},
    "bias": {"bias": True},
    "gemma": {"offset": 1.0},
    "partial rotation": {"rotation": 4},
    "positions per row": {"per_row": True},
    "heads of 2": {"head_dim": 2},
    "heads of 64": {"head_dim": 64, "width": 64},
    "heads of 66": {"head_dim": 66, "rotation": 34, "width": 64},
    "heads of 96": {"head_dim": 96, "width": 64},
    "heads of 128": {"head_dim": 128, "q_heads": 2, "kv_heads": 1, "batch": 1, "tokens": 2},
    "heads of 256": {"head_dim": 256, "q_heads": 2, "kv_heads": 1, "batch": 1, "tokens": 2, "width": 40},
    "one row": {"batch": 1, "tokens": 1},
    "many rows": {"batch": 10, "tokens": 13, "width": 8},  # projected in the other form
}


def head_norms(dtype: torch.dtype, dim: int, offset: float = 0.0) -> tuple[Norm, Norm]:
    """Of q and k, which differ in all that they may; eps is such that it tells."""
    q_weight, k_weight = (torch.randn(2, dim) + 1 - offset).to(dtype)
    return Norm("rms", q_weight, None, offset, 1e-2), Norm("rms", k_weight, None, offset, 1e-1)


def as_modules_do(x: Tensor, norm: Norm, cos: Tensor, sin: Tensor) -> Tensor:
    """A norm of heads ``[B, heads, S, D]`` and the rotation, rounded where transformers' modules round."""
    assert norm.weight is not None
    x = F.rms_norm(x, x.shape[-1:], None, norm.eps) * (norm.weight.to(x.dtype) + norm.offset)
    size = cos.shape[-1]
    first, second = x[..., :size].chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    turned = x[..., :size] * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, x[..., size:]], -1)


def normed(call: dict[str, Any], norms: tuple[Norm, Norm], backend: str) -> list[Tensor]:
    """Query, key and value by a backend's projection, which has no rotation, and PyTorch behind it."""
    plain = {key: x for key, x in call.items() if key not in ("cos", "sin")}
    query, key, value, _ = ops.prompt_qkv(**plain, backend=backend)
    turned = [as_modules_do(x, n, call["cos"], call["sin"]) for x, n in zip((query, key), norms, strict=True)]
    return [*turned, value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMED)
def test_forward_with_norms_of_heads(name: str, dtype: torch.dtype) -> None:
    from softprompt_fast.backends.cuda import prompt_qkv

    change = {**NORMED[name]}
    offset = change.pop("offset", 0.0)
    call = make(dtype, **change)
    norms = head_norms(dtype, change.get("head_dim", 8), offset)
    plain = {key: x for key, x in call.items() if key not in ("cos", "sin")}
    with poisoned_memory():
        query, key, value, _ = ops.prompt_qkv(**plain, backend="cuda")
        prompt_qkv.norm_heads(query, key, *norms, call["cos"], call["sin"])
    oracle = normed({k: widened(v) for k, v in call.items()}, norms, "reference")
    for what, x, y, z in zip(NAMES, (query, key, value), oracle, normed(call, norms, "torch"), strict=False):
        assert x.dtype == dtype
        assert_within_noise(x, y, z, what)


def test_heads_of_random_sizes() -> None:
    """Views with any strides of memory that holds NaN everywhere else, and a static cache's other places."""
    from softprompt_fast.backends.cuda import prompt_qkv

    draw = random.Random(0)
    orders = [(0, 2, 1, 3), (0, 1, 2, 3), (2, 0, 1, 3), (0, 2, 3, 1)]
    for _ in range(60):
        batch, length, q_heads, kv_heads, free = (draw.randint(1, most) for most in (4, 5, 5, 3, 6))
        dim, dtype = 2 * draw.randint(1, 128), draw.choice(DTYPES)
        size, start = 2 * draw.randint(1, dim // 2), draw.randint(0, free)
        query = guarded((batch, q_heads, length, dim), dtype, order=draw.choice(orders))
        key = guarded((batch, kv_heads, length + free, dim), dtype, order=draw.choice(orders))
        angles = torch.randn(draw.choice((1, batch)), length, size, dtype=torch.float64)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        norms = head_norms(dtype, dim, draw.choice((0.0, 1.0)))
        new = key[:, :, start : start + length].clone()
        pairs = list(zip((query.clone(), new), norms, strict=True))
        baseline = [as_modules_do(x, norm, cos, sin) for x, norm in pairs]
        oracle = [as_modules_do(x.double(), norm, cos.double(), sin.double()) for x, norm in pairs]
        others = key.clone()
        prompt_qkv.norm_heads(query, key, *norms, cos, sin, torch.tensor([start], dtype=torch.int32))
        found = key[:, :, start : start + length].clone()
        for what, x, y, z in zip(("query", "key"), (query, found), oracle, baseline, strict=True):
            assert_within_noise(x, y, z, what)
        key[:, :, start : start + length] = others[:, :, start : start + length]
        assert torch.equal(key, others)


@cpu_only
@pytest.mark.parametrize("start", [6, -1])
def test_heads_beyond_a_static_cache_are_an_assertion(start: int) -> None:
    from softprompt_fast.backends.cuda import prompt_qkv

    query, key = torch.ones(1, 2, 4, 8).bfloat16(), torch.ones(1, 1, 9, 8).bfloat16()
    cos = torch.ones(1, 4, 8).bfloat16()
    with pytest.raises(RuntimeError, match="a static cache has no room for the new tokens"):
        prompt_qkv.norm_heads(query, key, *head_norms(torch.bfloat16, 8), cos, cos, torch.tensor([start]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": (1, 1, 5, 8)}, "key: expected 4 places without a start, found 5"),
        ({"key": (2, 1, 4, 8)}, "key: does not fit"),
        ({"query": (1, 2, 4, 7)}, "with an even D"),
        ({"query": (1, 2, 4, 258), "key": (1, 1, 4, 258), "dim": 258}, "expected heads of at most 256, found 258"),
        ({"dim": 6}, "weight: does not fit"),
        ({"cos": (1, 3, 8)}, "cos: does not fit"),
        ({"cos": (1, 4, 10)}, "cos, sin: expected an even number up to 8, found 10"),
        ({"cos": (1, 4, 0)}, "cos, sin: expected angles"),
        ({"angles": torch.float32}, "cos, sin: expected angles in the others' dtype, found float32"),
        ({"dtype": torch.float32}, "query: expected bfloat16 or float16"),
    ],
    ids=str,
)
def test_heads_that_the_norm_does_not_take(change: dict[str, Any], message: str) -> None:
    from softprompt_fast.backends.cuda import prompt_qkv

    given = {"query": (1, 2, 4, 8), "key": (1, 1, 4, 8), "cos": (1, 4, 8), "dim": 8, "dtype": torch.bfloat16, **change}
    query, key = (torch.ones(given[name], dtype=given["dtype"]) for name in ("query", "key"))
    cos = torch.ones(given["cos"], dtype=given.get("angles", given["dtype"]))
    with pytest.raises(ValueError, match=message):
        prompt_qkv.norm_heads(query, key, *head_norms(given["dtype"], given["dim"]), cos, cos)


def test_opcheck_of_the_norm_of_heads() -> None:
    from softprompt_fast.backends.cuda import prompt_qkv

    query, key = (torch.randn(3, heads, 4, 8).to(torch.bfloat16) for heads in (4, 2))
    norms = [x for norm in head_norms(torch.bfloat16, 8) for x in (norm.weight, norm.offset, norm.eps)]
    cos = torch.ones(1, 4, 8, dtype=torch.bfloat16)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(prompt_qkv._HEAD_NORM, (query, key, *norms, cos, cos, None), test_utils=checks)


# ---- what the kernel does not take ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"width": 12},
        {"batch": 129, "tokens": 1, "width": 8},
        {"v_dim": 3},
        {"prompt": 5, "mixed": True},
        {"strided": True},
        {"late": True},
    ],
    ids=["float32", "width", "rows", "odd head", "two dtypes", "columns apart", "unaligned"],
)
def test_what_takes_the_other_form(change: dict[str, Any], calls: list[str]) -> None:
    flags = {name: change.get(name, False) for name in ("mixed", "strided", "late")}
    call = make(**{"dtype": torch.bfloat16, **{k: v for k, v in change.items() if k not in flags}})
    if flags["mixed"]:
        call["prompt"] = call["prompt"].float()
    if flags["strided"]:
        call["tokens"] = call["tokens"].repeat_interleave(2, -1)[..., ::2]
    if flags["late"]:
        call["tokens"] = torch.cat([call["tokens"].flatten()[:1], call["tokens"].flatten()])[1:].view(3, 4, 72)
    found = ops.prompt_qkv(**call, backend="cuda")
    assert calls == ["other"]
    oracle = ops.prompt_qkv(**{k: widened(v) for k, v in call.items()}, backend="reference")
    plain = ops.prompt_qkv(**call, backend="reference")
    for what, x, y, z in zip(NAMES, found, oracle, plain, strict=True):
        assert_within_noise(x, y, z, what)


def test_gradients_through_the_kernel() -> None:
    grads = []
    for backend, wide in (("cuda", False), ("reference", True), ("reference", False)):
        torch.manual_seed(0)
        call = make(torch.bfloat16, prompt=5, own_start=[0, 1, 4])
        call = {k: widened(v) for k, v in call.items()} if wide else call
        call["prompt"].requires_grad_()
        results = ops.prompt_qkv(**call, backend=backend)
        weights = [torch.randn(x.shape).to(torch.bfloat16).to(x.dtype) for x in results]
        grads.append(torch.autograd.grad(results, call["prompt"], weights)[0])
    assert_within_noise(*grads, "gradient of prompt")


def test_float64_is_refused() -> None:
    with pytest.raises(BackendError, match="it takes float32, bfloat16 and float16, found float64"):
        ops.prompt_qkv(**make(torch.float64), backend="cuda")


def test_the_limit_is_the_heuristic() -> None:
    assert heuristics.fuse_projection(128) and not heuristics.fuse_projection(129)


@pytest.mark.parametrize("name", ["hidden states", "padded, scaled"])
def test_opcheck(name: str) -> None:
    call = make(torch.bfloat16, **CASES[name])
    given = [call.get(key) for key in ("table", "prompt", "prompt_offsets", "prompt_index", "own_start")]
    scales = (0 if call.get("prompt") is None else 5, call.get("scale", 1.0), call.get("prompt_scale", 1.0))
    layer = (4, 2, "rms", call["norm_weight"], None, 0.0, 1e-6, call["cos"], call["sin"], False)
    args = (call["tokens"], *given, *scales, torch.bfloat16, True, call["weight"], [], *layer, "cuda")
    torch.library.opcheck(torch.ops.softprompt_fast.prompt_qkv.default, args)


def test_a_decode_loop_compiles_once() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.prompt_qkv, fullgraph=True, backend="aot_eager", dynamic=True)
    calls = [make(torch.bfloat16, batch=batch, tokens=1, per_row=True) for batch in (3, 4, 17)]
    for call in calls:
        call.update({k: calls[0][k] for k in ("weight", "norm_weight")})
    found = [compiled(**calls[0], backend="cuda")]
    with torch.compiler.set_stance("fail_on_recompile"):
        found += [compiled(**call, backend="cuda") for call in calls[1:]]
    for call, results in zip(calls, found, strict=True):
        want = ops.prompt_qkv(**call, backend="cuda")
        assert all(torch.equal(x, y) for x, y in zip(results, want, strict=True))
