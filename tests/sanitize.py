# SPDX-License-Identifier: Apache-2.0
"""Tests of the C++ kernels with the extension built under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [pytest arguments]

Without arguments: all tests of the C++ kernels that are not slow, as ``make sanitize`` runs them. The
extension goes to a folder of its own, beside links to the package's files; the first finding ends the run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
# torch.compile and opcheck run other code than kernels, for most of the time.
DEFAULT = ["-m", "not slow", "-k", "cpu and not compile and not opcheck", "tests/ops"]
DEFAULT += [f"tests/test_cpu_{name}.py" for name in ("backend", "linear", "training")]

# Memory that ends one element early: the last read is behind it. A run that survives this proves nothing.
PLANTED = """
import torch
from softprompt_fast import ops
x = torch.zeros(1, 1, 8, 8)
prefix = x[0].clone()
x.untyped_storage().resize_(x.nbytes - x.element_size())
ops.prefix_attention(x, x, x, prefix, prefix, backend="cpu")
"""


def overlay(folder: Path, **environment: str) -> Path:
    """Build the extension into ``folder`` and put links to the package's files beside it: with ``folder`` first on
    the path, the package is this one with that extension. RuntimeError, with what was said, if it can't be built."""
    package = folder / "softprompt_fast"
    package.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "softprompt_fast").iterdir():
        link = package / path.name
        if path.suffix not in (".so", ".pyd") and not link.is_symlink():
            link.symlink_to(path)
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    command += ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    env = {**os.environ, "SOFTPROMPT_FAST_BUILD": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return folder


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python in the overlay; its output can be read."""
    env = on_path(folder) | environment
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def on_path(folder: Path) -> dict[str, str]:
    """The environment in which the overlay is the package. Safe path: otherwise the working directory, which holds
    the package too, would come first; behind the overlay it is where tests import each other from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "PYTHONSAFEPATH": "1"}


def compiler() -> list[str] | None:
    """The command of the C++ compiler that setup.py uses; None if there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if shutil.which(command[0]) else None


def sanitized(folder: Path) -> tuple[Path, dict[str, str]]:
    """The overlay with the sanitizers in it, and the environment it needs."""

    def library(name: str) -> str:
        found = subprocess.run(
            [*(compiler() or ["c++"]), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    overlay(folder, CXXFLAGS=FLAGS)
    return folder, {
        # Python itself is built without, so the runtime comes first; libstdc++ beside it, or a C++ exception finds
        # no real __cxa_throw.
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep memory to the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def check(folder: Path, environment: dict[str, str]) -> None:
    """The extension under test is the sanitized one, and it reports an error when there is one."""
    process = python(folder, "-c", PLANTED, **environment)
    said, _ = process.communicate()
    # A wide load that begins inside and ends outside is reported as "unknown-crash", others as "heap-buffer-overflow".
    if process.returncode == 0 or "ERROR: AddressSanitizer" not in said or "prefix_attention" not in said:
        raise RuntimeError(f"a planted overflow was not found (exit status {process.returncode}):\n{said}")


def main(arguments: list[str]) -> int:
    folder, environment = sanitized(ROOT / "build" / "sanitize")
    check(folder, environment)
    print("planted overflow: found", flush=True)
    # What is printed below Python is not captured: the report of a finding, after which the process is gone.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", *(arguments or DEFAULT)]
    return subprocess.run(command, cwd=ROOT, env=on_path(folder) | environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
