# SPDX-License-Identifier: Apache-2.0
"""A norm's values, as the kernels of every backend take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Codes of ``csrc/cpu/linear.h`` and ``csrc/prompt_qkv.h``.
KINDS = {"none": 0, "rms": 1, "layer": 2}


@dataclass
class Norm:
    """``norm(x) * (offset + weight) + bias`` over the last dimension; see ``ops.prompt_qkv``."""

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    offset: float = 0.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")

    @cached_property
    def packed(self) -> tuple[int, int, int, float, float]:
        """For the C++ extension: the kind's code, pointers to weight and bias in float32, offset and eps."""
        weight, bias = (0 if x is None else x.data_ptr() for x in self._floats)
        return KINDS[self.kind], weight, bias, float(self.offset), float(self.eps)

    @cached_property
    def _floats(self) -> tuple[Tensor | None, Tensor | None]:
        """What :attr:`packed` points to is kept here, for as long as it may be read."""
        weight, bias = (None if x is None else x.to(torch.float32).contiguous() for x in (self.weight, self.bias))
        return weight, bias
