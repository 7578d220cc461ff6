# SPDX-License-Identifier: Apache-2.0
"""Attention of vLLM's CPU backend that reads a prefix once for all rows that share it.

vLLM shares a prefix's blocks between rows, but its CPU kernel reads them again for every row. Here the rows of a step
whose block tables begin with the same full blocks, whatever made them common (a soft prompt, or the same text), attend
to those by one call of ``prefix_attention``, whose product is dense over rows, and to the rest of their own blocks
in the same call. Everything is read from vLLM's cache in every step, so nothing can be out of date. Other rows, and
layers with windows, ALiBi, sinks or an 8-bit cache, take vLLM's own kernel.

``LLM(..., worker_extension_cls="softprompt_fast.integrations.vllm.shared_prefix.SharedPrefixWorker")`` asks for it (of
the server ``--worker-extension-cls``): vLLM imports that class in each worker before it loads the model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as kernels
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from softprompt_fast.backends.cpu import prefix_attention
from softprompt_fast.integrations.vllm import _internals  # noqa: F401  it checks the version of vLLM

#: Shared tokens from which on one read saves more than gathering own tokens costs.
LEAST_SHARED = 64
#: Queries, padding included, that a call may have for each real one.
MOST_PADDING = 2


@dataclass(frozen=True)
class SharedRows:
    """Rows of a step that share, R of them, in N groups.

    Attributes:
        prefix_blocks: int64, the shared blocks of all groups, end to end.
        prefix_offsets: int32 ``[N + 1]``, in tokens.
        prefix_index: int32 ``[R]``, each row's group.
        own_blocks: int64 ``[R, blocks]``, each row's other blocks; behind its last any valid ones.
        own_end, query_start: int32 ``[R]``, in tokens from a row's first own block.
        tokens: int64 ``[R, S]``, the step's tokens that are the rows' queries; a row's last one fills it up.
        real: bool ``[R, S]``, where it does not.
    """

    prefix_blocks: Tensor
    prefix_offsets: Tensor
    prefix_index: Tensor
    own_blocks: Tensor
    own_end: Tensor
    query_start: Tensor
    tokens: Tensor
    real: Tensor


def find_shared(
    block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor, block_size: int
) -> tuple[SharedRows, list[int]] | None:
    """Which rows share what, and which don't. For example with blocks of 32 three rows that decode, of 100, 70 and 90
    tokens and blocks (5, 6, 1, 2), (5, 6, 3) and (7, 8, 9): rows 0 and 1 share blocks 5 and 6, row 2 is on its own.

    Args:
        block_table: int ``[B, blocks]``.
        seq_lens: int ``[B]``, tokens of each row with this step's.
        query_start_loc: int ``[B + 1]``, where each row's tokens of this step begin.

    Returns:
        The rows that share at least `LEAST_SHARED` tokens, all computed in earlier steps, and the numbers of the
        others; None where too little is shared.
    """
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    counts = [end - start for start, end in itertools.pairwise(starts)]
    before = [(length - count) // block_size for length, count in zip(lengths, counts, strict=True)]
    groups: dict[int, list[int]] = {}
    for row, first in enumerate(block_table[:, 0].tolist()):
        if before[row] * block_size >= LEAST_SHARED:
            groups.setdefault(first, []).append(row)
    rows: list[int] = []
    shared: list[int] = []
    index: list[int] = []
    prefixes: list[Tensor] = []
    for members in groups.values():
        tables = block_table[members, : min(before[row] for row in members)]
        common = int((tables == tables[0]).all(0).int().cumprod(0).sum())
        if len(members) > 1 and common * block_size >= LEAST_SHARED:
            rows += members
            shared += [common] * len(members)
            index += [len(prefixes)] * len(members)
            prefixes.append(tables[0, :common].long())
    widest = max((counts[row] for row in rows), default=0)
    if not rows or widest * len(rows) > MOST_PADDING * sum(counts[row] for row in rows):
        return None
    own_end = [lengths[row] - common * block_size for row, common in zip(rows, shared, strict=True)]
    blocks = torch.arange(-(-max(own_end) // block_size)) + torch.tensor(shared)[:, None]
    place = torch.arange(widest)
    count = torch.tensor([counts[row] for row in rows])[:, None]
    sizes = torch.tensor([0, *(len(prefix) for prefix in prefixes)]) * block_size
    found = SharedRows(
        torch.cat(prefixes),
        sizes.cumsum(0).int(),
        torch.tensor(index, dtype=torch.int32),
        block_table[rows].long().gather(1, blocks.clamp_(max=block_table.shape[1] - 1)),
        torch.tensor(own_end, dtype=torch.int32),
        torch.tensor([end - counts[row] for row, end in zip(rows, own_end, strict=True)], dtype=torch.int32),
        torch.tensor([starts[row] for row in rows])[:, None] + place.minimum(count - 1),
        place < count,
    )
    return found, sorted(set(range(len(lengths))) - set(rows))


class SharedPrefixMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.shared = metadata.others = None
        if metadata.causal is not True or metadata.encoder_cache is not None:
            return metadata
        found = find_shared(metadata.block_table, metadata.seq_lens, metadata.query_start_loc, self.block_size)
        if found is not None:
            metadata.shared, rows = found
            if rows:
                metadata.others = self._of_rows(metadata, rows)
        return metadata

    def _of_rows(self, metadata: CPUAttentionMetadata, rows: list[int]) -> tuple[CPUAttentionMetadata, Tensor]:
        """The same for some rows alone, and which of the step's tokens are theirs."""
        starts = metadata.query_start_loc.tolist()
        tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
        counts = torch.tensor([0, *(starts[row + 1] - starts[row] for row in rows)], dtype=torch.int32)
        query_start_loc, seq_lens = counts.cumsum(0).int(), metadata.seq_lens[rows]
        scheduled = kernels.cpu_attn_get_scheduler_metadata(
            num_reqs=len(rows),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        some = replace(
            metadata,
            num_actual_tokens=len(tokens),
            max_query_len=int(counts.max()),
            query_start_loc=query_start_loc,
            max_seq_len=int(seq_lens.max()),
            seq_lens=seq_lens,
            block_table=metadata.block_table[rows],
            slot_mapping=metadata.slot_mapping[tokens],
            scheduler_metadata=scheduled,
        )
        some.shared = some.others = None
        return some, tokens


class SharedPrefixImpl(CPUAttentionBackendImpl):
    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *scales: Any,
        **named_scales: Any,
    ) -> Tensor:
        shared = getattr(attn_metadata, "shared", None)
        call = (*scales, *named_scales.values())
        if shared is None or self._why_not(layer) or any(scale is not None for scale in call):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales)
        if attn_metadata.others is not None:
            metadata, tokens = attn_metadata.others
            part = torch.empty_like(output[: len(tokens)])
            super().forward(layer, query[tokens], key, value, kv_cache, metadata, part)
            output[tokens] = part
        self._attend(shared, query, kv_cache, output)
        return output

    def _why_not(self, layer: Any) -> bool:
        """Whether this layer needs what only vLLM's kernel has, or a cache whose layout is another one."""
        return (
            layer.isa != "vec"
            or self.sliding_window != -1
            or self.alibi_slopes is not None
            or self.sinks is not None
            or self.is_fp8_kv_cache
        )

    def _attend(self, shared: SharedRows, query: Tensor, kv_cache: Tensor, output: Tensor) -> None:
        blocks, heads, size, width = kv_cache.shape
        dim = width // 2
        # A block holds its keys as [D, block] and then its values as [block, D].
        whole = kv_cache.view(blocks, heads, 2, size * dim)
        rows, own = shared.own_blocks.shape
        taken = whole.index_select(0, shared.own_blocks.flatten()).view(rows, own, heads, 2, size * dim)
        keys = taken[:, :, :, 0].view(rows, own, heads, dim, size).permute(0, 2, 1, 4, 3)
        values = taken[:, :, :, 1].view(rows, own, heads, size, dim).transpose(1, 2)
        prefix = whole.index_select(0, shared.prefix_blocks).view(-1, heads, 2, size * dim)
        prefix_keys = prefix[:, :, 0].view(-1, heads, dim, size).permute(1, 0, 3, 2)
        prefix_values = prefix[:, :, 1].view(-1, heads, size, dim).transpose(0, 1)
        out, _ = prefix_attention.forward(
            query[shared.tokens].transpose(1, 2),
            keys.reshape(rows, heads, own * size, dim),
            values.reshape(rows, heads, own * size, dim),
            prefix_keys.reshape(heads, -1, dim),
            prefix_values.reshape(heads, -1, dim),
            shared.prefix_offsets,
            shared.prefix_index,
            None,
            shared.own_end,
            shared.query_start,
            self.scale,
            True,
            None,
            self.logits_soft_cap or None,
            None,
            None,
        )
        output[shared.tokens[shared.real]] = out.transpose(1, 2)[shared.real]


@register_backend(AttentionBackendEnum.CPU_ATTN)
class SharedPrefixBackend(CPUAttentionBackend):
    """vLLM's CPU backend, in the place of which it is registered when this module is imported."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return SharedPrefixImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return SharedPrefixMetadataBuilder


class SharedPrefixWorker:
    """Adds nothing to a worker: naming it makes the worker import this module."""
