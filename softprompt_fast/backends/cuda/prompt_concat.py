# SPDX-License-Identifier: Apache-2.0
"""prompt_concat in CUDA C++: see ``csrc/cuda/prompt_concat.cuh``. A token id outside the table ends in a device-side
assertion, as in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import native_ops
from softprompt_fast.backends.cuda import _runtime
from softprompt_fast.backends.native_ops import prompt_concat_results as results

NATIVE = native_ops.op("prompt_concat", "cuda", results)
_OUT = native_ops.op("prompt_concat.out", "cuda")
_BACKWARD = native_ops.op("prompt_concat_backward", "cuda")


def reasons(*args: Any) -> list[str]:
    tokens, table, prompt, out_dtype = args[0], args[1], args[2], args[9]
    why = _runtime.refusals(tokens if table is None else table, prompt)
    if out_dtype not in _runtime.FLOATING:
        why.append(f"it gives float32, bfloat16 and float16, found {str(out_dtype).removeprefix('torch.')}")
    if table is not None and table.requires_grad and torch.is_grad_enabled():
        why.append("it gives no gradient for table")
    return why


def forward(*args: Any) -> Tensor:
    return native_ops.prompt_concat(_runtime._cuda, _OUT, *args)


def backward(*args: Any) -> tuple[Tensor, Tensor | None]:
    return native_ops.prompt_concat_backward(_runtime._cuda, _BACKWARD, *args)
