# SPDX-License-Identifier: Apache-2.0
"""How cost grows with the rows B, the virtual tokens P, the queries S and the number of prompts: the cases behind the
curves and the heat maps. SmolLM2-135M's heads for attention alone, SmolLM2-135M itself for ``generate``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import bench_model
import torch
from _bases import DEMO
from _gpu import System
from _peers import sdpa
from _suite import Case, Prepared, short_calls
from bench_prefix_attention import SMALL, Shape, make_inputs, prepare_forward
from torch import Tensor

from softprompt_fast import ops

BATCHES, PREFIXES = (1, 4, 8, 16, 32, 64), (32, 128, 512, 2048)
QUICK_BATCHES = (1, 8, 32)
QUERIES = (1, 8, 64, 256)
PROMPTS = (1, 4, 16, 32)
GENERATE = ((1, 4, 8, 16, 32), (20, 100, 512))
NEW = 8


def prepare_prompts(shape: Shape, count: int, names: frozenset[str]) -> Prepared:
    """One step of decoding in which row i has prompt ``i % count``; all prompts of one length, packed end to end."""
    index = torch.arange(shape.batch, dtype=torch.int32) % count
    offsets = torch.arange(count + 1, dtype=torch.int32) * shape.prefix

    def make() -> tuple[Tensor, ...]:
        query, key, value, *_ = make_inputs(shape)
        return query, key, value, *torch.randn(2, shape.kv_heads, count * shape.prefix, shape.head_dim)

    def attend(inputs: tuple[Tensor, ...], **how: str) -> Tensor:
        return ops.prefix_attention(*inputs, prefix_offsets=offsets, prefix_index=index, **how)

    def expanded(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Every row's own prefix, copied in front of its keys and values."""
        query, key, value, *prefix = inputs
        rows = (p.unflatten(1, (count, shape.prefix)).transpose(0, 1)[index.long()] for p in prefix)
        return query, *(torch.cat([p, x], 2) for p, x in zip(rows, (key, value), strict=True))

    systems = {"ours": System(attend), "sdpa": System(sdpa, expanded)}
    own = shape.moved - 4 * 2 * shape.head_dim * shape.kv_heads * shape.prefix
    return short_calls(
        {name: system for name, system in systems.items() if name in names},
        make,
        lambda x: attend(tuple(t.double() for t in x), backend="reference"),
        flops=shape.flops,
        moved=own + 4 * 2 * shape.head_dim * shape.kv_heads * shape.prefix * count,
    )


def cases() -> Iterator[Case]:
    def attention(name: str, shape: Shape, quick: bool) -> Case:
        systems = ("ours", "sdpa", "hydragen")
        return Case(
            "scaling",
            name,
            shape.work,
            systems,
            partial(prepare_forward, shape, False),
            ("prefix_attention",),
            quick=quick,
            rounds=(5, 9),
        )

    for batch, prefix in itertools.product(BATCHES, PREFIXES):
        shape = Shape(batch, 1, 32, prefix, **SMALL)
        yield attention(f"decode-b{batch}-p{prefix}", shape, batch in QUICK_BATCHES)
    for queries in QUERIES:
        yield attention(f"queries-s{queries}", Shape(8, queries, queries + 32, 512, **SMALL), True)
    for count in PROMPTS:
        shape = Shape(32, 1, 32, 256, **SMALL)
        yield Case(
            "scaling",
            f"prompts-n{count}",
            {**shape.work, "prompts": count},
            ("ours", "sdpa"),
            partial(prepare_prompts, shape, count),
            ("prefix_attention",),
            rounds=(5, 9),
        )
    for batch, virtual in itertools.product(*GENERATE):
        call = bench_model.Shape(batch, virtual, new=NEW)
        yield Case(
            "scaling",
            f"generate-b{batch}-p{virtual}",
            {"base": DEMO, **call.work},
            ("ours", "expanded", "peft"),
            partial(bench_model.prepare, DEMO, call),
            ("generate",),
            quick=batch in QUICK_BATCHES,
            slow=frozenset({"peft"}) if batch * virtual > 1000 else frozenset(),
            rounds=(1, 1),
        )
