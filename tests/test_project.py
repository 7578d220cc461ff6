# SPDX-License-Identifier: Apache-2.0
"""The project's own promises: light import, honest pins, a build that works without a compiler, a complete archive."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

import softprompt_fast
from softprompt_fast import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def pins() -> dict[str, str]:
    """Name -> exact version of every line of requirements-dev.txt."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = line.split("==")  # fails on anything that is no exact pin
            found[name.replace("_", "-")] = version
    return found


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def build_extension(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Run setup.py's build into a folder of its own; what it said and the binaries that came out."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done, [path for path in tmp_path.rglob("_C*") if path.suffix in (".so", ".pyd")]


NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


def test_import_is_light():
    done = run_python(
        "import sys, softprompt_fast; print({'torch', 'transformers', 'peft', 'rich'} & sys.modules.keys())"
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_processes_in_other_folders_run_the_package_under_test(tmp_path: Path):
    """Also where it is found by a relative PYTHONPATH."""
    done = run_python("import softprompt_fast; print(softprompt_fast.__file__)", cwd=tmp_path)
    assert done.stdout.strip() == softprompt_fast.__file__, done.stderr


def test_the_core_works_without_the_extras():
    code = """
import sys
for name in (
    "peft", "triton", "vllm", "gguf", "matplotlib", "accelerate", "datasets", "tensorboard", "trl", "pybind11",
    "softprompt_fast._C",
):
    sys.modules[name] = None  # importing it now raises ImportError
import softprompt_fast as spf
from softprompt_fast.backends import native
spf.SoftPromptModel, spf.PrefixKV, spf.accelerate, spf.ops.prefix_attention
print(native.status()[0])
"""
    done = run_python(code)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_an_isolated_build_downloads_no_torch():
    assert not [need for need in PROJECT["build-system"]["requires"] if need.startswith("torch")]


def test_every_direct_dependency_is_pinned_within_its_range():
    pinned = pins()
    needs = PROJECT["project"]["dependencies"] + [
        need for extra in ("peft", "train", "bench", "demo", "serve", "dev") for need in EXTRAS[extra]
    ]
    for need in map(Requirement, needs):
        assert need.name in pinned, f"requirements-dev.txt: no pin for {need}"
        assert need.specifier.contains(pinned[need.name]), f"{need} does not accept the pin {pinned[need.name]}"


def test_the_changelog_knows_this_version():
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)


def test_every_source_file_names_its_licence():
    folders = ("softprompt_fast", "csrc", "tests", "benchmarks")
    sources = [
        p for folder in folders for end in ("py", "cpp", "h", "cu", "cuh") for p in (ROOT / folder).rglob(f"*.{end}")
    ]
    sources += [ROOT / name for name in ("setup.py", "pyproject.toml", "Makefile", ".ci/run", "requirements-dev.txt")]
    assert len(sources) > 20
    nameless = [p for p in sources if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:120]]
    assert not nameless


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_ci_runs_lint_and_all_tests():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in script and script.rstrip().endswith("make test")
    plan = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for tool in ("ruff check", "ruff format --check", "clang-format", "mypy", "pytest"):
        assert tool in plan
    assert "not slow" not in plan


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_names_what_the_machine_lacks(tmp_path: Path):
    stand_in = tmp_path / "python3"
    stand_in.write_text('#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\n')  # a new enough Python without venv
    stand_in.chmod(0o755)
    command = ["make", "install", f"PYTHON={stand_in}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "has no venv module" in done.stderr and "python3-venv" in done.stderr


def test_build_without_a_compiler_says_so_and_succeeds(tmp_path: Path):
    done, binaries = build_extension(tmp_path, SOFTPROMPT_FAST_BUILD="auto", **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert not binaries
    assert "Missing: GCC or Clang with C++17" in done.stderr and "no-such-compiler" in done.stderr


def test_build_without_a_compiler_fails_if_the_extension_was_asked_for(tmp_path: Path):
    done, binaries = build_extension(tmp_path, SOFTPROMPT_FAST_BUILD="1", **NO_COMPILER)
    assert done.returncode != 0 and not binaries
    assert "SOFTPROMPT_FAST_BUILD=1" in done.stderr


def test_build_can_be_switched_off(tmp_path: Path):
    done, binaries = build_extension(tmp_path, SOFTPROMPT_FAST_BUILD="0")
    assert done.returncode == 0 and not binaries
    assert "Missing" not in done.stderr


def test_build_refuses_an_unknown_mode(tmp_path: Path):
    done, _ = build_extension(tmp_path, SOFTPROMPT_FAST_BUILD="yes")
    assert done.returncode != 0
    assert "SOFTPROMPT_FAST_BUILD: expected 0, 1 or auto, found 'yes'" in done.stderr


def test_the_source_archive_holds_what_a_build_needs(tmp_path: Path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    # From a copy: an archive is put together inside the tree that it is made of.
    copy = tmp_path / "tree"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    )
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    wanted |= {"LICENSE", "README.md", "setup.py", "softprompt_fast/py.typed", "softprompt_fast/cli/app.py"}
    assert wanted <= names
