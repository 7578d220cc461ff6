# SPDX-License-Identifier: Apache-2.0
"""Builds the optional extensions: ``softprompt_fast._C``, the CPU's kernels, and ``softprompt_fast._cuda``, the GPU's.

The package works without them. So a missing compiler, header or pybind11 is reported and skipped, unless the
environment variable SOFTPROMPT_FAST_BUILD says otherwise: ``1`` makes it an error, ``0`` doesn't try. For the CUDA
kernels SOFTPROMPT_FAST_CUDA says the same; left out, they are built where nvcc is found and the building environment
has a torch with CUDA. TORCH_CUDA_ARCH_LIST ("8.0;9.0a", "10.0+PTX") says for which GPUs, by default CUDA_ARCHS.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
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


CUDA = os.environ.get("SOFTPROMPT_FAST_CUDA", "auto")
if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"SOFTPROMPT_FAST_CUDA: expected 0, 1 or auto, found {CUDA!r}")


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
# GPUs that the CUDA kernels are built for: a later one of a generation runs code of an earlier, and what comes after
# these compiles the PTX of the last. "a" allows instructions of that very chip.
CUDA_ARCHS = "8.0;9.0a;10.0+PTX"
HOPPER = "code=sm_90a"  # instructions of this chip alone are in files named *_sm90a.cu
NVCC_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


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
        cuda = extension.name.endswith("._cuda")
        folder, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = folder / "cuda" if cuda else folder
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        openmp = "-fopenmp" if not cuda and self.compiles(compiler, folder, "-fopenmp") else ""
        extra = os.environ.get("CXXFLAGS", "")
        includes = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()]
        macros = {
            "SOFTPROMPT_FAST_VERSION": package_version(),
            "SOFTPROMPT_FAST_FLAGS": " ".join(f"{FLAGS} {openmp} {extra}".split()),
            "SOFTPROMPT_FAST_TORCH": torch_version(),
            "SOFTPROMPT_FAST_CUDA": without_cuda() or f"built for {cuda_archs()}",
            "SOFTPROMPT_FAST_CUDA_ARCHS": cuda_archs(),
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
            f"  command = $cxx {link} $in -o $out $libraries {openmp} {extra} {os.environ.get('LDFLAGS', '')}",
        ]
        if cuda:
            command = f"{nvcc()} -MMD -MF $out.d -ccbin $cxx {NVCC_FLAGS} $archs $more -c $in -o $out"
            lines += ["rule cuda", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]
        objects = []
        for source in extension.sources:
            name = Path(source).name
            objects.append(f"{source}.o")
            lines.append(f"build {objects[-1]}: {'cuda' if name.endswith('.cu') else 'compile'} {ROOT / source}")
            more = shlex.join(defines) if name == "registration.cpp" else ISA_FLAGS.get(name, "")
            archs = cuda_archs()
            if name.endswith("_sm90a.cu") and HOPPER in gencode(archs):
                archs, more = "9.0a", "-DSOFTPROMPT_FAST_SM90A"
            lines += [f"  more = {more}", f"  archs = {gencode(archs)}"]
        lines.append(f"build {target}: link {' '.join(objects)}")
        libraries = [] if sys.platform == "darwin" else ["-ldl"]
        if cuda:  # the static runtime: it finds the driver when it is called, so the module loads without one
            where = [f"-L{cuda_home() / name}" for name in ("lib64", "lib")]  # the second in NVIDIA's Python packages
            libraries = [*where, "-lcudart_static", "-lrt", "-lpthread", *libraries]
        lines.append(f"  libraries = {' '.join(libraries)}")
        (folder / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
        ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        done = subprocess.run([*ninja, "-C", str(folder)], capture_output=True, text=True, check=False)
        if "warning:" in done.stdout:
            print(done.stdout, file=sys.stderr)
        if done.returncode:
            if cuda and CUDA == "auto":  # the CPU's kernels are worth having without
                print(f"softprompt-fast: no CUDA kernels are built: {done.stdout}{done.stderr}", file=sys.stderr)
                self.extensions = [e for e in self.extensions if e is not extension]
                return
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


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, or the first on the path, or where its installer puts it."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_home() -> Path:
    """The toolkit's folder, as nvcc says it, for what is on the path may be a link or a script."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    done = subprocess.run([str(nvcc()), "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(found[1].strip() if found else "/usr/local/cuda")


def cuda_archs() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS


def gencode(archs: str) -> str:
    """nvcc's options for a list like torch's, without GPUs before 8.0, which lack what the kernels use.

    Example: ``"8.0;9.0a"`` gives ``-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a``, and
    ``"10.0+PTX"`` machine code and PTX of 10.0.
    """
    options = []
    for arch in re.split(r"[;, ]+", archs.strip(";, ")):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if found is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected a list like {CUDA_ARCHS!r}, found {archs!r}")
        if int(found[1]) < 8:
            continue
        number = found[1] + found[2] + found[3]
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(options)


def without_cuda() -> str:
    """Why the CUDA kernels are not built; empty where they are."""
    if CUDA == "0":
        return "not built: SOFTPROMPT_FAST_CUDA=0"
    if nvcc() is None:
        return "not built: no nvcc in CUDA_HOME or on the path"
    if not gencode(cuda_archs()):
        return "not built: TORCH_CUDA_ARCH_LIST names no GPU of 8.0 or later"
    if CUDA == "1":
        return ""
    # Read from its file: importing torch takes seconds.
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return "not built: no torch in the building environment (pip's --no-build-isolation; SOFTPROMPT_FAST_CUDA=1)"
    version = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8")
    if re.search(r"^cuda\b.*= *['\"]", version, re.MULTILINE) is None:
        return "not built: the building environment's torch has no CUDA (SOFTPROMPT_FAST_CUDA=1 builds them anyway)"
    return ""


def extensions() -> list[Extension]:
    if MODE == "0":
        return []
    if pybind11 is None:
        give_up("the Python package pybind11 in the building environment")
        return []
    if CUDA == "1" and without_cuda():
        raise SystemExit(f"softprompt-fast: the CUDA kernels are {without_cuda()}")
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.parent.name != "tests")
    headers = [name for name in files if name.endswith((".h", ".cuh"))]
    gpu = [name for name in files if Path(name).parts[1] == "cuda" and name.endswith((".cpp", ".cu"))]
    cpu = [name for name in files if name.endswith(".cpp") and name not in gpu]
    gpu.append(str(Path("csrc", "torch_abi.cpp")))
    found = [Extension("softprompt_fast._C", sources=cpu, depends=headers)]
    if not without_cuda():
        found.append(Extension("softprompt_fast._cuda", sources=gpu, depends=headers))
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})
