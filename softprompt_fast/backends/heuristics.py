# SPDX-License-Identifier: Apache-2.0
"""Choices by shape, as pure functions of numbers: no tensors, no state, every one with a worked example."""

from __future__ import annotations


def backend_order(device_type: str) -> tuple[str, ...]:
    """Backends in the order ``"auto"`` tries them on a device.

    Example: on "cpu" the C++ kernels come first, then plain PyTorch, then the reference, which serves everything.
    """
    if device_type == "cpu":
        return ("cpu", "torch", "reference")
    if device_type == "cuda":
        return ("cuda", "triton", "torch", "reference")
    return ("torch", "reference")


def join_keys(batch: int, keys: int, width: int) -> bool:
    """Whether a decode step copies prefix and own keys into one run a row, instead of attending to each and merging.

    A second kernel call and the merge cost some 30 us, the copy costs memory traffic that grows with the batch; on a
    CPU they break even near 256k elements. ``keys`` counts prefix and own keys, ``width`` the elements of one of them
    (key and value).

    Example: 1 row, 100 + 16 keys, 3 heads of 64: ``1 * 116 * 3 * (64 + 64) = 44544`` elements, joined. A batch of 32,
    or 2048
    virtual tokens: apart.
    """
    return batch * keys * width <= 1 << 18


def score_rows(heads: int, rows: int, keys: int) -> int:
    """How many query rows to score at a time, so that a block of scores stays near 4M elements (16 MB in float32).

    Example: 96 heads, 1024 rows, 2048 keys: ``4194304 // (96 * 2048) = 21`` rows at a time; 3 heads, 96 rows, 512
    keys: all.
    """
    return max(1, min(rows, (1 << 22) // max(1, heads * keys)))
