# SPDX-License-Identifier: Apache-2.0
"""What ``softprompt-fast tune`` may vary: for every kernel its keys, the configurations worth a measurement, and a
typical call. Beside the kernels and not in their files, because calls of one op share how they are made.

Sizes are those of Llama-3.1-8B: 32 query heads over 8 key/value heads, 4096 wide.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.triton import _tuning
from softprompt_fast.backends.triton._tuning import Tunable

HEAD_DIMS = (16, 32, 64, 128, 256)
Q_HEADS, KV_HEADS, HIDDEN = 32, 8, 4096
_HEAD_KEYS = tuple(f"d{size}-{bits}bit" for size in HEAD_DIMS for bits in (16, 32))

Call = Callable[[], Sequence[Tensor]]


def _varied(op: str, kernel: str, key: str, /, **axes: Sequence[Any]) -> list[dict[str, Any]]:
    """What ships by default for the key, with every combination of some of its values."""
    default = _tuning.table(_tuning.SHIPPED, "default", op)[kernel][key]
    return [{**default, **dict(zip(axes, values, strict=True))} for values in product(*axes.values())]


def _numbers(key: str) -> list[int]:
    """Example: "d128-16bit-m64": 128, 16, 64."""
    return [int(x) for x in re.findall(r"\d+", key)]


def _dtype(bits: int) -> torch.dtype:
    return torch.bfloat16 if bits == 16 else torch.float32


def _backend(op: str) -> Any:
    return importlib.import_module(f"softprompt_fast.backends.triton.{op}")


# ---- merge_states -----------------------------------------------------------------------------------------------


def _merge_states(kernel: str, key: str, device: torch.device) -> Call:
    """States as prefix_attention makes them: views of [B, S, H, D] memory, 192 MiB an output."""
    size, bits = _numbers(key)
    shape = 16, 3 * 2**26 // (16 * 32 * size * (bits // 8)), 32, size
    out_a, out_b, grad = (torch.randn(shape, dtype=_dtype(bits), device=device).transpose(1, 2) for _ in range(3))
    lse_a, lse_b, grad_lse = (torch.randn(out_a.shape[:-1], device=device) for _ in range(3))
    module = _backend("merge_states")
    if kernel == "forward":
        return lambda: module.forward(out_a, lse_a, out_b, lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    return lambda: module.backward(grad, grad_lse, out_a, lse_a, out_b, lse_b, lse)


def _merge_states_tunable(kernel: str) -> Tunable:
    def candidates(key: str) -> list[dict[str, Any]]:
        return _varied("merge_states", kernel, key, BLOCK_ROWS=(4, 8, 16, 32, 64, 128), num_warps=(2, 4, 8))

    return Tunable(kernel, _HEAD_KEYS, candidates, partial(_merge_states, kernel))


# ---- prefix_attention -------------------------------------------------------------------------------------------


def _attention(
    size: int,
    bits: int,
    device: torch.device,
    *,
    batch: int,
    queries: int,
    own: int,
    prefix: int,
    mixed: bool = False,
    prefix_bits: int | None = None,
    bias: bool = False,
    options: bool = False,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The op's arguments up to bias, and those about a quantised prefix."""
    make = partial(torch.randn, dtype=_dtype(bits), device=device)
    query = make(batch, queries, Q_HEADS, size).transpose(1, 2)
    key, value = (make(batch, KV_HEADS, own, size) for _ in range(2))
    prefix_key, prefix_value = (make(KV_HEADS, prefix, size) for _ in range(2))
    scales: tuple[Any, ...] = (None, None, None)
    if prefix_bits == 8:
        prefix_key, prefix_value = (
            torch.randint(-127, 128, x.shape, dtype=torch.int8, device=device) for x in (prefix_key, prefix_value)
        )
        scales = *(torch.rand(KV_HEADS, prefix // 64, device=device) / 64 for _ in range(2)), 64
    offsets = index = None
    if mixed:
        offsets = torch.arange(0, prefix + 1, prefix // 4, dtype=torch.int32, device=device)
        index = torch.arange(batch, dtype=torch.int32, device=device) % 4
    window, softcap = (256, 30.0) if options else (None, None)
    slopes = make(1, Q_HEADS, 1, prefix + own) if bias else None
    tensors = (query, key, value, prefix_key, prefix_value, offsets, index, None, None, None)
    return (*tensors, size**-0.5, True, window, softcap, None, slopes), scales


def _prefill(key: str, device: torch.device) -> Call:
    size, bits, *prefix_bits = _numbers(key)
    lengths: dict[str, Any] = {"batch": 16, "queries": 512, "own": 512, "prefix": 512}
    arguments, scales = _attention(
        size, bits, device, **lengths, prefix_bits=next(iter(prefix_bits), None), bias=key.endswith("-general")
    )
    return lambda: _backend("prefix_attention").forward(*arguments, *scales)


def _decode(key: str, device: torch.device) -> Call:
    """Rows for tiles of the key's height, four grouped heads each, and for each of four prefixes in general."""
    size, bits, rows = _numbers(key)
    mixed = key.endswith("-general")
    batch = (rows if rows < 128 else 256) // 4 * (4 if mixed else 1)
    arguments, scales = _attention(
        size, bits, device, batch=batch, queries=1, own=16384 // batch, prefix=4096, mixed=mixed
    )
    return lambda: _backend("prefix_attention").forward(*arguments, *scales)


def _backward(key: str, device: torch.device) -> Call:
    size, bits = _numbers(key)
    size -= 4 if key.endswith("-odd") else 0
    lengths: dict[str, Any] = {"batch": 16, "queries": 512, "own": 512, "prefix": 512}
    arguments, _ = _attention(size, bits, device, **lengths, options=key.endswith("-options"))
    module = _backend("prefix_attention")
    out, lse = module.forward(*arguments)
    grad = torch.randn(16, 512, Q_HEADS, size, dtype=out.dtype, device=device).transpose(1, 2)
    # Without sinks their gradient is None.
    return lambda: module.backward(grad, None, *arguments, out, lse)[:5]


def _tiles(kernel: str, **axes: Sequence[Any]) -> Callable[[str], list[dict[str, Any]]]:
    """Tiles of products. In float32 registers hold half as many elements, and nothing runs on warp groups."""

    def candidates(key: str) -> list[dict[str, Any]]:
        narrow = _numbers(key)[1] == 32
        chosen = {
            "BLOCK_M": (16, 32, 64) if narrow else (64, 128),
            "BLOCK_N": (16, 32, 64) if narrow else (32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (1, 2) if narrow else (2, 3, 4),
            **axes,
        }
        return _varied("prefix_attention", kernel, key, **chosen)

    return candidates


def _decode_candidates(key: str) -> list[dict[str, Any]]:
    """What divides the work stays: its heuristic knows the number of multiprocessors."""
    return _varied(
        "prefix_attention", "decode", key, BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)
    )  # fmt: skip


_PREFIX_ATTENTION = (
    Tunable(
        "prefill",
        tuple(f"{key}{end}" for key in _HEAD_KEYS for end in ("", "-prefix8bit", "-general")),
        _tiles("prefill"),
        _prefill,
    ),
    Tunable(
        "decode",
        tuple(f"{key}-m{n}{end}" for key in _HEAD_KEYS for n in (16, 32, 64, 128) for end in ("", "-general")),
        _decode_candidates,
        _decode,
    ),
    Tunable(
        "combine",
        tuple(f"d{size}" for size in HEAD_DIMS),
        lambda key: _varied("prefix_attention", "combine", key, BLOCK_ROWS=(1, 2, 4, 8, 16), num_warps=(1, 2, 4)),
        lambda key, device: _decode(f"{key}-16bit-m16", device),
    ),
    Tunable(
        "plan",
        ("any",),
        lambda key: _varied("prefix_attention", "plan", key, BLOCK=(16, 32, 64, 128), num_warps=(1, 2, 4)),
        lambda key, device: _decode("d128-16bit-m128-general", device),
    ),
    Tunable(
        "backward_sums",
        _HEAD_KEYS,
        lambda key: _varied("prefix_attention", "backward_sums", key, BLOCK_M=(16, 32, 64, 128), num_warps=(2, 4, 8)),
        _backward,
    ),
    *(
        Tunable(
            kernel,
            tuple(f"{k}{end}" for k in _HEAD_KEYS for end in ("", "-options", "-odd")),
            _tiles(kernel),
            _backward,
        )
        for kernel in ("backward_query", "backward_own", "backward_prefix")
    ),
)


# ---- prompt_concat ----------------------------------------------------------------------------------------------


def _prompt_concat(kernel: str, key: str, device: torch.device) -> Call:
    dtype, rows, prompt_length, own = _dtype(_numbers(key)[0]), 64, 128, 512
    table = torch.randn(32000, HIDDEN, dtype=dtype, device=device)
    prompt = torch.randn(prompt_length, HIDDEN, device=device)
    ids = torch.randint(0, table.shape[0], (rows, own), device=device)
    rest = (prompt, None, None, None, prompt_length, 1.0, 1.0)
    module = _backend("prompt_concat")
    if kernel == "forward":
        return lambda: (module.forward(ids, table, *rest, dtype, True),)
    grad = torch.randn(rows, prompt_length + own, HIDDEN, dtype=dtype, device=device)
    if kernel == "backward_prompt":
        return lambda: module.backward(grad, ids, *rest, True)[:1]
    tokens = torch.empty(rows, own, HIDDEN, dtype=dtype, device=device)
    return lambda: module.backward(grad, tokens, *rest, True)


def _prompt_concat_tunable(kernel: str) -> Tunable:
    def candidates(key: str) -> list[dict[str, Any]]:
        rows = (4, 8, 16, 32) if kernel == "backward_prompt" else (1, 2, 4, 8)
        columns = (128, 256, 512) if kernel == "backward_prompt" else (512, 1024, 2048, 4096)
        return _varied(
            "prompt_concat", kernel, key, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns, num_warps=(2, 4, 8)
        )  # fmt: skip

    return Tunable(kernel, ("16bit", "32bit"), candidates, partial(_prompt_concat, kernel))


# ---- prompt_qkv -------------------------------------------------------------------------------------------------


def _prompt_qkv(form: str, key: str, device: torch.device) -> Call:
    """One kernel: a decode step of 64 rows, or their prefill. Around the library's products: gathered rows."""
    bits = _numbers(key)[-1]
    make = partial(torch.randn, dtype=_dtype(bits), device=device)
    width = _numbers(key)[0] if key.startswith("h") else HIDDEN
    head_dim = _numbers(key)[0] if key.startswith("d") else 128
    hidden = make(64, 1 if key.startswith("few") else 256, width)
    weights = [make(heads * head_dim, width) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
    gain = make(width)
    cos, sin = (make(1, hidden.shape[1], head_dim) for _ in range(2))
    nothing = (None, None, None, None)
    module = _backend("prompt_qkv")
    if form == "backward":
        heads = [make(64, 256, n, head_dim).transpose(1, 2) for n in (Q_HEADS, KV_HEADS, KV_HEADS)]
        frozen = (weights, Q_HEADS, KV_HEADS, "rms", gain, 0.0, 1e-6, cos, sin, False)
        return lambda: module.backward(*heads, hidden, hidden, hidden, *nothing, 0, 1.0, 1.0, True, *frozen)[:1]
    start = (hidden, None, *nothing, 0, 1.0, 1.0, hidden.dtype, True)
    layer = (Q_HEADS, KV_HEADS, "rms", gain, None, 0.0, 1e-6, cos, sin, False)
    return lambda: getattr(module, form)(*start, weights, [], *layer)


def _one_kernel_candidates(key: str) -> list[dict[str, Any]]:
    rows = (16, 32, 64) if key.startswith("few") else (64, 128)
    tiles = {"BLOCK_N": (16, 32, 64, 128), "BLOCK_K": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
    return _varied("prompt_qkv", "one_kernel", key, BLOCK_M=rows, **tiles)


def _rows(kernel: str) -> Callable[[str], list[dict[str, Any]]]:
    """Kernels that pass over rows once."""

    def candidates(key: str) -> list[dict[str, Any]]:
        shipped = _tuning.table(_tuning.SHIPPED, "default", "prompt_qkv")[kernel][key]["BLOCK_ROWS"]
        rows = sorted({max(1, shipped // 4), max(1, shipped // 2), shipped, 2 * shipped, 4 * shipped})
        return _varied("prompt_qkv", kernel, key, BLOCK_ROWS=rows, num_warps=(2, 4, 8, 16))

    return candidates


_WIDTH_KEYS = tuple(f"h{256 << i}-{bits}bit" for i in range(7) for bits in (16, 32))
_PROMPT_QKV = (
    Tunable(
        "one_kernel",
        tuple(f"{mode}-{bits}bit" for mode in ("few", "many") for bits in (16, 32)),
        _one_kernel_candidates,
        partial(_prompt_qkv, "one_kernel"),
    ),
    Tunable("normalise", _WIDTH_KEYS, _rows("normalise"), partial(_prompt_qkv, "composed")),
    Tunable("normalise_backward", _WIDTH_KEYS, _rows("normalise_backward"), partial(_prompt_qkv, "backward")),
    Tunable("turn", _HEAD_KEYS, _rows("turn"), partial(_prompt_qkv, "composed")),
)

# op -> kernel, as the tables name it -> how to tune it
TUNABLES: dict[str, dict[str, Tunable]] = {
    op: {tunable.kernel: tunable for tunable in tunables}
    for op, tunables in {
        "prefix_attention": _PREFIX_ATTENTION,
        "merge_states": [_merge_states_tunable(kernel) for kernel in ("forward", "backward")],
        "prompt_concat": [_prompt_concat_tunable(k) for k in ("forward", "backward_prompt", "backward_tokens")],
        "prompt_qkv": _PROMPT_QKV,
    }.items()
}
