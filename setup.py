# SPDX-License-Identifier: Apache-2.0
"""Builds the optional C++ extension ``softprompt_fast._C``; everything else stands in pyproject.toml.

The package works without the extension. So a missing compiler, header or pybind11 is reported and skipped, unless the
environment variable SOFTPROMPT_FAST_BUILD says otherwise: ``1`` makes it an error, ``0`` doesn't try.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:
    Pybind11Extension = None  # type: ignore[assignment, misc]

ROOT = Path(__file__).parent
MODE = os.environ.get("SOFTPROMPT_FAST_BUILD", "auto")
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"SOFTPROMPT_FAST_BUILD: expected 0, 1 or auto, found {MODE!r}")


def give_up(missing: str) -> None:
    """Say what is missing; fatal only when the extension was asked for."""
    message = f"softprompt-fast: no C++ extension is built, the package uses its PyTorch backend. Missing: {missing}"
    if MODE == "1":
        raise SystemExit(f"{message}\n(fatal because SOFTPROMPT_FAST_BUILD=1)")
    print(message, file=sys.stderr)


class OptionalBuildExt(build_ext):
    """``build_ext`` for which a machine without a working C++17 compiler is no error."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # distutils raises many kinds, and each means the same: it can't be built here
            self.extensions = []  # an in-place build would otherwise look for the file and copy it
            give_up(f"a working C++17 compiler with Python's headers ({type(error).__name__}: {error})")


def package_version() -> str:
    scope: dict[str, str] = {}
    exec((ROOT / "softprompt_fast" / "_version.py").read_text(encoding="utf-8"), scope)
    return scope["__version__"]


def torch_version() -> str:
    """The torch of the building environment: recorded, not linked against ("none" in an isolated build)."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"


def extensions() -> list:
    if MODE == "0":
        return []
    if Pybind11Extension is None:
        give_up("the Python package pybind11 in the building environment")
        return []
    flags = ["/O2"] if sys.platform == "win32" else ["-O2", "-Wall", "-Wextra"]
    return [
        Pybind11Extension(
            "softprompt_fast._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=flags,
            define_macros=[
                ("SOFTPROMPT_FAST_VERSION", f'"{package_version()}"'),
                ("SOFTPROMPT_FAST_FLAGS", f'"{" ".join(flags)}"'),
                ("SOFTPROMPT_FAST_TORCH", f'"{torch_version()}"'),
            ],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuildExt})
