# SPDX-License-Identifier: Apache-2.0
"""What the Triton backend would launch on a GPU, and what its compiler makes of it, on a machine that has none.

Host code runs for an architecture over tensors that have shapes and strides, but no memory, so reading a value raises.
Compiling needs a process without TRITON_INTERPRET, which Triton reads where a kernel is defined, so tests run ``python
-m tests.triton_resources``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from softprompt_fast.backends.triton import _runtime

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory that a block may use, in bytes (CUDA C++ programming guide, "technical specifications per compute
# capability"). sm_86 stands for the GPUs that "default" must fit.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the arguments as ``_runtime.launch`` got them."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


class _StayOnDevice(TorchDispatchMode):
    """An op that makes a host tensor of a device's, or the reverse, waits for the device (and breaks a capture)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            assert not isinstance(x, Tensor) or x.device.type == "meta", f"{func} made a tensor in host memory"
        return result


@contextmanager
def without_values() -> Iterator[None]:
    """Within it tensors are made on "meta": everything that reads a value of one raises. (Fake "cuda" tensors would be
    nearer, but a PyTorch that is built without CUDA cannot even slice those.)"""
    with torch.device("meta"), _StayOnDevice():
        yield


def record(call: Callable[[], object], arch: str) -> list[Launch]:
    """The launches of ``call()`` on a GPU of that architecture; ``call`` makes its own tensors."""
    found: list[Launch] = []

    def recorder(kernel: Any, grid: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        for x in args:
            assert not isinstance(x, Tensor) or x.device.type == "meta", f"{kernel.__name__}: an argument on the CPU"
        found.append(Launch(kernel, tuple(grid), args, meta))

    with without_values(), _runtime.recorded("sm_80" if arch == "sm_86" else arch, recorder):
        call()
    return found


# ---- compiling --------------------------------------------------------------------------------------------------


class _CompileOnly:
    """As much of a Triton driver as its compiler asks for."""

    def __init__(self) -> None:
        self.arch = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # each architecture is a device, with a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_DRIVER = _CompileOnly()


def _compile_for(arch: str) -> None:
    assert not _runtime.INTERPRETED, "run it without TRITON_INTERPRET: interpreted kernels cannot be compiled"
    _DRIVER.arch = int(arch.removeprefix("sm_"))
    driver.set_active(_DRIVER)


def _arguments(launch: Launch) -> list[Any]:
    return [x.dtype if isinstance(x, Tensor) else x for x in launch.args]


def specialisation(launch: Launch, arch: str) -> str:
    """What Triton's cache of compiled kernels is looked up with, in words. Two launches with one of them share a
    compiled kernel."""
    from triton.runtime.jit import MockTensor

    _compile_for(arch)
    *_, binder = launch.kernel.device_caches[_DRIVER.get_current_device()]
    args = map(MockTensor.wrap_dtype, _arguments(launch))
    _, specialization, options = binder(*args, enable_fp_fusion=True, **launch.meta)
    return f"{launch.kernel.__module__}.{launch.name} {specialization} {sorted(options.items())}"


@dataclass(frozen=True)
class Resources:
    registers: int  # a thread
    spills: int  # instructions that read or write local memory
    shared: int  # bytes a block
    warps: int
    tensor_cores: str  # the instructions that use them: "wgmma", "tcgen05", "mma" or ""

    def row(self) -> list[Any]:
        return list(asdict(self).values())


COLUMNS = list(Resources.__annotations__)


def compile_launch(launch: Launch, arch: str) -> Resources:
    _compile_for(arch)
    meta = {"enable_fp_fusion": True, **launch.meta}
    compiled = launch.kernel.warmup(*_arguments(launch), grid=launch.grid, **meta)
    usage, local = _usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    units = [
        short
        for name, short in (("wgmma.mma", "wgmma"), ("tcgen05.mma", "tcgen05"), ("mma.sync", "mma"))
        if name in ptx
    ]
    return Resources(usage["REG"], local, compiled.metadata.shared, compiled.metadata.num_warps, "+".join(units))


def _usage(cubin: bytes) -> tuple[dict[str, int], int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("cuobjdump", "--dump-resource-usage", file.name)
        usage = {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}
        # A frame alone is no spill: a call (an assertion's, say) has one too.
        local = 0
        if usage["STACK"] or usage["LOCAL"]:
            local = len(re.findall(r"\b(?:LDL|STL)\b", _run("nvdisasm", "--print-code", file.name)))
        return usage, local


def _run(binary: str, *args: str) -> str:
    return subprocess.run([BINARIES / binary, *args], capture_output=True, text=True, check=True).stdout
