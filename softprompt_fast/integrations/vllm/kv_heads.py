# SPDX-License-Identifier: Apache-2.0
"""Which key/value heads a tensor-parallel rank holds. Needs no vLLM."""

from __future__ import annotations


def rank_kv_heads(num_kv_heads: int, tensor_parallel_size: int, rank: int) -> slice:
    """The heads of `rank`, as vLLM's QKV projections split them: an equal share each, or, with more ranks than heads,
    one head that neighbouring ranks hold copies of.

    For example 8 heads on 4 ranks are 0-1, 2-3, 4-5, 6-7; 2 heads on 4 ranks 0, 0, 1, 1.

    Raises:
        ValueError: neither divides the other, or there is no such rank.
    """
    larger, smaller = max(num_kv_heads, tensor_parallel_size), min(num_kv_heads, tensor_parallel_size)
    if smaller < 1 or larger % smaller or not 0 <= rank < tensor_parallel_size:
        raise ValueError(
            f"expected a rank of {tensor_parallel_size} and {num_kv_heads} key/value heads that they divide, or that "
            f"divide them, found rank {rank}"
        )
    share = max(1, num_kv_heads // tensor_parallel_size)
    first = rank * num_kv_heads // tensor_parallel_size
    return slice(first, first + share)
