# SPDX-License-Identifier: Apache-2.0
"""Tensors for tests that draw whole calls (hypothesis)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

DENSE_MOSTLY = ("dense", "dense", "dense", "sliced", "repeated", "overlapping")


@st.composite
def strided(
    draw: Callable[..., Any],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    kinds: Sequence[str] = DENSE_MOSTLY,
    change: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> torch.Tensor:
    """Random numbers with strides of any kind: permuted, sliced, repeated (0) or overlapping. The memory between and
    around them is NaN, of integers the largest. ``change``: what becomes of the numbers drawn."""
    strides, step = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        kind = draw(st.sampled_from(kinds))
        strides[dim] = {"repeated": 0, "overlapping": 1, "sliced": 2 * step}.get(kind, step)
        step = max(step, strides[dim] * max(shape[dim], 1))
    before, behind = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    places = torch.arange(before + size + behind).as_strided(shape, strides, before).unique()
    if dtype.is_floating_point:
        memory = torch.full((before + size + behind,), float("nan"))
        memory[places] = change(torch.randn(len(places)))
    else:
        memory = torch.full((before + size + behind,), torch.iinfo(dtype).max, dtype=dtype)
        memory[places] = torch.randint(-127, 128, (len(places),), dtype=dtype)
    return memory.to(dtype).as_strided(shape, strides, before)


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy whose last element in a dimension lies more than 2^31 elements behind its first. Only the pages that are
    used take memory."""
    strides, step = [0] * x.dim(), 1
    for d in reversed(range(x.dim())):
        if d != dim:
            strides[d], step = step, step * x.shape[d]
    strides[dim] = (1 << 31) // (x.shape[dim] - 1) // 16 * 16 + 16
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    return torch.empty(span, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)
