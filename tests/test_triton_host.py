# SPDX-License-Identifier: Apache-2.0
"""What the Triton backend does on the host: reads no value of a tensor, compiles nothing new for a new length, and is
one node of a graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from softprompt_fast import ops
from softprompt_fast.testing import attention_inputs
from tests import triton_offline, triton_variants

ROOT = Path(__file__).resolve().parents[1]


# ---- no value is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", triton_variants.variants(), ids=lambda v: v.title)
def test_no_value_of_a_tensor_is_read(variant: triton_variants.Variant) -> None:
    """Over tensors that have no values; a launch that waits for the device could not be captured in a CUDA graph."""
    launches = triton_offline.record(variant.call, "sm_90")
    assert launches
    for launch in launches:
        assert all(isinstance(n, int) for n in launch.grid), launch.name


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.repeat_interleave(x),
        lambda x: torch.equal(x, x),
        lambda x: x[torch.tensor([0, 1], device="cpu")],
    ],
)
def test_a_value_that_is_read_is_seen(read: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((RuntimeError, AssertionError)), triton_offline.without_values():
        read(torch.empty(4, dtype=torch.int64))


# ---- what a new length costs ------------------------------------------------------------------------------------


def test_a_decode_loop_compiles_each_kernel_once() -> None:
    """Triton specialises on arguments that are 1 or multiples of 16: not on those that count decoded tokens."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_resources", "--specialisations"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert found.keys() == triton_variants.growing().keys()
    for title, kernels in found.items():
        assert kernels and len(kernels) == len(set(kernels)), f"{title}: {kernels}"


def one_graph(call: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]], dynamic: dict[int, int]) -> None:
    """``call`` of the arguments for 7 compiles to one graph that serves 8, 9, 33 and 64; results are those of eager
    mode. ``dynamic``: place of an argument -> its dimension that grows."""
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(n: int) -> None:
        given = arguments(n)
        for place, dimension in dynamic.items():
            torch._dynamo.mark_dynamic(given[place], dimension)
        for x, y in zip(compiled(*given), call(*given), strict=True):
            assert torch.equal(x, y)

    check(7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (8, 9, 33, 64):
            check(n)


needs = {
    op: pytest.mark.skipif(not triton_variants.present(op), reason=f"no Triton {op}") for op in triton_variants.OPS
}


@needs["prefix_attention"]
@pytest.mark.parametrize("queries", [1, 5])
def test_prefix_attention_is_one_graph(queries: int) -> None:
    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *qkv, start = tensors
        return ops.prefix_attention(*qkv, own_start=start, return_lse=True, backend="triton")

    def arguments(n: int) -> tuple[torch.Tensor, ...]:
        inputs = attention_inputs(batch=2, queries=queries, own=n, own_start=[0, 2])
        return *(x.contiguous() for x in inputs.tensors), inputs.options["own_start"]

    with torch.no_grad():
        one_graph(call, arguments, {1: 2, 2: 2})


@needs["merge_states"]
def test_merge_states_is_one_graph() -> None:
    def call(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.merge_states(*states, backend="triton")

    def arguments(n: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(2, n, 16), torch.randn(2, n), torch.randn(2, n, 16), torch.randn(2, n)

    with torch.no_grad():
        one_graph(call, arguments, dict.fromkeys(range(4), 1))


@needs["prompt_concat"]
def test_prompt_concat_is_one_graph() -> None:
    table, prompt, start = torch.randn(11, 16), torch.randn(3, 16), torch.tensor([0, 2], dtype=torch.int32)

    def call(tokens: torch.Tensor) -> tuple[torch.Tensor]:
        return (ops.prompt_concat(tokens, table, prompt, own_start=start, backend="triton"),)

    with torch.no_grad():
        one_graph(call, lambda n: (torch.randint(0, 11, (2, n)),), {0: 1})


@needs["prompt_qkv"]
def test_prompt_qkv_is_one_graph() -> None:
    table, prompt, weight = torch.randn(11, 32), torch.randn(3, 32), torch.randn(64, 32)

    def call(tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layer = {"q_heads": 2, "kv_heads": 1, "norm_weight": table[0], "cos": cos, "sin": sin}
        return ops.prompt_qkv(tokens, weight, table=table, prompt=prompt, **layer, backend="triton")

    def arguments(n: int) -> tuple[torch.Tensor, ...]:
        return torch.randint(0, 11, (2, n)), torch.randn(1, n + 3, 16), torch.randn(1, n + 3, 16)

    with torch.no_grad():
        one_graph(call, arguments, {0: 1, 1: 1, 2: 1})
