# SPDX-License-Identifier: Apache-2.0
"""The emulator that CUDA kernels are tested with (csrc/tests/cuda_test.cpp): its instructions compute what PTX says,
and it finds planted faults."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import cuda_emulated

COMPILER = cuda_emulated.compiler()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
def test_instructions_and_planted_faults(tmp_path: Path) -> None:
    program = tmp_path / "cuda_test"
    source = str(cuda_emulated.ROOT / "csrc" / "tests" / "cuda_test.cpp")
    command = [*(COMPILER or []), *cuda_emulated.FLAGS, source, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")
def test_the_kernels_build_for_it() -> None:
    path, why = cuda_emulated.library()
    assert path is not None, why
