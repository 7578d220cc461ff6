# SPDX-License-Identifier: Apache-2.0
"""merge_states in C++: see ``csrc/cpu/merge_states_kernel.h``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends.cpu import _tensors
from softprompt_fast.backends.torch import merge_states as torch_backend

_C = _tensors.extension()


def reasons(*args: Any) -> list[str]:
    return _tensors.refusals(*args)


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out_a, lse_a, out_b, lse_b = (x.contiguous() for x in (out_a, lse_a, out_b, lse_b))
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    _C.merge_states(
        (out_a.data_ptr(), _tensors.CODES[out_a.dtype]),
        lse_a.data_ptr(),
        (out_b.data_ptr(), _tensors.CODES[out_b.dtype]),
        lse_b.data_ptr(),
        (out.data_ptr(), _tensors.CODES[out.dtype]),
        lse.data_ptr(),
        lse.numel(),
        out.shape[-1],
        torch.get_num_threads(),
    )
    return out, lse


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch_backend.backward(*args)
