# SPDX-License-Identifier: Apache-2.0
"""How tensors reach the CUDA kernels, and when none can: the one place that asks what is built and which GPU is here.

The kernels take pointers, strides and a stream, and link against no torch. Where SOFTPROMPT_FAST_CUDA_EMULATED names
their emulated build they run on CPU tensors, which is how tests see them without a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import native, native_ops

#: Codes of ``csrc/tensor.h``.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def _extension() -> Any:
    module, reason = native.load_cuda()
    if module is None:  # the registry shows this as the reason
        raise ImportError(f"CUDA kernels: {reason}")
    native_ops.implement(module)
    return module


_cuda = _extension()
EMULATED: bool = _cuda.build_info()["architectures"] == "emulated"


def refusals(*tensors: Tensor | None) -> list[str]:
    """Why no kernel can take these floating tensors; empty where one can."""
    why = []
    given = [x for x in tensors if x is not None]
    wrong = dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in given if x.dtype not in FLOATING)
    if wrong:
        why.append(f"it takes float32, bfloat16 and float16, found {', '.join(wrong)}")
    device = given[0].device
    if EMULATED:
        if device.type != "cpu":
            why.append(f"SOFTPROMPT_FAST_CUDA_EMULATED is set, and emulated kernels run on the CPU, found {device}")
    elif device.type != "cuda" or torch.version.hip is not None:
        why.append(f"it runs on NVIDIA GPUs, found {device}{'' if torch.version.hip is None else ' of ROCm'}")
    elif _capability(device.index or 0) < (8, 0):
        major, minor = _capability(device.index or 0)
        why.append(f"it needs compute capability 8.0, {device} has {major}.{minor}")
    return why


def queue(x: Tensor) -> tuple[int, int]:
    """The device of a tensor and its current stream there: where a call's kernels go."""
    if EMULATED:
        return 0, 0
    index = x.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def view(x: Tensor, dimensions: int) -> tuple[int, ...]:
    """Pointer, dtype code and strides, with further dimensions of size 1 in front."""
    strides = x.stride()
    if len(strides) < dimensions:
        strides = (*(0,) * (dimensions - len(strides)), *strides)
    return (x.data_ptr(), CODES[x.dtype], *strides)


def indexes(x: Tensor | None) -> tuple[int, int, bool] | None:
    """Pointer, length and whether the values are int64. The caller keeps `x` alive, and has made it dense."""
    return None if x is None else (x.data_ptr(), x.shape[0], x.dtype == torch.int64)


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of one number a row or a prompt: small enough to copy where they are apart in memory."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


@cache
def shared_bytes(index: int) -> int:
    """Of shared memory that a block may have on a device."""
    return _cuda.shared_of_device(index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
