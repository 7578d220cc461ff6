# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.backends._registry import BackendError
from softprompt_fast.reference.merge_states import merge_states as reference
from softprompt_fast.testing import assert_within_noise, attention_inputs, guarded, poisoned_memory
from tests.isas import BACKENDS, CPU, CUDA, EVERY, using

SHAPES = [(), (1,), (2, 3), (0, 3), (2, 0, 3), (2, 3, 63), (129,)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[*BACKENDS, *CUDA])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as name:
        yield name


@pytest.fixture(params=CPU)
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as name:
        yield name


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


def check_forward(inputs: list[Tensor], backend: str) -> None:
    dtype = inputs[0].dtype
    with poisoned_memory():
        out, lse = ops.merge_states(*inputs, backend=backend)
    assert out.dtype == dtype and lse.dtype == inputs[1].dtype
    oracle = reference(*(x.double() for x in inputs))
    if out.numel():
        for what, x, y, z in zip(("out", "lse"), (out, lse), oracle, reference(*inputs), strict=True):
            assert_within_noise(x, y, z, what)


@pytest.mark.parametrize("head_dim", [5, 64, 83])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, head_dim: int, backend: str) -> None:
    check_forward(states(shape, dtype, head_dim), backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_in_float64(shape: tuple[int, ...]) -> None:
    check_forward(states(shape, torch.float64), "torch")


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


@pytest.mark.parametrize("backend", EVERY, indirect=True)
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
def test_extreme_lse(scale: float, backend: str) -> None:
    a, lse_a, b, lse_b = states((3, 4), torch.float32)
    lse_a, lse_b = lse_a + scale, lse_b - scale
    out, lse = ops.merge_states(a, lse_a, b, lse_b, backend=backend)
    keep = (a, lse_a) if scale > 0 else (b, lse_b)
    assert torch.equal(out, keep[0]) and torch.equal(lse, keep[1])


def test_states_without_columns(backend: str) -> None:
    out, lse = torch.empty(3, 0), torch.tensor([0.0, 1.0, -torch.inf])
    with poisoned_memory():
        merged, merged_lse = ops.merge_states(out, lse, out, lse, backend=backend)
    assert merged.shape == (3, 0)
    torch.testing.assert_close(merged_lse, lse + math.log(2.0))


@pytest.mark.parametrize("lse", [-math.inf, -3.4e38, -1e4, -1e-30, 0.0, 3.25, 1e30, 3.4e38])
def test_one_state_comes_back_bit_for_bit(lse: float, backend: str) -> None:
    """Merged with an empty state, from either side."""
    state = torch.randn(3, 37) * (lse > -math.inf), torch.full((3,), lse)
    empty = torch.zeros(3, 37), torch.full((3,), -math.inf)
    for first, second in ((state, empty), (empty, state)):
        merged = ops.merge_states(*first, *second, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(merged, state, strict=True))


def test_nan_is_not_hidden(backend: str) -> None:
    """A NaN log-sum-exp beside any other, an empty state's included."""
    nan = torch.full((3,), math.nan)
    other = torch.tensor([-math.inf, 0.0, math.nan])
    x = torch.ones(3, 2)
    for first, second in ((nan, other), (other, nan)):
        out, lse = ops.merge_states(x, first, x, second, backend=backend)
        assert out.isnan().all() and lse.isnan().all()


def test_weights_of_large_lse(cpu: str) -> None:
    """Near 1e4 a float32 LSE has an error of 5e-4: the weights, and so the gradients, must not inherit it."""
    a, _, b, _ = states((40,), torch.float32, 33)
    inputs = [x.requires_grad_() for x in (a, 1e4 + torch.rand(40), b, 1e4 + torch.rand(40))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, want = ops.merge_states(*inputs, backend=cpu)[0], reference(*exact)[0]
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
    weights = torch.randn(40, 33)
    found, oracle = torch.autograd.grad(out, inputs, weights), torch.autograd.grad(want, exact, weights.double())
    for x, y in zip(found, oracle, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


ORDERS = [(0, 2, 1, 3), (3, 0, 1, 2), (2, 1, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_strides(order: tuple[int, ...], dtype: torch.dtype, cpu: str) -> None:
    """Memory in any order, columns that lie apart, broadcast LSEs: the bits of dense inputs, in results whose strides
    are those of torch.empty_like."""
    shape, lse_shape = (2, 3, 7, 19), (2, 3, 7)
    lse_order = tuple(d for d in order if d < 3)
    dense = [x.contiguous().requires_grad_() for x in states(lse_shape, dtype, shape[3])]
    a, lse_a, b, lse_b = (x.detach() for x in dense)
    permuted = [guarded(x.shape, x.dtype, order=o).copy_(x) for x, o in ((a, order), (lse_a, lse_order), (b, order))]
    wide = torch.full((*shape, 2), float("nan"), dtype=dtype)[..., 0].copy_(b)
    for given in ([*permuted, lse_b], [a, lse_a, permuted[2], lse_b], [permuted[0], permuted[1], wide, lse_b]):
        given = [x.detach().requires_grad_() for x in given]
        with poisoned_memory():
            results = ops.merge_states(*given, backend=cpu)
        wanted = ops.merge_states(*dense, backend=cpu)
        assert [x.stride() for x in results] == [torch.empty_like(x).stride() for x in given[:2]]
        assert all(torch.equal(x, y) for x, y in zip(results, wanted, strict=True))
        weights = [torch.randn(x.shape).to(x.dtype) for x in wanted]
        apart = [torch.empty(*shape, 2, dtype=dtype)[..., 0].copy_(weights[0]), weights[1].mT.contiguous().mT]
        with poisoned_memory():
            found = torch.autograd.grad(results, given, apart)
        assert all(torch.equal(x, y) for x, y in zip(found, torch.autograd.grad(wanted, dense, weights), strict=True))
    one = lse_a[:1, :1, :1].expand(lse_shape)
    merged = (ops.merge_states(a, x, b, lse_b, backend=cpu) for x in (one, one.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(*merged, strict=True))


def test_threads_change_nothing(cpu: str) -> None:
    inputs = [x.requires_grad_() for x in states((3, 7, 100), torch.float32, 40)]
    weights = torch.randn(3, 7, 100, 40), torch.randn(3, 7, 100)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results = ops.merge_states(*inputs, backend=cpu)
            found.append((*results, *torch.autograd.grad(results, inputs, weights)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_what_the_kernels_refuse(cpu: str) -> None:
    with pytest.raises(BackendError, match="it takes float32, bfloat16 and float16, found float64"):
        ops.merge_states(*states((2,), torch.float64), backend=cpu)
    five = states((2, 1, 2, 1), torch.float32)
    with pytest.raises(BackendError, match="it takes at most 4 dimensions, found 5"):
        ops.merge_states(*five, backend=cpu)
    assert ops.merge_states(*five)[0].shape == (2, 1, 2, 1, 5)  # "auto": another backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "out alone"])
def test_gradients(dtype: torch.dtype, with_lse: bool, backend: str) -> None:
    inputs = [x.requires_grad_() for x in states((2, 3, 7), dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    weights = torch.randn(2, 3, 7, 5, dtype=torch.float64).to(dtype), torch.randn(2, 3, 7)

    def grads(results: tuple[Tensor, Tensor], of: list[Tensor]) -> tuple[Tensor, ...]:
        if not with_lse:
            return torch.autograd.grad(results[0], of, weights[0].to(results[0].dtype))
        return torch.autograd.grad(results, of, tuple(w.to(r.dtype) for w, r in zip(weights, results, strict=True)))

    with poisoned_memory():
        found = grads(ops.merge_states(*inputs, backend=backend), inputs)
    oracle, baseline = grads(reference(*exact), exact), grads(reference(*plain), plain)
    for what, x, y, z in zip(("out_a", "lse_a", "out_b", "lse_b"), found, oracle, baseline, strict=True):
        assert_within_noise(x, y, z, f"gradient of {what}")


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in states((2, 3), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: ops.merge_states(*x, backend="torch"), inputs)
    assert torch.autograd.gradcheck(lambda *x: ops.merge_states(*x, backend="torch")[1], inputs)


def test_opcheck(backend: str) -> None:
    inputs = [x.requires_grad_() for x in states((2, 3, 7), torch.float32)]
    torch.library.opcheck(torch.ops.softprompt_fast.merge_states.default, (*inputs, backend))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_opcheck_of_views(order: tuple[int, ...], backend: str) -> None:
    inputs = [guarded((2, 3, 7, 5), order=order), *states((2, 3, 7), torch.float32)[1:]]
    of = (x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.softprompt_fast.merge_states.default, (*of, backend))


def test_compiles_to_one_graph_and_once(backend: str) -> None:
    torch._dynamo.reset()
    merge = partial(ops.merge_states, backend=backend)
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager", dynamic=True)
    # Dense: of a view, dynamo also guards on the relation to its base.
    inputs = [x.contiguous().requires_grad_() for x in states((2, 3, 7), torch.float32)]
    results = compiled(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(results, merge(*inputs), strict=True))
    found = torch.autograd.grad(sum(r.sum() for r in results), inputs)
    want = torch.autograd.grad(sum(r.sum() for r in merge(*inputs)), inputs)
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
