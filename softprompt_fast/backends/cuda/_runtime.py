# SPDX-License-Identifier: Apache-2.0
"""Which tensors the CUDA kernels take, and when none: the one place that asks what is built and which GPU is here.

Where SOFTPROMPT_FAST_CUDA_EMULATED names their emulated build they run on CPU tensors, which is how tests see them
without a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import native, native_ops

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


@cache
def shared_bytes(index: int) -> int:
    """Of shared memory that a block may have on a device."""
    return _cuda.shared_of_device(index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
