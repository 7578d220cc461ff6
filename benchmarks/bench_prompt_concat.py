# SPDX-License-Identifier: Apache-2.0
"""prompt_concat against the three steps it stands for (gather, repeat, concatenate), on the CPU. Run it with

python -m pytest benchmarks/bench_prompt_concat.py --benchmark-group-by=param:shape
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _harness import backends

from softprompt_fast import ops

# Rows, own tokens, virtual tokens; SmolLM2-135M's width and vocabulary.
SHAPES = {"B16 S32 P20": (16, 32, 20), "B16 S32 P100": (16, 32, 100), "B32 S16 P512": (32, 16, 512)}
WIDTH, VOCABULARY = 576, 49152


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("system", [*backends("prompt_concat"), "three steps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_concat(benchmark, shape: str, system: str, train: bool) -> None:
    batch, own, virtual = SHAPES[shape]
    tokens, table = torch.randint(0, VOCABULARY, (batch, own)), torch.randn(VOCABULARY, WIDTH)
    prompt = torch.randn(virtual, WIDTH, requires_grad=train)

    def one_op() -> torch.Tensor:
        return ops.prompt_concat(tokens, table, prompt, backend=system)

    def steps() -> torch.Tensor:
        return torch.cat([prompt.unsqueeze(0).repeat(batch, 1, 1), F.embedding(tokens, table)], 1)

    make = steps if system == "three steps" else one_op
    assert torch.equal(make(), steps())

    def step() -> None:
        out = make()
        if train:
            torch.autograd.grad(out, prompt, out)

    benchmark(step)
    moved = 4 * WIDTH * (2 * batch * own + virtual + batch * virtual) * (2 if train else 1)
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        bytes=moved,
        gigabytes_per_second=round(moved / benchmark.stats.stats.median / 1e9, 2),
    )
