# SPDX-License-Identifier: Apache-2.0
"""What a training pass is made of (``backends/cpu/_training.py``), on every instruction set that this machine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_fast.backends import native
from softprompt_fast.testing import assert_within_noise, guarded, poisoned_memory

EXTENSION, WHY_NOT = native.load()
if EXTENSION is None:
    pytest.skip(f"C++ extension: {WHY_NOT}", allow_module_level=True)

from softprompt_fast.backends.cpu import _training as training  # noqa: E402
from softprompt_fast.backends.norm import Norm  # noqa: E402

# Rows, depth, columns: one row, whole panels, rests of every kind, several row blocks and blocks of depth.
SHAPES = [(1, 64, 96), (3, 20, 33), (9, 129, 1), (33, 33, 70), (300, 40, 65), (5, 2100, 40), (0, 8, 8), (2, 1, 3)]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture(params=EXTENSION.available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    EXTENSION.use_isa(request.param)
    yield request.param
    EXTENSION.use_isa("auto")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrix(depth: int, columns: int, transposed: bool) -> Tensor:
    """``[K, N]`` as a view of ``[N, K]`` or of ``[K, N]`` memory, between NaN."""
    if transposed:
        return guarded((columns, depth), scale=depth**-0.5).t()
    return guarded((depth, columns), scale=depth**-0.5)


@pytest.mark.parametrize("transposed", [False, True], ids=["W", "W^T"])
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_product(rows: int, depth: int, columns: int, transposed: bool, threads: int) -> None:
    x, b, bias = guarded((rows, depth)), matrix(depth, columns, transposed), torch.randn(columns)
    oracle, baseline = x.double() @ b.double(), x @ b
    with poisoned_memory():
        assert_within_noise(training.product(x, b), oracle, baseline, "product")
    found = training.product(x, b, bias=bias)
    assert_within_noise(found, oracle + bias, baseline + bias, "with bias")
    # Into the middle of a wider buffer, whose other columns may not change.
    wide = torch.full((rows, columns + 3), 7.0)
    out = wide[:, 2 : 2 + columns]
    out.normal_()
    before = out.clone()
    assert training.product(x, b, bias=bias, out=out, add=True) is out
    assert_within_noise(out, oracle + bias + before, baseline + bias + before, "added")
    assert (wide[:, :2] == 7).all() and (wide[:, 2 + columns :] == 7).all()


def test_a_row_of_a_product_does_not_depend_on_the_others(threads: int) -> None:
    for transposed in (False, True):
        x, b = torch.randn(700, 1000), matrix(1000, 70, transposed)
        whole = training.product(x, b)
        for row in (0, 127, 128, 350, 699):
            assert torch.equal(training.product(x[row : row + 1], b)[0], whole[row])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "depth", "columns"), [*SHAPES, (5, 700, 40)])
def test_gated_product_and_its_backward(rows: int, depth: int, columns: int, activation: str, threads: int) -> None:
    act = ACTIVATIONS[activation]
    x, gate, up = guarded((rows, depth)), matrix(depth, columns, True), matrix(depth, columns, True)
    bias, down, grad = torch.randn(columns), matrix(depth, columns, False), guarded((rows, depth))
    with poisoned_memory():
        g, u, out = training.gated_product(x, gate, bias, up, None, activation)
        grads = training.gated_product_backward(grad, down, g, u, activation)
    # The products are those of test_product, up to the order of sums in several blocks of depth.
    through = training.product(grad, down)
    for found, product in ((g, training.product(x, gate, bias=bias)), (u, training.product(x, up))):
        assert torch.equal(found, product) or (depth > 768 and torch.allclose(found, product, atol=1e-5))
    if depth > 768:
        return

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        kept = [y.to(dtype).requires_grad_() for y in (g.clone(), u.clone())]
        result = act(kept[0]) * kept[1]
        return result.detach(), *torch.autograd.grad(result, kept, through.to(dtype))

    names, found = ("act(gate) up", "gradient of gate", "gradient of up"), (out, *grads)
    for name, y, oracle, baseline in zip(names, found, expected(torch.float64), expected(torch.float32), strict=True):
        assert_within_noise(y, oracle, baseline, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_far_from_zero(activation: str) -> None:
    gate = torch.tensor([[-200.0, -88.5, -20.0, -1e-4, 0.0, 1e-4, 20.0, 88.5, 200.0]])
    ones = torch.ones_like(gate)
    found, _ = training.gated_product_backward(torch.ones(1, 1), ones, gate, ones, activation)
    exact = gate.double().requires_grad_()
    (oracle,) = torch.autograd.grad(ACTIVATIONS[activation](exact).sum(), exact)
    torch.testing.assert_close(found.double(), oracle, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (3, 20), (70, 64), (2, 577), (0, 5)])
def test_norm_rows_and_its_backward(rows: int, columns: int, offset: float, threads: int) -> None:
    norm = Norm("rms", torch.rand(columns) + 0.5, offset=offset, eps=1e-5)
    x, grad, before = torch.randn(rows, columns), torch.randn(rows, columns), torch.randn(rows, columns)
    if rows > 1:
        x[1] *= 1e-3  # so small that eps tells

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inside = x.to(dtype).requires_grad_()
        y = F.rms_norm(inside, (columns,), norm.weight.to(dtype) + offset, norm.eps)
        return y.detach(), torch.autograd.grad(y, inside, grad.to(dtype))[0]

    (y, oracle), (y_baseline, baseline) = expected(torch.float64), expected(torch.float32)
    with poisoned_memory():
        assert_within_noise(training.norm_rows(x, norm), y, y_baseline, "norm")
        assert_within_noise(training.norm_rows_backward(x, grad, norm), oracle, baseline, "gradient")
    out = before.clone()
    assert training.norm_rows_backward(x, grad, norm, out=out) is out
    assert_within_noise(out, oracle + before, baseline + before, "gradient added")


@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (20, 20), (33, 6), (64, 40), (8, 0)])
def test_rotate_rows_and_its_transpose(head_dim: int, rotated: int, threads: int) -> None:
    rows, heads = 37, 3
    x, grad = torch.randn(rows, heads * head_dim), torch.randn(rows, heads * head_dim)
    # Any numbers: a scaled rotation's transpose is not its inverse, and the two halves may differ.
    cos, sin = torch.randn(rows, rotated), torch.randn(rows, rotated)

    def turned(x: Tensor) -> Tensor:
        part, rest = x.view(rows, heads, head_dim).split([rotated, head_dim - rotated], -1)
        other = torch.cat([-part[..., rotated // 2 :], part[..., : rotated // 2]], -1)
        return torch.cat([part * cos[:, None] + other * sin[:, None], rest], -1).flatten(1)

    inside = x.clone().requires_grad_()
    expected = turned(inside)
    (expected_grad,) = torch.autograd.grad(expected, inside, grad)
    for found, oracle in (
        (training.rotate_rows(x, cos, sin, head_dim), expected),
        (training.rotate_rows(grad, cos, sin, head_dim, transposed=True), expected_grad),
    ):
        torch.testing.assert_close(found, oracle.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 61), (2, 5000), (40, 130), (0, 9)])
def test_cross_entropy_rows(rows: int, columns: int, threads: int) -> None:
    logits, labels = torch.randn(rows, columns) * 4, torch.randint(0, columns, (rows,))
    labels[1::3] = -100
    for weights in (None, torch.randn(rows)):

        def expected(dtype: torch.dtype, weights: Tensor | None = weights) -> tuple[Tensor, Tensor]:
            inside = logits.to(dtype).requires_grad_()
            losses = F.cross_entropy(inside, labels, reduction="none")
            losses = losses if weights is None else losses * weights.to(dtype)
            return losses.detach(), torch.autograd.grad(losses.sum(), inside)[0]

        (oracle, oracle_grad), (baseline, baseline_grad) = expected(torch.float64), expected(torch.float32)
        kept = logits.clone()
        assert_within_noise(
            training.cross_entropy_rows(kept, labels, weights, gradient=False), oracle, baseline, "losses"
        )
        assert torch.equal(kept, logits)
        assert_within_noise(training.cross_entropy_rows(kept, labels, weights), oracle, baseline, "losses")
        assert_within_noise(kept, oracle_grad, baseline_grad, "gradient")


def test_cross_entropy_of_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3.0, -3e38], [float("-inf"), 0.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), exact)
    found = training.cross_entropy_rows(logits, labels, None)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)
    # A NaN stays one, in the loss and in every gradient of its row, and in no other row.
    logits = torch.randn(2, 40)
    logits[0, 33] = float("nan")
    found = training.cross_entropy_rows(logits, torch.tensor([3, 4]), None)
    assert found.isnan().tolist() == [True, False] and logits.isnan().all(1).tolist() == [True, False]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "depth": (lambda: training.product(zeros(2, 3), zeros(4, 5)), r"b: expected float32 \[3, N\]"),
    "dtype": (lambda: training.product(zeros(2, 3).double(), zeros(3, 5)), r"x: expected float32 \[2, 3\]"),
    "strides": (lambda: training.product(zeros(2, 3), zeros(6, 10)[::2, ::2]), "b: expected .* with a stride of 1"),
    "columns apart": (lambda: training.product(zeros(3, 2).t(), zeros(3, 5)), "x: expected .* with dense rows"),
    "out": (lambda: training.product(zeros(2, 3), zeros(3, 5), out=zeros(2, 4)), r"out: expected float32 \[2, 5\]"),
    "bias": (lambda: training.product(zeros(2, 3), zeros(3, 5), bias=zeros(4)), r"bias: expected dense float32 \[5\]"),
    "up": (
        lambda: training.gated_product(zeros(2, 3), zeros(3, 5), None, zeros(3, 4), None, "silu"),
        r"up: expected \[3, 5\], as gate has, found \[3, 4\]",
    ),
    "gate": (
        lambda: training.gated_product_backward(zeros(2, 3), zeros(3, 5), zeros(2, 4), zeros(2, 5), "silu"),
        r"gate: expected dense float32 \[2, 5\]",
    ),
    "norm": (
        lambda: training.norm_rows_backward(zeros(2, 3), zeros(2, 3), Norm("layer")),
        "norm: expected an RMS norm",
    ),
    "angles": (lambda: training.rotate_rows(zeros(2, 8), zeros(2, 3), zeros(2, 3), 4), "rotated: expected an even"),
    "heads": (lambda: training.rotate_rows(zeros(2, 7), zeros(2, 2), zeros(2, 2), 4), "head_dim: expected a divisor"),
    "label": (
        lambda: training.cross_entropy_rows(zeros(2, 3), torch.tensor([0, 3]), None),
        "labels: expected values below 3, found 3 in place 1",
    ),
    "labels": (
        lambda: training.cross_entropy_rows(zeros(2, 3), torch.tensor([0]), None),
        r"labels: expected dense int64 \[2\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
