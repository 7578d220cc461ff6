# SPDX-License-Identifier: Apache-2.0
"""merge_states in CUDA C++: see ``csrc/cuda/merge_states.cuh``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softprompt_fast.backends import native_ops
from softprompt_fast.backends.cuda import _runtime
from softprompt_fast.backends.native_ops import merge_states_results as results

NATIVE = native_ops.op("merge_states", "cuda", results)
_OUT = native_ops.op("merge_states.out", "cuda")
_BACKWARD = native_ops.op("merge_states_backward", "cuda")


def reasons(*args: Any) -> list[str]:
    why = _runtime.refusals(*args)
    if args[0].dim() > 4:
        why.append(f"it takes at most 4 dimensions, found {args[0].dim()}")
    return why


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = results(out_a, lse_a, out_b, lse_b)
    native_ops.served(_runtime._cuda, _OUT(out_a, lse_a, out_b, lse_b, out=out, lse=lse))
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (*results(out_a, lse_a, out_b, lse_b), *results(out_b, lse_b, out_a, lse_a))
    native_ops.served(_runtime._cuda, _BACKWARD(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, *grads))
    return grads
