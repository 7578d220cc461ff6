# SPDX-License-Identifier: Apache-2.0
"""What a user would run instead: each peer as its own users run it, from the inputs that our ops and models get.

Op level (:func:`attention_peers`): a ``System`` whose ``prepare`` makes of ``(query, key, value, prefix_key,
prefix_value)`` what the peer would have at hand, such as a cache with a copy of the prefix for every row. That is not
timed; whatever a peer does at every call is. Model level: turns, from own tokens to new tokens and seconds.

A peer that can't run here raises :class:`Unavailable` with the reason.
"""

from __future__ import annotations

import functools
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _gpu import System
from _harness import Times
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from softprompt_fast import PrefixKV

Inputs = tuple[Tensor, ...]


class Unavailable(RuntimeError):
    """Why a peer can't run here."""


SLOW = frozenset({"flex", "flex-shared", "static-compiled"})
"""Those that compile for seconds or minutes."""


def recompiling() -> Any:
    """While a peer is compiled for one more shape. Beyond its limit torch.compile goes on without compiling, which is
    many times slower and no longer that peer."""
    return torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024)


# -- attention over keys and values that hold the prefix for every row ------------------------------------------------


def expanded(inputs: Inputs, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Query, and keys and values with a copy of the prefix in every row; each head ``groups`` times."""
    query, key, value, *prefix = inputs
    keys, values = (
        torch.cat([p.expand(key.shape[0], -1, -1, -1), x], 2).repeat_interleave(groups, 1)
        for p, x in zip(prefix, (key, value), strict=True)
    )
    return query, keys, values


def with_mask(inputs: Inputs) -> Inputs:
    """With the additive mask ``[1, 1, S, columns]`` of queries that are the last S of the columns; a lone query sees
    all of them and needs none."""
    query, key, _ = inputs
    if query.shape[2] == 1:
        return inputs
    return *inputs, lower_right(query, key.shape[2])[None, None]


def lower_right(query: Tensor, columns: int) -> Tensor:
    """The additive mask ``[S, columns]`` of the last S of the columns, in the query's dtype."""
    queries = query.shape[2]
    hidden = torch.ones(queries, columns, dtype=torch.bool, device=query.device).triu(columns - queries + 1)
    return torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, -math.inf)


def sdpa(inputs: Inputs) -> Tensor:
    """PyTorch's attention with what it chooses by itself; ``inputs``: query, keys, values and perhaps a mask."""
    return F.scaled_dot_product_attention(*inputs, enable_gqa=inputs[0].shape[1] != inputs[1].shape[1])


def heads_repeated(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return expanded(inputs, inputs[0].shape[1] // inputs[1].shape[1])


# -- FlexAttention ----------------------------------------------------------------------------------------------------


@functools.cache
def compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def block_mask(shared: bool, rows: int, queries: int, own: int, prefix: int, device: torch.device) -> Any:
    """Of ``expanded`` rows, or (``shared``) of all rows packed behind one prefix."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen_by_row(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + (prefix + own - queries)

    def seen_by_all(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, position = (j - prefix) // own, (j - prefix) % own
        return (j < prefix) | ((row == i // queries) & (position <= i % queries + (own - queries)))

    if shared:
        return create_block_mask(seen_by_all, None, None, rows * queries, prefix + rows * own, device=device)
    return create_block_mask(seen_by_row, None, None, queries, prefix + own, device=device)


def packed(inputs: Inputs) -> Inputs:
    """All rows in one sequence: queries ``[1, Hq, B * S, D]``, keys and values ``[1, Hkv, P + B * T, D]``, the prefix
    once and then every row's own."""
    query, key, value, *prefix = inputs
    rows = [x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)]
    keys, values = (torch.cat([p, x], 1)[None] for p, x in zip(prefix, rows[1:], strict=True))
    return rows[0][None].contiguous(), keys, values


def flex_attention(shared: bool) -> System:
    """FlexAttention, compiled: over expanded rows, or (``shared``) with a mask by which all rows see one prefix."""
    compiled: set[Any] = set()

    def prepare(inputs: Inputs) -> tuple[Any, ...]:
        query, key, _, prefix, _ = inputs
        shape = (query.shape[0], query.shape[2], key.shape[2], prefix.shape[1])
        mask = block_mask(shared, *shape, query.device)
        return *(packed(inputs) if shared else expanded(inputs)), mask, shape

    def attend(prepared: tuple[Any, ...]) -> Tensor:
        query, keys, values, mask, (rows, queries, *_) = prepared
        grouped = query.shape[1] != keys.shape[1]
        out = compiled_flex_attention()(query, keys, values, block_mask=mask, enable_gqa=grouped)
        return out[0].unflatten(1, (rows, queries)).transpose(0, 1) if shared else out

    def call(prepared: tuple[Any, ...]) -> Tensor:
        if prepared[-1] not in compiled:
            with recompiling():
                attend(prepared)
            compiled.add(prepared[-1])
        return attend(prepared)

    return System(call, prepare)


# -- Hydragen ---------------------------------------------------------------------------------------------------------


def partial_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention and its natural log-sum-exp, by the kernels behind PyTorch's own attention. The public function keeps
    the log-sum-exp to itself.

    Raises:
        Unavailable: a mask on a GPU, where that kernel takes none.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)
        return out, lse
    if mask is not None:
        raise Unavailable("PyTorch's flash attention on a GPU takes no mask, which several queries a row need here")
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out, lse[..., : query.shape[2]]


def hydragen(inputs: Inputs) -> Tensor:
    """Hydragen (Juravsky et al., 2024) in plain PyTorch: all rows' queries against the one prefix, each row's against
    its own keys, merged by their log-sum-exps. Query heads of one key head are stacked, so that no key is repeated."""
    query, key, value, prefix_key, prefix_value, *mask = inputs
    rows, heads, queries, width = query.shape
    stacked = query.unflatten(1, (key.shape[1], -1))  # [B, Hkv, G, S, D]
    together = stacked.permute(1, 2, 0, 3, 4).flatten(1, 3)[None]  # [1, Hkv, G * B * S, D]
    out, lse = partial_attention(together, prefix_key[None], prefix_value[None], None)
    groups = stacked.shape[2]
    out_a = out[0].unflatten(1, (groups, rows, queries)).permute(2, 0, 1, 3, 4)
    lse_a = lse[0].unflatten(1, (groups, rows, queries)).permute(2, 0, 1, 3)
    out, lse = partial_attention(stacked.flatten(2, 3), key, value, mask[0] if mask else None)
    out_b, lse_b = (x.unflatten(2, (groups, queries)) for x in (out, lse))
    lse = torch.logaddexp(lse_a, lse_b)
    share = torch.exp(lse_a - lse)[..., None].to(out.dtype)
    return torch.lerp(out_b, out_a, share).reshape(rows, heads, queries, width)


def hydragen_inputs(inputs: Inputs) -> Inputs:
    """With the additive mask of own keys ``[G * S, T]`` that several queries need."""
    query, key, *_ = inputs
    if query.shape[2] == 1:
        return inputs
    return *inputs, lower_right(query, key.shape[2]).repeat(query.shape[1] // key.shape[1], 1)


# -- FlashInfer -------------------------------------------------------------------------------------------------------


def flashinfer_cascade(page: int = 16) -> System:
    """FlashInfer's cascade of two levels over a cache in pages of ``page`` tokens: the prefix for all queries, then
    every row's own. Planned once, as a model plans once for all of its layers. Tables and arguments are those of
    flashinfer-python 0.7.2; its kernels are for 16 bits."""

    def prepare(inputs: Inputs) -> tuple[Any, ...]:
        query, key, value, prefix_key, prefix_value = inputs
        try:
            flashinfer = importlib.import_module("flashinfer")
        except ImportError as error:
            raise Unavailable(f"{error}; it needs a GPU (pip install flashinfer-python==0.7.2.post1)") from None
        rows, heads, queries, width = query.shape
        cache = torch.cat(
            [pages(x, page) for x in (torch.stack([prefix_key, prefix_value])[None], torch.stack([key, value], 1))]
        )
        counts = [-(-x.shape[-2] // page) for x in (prefix_key, key)]

        def table(first: int, sequences: int, count: int, length: int) -> list[Tensor]:
            """Where each sequence's pages begin, which they are, and how full its last one is."""
            starts = torch.arange(sequences + 1, dtype=torch.int32) * count
            used = torch.arange(first, first + sequences * count, dtype=torch.int32)
            last = torch.full((sequences,), (length - 1) % page + 1, dtype=torch.int32)
            return [x.to(query.device) for x in (starts, used, last)]

        levels = (table(0, 1, counts[0], prefix_key.shape[1]), table(counts[0], rows, counts[1], key.shape[2]))
        every = torch.tensor([0, rows * queries], dtype=torch.int32, device=query.device)
        each = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * queries
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
        wrapper.plan(
            [every, each],
            *(list(column) for column in zip(*levels, strict=True)),
            heads,
            key.shape[1],
            width,
            page,
            causal=True,
            q_data_type=query.dtype,
        )
        return wrapper, query.transpose(1, 2).flatten(0, 1).contiguous(), cache, (rows, queries)

    def call(prepared: tuple[Any, ...]) -> Tensor:
        wrapper, query, cache, sizes = prepared
        return wrapper.run(query, cache).unflatten(0, sizes).transpose(1, 2)

    return System(call, prepare)


def pages(pairs: Tensor, page: int) -> Tensor:
    """Keys and values ``[sequences, 2, Hkv, length, D]`` as pages ``[n, 2, page, Hkv, D]``, the last of each sequence
    filled up with zeros."""
    padded = F.pad(pairs, (0, 0, 0, -pairs.shape[3] % page)).unflatten(3, (-1, page))
    return padded.permute(0, 3, 1, 4, 2, 5).flatten(0, 1)


def attention_peers() -> dict[str, System]:
    """All peers of one call of ``prefix_attention``."""
    return {
        "sdpa": System(sdpa, lambda inputs: with_mask(expanded(inputs))),
        "sdpa-repeated": System(sdpa, lambda inputs: with_mask(heads_repeated(inputs))),
        "flex": flex_attention(shared=False),
        "flex-shared": flex_attention(shared=True),
        "hydragen": System(hydragen, hydragen_inputs),
        "flashinfer": flashinfer_cascade(),
    }


# -- whole models -----------------------------------------------------------------------------------------------------


class FirstToken(LogitsProcessor):
    """Notes when the first token's logits arrive."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return scores


def greedy(model: Any, ids: Tensor, new: int, **kwargs: Any) -> tuple[Tensor, Times]:
    """The ``new`` tokens ``[B, new]`` that a model's ``generate`` puts behind ``ids [B, S]``, and its seconds; the
    base must have no end of text."""
    first = FirstToken()
    started = time.perf_counter()
    out = model.generate(
        input_ids=ids, max_new_tokens=new, do_sample=False, logits_processor=LogitsProcessorList([first]), **kwargs
    )
    ended = time.perf_counter()
    assert first.at is not None
    return out[:, ids.shape[1] :], {"first token": first.at - started, "total": ended - started}


def filled(cache: Any, prefix: PrefixKV, batch: int) -> Any:
    """A cache of transformers with a copy of the prefix for every row."""
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
    return cache


def generate_behind(base: Any, ids: Tensor, prefix: PrefixKV, new: int, cache: Any, **kwargs: Any) -> Any:
    """``generate`` of transformers behind a prefix that is copied into ``cache``, which every request pays."""
    started = time.perf_counter()
    filled(cache, prefix, len(ids))
    copied = time.perf_counter() - started
    mask = ids.new_ones(len(ids), prefix.num_virtual_tokens + ids.shape[1])
    tokens, times = greedy(base, ids, new, past_key_values=cache, attention_mask=mask, **kwargs)
    return tokens, {what: seconds + copied for what, seconds in times.items()}


class StaticCompiled:
    """transformers with a static cache and its decode step compiled, as its own ``generate`` does on a GPU for
    ``cache_implementation="static"``; on a CPU it has to be told to. The first call runs what it times twice
    beforehand, so that all times are of the steady state.

    Attributes:
        compile_seconds: how much longer its first run took than its second; None before.
    """

    def __init__(self, base: Any, prefix: PrefixKV, new: int) -> None:
        self.base, self.prefix, self.new = base, prefix, new
        self.compile_seconds: float | None = None
        self.config = CompileConfig()
        self.config._compile_all_devices = True

    def __call__(self, ids: Tensor) -> tuple[Tensor, Times]:
        if self.compile_seconds is None:
            with recompiling():
                first = self._run(ids)[1]["total"]
            self.compile_seconds = first - self._run(ids)[1]["total"]
        tokens, times = self._run(ids)
        return tokens, {**times, "compile": self.compile_seconds}

    def _run(self, ids: Tensor) -> tuple[Tensor, Times]:
        length = self.prefix.num_virtual_tokens + ids.shape[1] + self.new
        cache = StaticCache(config=self.base.config, max_cache_len=length)
        return generate_behind(self.base, ids, self.prefix, self.new, cache, compile_config=self.config)


def generation_peers(base: Any, prefix: PrefixKV, new: int) -> dict[str, Callable[[Tensor], tuple[Tensor, Times]]]:
    """transformers' own ``generate`` behind the prefix: turns from own tokens ``[B, S]`` to new ones ``[B, new]``.

    Args:
        base: best one that this package has not touched, as its users would have.
    """
    return {
        "expanded": lambda ids: generate_behind(base, ids, prefix, new, DynamicCache()),
        "static-compiled": StaticCompiled(base, prefix, new),
    }
