# SPDX-License-Identifier: Apache-2.0
"""How every kernel is launched, and when none can be: the one place that asks Triton and torch what is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError as error:  # the registry shows this as the reason
    raise ImportError("triton is not installed: pip install 'softprompt-fast[triton]'") from error

# Triton reads TRITON_INTERPRET where a kernel is defined, so it can be no choice of a call.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_recorder: Callable[..., None] | None = None
_recorded_arch: str | None = None


def refusals(*tensors: Tensor | None) -> list[str]:
    """Why no kernel can take these floating tensors; empty where one can."""
    why = []
    given = [x for x in tensors if x is not None]
    wrong = dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in given if x.dtype not in DTYPES)
    if wrong:
        why.append(f"it takes float32, bfloat16 and float16, found {', '.join(wrong)}")
    device = given[0].device
    if device.type == "cpu":
        if not INTERPRETED:
            why.append("it needs a GPU (on the CPU Triton only interprets, where TRITON_INTERPRET=1 is set)")
    elif device.type != "cuda":
        why.append(f"it runs on CUDA devices, found {device}")
    elif INTERPRETED:
        why.append("TRITON_INTERPRET=1 is set, and interpreted kernels run on the CPU")
    elif torch.version.hip is None and _capability(device.index or 0) < (8, 0):
        major, minor = _capability(device.index or 0)
        why.append(f"it needs compute capability 8.0, {device} has {major}.{minor}")
    return why


def launch(kernel: Any, grid: Sequence[int], *args: Any, **meta: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device and current stream of its first tensor.

    ``args`` are the run-time arguments in order, ``meta`` the compile-time ones and Triton's own (num_warps,
    num_stages). No value of a tensor is read, so a launch can be captured in a CUDA graph.
    """
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder(kernel, grid, args, meta)
        return
    # Said and not left to Triton: its default changes with 3.10, and unset it warns.
    meta.setdefault("enable_fp_fusion", True)
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the pointers point
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


@contextmanager
def recorded(arch: str, recorder: Callable[..., None]) -> Iterator[None]:
    """Within it launches go to ``recorder(kernel, grid, args, meta)`` instead of a device, with the configurations of
    ``arch`` ("sm_90"): what a call would launch there, without having one. Not for several threads at once."""
    global _recorder, _recorded_arch
    before = _recorder, _recorded_arch
    _recorder, _recorded_arch = recorder, arch
    try:
        yield
    finally:
        _recorder, _recorded_arch = before


def places(device: torch.device) -> tuple[str, ...]:
    """Names of the tuned tables to look in for a device, the most special first.

    Example: an H100: ``("nvidia-h100-80gb-hbm3", "sm_90", "default")``.
    """
    if _recorded_arch is not None:
        return (_recorded_arch, "default")
    if device.type != "cuda":
        return ("interpreter", "default")
    return _gpu_places(device.index if device.index is not None else torch.cuda.current_device())


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a small number in the interpreter, so that tests split their work too."""
    if _recorded_arch is not None:
        return {"sm_80": 108, "sm_90": 132, "sm_100": 148}[_recorded_arch]
    return _properties(device.index or 0).multi_processor_count if device.type == "cuda" else 4


def has_e4m3(device: torch.device) -> bool:
    """Whether kernels can read float8_e4m3fn: from compute capability 8.9 on, and interpreted."""
    return device.type == "cpu" or (torch.version.hip is None and _capability(device.index or 0) >= (8, 9))


def block(size: int) -> int:
    """The block that holds ``size`` elements: a power of two, and at least 16, as deep as a product's operands are."""
    return max(16, triton.next_power_of_2(size))


def dense(*indexes: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of one number a row, a head or a prompt: small enough to copy where they are apart in memory."""
    return tuple(None if x is None else x.contiguous() for x in indexes)


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of ``x``, 0 along dimensions of size 1, which may stand for any size."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True))


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` of float32 products: exact, unless PyTorch was told that tf32 will do."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


@cache
def _gpu_places(index: int) -> tuple[str, ...]:
    major, minor = _capability(index)
    name = "-".join(_properties(index).name.lower().split())
    # Only the exact architecture: what fits sm_80's shared memory does not fit sm_86's.
    return (name, f"sm_{major}{minor}", "default")


@cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
