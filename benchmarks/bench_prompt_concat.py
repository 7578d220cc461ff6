# SPDX-License-Identifier: Apache-2.0
"""prompt_concat against the three steps it stands for (gather, repeat, concatenate), on the CPU:
``softprompt-fast bench --only 'op/prompt_concat*'``, or alone, one system after the other:

python -m pytest benchmarks/bench_prompt_concat.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _gpu import System
from _suite import Case, Prepared, one_system, pairs, short_calls
from torch import Tensor

from softprompt_fast import ops

OP = "prompt_concat"
# Rows, own tokens, virtual tokens; SmolLM2-135M's width and vocabulary.
SHAPES = {"b16-s32-p20": (16, 32, 20), "b16-s32-p100": (16, 32, 100), "b32-s16-p512": (32, 16, 512)}
WIDTH, VOCABULARY = 576, 49152


def prepare(shape: tuple[int, int, int], train: bool, names: frozenset[str]) -> Prepared:
    batch, own, virtual = shape
    table = torch.randn(VOCABULARY, WIDTH)

    def make() -> tuple[Tensor, Tensor]:
        return torch.randint(0, VOCABULARY, (batch, own)), torch.randn(virtual, WIDTH, requires_grad=train)

    def one_op(tokens: Tensor, prompt: Tensor) -> Tensor:
        return ops.prompt_concat(tokens, table, prompt)

    def steps(tokens: Tensor, prompt: Tensor) -> Tensor:
        return torch.cat([prompt.unsqueeze(0).repeat(len(tokens), 1, 1), F.embedding(tokens, table)], 1)

    def system(call: Callable[[Tensor, Tensor], Tensor]) -> System:
        def run(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            out = call(*inputs)
            return (out, *torch.autograd.grad(out, inputs[1], out)) if train else (out,)

        return System(run)

    def reference(inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        tokens, prompt = inputs
        out = ops.prompt_concat(tokens, table.double(), prompt.detach().double(), backend="reference")
        return [out, out[:, :virtual].sum(0)] if train else [out]

    systems = {"ours": system(one_op), "pytorch": system(steps)}
    return short_calls(
        {name: one for name, one in systems.items() if name in names},
        make,
        reference,
        grad=train,
        moved=4 * WIDTH * (2 * batch * own + virtual + batch * virtual) * (2 if train else 1),
    )


def cases() -> Iterator[Case]:
    for name, shape in SHAPES.items():
        batch, own, virtual = shape
        for train in (False, True):
            work = {"B": batch, "S": own, "P": virtual, "H": WIDTH, "dtype": "float32"}
            work["pass"] = "forward and backward" if train else "forward"
            what = f"{OP}-{'train' if train else 'forward'}-{name}"
            quick = name != "b16-s32-p20"
            yield Case("op", what, work, ("ours", "pytorch"), partial(prepare, shape, train), (OP,), quick=quick)


@pytest.mark.parametrize(("case", "system"), **pairs(cases()))
def test_prompt_concat(benchmark, case: Case, system: str) -> None:
    one_system(benchmark, case, system)
