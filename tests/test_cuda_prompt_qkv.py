# SPDX-License-Identifier: Apache-2.0
"""prompt_qkv's CUDA kernel for few rows against the float64 reference, at widths that its 16-byte loads divide
(tests/ops has the others, which take another form). On a CPU it is emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.backends import heuristics, native
from softprompt_fast.backends._registry import BackendError
from softprompt_fast.testing import assert_within_noise, poisoned_memory
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
