# SPDX-License-Identifier: Apache-2.0
"""Which backends the tests of an op go through: plain PyTorch, and the C++ kernels of every instruction set that this
processor runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from softprompt_fast.backends import native

_C, _REASON = native.load()

CPU = (
    [pytest.param(("cpu", isa), id=f"cpu-{isa}") for isa in _C.available_isas()]
    if _C is not None
    else [pytest.param(("cpu", ""), id="cpu", marks=pytest.mark.skip(f"C++ extension: {_REASON}"))]
)
# In Triton's interpreter: see conftest.py.
TRITON = [pytest.param(("triton", ""), id="triton")]
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
