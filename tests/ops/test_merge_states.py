# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.reference.merge_states import merge_states as reference
from softprompt_fast.testing import assert_within_noise, attention_inputs, guarded, poisoned_memory

SHAPES = [(), (1,), (2, 3), (0, 3), (2, 0, 3), (2, 3, 63), (129,)]


def states(shape: tuple[int, ...], dtype: torch.dtype, head_dim: int = 5) -> list[Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [
        guarded((*shape, head_dim), dtype),
        guarded(shape, wide, scale=3.0) if shape else torch.randn((), dtype=wide),
    ]
    tensors += [
        guarded((*shape, head_dim), dtype),
        guarded(shape, wide, scale=3.0) if shape else torch.randn((), dtype=wide),
    ]
    return tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = states(shape, dtype)
    with poisoned_memory():
        out, lse = ops.merge_states(*inputs, backend="torch")
    assert out.dtype == dtype and lse.dtype == inputs[1].dtype
    oracle = reference(*(x.double() for x in inputs))
    if out.numel():
        for what, x, y, z in zip(("out", "lse"), (out, lse), oracle, reference(*inputs), strict=True):
            assert_within_noise(x, y, z, what)


def test_reference_is_softmax_over_the_union() -> None:
    """Two softmaxes over pieces of one list of scores."""
    scores, values = torch.randn(3, 4, 10, dtype=torch.float64), torch.randn(10, 6, dtype=torch.float64)
    parts = [
        (scores[..., i].softmax(-1) @ values[i], scores[..., i].logsumexp(-1)) for i in (slice(0, 7), slice(7, 10))
    ]
    for backend in ("torch", "reference"):
        out, lse = ops.merge_states(*parts[0], *parts[1], backend=backend)
        torch.testing.assert_close(out, scores.softmax(-1) @ values)
        torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_states(backend: str) -> None:
    a, lse_a, b, lse_b = (x.contiguous() for x in states((4,), torch.float32))
    none = float("-inf")
    a[0], lse_a[0] = 0.0, none  # a empty
    b[1], lse_b[1] = 0.0, none  # b empty
    a[2], lse_a[2], b[2], lse_b[2] = 0.0, none, 0.0, none  # both
    inputs = [x.requires_grad_() for x in (a, lse_a, b, lse_b)]
    out, lse = ops.merge_states(*inputs, backend=backend)
    assert torch.equal(out[0], b[0]) and lse[0] == lse_b[0]
    assert torch.equal(out[1], a[1]) and lse[1] == lse_a[1]
    assert torch.equal(out[2], torch.zeros(5)) and lse[2] == -math.inf
    grads = torch.autograd.grad(out.sum() + lse[[0, 1, 3]].sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][0].abs().sum() == 0 and grads[2][0].eq(1).all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_lse(scale: float) -> None:
    a, lse_a, b, lse_b = states((3, 4), torch.float32)
    lse_a, lse_b = lse_a + scale, lse_b - scale
    out, lse = ops.merge_states(a, lse_a, b, lse_b)
    keep = (a, lse_a) if scale > 0 else (b, lse_b)
    assert torch.equal(out, keep[0]) and torch.equal(lse, keep[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in states((2, 3, 7), dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    weights = torch.randn(2, 3, 7, 5, dtype=torch.float64).to(dtype), torch.randn(2, 3, 7)

    def grads(results: tuple[Tensor, Tensor], of: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results, of, tuple(w.to(r.dtype) for w, r in zip(weights, results, strict=True)))

    with poisoned_memory():
        found = grads(ops.merge_states(*inputs, backend="torch"), inputs)
    oracle, baseline = grads(reference(*exact), exact), grads(reference(*plain), plain)
    for what, x, y, z in zip(("out_a", "lse_a", "out_b", "lse_b"), found, oracle, baseline, strict=True):
        assert_within_noise(x, y, z, f"gradient of {what}")


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in states((2, 3), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: ops.merge_states(*x, backend="torch"), inputs)
    assert torch.autograd.gradcheck(lambda *x: ops.merge_states(*x, backend="torch")[1], inputs)


def test_opcheck() -> None:
    inputs = [x.requires_grad_() for x in states((2, 3, 7), torch.float32)]
    torch.library.opcheck(torch.ops.softprompt_fast.merge_states.default, (*inputs, "torch"))


def test_compiles_to_one_graph_and_once() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.merge_states, fullgraph=True, backend="aot_eager", dynamic=True)
    # Dense: of a view, dynamo also guards on the relation to its base.
    inputs = [x.contiguous().requires_grad_() for x in states((2, 3, 7), torch.float32)]
    results = compiled(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(results, ops.merge_states(*inputs), strict=True))
    found = torch.autograd.grad(sum(r.sum() for r in results), inputs)
    want = torch.autograd.grad(sum(r.sum() for r in ops.merge_states(*inputs)), inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((4, 3, 7), (2, 5, 9)):
            compiled(*(x.contiguous().requires_grad_() for x in states(shape, torch.float32)))


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_merges_partial_attentions(cut: int) -> None:
    """Attention to the prefix and to two pieces of the own keys, merged, is attention to all; so are its gradients."""
    inputs = attention_inputs(dtype=torch.float64, queries=7).requires_grad_()
    query, key, value, *prefix = inputs.tensors
    nothing = [x[:, :0] for x in prefix]
    whole = ops.prefix_attention(*inputs.tensors, causal=False, return_lse=True)
    first = ops.prefix_attention(query, key[:, :, :cut], value[:, :, :cut], *prefix, causal=False, return_lse=True)
    second = ops.prefix_attention(query, key[:, :, cut:], value[:, :, cut:], *nothing, causal=False, return_lse=True)
    merged = ops.merge_states(*first, *second)
    for x, y in zip(merged, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(x) for x in whole]
    for x, y in zip(
        torch.autograd.grad(merged, inputs.tensors, weights),
        torch.autograd.grad(whole, inputs.tensors, weights),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_order_does_not_matter() -> None:
    a, lse_a, b, lse_b = states((2, 9), torch.float64)
    for x, y in zip(ops.merge_states(a, lse_a, b, lse_b), ops.merge_states(b, lse_b, a, lse_a), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_b": torch.zeros(2, 4)}, r"out_b: expected the shape of out_a, \[2, 3\], found \[2, 4\]"),
        ({"out_b": torch.zeros(2, 3).double()}, "expected one floating dtype, found torch.float32 and torch.float64"),
        ({"lse_a": torch.zeros(3)}, r"lse_a: expected shape \[2\], found \[3\]"),
        ({"lse_b": torch.zeros(2).half()}, "lse_b: expected torch.float32 beside torch.float32 outputs"),
    ],
)  # fmt: skip
def test_bad_input(change: dict, message: str) -> None:
    good = {"out_a": torch.zeros(2, 3), "lse_a": torch.zeros(2), "out_b": torch.zeros(2, 3), "lse_b": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        ops.merge_states(**{**good, **change})
