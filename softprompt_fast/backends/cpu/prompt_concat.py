# SPDX-License-Identifier: Apache-2.0
"""prompt_concat in C++: see ``csrc/cpu/prompt_concat_kernel.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import native_ops
from softprompt_fast.backends.cpu import _tensors
from softprompt_fast.backends.native_ops import prompt_concat_results as results

_C = _tensors.extension()
NATIVE = native_ops.op("prompt_concat", "cpu", results)
_OUT = native_ops.op("prompt_concat.out", "cpu")
_BACKWARD = native_ops.op("prompt_concat_backward", "cpu")


def reasons(*args: Any) -> list[str]:
    tokens, table, prompt, out_dtype = args[0], args[1], args[2], args[9]
    why = _tensors.refusals(tokens if table is None else table, prompt)
    if not why and out_dtype not in _tensors.CODES:
        why = [f"it gives float32, bfloat16 and float16, found {str(out_dtype).removeprefix('torch.')}"]
    if table is not None and table.requires_grad and torch.is_grad_enabled():
        why.append("it gives no gradient for table")
    return why


def forward(*args: Any) -> Tensor:
    return native_ops.prompt_concat(_C, _OUT, *args)


def backward(*args: Any) -> tuple[Tensor, Tensor | None]:
    return native_ops.prompt_concat_backward(_C, _BACKWARD, *args)
