# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel for few queries a row: what the op's own tests are too small for. Several tiles, several splits,
many prompts, every head size, quantised prefixes. On a CPU it is emulated (csrc/cuda/emulator.h)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from softprompt_fast.backends import native
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import AttentionInputs, assert_within_noise, attention_inputs, poisoned_memory
from tests.ops.test_prefix_attention import LAYOUTS

_cuda, _reason = native.load_cuda()
if _cuda is None:
    pytest.skip(f"CUDA kernels: {_reason}", allow_module_level=True)

from softprompt_fast.backends.cuda import prefix_attention as decode
from tests.test_triton_decode import CASES, MANY, arguments, quantized

BF16, FP16 = torch.bfloat16, torch.float16


def run(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_memory():
        return decode.forward(*arguments(inputs))


def check(found: tuple[torch.Tensor, torch.Tensor], exact: AttentionInputs, plain: AttentionInputs) -> None:
    """Against the oracle in float64; where a query is padding, only that it is finite."""
    real = plain.real_queries()
    assert found[0].isfinite().all() and not found[1].isnan().any()
    results = (found, reference(*exact.tensors, **exact.options), plain.baseline())
    for which, mask in ((0, real), (1, real[..., 0])):
        assert_within_noise(*(x[which].masked_fill(~mask, 0.0) for x in results), ("out", "lse")[which])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if "bias" not in CASES[n]])
def test_forward(name: str, dtype: torch.dtype) -> None:
    inputs = attention_inputs(dtype=dtype, **CASES[name])
    check(run(inputs), inputs.to(torch.float64), inputs)
