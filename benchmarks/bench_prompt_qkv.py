# SPDX-License-Identifier: Apache-2.0
"""prompt_qkv against PyTorch's operators one after the other, on the CPU, alone and as part of a whole first layer
(``_first_layer.py``): ``softprompt-fast bench --only 'op/prompt_qkv*'``, or alone, one system after the other:

python -m pytest benchmarks/bench_prompt_qkv.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from _first_layer import FirstLayer, Shape
from _gpu import System
from _suite import Case, Prepared, one_system, pairs, short_calls
from torch import Tensor

from softprompt_fast import ops

OP = "prompt_qkv"
# Rows, own tokens, virtual tokens (0: plain hidden states); SmolLM2-135M's layer.
SHAPES = {"compile-p512": (1, 0, 512), "train-b16-s32-p100": (16, 32, 100), "decode-b32": (32, 1, 0)}
WIDTH, VOCABULARY, Q_HEADS, KV_HEADS, HEAD_DIM = 576, 49152, 9, 3, 64
ROWS = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
SIZES = (WIDTH, VOCABULARY, Q_HEADS, KV_HEADS, HEAD_DIM)
# From token ids and the prompt to attention's result.
FIRST_LAYERS = {
    "decode-b1": Shape(1, 1, 512, 31, *SIZES),
    "decode-b32": Shape(32, 1, 512, 31, *SIZES),
    "b1-s32-p100": Shape(1, 32, 100, 0, *SIZES),
    "b16-s32-p100": Shape(16, 32, 100, 0, *SIZES),
}


def prepare(shape: tuple[int, int, int], names: frozenset[str]) -> Prepared:
    batch, own, virtual = shape
    fixed: dict[str, Any] = {"weight": torch.randn(ROWS, WIDTH) / WIDTH**0.5, "norm_weight": torch.randn(WIDTH)}
    angles = torch.randn(1, virtual + own, HEAD_DIM)
    fixed |= {"cos": angles.cos(), "sin": angles.sin()}
    if virtual:
        fixed["table"] = torch.randn(VOCABULARY, WIDTH)

    def make() -> dict[str, Tensor]:
        if virtual:
            return {"tokens": torch.randint(0, VOCABULARY, (batch, own)), "prompt": torch.randn(virtual, WIDTH)}
        return {"tokens": torch.randn(batch, own, WIDTH)}

    def call(inputs: dict[str, Tensor], backend: str | None = None) -> tuple[Tensor, ...]:
        return ops.prompt_qkv(**inputs, **fixed, q_heads=Q_HEADS, kv_heads=KV_HEADS, backend=backend)

    def exact(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        given = {**inputs, **fixed}
        wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
        return ops.prompt_qkv(**wide, q_heads=Q_HEADS, kv_heads=KV_HEADS, backend="reference")

    # The reference is the operators one after the other.
    systems = {"ours": System(call), "pytorch": System(partial(call, backend="reference"))}
    tokens = batch * (own + virtual)
    return short_calls(
        {name: system for name, system in systems.items() if name in names},
        make,
        exact,
        flops=2 * tokens * ROWS * WIDTH,
        moved=4 * (ROWS * WIDTH + tokens * (2 * WIDTH + ROWS)),
    )


def prepare_first_layer(shape: Shape, names: frozenset[str]) -> Prepared:
    layer = FirstLayer(shape, torch.device("cpu"), torch.float32)
    exact = layer.widened(torch.float64)

    def reference(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        return exact.operators(exact.with_copies(wide))

    systems = {
        "ours": System(partial(layer.ours, backend="cpu")),
        "concat": System(partial(layer.concatenated, backend="cpu")),
        "pytorch": System(layer.operators, layer.with_copies),
    }
    return short_calls(
        {name: system for name, system in systems.items() if name in names},
        layer.make,
        reference,
        flops=shape.flops,
        moved=4 * shape.numbers,
    )


def cases() -> Iterator[Case]:
    for name, shape in SHAPES.items():
        batch, own, virtual = shape
        work = {"B": batch, "S": own, "P": virtual, "H": WIDTH, "dtype": "float32"}
        yield Case("op", f"{OP}-{name}", work, ("ours", "pytorch"), partial(prepare, shape), (OP,))
    for name, layer in FIRST_LAYERS.items():
        sizes = {"B": layer.batch, "S": layer.own, "P": layer.virtual, "T": layer.past + layer.own, "H": WIDTH}
        systems = ("ours", "pytorch") if layer.past else ("ours", "concat", "pytorch")
        prepared = partial(prepare_first_layer, layer)
        tests = (OP, "prefix_attention")
        yield Case("op", f"{OP}-first-layer-{name}", {**sizes, "dtype": "float32"}, systems, prepared, tests)


@pytest.mark.parametrize(("case", "system"), **pairs(cases()))
def test_prompt_qkv(benchmark, case: Case, system: str) -> None:
    one_system(benchmark, case, system)
