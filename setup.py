# SPDX-License-Identifier: Apache-2.0
"""Builds the optional C++ extension ``softprompt_fast._C``; everything else stands in pyproject.toml.

The package works without the extension. So a missing compiler, header or pybind11 is reported and skipped, unless the
environment variable SOFTPROMPT_FAST_BUILD says otherwise: ``1`` makes it an error, ``0`` doesn't try.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import pybind11
except ImportError:
    pybind11 = None  # type: ignore[assignment]

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


# Flags of one file: the kernels of one instruction set. Everything else, the dispatcher above all, is built with none
# of them. The feature macros decide what is in a file, so an architecture that lacks the set needs no rule of its own.
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
ISA_FLAGS = {
    "isa_avx2.cpp": "-mavx2 -mfma -mf16c" if X86 else "",
    "isa_avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    if X86
    else "",
}
# Contraction: a * b + c is one FMA where there is one. No errno: nobody reads it, and it prevents inlining.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra"


class NinjaBuildExt(build_ext):
    """Writes a build.ninja and runs it: setuptools itself can neither compile two files at once, nor give a file flags
    of its own, nor see that a header changed. A machine on which that fails gets a package without the extension."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # many kinds, and each means the same: it can't be built here
            self.extensions = []  # an in-place build would otherwise look for the file and copy it
            give_up(f"GCC or Clang with C++17, Python's headers and ninja ({type(error).__name__}: {error})")

    def build_extension(self, extension: Extension) -> None:
        if os.name == "nt":
            raise RuntimeError("the kernels use the vector extension of GCC and Clang, which MSVC lacks")
        compiler = os.environ.get("CXX") or "c++"
        folder, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(extension.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        openmp = "-fopenmp" if self.compiles(compiler, folder, "-fopenmp") else ""
        extra = os.environ.get("CXXFLAGS", "")
        includes = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()]
        macros = {
            "SOFTPROMPT_FAST_VERSION": package_version(),
            "SOFTPROMPT_FAST_FLAGS": " ".join(f"{FLAGS} {openmp} {extra}".split()),
            "SOFTPROMPT_FAST_TORCH": torch_version(),
        }
        defines = [f'-D{name}="{value}"' for name, value in macros.items()]
        system = [f"-isystem {path}" for path in dict.fromkeys(includes)]
        link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        lines = [
            f"cxx = {compiler}",
            f"flags = {FLAGS} {openmp} -I{ROOT / 'csrc'} {' '.join(system)} {extra}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $more -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx {link} $in -o $out {openmp} {extra} {os.environ.get('LDFLAGS', '')}",
        ]
        objects = []
        for source in extension.sources:
            name = Path(source).name
            objects.append(str(Path(source).with_suffix(".o")))
            lines.append(f"build {objects[-1]}: compile {ROOT / source}")
            more = shlex.join(defines) if name == "registration.cpp" else ISA_FLAGS.get(name, "")
            lines.append(f"  more = {more}")
        lines.append(f"build {target}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
        command = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        done = subprocess.run([*command, "-C", str(folder)], capture_output=True, text=True, check=False)
        if "warning:" in done.stdout:
            print(done.stdout, file=sys.stderr)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    @staticmethod
    def compiles(compiler: str, folder: Path, flag: str) -> bool:
        """Whether a shared library links with `flag` (Apple's Clang has no OpenMP of its own)."""
        probe = folder / "probe.cpp"
        probe.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n", encoding="utf-8")
        command = [*shlex.split(compiler), "-shared", "-fPIC", flag, str(probe), "-o", str(folder / "probe.so")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


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


def extensions() -> list[Extension]:
    if MODE == "0":
        return []
    if pybind11 is None:
        give_up("the Python package pybind11 in the building environment")
        return []
    files = [path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    return [
        Extension(
            "softprompt_fast._C",
            sources=sorted(str(path) for path in files if path.suffix == ".cpp" and path.parts[1] != "tests"),
            depends=sorted(str(path) for path in files if path.suffix == ".h"),
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
