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
        # No "cuda" until its kernels have run on a GPU: so far they are tested in their emulator alone.
        return ("triton", "torch", "reference")
    return ("torch", "reference")


def join_keys(batch: int, keys: int, width: int) -> bool:
    """Whether a decode step copies prefix and own keys into one run a row, instead of attending to each and merging.

    A second kernel call and the merge cost some 30 us, the copy costs memory traffic that grows with the batch; on a
    CPU they break even near 256k elements. ``keys`` counts prefix and own keys, ``width`` the elements of one of them
    (key and value).

    Example: 1 row, 100 + 16 keys, 3 heads of 64: ``1 * 116 * 3 * (64 + 64) = 44544`` elements, joined. A batch of 32,
    or 2048 virtual tokens: apart.
    """
    return batch * keys * width <= 1 << 18


def copy_prefix(rows: int, virtual_tokens: int, fused: bool) -> bool:
    """Whether ``generate`` copies the prefix into the row's own cache instead of attending to the shared one.

    Only for a single row: memory must not grow with the batch. On a CPU a decode step of one layer (3 kv heads of 64)
    then took 14 us instead of 48 at 100 virtual tokens, 229 instead of 397 at 2048, 533 instead of 727 at 4096; beyond
    that the copy itself, made for every request, is the larger part. The fused decoder, which serves only the shared
    prefix, saves more than that.

    Example: 1 row, 100 virtual tokens, not fused: copied. 2 rows, or 8192 virtual tokens, or fused: shared.
    """
    return not fused and rows == 1 and virtual_tokens <= 4096


def pack_weights(weight_bytes: int, available_bytes: int) -> bool:
    """Whether the fused decoder keeps a second copy of the weights, laid out for the C++ product.

    Example: 538 MB of weights and 8 GB available: packed, for they take at most a quarter. 3 GB of weights: not,
    and the base keeps its own pass.
    """
    return 4 * weight_bytes <= available_bytes


def fuse_projection(rows: int) -> bool:
    """Whether norm, q, k, v projection and rotation run as one Triton kernel instead of a library's products between
    two kernels.

    Every tile of columns normalises its rows again. With few rows reading the weights takes the time, and one launch
    is saved over four; with many the arithmetic does, which a library does better. ``rows`` counts batch times length.

    Example: a decode step of 64 rows: one kernel. 32 rows of 128 virtual and 128 own tokens, 8192: composed.
    """
    return rows <= 128


def score_rows(heads: int, rows: int, keys: int) -> int:
    """How many query rows to score at a time, so that a block of scores stays near 4M elements (16 MB in float32).

    Example: 96 heads, 1024 rows, 2048 keys: ``4194304 // (96 * 2048) = 21`` rows at a time; 3 heads, 96 rows, 512
    keys: all.
    """
    return max(1, min(rows, (1 << 22) // max(1, heads * keys)))


def stack_queries(queries: int, groups: int) -> bool:
    """Whether the Triton kernels stack the queries of all rows and of a key's ``groups`` query heads into one tile.

    A tile of the prefill kernel holds 64 to 128 queries of one row and head: with fewer it multiplies mostly zeros.
    Stacked, tiles are full, but prefix and own keys meet in a second launch.

    Example: decode steps, and 16 queries a row with 4 query heads a key head, are stacked; 17 such are not.
    """
    return queries == 1 or queries * groups <= 64


def l2_section(pairs: int, pair_bytes: int) -> int:
    """How many pairs of a row and a key head the prefill kernel works on at a time, so that the own keys and values
    that their query blocks read over and over stay in the L2 cache (50 MB on an H100; the prefix and the queries take
    the rest).

    Example: 16 rows of 8 heads with 512 keys of 128 in 16 bits: ``2 * 512 * 128 * 2`` bytes a pair, all 128 pairs at
    once. With 8192 keys 8 pairs.
    """
    return max(1, min(pairs, (32 << 20) // max(1, pair_bytes)))


def prefix_splits(blocks: int, rows: int, processors: int) -> int:
    """Among how many programs the Triton backward shares out the rows of each block of a prefix's gradient.

    Each program sums over its rows on its own, so partial sums take memory and time: as few as leave the least time
    until the last is done, ``ceil(blocks * splits / processors) / splits`` of a block's, and never more than two
    blocks a processor. Their memory is then bounded by the processors, whatever the batch.

    Example: 512 entries in blocks of 128, 8 heads, 16 rows on 132 processors: 32 blocks, 4 splits, one wave of 128
    programs. 70 blocks: 3 splits, two waves of a third each. 133 blocks or more: one, and no partial sums.
    """
    most = max(1, min(rows, 2 * processors // max(blocks, 1)))
    return min(range(1, most + 1), key=lambda splits: -(-blocks * splits // processors) / splits)


def head_rows(rows: int, vocab_size: int) -> int:
    """How many rows of hidden states a head makes logits of at a time: 64 MB in float32, in chunks of one size.

    Each chunk reads all of the head's weights twice (once for its gradient), so few rows waste that: never fewer than
    64, where there are so many. Who keeps logits and their softmax side by side takes that memory twice.

    Example: 496 rows of 49152 logits: at most 341, so two chunks of 248. 1000 rows of 262144: chunks of 63, of at most
    64.
    """
    most = max(64, (1 << 24) // max(1, vocab_size))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))
