# SPDX-License-Identifier: Apache-2.0
"""prompt_qkv in CUDA C++ for the few rows of a decode step, in one launch: see ``csrc/cuda/prompt_qkv.cuh``.

More rows are bound by the product, which a library does better: they, float32, and what the kernel's 16-byte loads
don't fit take Triton's form of the op, or PyTorch's where there is no Triton. So do the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import heuristics, native_ops
from softprompt_fast.backends.cuda import _runtime
from softprompt_fast.backends.norm import KINDS, Norm
from softprompt_fast.backends.torch import prompt_qkv as torch_backend

many_rows: Any
try:
    from softprompt_fast.backends.triton import prompt_qkv as many_rows
except ImportError:
    many_rows = torch_backend

_OP = native_ops.op("prompt_qkv", "cuda")
_HEAD_NORM = native_ops.op("head_norm", "cuda")

backward = many_rows.backward


def reasons(*args: Any) -> list[str]:
    tensors = [*args[:3], *args[11], *args[12], args[16], args[17], args[20], args[21]]
    why = _runtime.refusals(*(x for x in tensors if x is not None and x.is_floating_point()))
    if args[9] not in _runtime.FLOATING:
        why.append(f"it gives float32, bfloat16 and float16, asked for {str(args[9]).removeprefix('torch.')}")
    return why + torch_backend.reasons(*args)


def forward(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    out_dtype: torch.dtype,
    left: bool,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    q_heads: int,
    kv_heads: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_offset: float,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    concat: tuple[Any, ...] = (tokens, table, prompt, prompt_offsets, prompt_index, own_start)
    scales = (prompt_length, scale, prompt_scale)
    layer: tuple[Any, ...] = (q_heads, kv_heads, norm, norm_weight, norm_bias, norm_offset, eps, cos, sin, interleaved)
    heads = (q_heads, kv_heads, kv_heads)
    batch, length = tokens.shape[0], prompt_length + tokens.shape[1]
    by_head = torch_backend._split(weights, heads)
    if not heuristics.fuse_projection(batch * length) or not fits(concat, by_head, biases, layer, out_dtype):
        return many_rows.forward(*concat, *scales, out_dtype, left, weights, biases, *layer)
    query, key, value = (
        tokens.new_empty(batch, length, count, w.shape[0] // count, dtype=out_dtype).transpose(1, 2)
        for w, count in zip(by_head, heads, strict=True)
    )
    if prompt is None:
        residual = torch.empty_like(tokens)
    else:
        residual = prompt.new_empty(batch, length, prompt.shape[1], dtype=out_dtype)
    split = torch_backend._split(biases, heads) if biases else None
    rows: tuple[Any, ...] = (*concat, *scales, left, by_head, split, *layer, query, key, value, residual)
    into_cache(*rows)
    return query, key, value, residual


def into_cache(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    left: bool,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    q_heads: int,
    kv_heads: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_offset: float,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None,
    start: Tensor | None = None,
) -> None:
    """One launch, results where the caller wants them: ``query`` ``[B, Hq, S, D]``, ``key`` and ``value``
    ``[B, Hkv, S, D]`` with any strides, so views of the own-token cache, and the rows before the norm, ``residual``
    ``[B, S, H]`` (columns side by side), unless it is None. ``weights`` and ``biases`` are q's, k's and v's; all of
    it has to pass :func:`fits`.

    With ``start``, int32 or int64 ``[1]``, ``key`` and ``value`` are a whole static cache ``[B, Hkv, capacity, D]``,
    of which the S places from there on are written: which they are is read on the device. Too few are a device-side
    assertion."""
    done = _OP(
        *(tokens, table, prompt, *native_ops.dense(prompt_offsets, prompt_index, own_start)),
        *(prompt_length, scale, prompt_scale, left, *weights),
        *((None, None, None) if biases is None else native_ops.dense(*biases)),
        *(q_heads, kv_heads, KINDS[norm], *native_ops.dense(norm_weight, norm_bias), norm_offset, eps),
        *(cos, sin, interleaved, start, query, key, value, residual),
    )
    native_ops.served(_runtime._cuda, done)


def norm_heads(
    query: Tensor,
    key: Tensor,
    q_norm: Norm,
    k_norm: Norm,
    cos: Tensor,
    sin: Tensor,
    start: Tensor | None = None,
) -> None:
    """The RMS norm over each head of queries and keys and the rotation behind it, in place and in one launch: for
    bases that normalise heads, where :func:`into_cache` or :func:`forward` has projected without a rotation.

    Args:
        query, key: ``[B, Hq, S, D]`` and ``[B, Hkv, S, D]``, any strides; one 16-bit dtype, D even and at most 256.
        q_norm, k_norm: of kind "rms", with weights ``[D]`` in the same dtype.
        cos, sin: ``[B or 1, S, R]``, R even and up to D, in the same dtype.
        start: as :func:`into_cache` has it; `key` is then the whole static cache.

    Raises:
        ValueError: a tensor is none of these.
    """
    norms = (q_norm.weight, q_norm.offset, q_norm.eps, k_norm.weight, k_norm.offset, k_norm.eps)
    native_ops.served(_runtime._cuda, _HEAD_NORM(query, key, *norms, cos, sin, start))


def fits(
    concat: tuple[Any, ...],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layer: tuple[Any, ...],
    dtype: torch.dtype,
) -> bool:
    """Whether the kernel takes these: one 16-bit dtype, and rows that begin at multiples of 16 bytes."""
    tokens, table, prompt = concat[:3]
    read = [x for x in (tokens if table is None else table, prompt, *weights) if x is not None]
    q_heads, _, _, norm_weight, norm_bias = layer[:5]
    alike = [x for x in (*read, *biases, norm_weight, norm_bias) if x is not None]
    dims = weights[0].shape[0] // q_heads, weights[2].shape[0] // layer[1]
    return (
        dtype in (torch.bfloat16, torch.float16)
        and all(x.dtype == dtype for x in alike)
        and all(dim % 2 == 0 for dim in dims)
        and all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in read)
        and all(stride % 8 == 0 for x in read for stride in x.stride()[:-1])
        and all(x is None or x.data_ptr() % 16 == 0 for x in (norm_weight, norm_bias))
    )
