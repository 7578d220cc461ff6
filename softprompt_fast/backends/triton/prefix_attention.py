# SPDX-License-Identifier: Apache-2.0
"""prefix_attention in Triton: which kernels serve a call.

Prefill and training run in one launch (:mod:`._prefix_attention_prefill`). Where a row has so few queries that they
would leave its tiles empty, those of all rows are stacked and the keys split (:mod:`._prefix_attention_decode`).
Gradients: :mod:`._prefix_attention_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import heuristics
from softprompt_fast.backends.triton import _prefix_attention_backward, _runtime
from softprompt_fast.backends.triton import _prefix_attention_decode as decode
from softprompt_fast.backends.triton import _prefix_attention_prefill as prefill

# Accumulators of wider heads do not fit the registers beside the scores.
MAX_HEAD_DIM = 256


def reasons(*args: Any) -> list[str]:
    query, key, value, prefix_key, prefix_value = args[:5]
    sinks, bias, scales = args[14], args[15], args[16:18]
    quantized = scales[0] is not None
    why = _runtime.refusals(query, key, value, sinks, bias, *(() if quantized else (prefix_key, prefix_value)))
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        why.append(f"it takes head dimensions up to {MAX_HEAD_DIM}, found {query.shape[-1]} and {value.shape[-1]}")
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        why.append("it gives no gradient for bias")
    if quantized and prefix_key.dtype == torch.float8_e4m3fn and not _runtime.has_e4m3(query.device):
        why.append(f"a prefix in float8_e4m3fn needs compute capability 8.9, which {query.device} has not")
    return why


def forward(query: Tensor, key: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Arguments: those of the op, as in :func:`._prefix_attention_prefill.forward`."""
    stacked = heuristics.stack_queries(query.shape[2], query.shape[1] // key.shape[1])
    return (decode if stacked else prefill).forward(query, key, *args)


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Arguments: grad_out, grad_lse, those of the op up to bias, out, lse."""
    return _prefix_attention_backward.backward(*args)
