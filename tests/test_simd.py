# SPDX-License-Identifier: Apache-2.0
"""Vector arithmetic of the C++ kernels (csrc/tests/simd_test.cpp), compiled anew for every instruction set that runs
here, with the flags that setup.py gives its kernels."""

from __future__ import annotations

import ast
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.isas import CPU

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def flags(isa: str) -> list[str]:
    """Those of csrc/cpu/isa_<isa>.cpp, taken from setup.py (which cannot be imported: it would build)."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    wanted = ("X86", "ISA_FLAGS", "FLAGS")
    settings = [s for s in tree.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) in wanted]
    assert len(settings) == len(wanted)
    scope = {"platform": platform}
    exec(compile(ast.Module(settings, []), "setup.py", "exec"), scope)
    source = f"isa_{isa}.cpp"
    found = re.search(r"SOFTPROMPT_FAST_VECTOR_BYTES (\d+)", (ROOT / "csrc/cpu" / source).read_text(encoding="utf-8"))
    assert found is not None
    macros = [f"-DSOFTPROMPT_FAST_ISA={isa}", f"-DSOFTPROMPT_FAST_VECTOR_BYTES={found[1]}"]
    return [*shlex.split(f"{scope['FLAGS']} {scope['ISA_FLAGS'].get(source, '')}"), *macros]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("served", CPU)
def test_against_scalar_code(served: tuple[str, str], tmp_path: Path) -> None:
    program = tmp_path / "simd_test"
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    source = str(ROOT / "csrc/tests/simd_test.cpp")
    command = [*shlex.split(COMPILER), *flags(served[1]), "-Werror", *extra, source, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
