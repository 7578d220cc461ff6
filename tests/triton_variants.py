# SPDX-License-Identifier: Apache-2.0
"""Calls of the Triton backend that between them launch every kernel variant in use: what tests/triton_resources.json
has a row for. Each runs the backend's own host code, over tensors without memory (tests/triton_offline.py)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends._registry import OPS
from softprompt_fast.backends.triton import _tuning
from softprompt_fast.backends.triton._tunables import TUNABLES
from tests.triton_offline import ARCHITECTURES, SHARED_LIMIT

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """``call()`` makes its tensors on the default device and runs the backend's forward or backward."""

    op: str
    name: str
    call: Callable[[], object]
    products: bool  # 16-bit matrix products, which belong on tensor cores
    architectures: tuple[str, ...] = ARCHITECTURES

    @property
    def title(self) -> str:
        return f"{self.op} {self.name}"


def present(op: str) -> bool:
    return importlib.util.find_spec(f"softprompt_fast.backends.triton.{op}") is not None


def variants() -> list[Variant]:
    made = [*_merge_states(), *_prefix_attention(), *_prompt_concat(), *_prompt_qkv()]
    return [variant for variant in made if present(variant.op)]


def backend(op: str) -> Any:
    return importlib.import_module(f"softprompt_fast.backends.triton.{op}")


# ---- merge_states -----------------------------------------------------------------------------------------------


def _merge_states() -> Iterator[Variant]:
    for head_dim, dtype in ((64, "bf16"), (128, "bf16"), (128, "fp32"), (100, "bf16")):
        for backward in (False, True):
            yield Variant(
                "merge_states",
                f"{'backward' if backward else 'forward'} d{head_dim} {dtype}",
                lambda d=head_dim, t=DTYPES[dtype], b=backward: merge_states(d, t, b),
                products=False,
            )


def merge_states(head_dim: int, dtype: torch.dtype, backward: bool, queries: int = 512) -> object:
    out, lse = torch.empty(16, queries, 32, head_dim, dtype=dtype).transpose(1, 2), torch.empty(16, 32, queries)
    if backward:
        return backend("merge_states").backward(out, lse, out, lse, out, lse, lse)
    return backend("merge_states").forward(out, lse, out, lse)


# ---- prefix_attention -------------------------------------------------------------------------------------------

# The head dimensions of models (64, 128, 256), and an odd one, which needs masks.
HEADS = ((64, "bf16"), (128, "bf16"), (256, "bf16"), (100, "bf16"), (128, "fp32"))
OPTIONS = {
    "sliding_window": 300, "softcap": 30.0, "sinks": True, "bias": True, "packed": True, "padded": True,
}  # fmt: skip


def _prefix_attention() -> Iterator[Variant]:
    def variant(name: str, mode: str, head_dim: int, dtype: str, *archs: str, **options: Any) -> Variant:
        return Variant(
            "prefix_attention",
            f"{mode} d{head_dim} {dtype}{name}",
            lambda: prefix_attention(mode, head_dim, DTYPES[dtype], **options),
            products=dtype != "fp32",
            architectures=archs or ARCHITECTURES,
        )

    for mode in ("prefill", "decode", "backward"):
        for head_dim, dtype in HEADS:
            yield variant("", mode, head_dim, dtype)
        yield variant(" all options", mode, 128, "bf16", **OPTIONS)
    for mode in ("prefill", "decode"):
        yield variant(" int8 prefix", mode, 128, "bf16", prefix_dtype=torch.int8)
        e4m3 = torch.float8_e4m3fn
        yield variant(" e4m3 prefix", mode, 128, "bf16", "sm_90", "sm_100", prefix_dtype=e4m3)
    # One row, and few heads: other tiles.
    yield variant(" one row", "decode", 128, "bf16", batch=1)
    yield variant(" padded", "prefill", 128, "bf16", padded=True)
    yield variant(" static cache", "decode", 128, "bf16", padded=True, static=True)


def prefix_attention(
    mode: str,
    head_dim: int,
    dtype: torch.dtype,
    *,
    batch: int = 64,
    own: int = 512,
    capacity: int = 0,
    static: bool = False,
    prefix_dtype: torch.dtype | None = None,
    packed: bool = False,
    padded: bool = False,
    sinks: bool = False,
    bias: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> object:
    """Llama-8B's heads: 32 queries over 8 keys and values. A cache is ``[B, Hkv, T, D]``, a query a view of ``[B, S,
    Hq, D]``."""
    q_heads, kv_heads, prefix = 32, 8, 1024
    queries = 1 if mode == "decode" else own
    query = torch.empty(batch, queries, q_heads, head_dim, dtype=dtype).transpose(1, 2)
    shape = batch, kv_heads, max(own, capacity), head_dim
    key, value = (torch.empty(shape, dtype=dtype)[:, :, :own] for _ in range(2))
    prefix_key, prefix_value = (torch.empty(kv_heads, prefix, head_dim, dtype=prefix_dtype or dtype) for _ in range(2))
    index: dict[str, Tensor | None] = dict.fromkeys(("offsets", "index", "start", "end", "query_start"))
    if packed:
        index["offsets"] = torch.empty(5, dtype=torch.int32)
        index["index"] = torch.empty(batch, dtype=torch.int32)
    if padded:
        index["start"] = torch.empty(batch, dtype=torch.int32)
    if static or (packed and padded):
        index["end"] = torch.empty(batch, dtype=torch.int32)
        index["query_start"] = torch.empty(batch, dtype=torch.int32)
    tensors = query, key, value, prefix_key, prefix_value, *index.values()
    numbers = head_dim**-0.5, True, sliding_window, softcap
    sinks_ = torch.empty(q_heads, dtype=dtype) if sinks else None
    bias_ = torch.empty(1, q_heads, 1, prefix + own, dtype=dtype) if bias else None
    module = backend("prefix_attention")
    if mode == "backward":
        out = torch.empty(batch, queries, q_heads, head_dim, dtype=dtype).transpose(1, 2)
        lse = torch.empty(batch, q_heads, queries)
        return module.backward(out, None, *tensors, *numbers, sinks_, bias_, out, lse)
    scales: tuple[Any, ...] = (None, None, None)
    if prefix_dtype is not None:
        scales = torch.empty(kv_heads, prefix // 64), torch.empty(kv_heads, prefix // 64), 64
    return module.forward(*tensors, *numbers, sinks_, bias_, *scales)


# ---- prompt_concat and prompt_qkv -------------------------------------------------------------------------------

HIDDEN, VOCABULARY, PROMPT, OWN, ROWS = 4096, 32000, 128, 512, 64


def _prompt_concat() -> Iterator[Variant]:
    for name, options in (
        ("", {}),
        (" ragged", {"ragged": True}),
        (" embeddings", {"ids": False}),
        (" fp32", {"dtype": torch.float32}),
    ):
        for mode in ("forward", "backward"):
            yield Variant(
                "prompt_concat", f"{mode}{name}", lambda m=mode, o=options: prompt_concat(m, **o), products=False
            )


def _concat_arguments(ids: bool, ragged: bool, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if ids:
        tokens, table = torch.empty(ROWS, OWN, dtype=torch.int64), torch.empty(VOCABULARY, HIDDEN, dtype=dtype)
    else:
        tokens, table = torch.empty(ROWS, OWN, HIDDEN, dtype=dtype), None
    prompt = torch.empty(4 * PROMPT if ragged else PROMPT, HIDDEN, dtype=torch.float32)
    offsets = torch.empty(5, dtype=torch.int32) if ragged else None
    index, start = (torch.empty(ROWS, dtype=torch.int32) if ragged else None for _ in range(2))
    return (tokens, table, prompt, offsets, index, start), (PROMPT, 1.0, 1.0)


def prompt_concat(mode: str, *, ids: bool = True, ragged: bool = False, dtype: torch.dtype = torch.bfloat16) -> object:
    (tokens, table, *rest), numbers = _concat_arguments(ids, ragged, dtype)
    if mode == "forward":
        return backend("prompt_concat").forward(tokens, table, *rest, *numbers, dtype, True)
    grad = torch.empty(ROWS, PROMPT + OWN, HIDDEN, dtype=dtype)
    return backend("prompt_concat").backward(grad, tokens, *rest, *numbers, True)


def _prompt_qkv() -> Iterator[Variant]:
    decode = {"concat": False, "own": 1}
    for form, name, dtype, options in (
        ("one_kernel", "rms", "bf16", {}),
        ("one_kernel", "decode rms", "bf16", decode),
        ("one_kernel", "decode rms", "fp32", decode),
        ("one_kernel", "decode layer bias interleaved", "bf16", {**decode, "norm": "layer", "interleaved": True}),
        ("composed", "rms", "bf16", {}),
        ("composed", "rms", "fp32", {}),
        ("composed", "layer bias interleaved", "bf16", {"norm": "layer", "interleaved": True}),
        ("composed", "hidden states rms", "bf16", {"concat": False}),
        ("backward", "rms", "bf16", {}),
        ("backward", "layer interleaved", "bf16", {"norm": "layer", "interleaved": True}),
    ):
        yield Variant(
            "prompt_qkv",
            f"{form} {name} {dtype}",
            lambda f=form, t=DTYPES[dtype], o=options: prompt_qkv(f, t, **o),
            products=form == "one_kernel" and dtype != "fp32",
        )


def prompt_qkv(
    form: str,
    dtype: torch.dtype,
    *,
    concat: bool = True,
    own: int = OWN,
    norm: str = "rms",
    interleaved: bool = False,
) -> object:
    q_heads, kv_heads, head_dim = 32, 8, 128
    if concat:
        tensors, numbers = _concat_arguments(True, False, dtype)
        start = (*tensors, *numbers, dtype, True)
        length = PROMPT + OWN
    else:
        start = (torch.empty(ROWS, own, HIDDEN, dtype=dtype), *(None,) * 5, 0, 1.0, 1.0, dtype, True)
        length = own
    heads = (q_heads, kv_heads, kv_heads)
    weights = [torch.empty(count * head_dim, HIDDEN, dtype=dtype) for count in heads]
    layer = norm == "layer"
    biases = [torch.empty(count * head_dim, dtype=dtype) for count in heads] if layer else []
    gain, shift = torch.empty(HIDDEN, dtype=dtype), torch.empty(HIDDEN, dtype=dtype) if layer else None
    cos, sin = (torch.empty(1, length, head_dim, dtype=dtype) for _ in range(2))
    run = getattr(backend("prompt_qkv"), form)
    if form == "backward":
        grads = [torch.empty(ROWS, length, n, head_dim, dtype=dtype).transpose(1, 2) for n in heads]
        residual = torch.empty(ROWS, length, HIDDEN, dtype=dtype)
        tokens, _, *rest = start[:9]
        numbers = (weights, q_heads, kv_heads, norm, gain, 0.0, 1e-6, cos, sin, interleaved)
        return run(*grads, residual, residual, tokens, *rest, True, *numbers)
    return run(
        *start, weights, biases, q_heads, kv_heads, norm, gain, shift, 0.0, 1e-6, cos, sin, interleaved
    )  # fmt: skip


# ---- calls whose lengths change from one to the next -------------------------------------------------------------


def growing() -> dict[str, Callable[[int], object]]:
    """What a server calls again and again: title -> call with n, which grows by one a decoded token."""
    found: dict[str, Callable[[int], object]] = {
        "merge_states decode": lambda n: merge_states(128, torch.bfloat16, False, queries=1),
        "prefix_attention decode": lambda n: prefix_attention("decode", 128, torch.bfloat16, own=n, capacity=1024),
        "prefix_attention decode dense": lambda n: prefix_attention("decode", 128, torch.bfloat16, own=n),
        "prefix_attention decode padded": lambda n: prefix_attention(
            "decode", 128, torch.bfloat16, own=n, capacity=1024, padded=True, packed=True
        ),
        "prompt_qkv decode": lambda n: prompt_qkv("forward", torch.bfloat16, concat=False, own=1),
    }
    return {title: call for title, call in found.items() if present(title.split()[0])}


# ---- entries of the tuned tables --------------------------------------------------------------------------------


def entries() -> dict[str, tuple[str, Callable[[], object]]]:
    """Every entry of every table that ships: title -> architecture and a call that launches it.

    What stands in "default" must fit the smallest GPU, so it is compiled for one.
    """
    found: dict[str, tuple[str, Callable[[], object]]] = {}
    for place in sorted(path.name for path in _tuning.SHIPPED.iterdir()):
        arch = {"default": "sm_86", "interpreter": ""}.get(place, place)
        if arch not in SHARED_LIMIT:
            continue  # the interpreter compiles nothing, a device's own table was written where it ran
        for op in filter(present, OPS):
            for kernel, keys in _tuning.table(_tuning.SHIPPED, place, op).items():
                tunable = TUNABLES[op][kernel]
                for key, config in keys.items():
                    found[f"{place} {op} {kernel} {key}"] = arch, partial(_entry, op, tunable, key, config)
    return found


def _entry(op: str, tunable: Any, key: str, config: dict[str, Any]) -> object:
    with _tuning.overridden(op, tunable.kernel, config):
        return tunable.problem(key, torch.device("meta"))()
