# SPDX-License-Identifier: Apache-2.0
"""The device that the tests run on: SOFTPROMPT_FAST_TEST_DEVICE, by default the CPU. ``conftest.py`` makes it torch's
default device, so that a tensor made without saying where lies on it.

On a GPU the same tests run with the backends that serve it, minus those of what only a CPU has: the C++ kernels, and
the checks of values that would have to wait for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("SOFTPROMPT_FAST_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type != "cpu"

cpu_only = pytest.mark.skipif(ON_GPU, reason="of the CPU only: its kernels, or a check of values in host memory")
#: Of tests that compute in float64 with whatever backend serves it; a kernel asked for by name refuses.
float64 = pytest.mark.skipif(
    os.environ.get("SOFTPROMPT_FAST_BACKEND") in ("triton", "cuda"),
    reason="SOFTPROMPT_FAST_BACKEND asks for kernels that take no float64",
)
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: SOFTPROMPT_FAST_TEST_DEVICE=cuda")


def seeded(seed: int) -> torch.Generator:
    """For :func:`randn` and :func:`randint`: they draw on the CPU, so that a model has one set of weights everywhere
    and a token that is decided on one device is decided on all."""
    return torch.Generator(device="cpu").manual_seed(seed)


def randn(*size: int | Sequence[int], generator: torch.Generator, **options: Any) -> Tensor:
    return torch.randn(*size, generator=generator, device="cpu", **options).to(DEVICE)


def randint(low: int, high: int, size: Sequence[int], *, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, size, generator=generator, device="cpu").to(DEVICE)
