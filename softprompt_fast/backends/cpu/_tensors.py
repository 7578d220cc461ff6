# SPDX-License-Identifier: Apache-2.0
"""How tensors reach the extension, which does not link against torch: as pointers, dtype codes and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import native, native_ops

#: Codes of ``csrc/cpu/kernels.h``.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def extension() -> Any:
    """The C++ extension. ImportError, with the reason, where there is none: the backend then counts as missing."""
    module, reason = native.load()
    if module is None:
        raise ImportError(f"C++ extension: {reason}")
    native_ops.implement(module)
    return module


def refusals(*tensors: Tensor | None) -> list[str]:
    """Why the extension cannot read these tensors; empty when it can."""
    why = []
    for x in tensors:
        if x is None:
            continue
        if not x.is_cpu:
            return [f"it runs on the CPU, found a tensor on {x.device}"]
        if x.layout is not torch.strided:
            return [f"it takes strided tensors, found {str(x.layout).removeprefix('torch.')}"]
        if x.dtype not in CODES:
            why = [f"it takes float32, bfloat16 and float16, found {str(x.dtype).removeprefix('torch.')}"]
    return why


def describe(x: Tensor) -> str:
    """Dtype, shape and device, for an error message."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def view(x: Tensor) -> tuple[int, ...]:
    """Pointer, dtype code and strides."""
    return (x.data_ptr(), CODES[x.dtype], *x.stride())


def indexes(x: Tensor | None) -> tuple[int, int, bool] | None:
    """Pointer, length and whether the values are int64. The caller keeps `x` alive, and has made it dense."""
    return None if x is None else (x.data_ptr(), x.shape[0], x.dtype == torch.int64)


def as_float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()
