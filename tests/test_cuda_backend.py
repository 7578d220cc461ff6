# SPDX-License-Identifier: Apache-2.0
"""What is special about the CUDA kernels, beyond what tests/ops sees of every backend: vector paths, mixed dtypes,
strides, and what they refuse. On a CPU they are emulated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.backends import native, native_ops
from softprompt_fast.backends._registry import BackendError
from softprompt_fast.reference.merge_states import merge_states as reference_merge
from softprompt_fast.testing import assert_within_noise, poisoned_memory
from tests.device import DEVICE, ON_GPU, cpu_only

module, reason = native.load_cuda()
pytestmark = pytest.mark.skipif(module is None, reason=f"CUDA kernels: {reason}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def prompted(
    width: int, dtypes: tuple[torch.dtype, ...], ids: bool, device: torch.device = DEVICE
) -> tuple[list[Tensor | None], dict]:
    """Eleven rows over three prompts, more than the warps that share a gradient; every other one padded."""
    table_dtype, prompt_dtype, out_dtype = dtypes
    offsets, index = torch.tensor([0, 3, 3, 7]), torch.tensor([2, -1, 0, 1, 2, 2, 0, 2, -1, 2, 0])
    start = torch.tensor([0, 2] * 5 + [5])
    tokens = torch.randint(0, 19, (11, 5)) if ids else torch.randn(11, 5, width).to(table_dtype)
    table = torch.randn(19, width).to(table_dtype) if ids else None
    inputs = [tokens, table, torch.randn(7, width).to(prompt_dtype)]
    options = {"prompt_offsets": offsets, "prompt_index": index, "own_start": start, "prompt_length": 5}
    return inputs, {**options, "scale": 1.5, "prompt_scale": 0.5, "out_dtype": out_dtype}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("dtypes", [(x, y, z) for x in DTYPES for y in DTYPES for z in DTYPES if x != y or y == z])
def test_prompt_concat_in_vectors(dtypes: tuple[torch.dtype, ...], ids: bool, side: str) -> None:
    """Widths that vectors divide, one of more than a warp's, and the gradients."""
    for width in (8, 264):
        inputs, options = prompted(width, dtypes, ids)
        options["padding_side"] = side
        results = []
        for backend, exact in (("cuda", False), ("reference", True), ("reference", False)):
            given = [x.double() if exact and x is not None and x.is_floating_point() else x for x in inputs]
            given = [None if x is None else x.detach().clone() for x in given]
            of = [x.requires_grad_() for x in (given[2], given[0]) if x is not None and x.is_floating_point()]
            with poisoned_memory():
                out = ops.prompt_concat(
                    *given, **{**options, "out_dtype": torch.float64 if exact else dtypes[2]}, backend=backend
                )
                torch.manual_seed(1)
                weights = torch.randn(out.shape, dtype=torch.float64).to(dtypes[2]).to(out.dtype)
                results.append([out, *torch.autograd.grad(out, of, weights)])
        for i, (found, oracle, plain) in enumerate(zip(*results, strict=True)):
            assert_within_noise(found, oracle, plain, f"result {i} at width {width}")


def test_prompt_concat_sums_in_one_order() -> None:
    inputs, options = prompted(264, (torch.bfloat16,) * 3, True)
    grads = []
    for _ in range(3):
        prompt = inputs[2].detach().clone().requires_grad_()
        out = ops.prompt_concat(inputs[0], inputs[1], prompt, **options, backend="cuda")
        grads.append(torch.autograd.grad(out, prompt, torch.ones_like(out).cumsum(0))[0])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 256, 264, 1024])
def test_merge_states_in_vectors(head_dim: int, dtype: torch.dtype) -> None:
    """Rows of one vector, of a power of two of lanes and of more than a warp's."""
    inputs = [torch.randn(2, 3, 5, head_dim).to(dtype), torch.randn(2, 3, 5) * 3]
    inputs += [torch.randn(2, 3, 5, head_dim).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)]
    inputs += [torch.randn(2, 3, 5) * 3]
    inputs[1][0, 0, 0] = inputs[3][0, 0, 0] = inputs[3][1, 1, 1] = -torch.inf
    weights = torch.randn(2, 3, 5, head_dim).to(dtype), torch.randn(2, 3, 5)
    results = []
    for how in ("cuda", "exact", "plain"):
        given = [x.detach().double() if how == "exact" else x.detach().clone() for x in inputs]
        of = [x.requires_grad_() for x in given]
        with poisoned_memory():
            merged = ops.merge_states(*given, backend="cuda") if how == "cuda" else reference_merge(*given)
            grads = torch.autograd.grad(merged, of, [w.to(x.dtype) for w, x in zip(weights, merged, strict=True)])
        results.append([*merged, *grads])
    for i, (found, oracle, plain) in enumerate(zip(*results, strict=True)):
        finite = oracle.isfinite()
        assert torch.equal(found.isfinite(), finite)
        assert_within_noise(found[finite], oracle[finite], plain[finite], f"result {i}")


@pytest.mark.parametrize("offset", [0, 1])
def test_vectors_need_their_alignment(offset: int) -> None:
    """A view that begins at an odd element goes element by element: the emulator and a device both refuse a vector."""
    x = torch.randn(3 * 64 + offset).to(torch.bfloat16)[offset:].view(3, 64)
    lse = torch.zeros(3)
    out, _ = ops.merge_states(x, lse, x, lse, backend="cuda")
    assert torch.equal(out, x)


def test_what_the_kernels_refuse() -> None:
    x, lse = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(BackendError, match="it takes float32, bfloat16 and float16, found float64"):
        ops.merge_states(x, lse, x, lse, backend="cuda")
    prompt, tokens = torch.zeros(2, 4), torch.zeros(1, 3, 4)
    with pytest.raises(BackendError, match="it gives float32, bfloat16 and float16, found float64"):
        ops.prompt_concat(tokens, None, prompt, out_dtype=torch.float64, backend="cuda")
    table = torch.zeros(5, 4, requires_grad=True)
    with pytest.raises(BackendError, match="it gives no gradient for table"):
        ops.prompt_concat(torch.zeros(1, 3, dtype=torch.int64), table, prompt, backend="cuda")
    if ON_GPU:
        with pytest.raises(BackendError, match="it runs on NVIDIA GPUs, found cpu"):
            ops.merge_states(*(torch.zeros(n, device="cpu") for n in ((2, 3), 2, (2, 3), 2)), backend="cuda")


@cpu_only
def test_a_wrong_id_ends_the_kernel() -> None:
    """The op checks ids that lie in host memory; the kernel asserts."""
    from softprompt_fast.backends.cuda import prompt_concat

    tokens, table, prompt = torch.tensor([[1, 5]]), torch.zeros(5, 8), torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="a token id is outside the table"):
        prompt_concat.forward(tokens, table, prompt, None, None, None, 2, 1.0, 1.0, torch.float32, True)


@cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4, dtype=torch.float64)}, "out_a: no kernel reads another dtype"),
        ({0: torch.zeros(2, 4, dtype=torch.int8)}, r"out_a: no kernel reads int8 \[2, 4\]"),
        ({0: torch.zeros(())}, "out_a: expected 1 to 4 dimensions"),
        ({1: torch.zeros(2).half()}, r"lse_a: does not fit out_a float32 \[2, 4\] on cpu, found float16 \[2\]"),
        ({2: torch.zeros(2, 5)}, r"out_b: does not fit out_a float32 \[2, 4\] on cpu, found float32 \[2, 5\]"),
        ({0: torch.zeros(4, 4)[::2]}, r"expected memory without gaps, found float32 \[2, 4\]"),
    ],
)
def test_the_op_checks_what_it_is_given(change: dict, message: str) -> None:
    given = [torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 4), torch.zeros(2)]
    for place, value in change.items():
        given[place] = value
    assert torch.ops.softprompt_fast.merge_states_cuda(*given) == (None, None)
    with pytest.raises(ValueError, match=message):
        native_ops.served(module, False)
