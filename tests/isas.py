# SPDX-License-Identifier: Apache-2.0
"""Which backends the tests of an op go through: plain PyTorch, Triton, and on a CPU the C++ kernels of every
instruction set that this processor runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from softprompt_fast.backends import native
from tests.device import ON_GPU

_C, _REASON = native.load()
_WHY_NOT = "the C++ kernels run on the CPU" if ON_GPU else None if _C is not None else f"C++ extension: {_REASON}"

needs_extension = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))
CPU = (
    [pytest.param(("cpu", isa), id=f"cpu-{isa}") for isa in _C.available_isas()]
    if _WHY_NOT is None
    else [pytest.param(("cpu", ""), id="cpu", marks=needs_extension)]
)
# On the CPU in Triton's interpreter: see conftest.py.
TRITON = [pytest.param(("triton", ""), id="triton")]
# On the CPU emulated: see conftest.py.
_CUDA, _CUDA_REASON = native.load_cuda()
CUDA = [
    pytest.param(
        ("cuda", ""), id="cuda", marks=pytest.mark.skipif(_CUDA is None, reason=f"CUDA kernels: {_CUDA_REASON}")
    )
]
BACKENDS = [pytest.param(("torch", ""), id="torch"), *CPU, *TRITON]
EVERY = [pytest.param(("reference", ""), id="reference"), *BACKENDS]


@contextmanager
def using(served: tuple[str, str]) -> Iterator[str]:
    """The backend's name; within it the C++ kernels are those of the instruction set."""
    backend, isa = served
    if backend != "cpu":
        yield backend
        return
    before = _C.isa()
    _C.use_isa(isa)
    try:
        yield backend
    finally:
        _C.use_isa(before)
