# SPDX-License-Identifier: Apache-2.0
"""prefix_attention in CUDA C++: a decode step in one launch (``csrc/cuda/prefix_attention_decode.cuh``).

It takes bfloat16 and float16 where rows have few queries (``heuristics.stack_queries``). Triton's kernels
(:mod:`softprompt_fast.backends.triton.prefix_attention`) take the rest, so that the backend serves whole models: more
queries a row, float32, a bias, and gradients.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import heuristics, native_ops
from softprompt_fast.backends.cuda import _runtime
from softprompt_fast.backends.native_ops import prefix_attention_results as results
from softprompt_fast.backends.triton import prefix_attention as triton

DTYPES = (torch.bfloat16, torch.float16)

NATIVE = native_ops.op("prefix_attention", "cuda", results)
_OUT = native_ops.op("prefix_attention.out", "cuda")


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


_shared_bytes = cache(_runtime._cuda.shared_of_prefix_attention)


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
    _, q_heads, queries, head_dim = query.shape
    kv_heads, _, v_dim = value.shape[1:]
    tensors = (query, key, value, prefix_key, prefix_value)
    rows = (prefix_offsets, prefix_index, own_start, own_end, query_start)
    shared = _runtime.shared_bytes(query.get_device())
    if not takes(queries, q_heads // kv_heads, head_dim, v_dim, query.dtype, bias is not None, shared):
        options = (scale, causal, sliding_window, softcap, sinks, bias)
        quantized = (prefix_key_scale, prefix_value_scale, prefix_scale_block)
        return triton.forward(*tensors, *rows, *options, *quantized, max_prefix_length)
    out, lse = results(query, key, value)
    done = _OUT(
        *(*tensors, *native_ops.dense(*rows), scale, causal, sliding_window, softcap, sinks, bias),
        *(prefix_key_scale, prefix_value_scale, prefix_scale_block, max_prefix_length),
        out=out,
        lse=lse,
    )
    native_ops.served(_runtime._cuda, done)
    return out, lse


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Arguments: grad_out, grad_lse, those of the op up to bias, out, lse."""
    return triton.backward(*args)
