# SPDX-License-Identifier: Apache-2.0
"""prefix_attention in CUDA C++: a decode step in one launch (``csrc/cuda/prefix_attention_decode.cuh``).

It takes bfloat16 and float16 where rows have few queries (``heuristics.stack_queries``). Triton's kernels
(:mod:`softprompt_fast.backends.triton.prefix_attention`) take the rest, so that the backend serves whole models: more
queries a row, float32, a bias, and gradients.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import heuristics
from softprompt_fast.backends.cuda import _runtime
from softprompt_fast.backends.cuda._runtime import indexes, view
from softprompt_fast.backends.triton import prefix_attention as triton
from softprompt_fast.backends.triton._runtime import dense

_cuda = _runtime._cuda
DTYPES = (torch.bfloat16, torch.float16)

# Counters of a device's stream and of the captures on it, which capture, where and how many: every call leaves them at
# 0 for the next.
_counters: dict[tuple[int, int, bool], tuple[int, int, int]] = {}


def reasons(*args: Any) -> list[str]:
    query, key, value, prefix_key, prefix_value = args[:5]
    sinks, bias, key_scale = args[14:17]
    given = (query, key, value, sinks, bias, *(() if key_scale is not None else (prefix_key, prefix_value)))
    return _runtime.refusals(*given) or triton.reasons(*args)


def takes(
    queries: int, groups: int, head_dim: int, v_dim: int, dtype: torch.dtype, biased: bool, shared_bytes: int
) -> bool:
    """Whether the CUDA kernel takes a call of rows of `queries` queries and `groups` query heads a key/value head, on
    a device whose blocks have up to `shared_bytes` of shared memory.

    Example: decode steps in bfloat16 or float16 and without a bias, and 16 queries a row of 4 grouped heads; heads up
    to 128 with 99 KB (compute capability 8.6, 8.9), up to 256 with 163 KB (8.0) and more.
    """
    if not (heuristics.stack_queries(queries, groups) and v_dim > 0 and dtype in DTYPES and not biased):
        return False
    return _shared_bytes(head_dim, v_dim) <= shared_bytes


_shared_bytes = cache(_cuda.shared_of_prefix_attention)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_offsets: Tensor | None,
    prefix_index: Tensor | None,
    own_start: Tensor | None,
    own_end: Tensor | None,
    query_start: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    prefix_key_scale: Tensor | None = None,
    prefix_value_scale: Tensor | None = None,
    prefix_scale_block: int | None = None,
    max_prefix_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    batch, q_heads, queries, head_dim = query.shape
    kv_heads, own, v_dim = value.shape[1:]
    tensors = (query, key, value, prefix_key, prefix_value)
    rows = (prefix_offsets, prefix_index, own_start, own_end, query_start)
    shared = _runtime.shared_bytes(query.get_device())
    if not takes(queries, q_heads // kv_heads, head_dim, v_dim, query.dtype, bias is not None, shared):
        options = (scale, causal, sliding_window, softcap, sinks, bias)
        quantized = (prefix_key_scale, prefix_value_scale, prefix_scale_block)
        return triton.forward(*tensors, *rows, *options, *quantized, max_prefix_length)
    out = query.new_empty(batch, queries, q_heads, v_dim).transpose(1, 2)
    lse = query.new_empty(batch, q_heads, queries, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    prefixes = 1 if prefix_offsets is None else prefix_offsets.shape[0] - 1
    packed = prefix_key.shape[1]
    longest = packed if max_prefix_length is None else max_prefix_length
    sizes = (batch, q_heads, kv_heads, queries, own, packed, head_dim, v_dim, prefixes, longest)
    queue = _runtime.queue(query)
    floats, units = _workspace(sizes, prefix_offsets is not None, prefix_index is not None, queue[0])
    workspace = query.new_empty(floats, dtype=torch.float32)
    scales = None
    if prefix_key_scale is not None and prefix_value_scale is not None:
        scales = (view(prefix_key_scale, 2), view(prefix_value_scale, 2), prefix_scale_block)
    indices = dense(*rows)
    _cuda.prefix_attention(
        sizes,
        view(query, 4),
        view(key, 4),
        view(value, 4),
        view(prefix_key, 3),
        view(prefix_value, 3),
        view(out, 4),
        lse.data_ptr(),
        tuple(map(indexes, indices)),
        scale,
        causal,
        sliding_window or 0,
        softcap or 0.0,
        None if sinks is None else view(sinks, 1),
        scales,
        workspace.data_ptr(),
        _counters_of(queue, units),
        queue,
    )
    return out, lse


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Arguments: grad_out, grad_lse, those of the op up to bias, out, lse."""
    return triton.backward(*args)


@lru_cache(maxsize=4096)
def _workspace(sizes: tuple[int, ...], offsets: bool, indexed: bool, device: int) -> tuple[int, int]:
    """Floats and counters of a call, which follow from sizes alone."""
    return _cuda.prefix_attention_workspace(sizes, offsets, indexed, device)


def _counters_of(queue: tuple[int, int], count: int) -> int:
    """The address of counters for the calls of one stream, all 0: two streams may run at once, so each has its own.

    A capture has others than the stream that it captures, cleared by the graph itself, once: a graph may be replayed
    on any stream, and beside eager calls. They are never freed, for nobody says when a graph ends, and they don't come
    from PyTorch: ``torch.compile`` with graphs raises where anything but results stays in its pool.
    """
    capture = _cuda.capture(queue)
    key = (*queue, capture != 0)
    found = _counters.get(key)
    if found is None or found[0] != capture or found[2] < count:
        count = max(count, 1024)
        found = (capture, _cuda.counters(count, queue), count)
        _counters[key] = found
    return found[1]
