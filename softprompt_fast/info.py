# SPDX-License-Identifier: Apache-2.0
"""What is installed and built here, and which backend can run which op: the facts of ``softprompt-fast info``."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from softprompt_fast._version import __version__
from softprompt_fast.backends import native

_PACKAGES = ("torch", "transformers", "safetensors", "peft", "triton", "vllm", "gguf", "matplotlib")


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Plain data, ready for JSON. ValueError if SOFTPROMPT_FAST_CPU_ISA names no instruction set that runs here.

    Keys: ``version``; ``python``; ``platform``; ``packages`` (name -> version or None); ``torch`` (CUDA version, CPU
    capability, threads, devices); ``extension`` (loaded, reason, build, and cpu_isa, the instruction set whose kernels
    run, None without the extension); ``cpu_features``; ``cuda`` (loaded, reason and build, with the architectures, of
    the CUDA kernels); ``triton`` (serves here, reason, and tables, op -> the first
    file that the current GPU's block sizes come from, empty without one); ``backend`` (what SOFTPROMPT_FAST_BACKEND
    asks for, None if it is not set); ``ops`` (op -> backend -> list of reasons why it can't run here; an empty list
    means that it can).
    """
    import torch

    from softprompt_fast.backends import _registry

    loaded, reason = native.status()
    cuda = native.cuda_build_info()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _installed(package) for package in _PACKAGES},
        "torch": {
            "cuda": torch.version.cuda,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "devices": devices,
        },
        "extension": {"loaded": loaded, "reason": reason, "build": native.build_info(), "cpu_isa": native.cpu_isa()},
        "cpu_features": native.cpu_features(),
        "cuda": {"loaded": bool(cuda), "reason": native.load_cuda()[1], "build": cuda},
        "triton": _triton(),
        "backend": os.environ.get(_registry.ENVIRONMENT_VARIABLE),
        "ops": {op: _registry.available_backends(op) for op in _registry.OPS},
    }


def _triton() -> dict[str, Any]:
    import torch

    from softprompt_fast.backends import _registry

    try:
        from softprompt_fast.backends.triton import _runtime, _tuning
    except ImportError as error:
        return {"serves": False, "reason": str(error), "tables": {}}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if why := _runtime.refusals(torch.empty(0, device=device)):
        return {"serves": False, "reason": "; ".join(why), "tables": {}}
    places = _runtime.places(device)
    here = [op for op in _registry.OPS if not _registry.available_backends(op)["triton"]]
    return {
        "serves": True,
        "reason": f"for {device}" + (", interpreted" if _runtime.INTERPRETED else ""),
        "tables": {op: _tuning.served_by(op, places) for op in here},
    }
