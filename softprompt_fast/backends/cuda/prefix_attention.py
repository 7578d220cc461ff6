# SPDX-License-Identifier: Apache-2.0
"""prefix_attention in CUDA C++: a decode step in one launch (``csrc/cuda/prefix_attention_decode.cuh``).

It takes bfloat16 and float16 where rows have few queries (``heuristics.stack_queries``). Triton's kernels
(:mod:`softprompt_fast.backends.triton.prefix_attention`) take the rest, so that the backend serves whole models: more
queries a row, float32, a bias, and gradients.
"""

from __future__ import annotations

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


def takes(queries: int, groups: int, v_dim: int, dtype: torch.dtype, biased: bool) -> bool:
    """Whether the CUDA kernel takes a call of rows of `queries` queries and `groups` query heads a key/value head.

    Example: decode steps in bfloat16 or float16 and without a bias, and 16 queries a row of 4 grouped heads.
    """
    return heuristics.stack_queries(queries, groups) and v_dim > 0 and dtype in DTYPES and not biased


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
    q_heads, queries = query.shape[1:3]
    kv_heads, _, v_dim = value.shape[1:]
    tensors = (query, key, value, prefix_key, prefix_value)
    rows = (prefix_offsets, prefix_index, own_start, own_end, query_start)
    if not takes(queries, q_heads // kv_heads, v_dim, query.dtype, bias is not None):
        options = (scale, causal, sliding_window, softcap, sinks, bias)
        quantized = (prefix_key_scale, prefix_value_scale, prefix_scale_block)
        return triton.forward(*tensors, *rows, *options, *quantized, max_prefix_length)
    out, lse = results(query, key, value)
    done = _OUT(
        *(*tensors, *_runtime.dense(*rows), scale, causal, sliding_window, softcap, sinks, bias),
        *(prefix_key_scale, prefix_value_scale, prefix_scale_block, max_prefix_length),
        out=out,
        lse=lse,
    )
    native_ops.served(_runtime._cuda, done)
    return out, lse


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Arguments: grad_out, grad_lse, those of the op up to bias, out, lse."""
    return triton.backward(*args)
