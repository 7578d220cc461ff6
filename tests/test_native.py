# SPDX-License-Identifier: Apache-2.0
"""The C++ extension: what it reports, and that the package says why when it is not there."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from softprompt_fast import __version__
from softprompt_fast.backends import native, native_ops

ROOT = Path(__file__).parent.parent
COMPILER = next((name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)), None)


@pytest.fixture(autouse=True)
def forget():
    """Each test loads anew; afterwards the real state comes back."""
    native.load.cache_clear()
    native.load_cuda.cache_clear()
    yield
    native.load.cache_clear()
    native.load_cuda.cache_clear()


def seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The extension as the sources stand now, built apart from any that is installed."""
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine: the extension can't be built")
    folder = tmp_path_factory.mktemp("native")
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder),
    ]
    before = seconds_of_children()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr, done.stderr
    # Processor time, which other work on the machine does not stretch: under three minutes on two processors.
    spent = seconds_of_children() - before
    print(f"the extension took {spent:.0f} s of processor time to build")
    assert spent < 2 * 180
    (binary,) = (path for path in (folder / "softprompt_fast").glob("_C*") if path.suffix in (".so", ".pyd"))
    spec = importlib.util.spec_from_file_location("softprompt_fast._C", binary)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_info(built: ModuleType):
    info = built.build_info()
    assert info["version"] == __version__
    assert info["torch"] == torch.__version__
    assert int(info["cxx_standard"]) >= 201703 or "msvc" in info["compiler"]
    assert str(ROOT) not in repr(info), "a path of the building machine got into the binary"


def test_build_info_says_about_cuda(built: ModuleType):
    """Here and wherever torch has no CUDA: why its kernels are not built."""
    said = built.build_info()["cuda"]
    assert said.startswith("built for " if torch.version.cuda and scope_of_setup()["nvcc"]() else "not built: ")


def scope_of_setup() -> dict[str, Any]:
    """setup.py without its last call, which builds."""
    code = (ROOT / "setup.py").read_text(encoding="utf-8").rsplit("\nsetup(", 1)[0]
    scope: dict[str, Any] = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile(code, "setup.py", "exec"), scope)
    return scope


@pytest.mark.parametrize(
    ("archs", "options"),
    [
        ("8.0", ["arch=compute_80,code=sm_80"]),
        ("8.0;9.0a", ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]),
        ("10.0+PTX ", ["arch=compute_100,code=sm_100", "arch=compute_100,code=compute_100"]),
        ("7.5 8.0", ["arch=compute_80,code=sm_80"]),
        ("8.6 12.0a", ["arch=compute_86,code=sm_86", "arch=compute_120a,code=sm_120a"]),
    ],
)
def test_architectures(archs: str, options: list[str]):
    assert scope_of_setup()["gencode"](archs) == " ".join(f"-gencode={option}" for option in options)


def test_architectures_that_nobody_knows():
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected a list like '8.0;.*found 'Hopper'"):
        scope_of_setup()["gencode"]("Hopper")


def test_gpus_that_the_cuda_kernels_do_not_run_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5")
    scope = scope_of_setup()
    scope.update(CUDA="1", nvcc=lambda: "nvcc")
    assert scope["without_cuda"]() == "not built: TORCH_CUDA_ARCH_LIST names no GPU of 8.0 or later"


@pytest.mark.parametrize(
    ("mode", "nvcc", "version", "said"),
    [
        ("0", "nvcc", "cuda: Optional[str] = '13.0'", "not built: SOFTPROMPT_FAST_CUDA=0"),
        ("auto", None, "cuda: Optional[str] = '13.0'", "not built: no nvcc"),
        ("1", None, "cuda = None", "not built: no nvcc"),
        (
            "auto",
            "nvcc",
            "cuda: Optional[str] = None\nhip = '7'",
            "not built: the building environment's torch has no",
        ),
        ("auto", "nvcc", None, "not built: no torch in the building environment"),
        ("auto", "nvcc", "cuda: Optional[str] = '13.0'", ""),
        ("1", "nvcc", None, ""),
    ],
)
def test_why_the_cuda_kernels_are_not_built(
    mode: str, nvcc: str | None, version: str | None, said: str, tmp_path: Path
):
    scope = scope_of_setup()
    if version is not None:
        (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{version}\n")
    spec = None if version is None else SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    scope.update(CUDA=mode, nvcc=lambda: nvcc, find_spec=lambda name: spec)
    found = scope["without_cuda"]()
    assert found.startswith(said) and bool(found) == bool(said)


def test_cuda_status_when_it_is_not_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SOFTPROMPT_FAST_CUDA_EMULATED", raising=False)
    monkeypatch.setattr(native, "_CUDA_NAME", "softprompt_fast._no_such_binary")
    module, reason = native.load_cuda()
    assert module is None
    assert native.cuda_build_info() == {}
    assert "reinstall" in reason


def test_cuda_status_when_the_emulated_build_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SOFTPROMPT_FAST_CUDA_EMULATED", str(tmp_path / "_cuda.so"))
    module, reason = native.load_cuda()
    assert module is None and "does not load here" in reason


def test_cpu_features_agree_with_the_system(built: ModuleType):
    features = built.cpu_features()
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        assert isinstance(features, dict)
        return
    flags = set(
        next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    )
    assert features == {name: name in flags for name in features}
    assert {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"} <= features.keys()
    # An independent second opinion, which also asks whether the system saves the wide registers.
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert features["avx2"] and features["fma"]


def test_has_cpu_feature(built: ModuleType):
    for name, usable in built.cpu_features().items():
        assert built.has_cpu_feature(name) is usable
    with pytest.raises(ValueError, match="unknown CPU feature 'avx1024'"):
        built.has_cpu_feature("avx1024")


def test_status_when_it_is_not_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_NAME", "softprompt_fast._no_such_binary")
    loaded, reason = native.status()
    assert not loaded
    assert "not built" in reason and "SOFTPROMPT_FAST_BUILD=1" in reason
    assert native.build_info() == {} and native.cpu_features() == {}


def test_status_when_the_binary_is_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"damaged_binary{suffix}").write_bytes(b"\x7fELF and then nothing of use")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(native, "_NAME", "damaged_binary")
    loaded, reason = native.status()
    assert not loaded
    assert "does not load here (ImportError" in reason and "reinstall" in reason


def test_status_when_the_binary_is_of_another_version(monkeypatch: pytest.MonkeyPatch):
    old = SimpleNamespace(build_info=lambda: {"version": "0.0.1"}, __spec__=object())
    monkeypatch.setitem(sys.modules, "old_binary", old)
    monkeypatch.setattr(native, "_NAME", "old_binary")
    loaded, reason = native.status()
    assert not loaded
    assert reason == f"built for softprompt-fast 0.0.1, found {__version__}; reinstall the package"


def test_what_an_extension_built_from_other_sources_lacks():
    extension, _ = native.load()
    if extension is None:
        pytest.skip(f"C++ extension: {native.status()[1]}")
    said = "is not in the extension: it was built from other sources; rebuild it"
    with pytest.raises(AttributeError, match=rf"^softprompt_fast._C.no_such_kernel {said}"):
        extension.no_such_kernel  # noqa: B018
    assert not hasattr(extension, "__path__")
    native_ops.implement(extension)
    for _ in range(2):  # it defines nothing
        with pytest.raises(ImportError, match=rf"^softprompt_fast::prompt_qkv_cpu {said}"):
            native_ops.op("prompt_qkv", "cpu")


def test_status_when_it_loads(monkeypatch: pytest.MonkeyPatch, built: ModuleType):
    monkeypatch.setitem(sys.modules, "softprompt_fast._C", built)
    assert native.status() == (True, "loaded")
    assert native.build_info() == built.build_info()
    assert native.cpu_features() == built.cpu_features()
