# SPDX-License-Identifier: Apache-2.0
"""Loads the extensions ``softprompt_fast._C`` and ``._cuda`` if they are there, and says why if they aren't.

Importing this module never fails and never compiles anything: a package installed without a compiler, a binary of
another Python, and a binary left over from another version of the package all end as ``status() == (False, reason)``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from softprompt_fast._version import __version__

_NAME = "softprompt_fast._C"
_CUDA_NAME = "softprompt_fast._cuda"


@cache
def load() -> tuple[ModuleType | None, str]:
    """The extension and "loaded", or None and the reason why there is none."""
    if importlib.util.find_spec(_NAME) is None:
        return None, (
            "not built: no C++ compiler or no pybind11 at install time, or SOFTPROMPT_FAST_BUILD=0; reinstall with "
            "SOFTPROMPT_FAST_BUILD=1 to see what is missing"
        )
    return _checked(lambda: importlib.import_module(_NAME))


@cache
def load_cuda() -> tuple[ModuleType | None, str]:
    """The extension of the CUDA kernels and "loaded", or None and the reason why there is none.

    The environment variable SOFTPROMPT_FAST_CUDA_EMULATED names a build of it that runs on the CPU, thread by thread:
    what the tests do where there is no GPU.
    """
    if emulated := os.environ.get("SOFTPROMPT_FAST_CUDA_EMULATED"):
        return _checked(lambda: _from_file(_CUDA_NAME, emulated))
    if importlib.util.find_spec(_CUDA_NAME) is None:
        why = build_info().get("cuda", "not built")
        return None, (
            f"{why}; reinstall with SOFTPROMPT_FAST_CUDA=1, nvcc on the path and pip's --no-build-isolation"
            if why.startswith("not built")
            else f"{why}, but the file is gone; reinstall the package"
        )
    return _checked(lambda: importlib.import_module(_CUDA_NAME))


def _from_file(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checked(load: Callable[[], ModuleType]) -> tuple[ModuleType | None, str]:
    try:
        module = load()
        built_for = module.build_info()["version"]
    except Exception as error:  # a damaged or foreign binary can fail in many ways; none may break the package
        return None, f"built, but it does not load here ({type(error).__name__}: {error}); reinstall the package"
    if built_for != __version__:
        return None, f"built for softprompt-fast {built_for}, found {__version__}; reinstall the package"

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(lacks(f"{module.__name__}.{name}"))

    module.__dict__.setdefault("__getattr__", __getattr__)
    return module, "loaded"


def lacks(name: str) -> str:
    """What to say where an extension of this version has no `name`, as one has that a checkout moved on from."""
    return f"{name} is not in the extension: it was built from other sources; rebuild it (make install, pip install)"


def status() -> tuple[bool, str]:
    """Whether the extension is loaded, and the reason if it is not ("loaded" if it is)."""
    module, reason = load()
    return module is not None, reason


def build_info() -> dict[str, str]:
    """Version, compiler, flags, C++ standard and torch seen at build time; empty if the extension is not loaded."""
    module, _ = load()
    return {} if module is None else module.build_info()


def cuda_build_info() -> dict[str, str]:
    """Version and architectures of the CUDA kernels ("emulated": they run on the CPU); empty if they aren't loaded."""
    module, _ = load_cuda()
    return {} if module is None else module.build_info()


def cpu_features() -> dict[str, bool]:
    """Instruction set name -> usable on this processor and operating system; empty if the extension is not loaded."""
    module, _ = load()
    return {} if module is None else module.cpu_features()


def cpu_isa() -> str | None:
    """The instruction set whose kernels run; None if the extension is not loaded.

    Raises:
        ValueError: the environment variable SOFTPROMPT_FAST_CPU_ISA names none that this processor runs.
    """
    module, _ = load()
    return None if module is None else module.isa()
