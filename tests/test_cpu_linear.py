# SPDX-License-Identifier: Apache-2.0
"""The products with packed weights (``backends/cpu/_linear.py``), on every instruction set that this machine runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from softprompt_fast.backends import native
from softprompt_fast.testing import assert_within_noise, guarded, poisoned_memory

EXTENSION, WHY_NOT = native.load()
if EXTENSION is None:
    pytest.skip(f"C++ extension: {WHY_NOT}", allow_module_level=True)

from softprompt_fast.backends.cpu._linear import PackedLinear, gated_mlp, linear  # noqa: E402
from softprompt_fast.backends.cpu.prompt_qkv import into_cache  # noqa: E402
from softprompt_fast.backends.norm import Norm  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, columns in, columns out: one row, whole panels, rests of every kind, several depth blocks.
SHAPES = [(1, 64, 96), (3, 20, 33), (9, 129, 1), (33, 33, 70), (130, 40, 65), (5, 2100, 40)]
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.fixture(params=EXTENSION.available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest):
    EXTENSION.use_isa(request.param)
    yield request.param
    EXTENSION.use_isa("auto")


def norms(width: int) -> list[Norm]:
    weight, bias = torch.rand(width) + 0.5, torch.randn(width)
    return [Norm("rms", weight), Norm("rms", weight, offset=1.0, eps=1e-5), Norm("layer", weight, bias), Norm("layer")]


def apply_norm(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """In PyTorch, in x's dtype."""
    weight = None if norm.weight is None else norm.weight.to(x.dtype) + norm.offset
    if norm.kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], weight, None if norm.bias is None else norm.bias.to(x.dtype), norm.eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "columns"), SHAPES)
def test_linear(rows: int, width: int, columns: int, dtype: torch.dtype) -> None:
    weights = [guarded((n, width), dtype, scale=width**-0.5) for n in (columns, 5)]
    bias = torch.randn(columns)
    x, residual = guarded((rows, width)), torch.randn(rows, columns + 5)
    layer = PackedLinear(weights, [bias, None])
    assert (layer.in_features, layer.out_features) == (width, columns + 5)
    stacked = torch.cat(weights)
    exact_bias = F.pad(bias, (0, 5))
    for norm in (None, *norms(width)):
        exact = x.double() if norm is None else apply_norm(norm, x.double())
        plain = x if norm is None else apply_norm(norm, x)
        oracle = F.linear(exact, stacked.double(), exact_bias.double())
        baseline = F.linear(plain, stacked.float(), exact_bias)
        with poisoned_memory():
            found = linear(x, layer, norm=norm)
        assert_within_noise(found, oracle, baseline, "linear")
        kept = residual.clone()
        assert linear(x, layer, norm=norm, residual=kept) is kept
        assert_within_noise(kept, oracle + residual, baseline + residual, "with residual")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width", "inner"), SHAPES)
def test_gated_mlp(rows: int, width: int, inner: int, activation: str, dtype: torch.dtype) -> None:
    gate, up, down = (
        guarded(shape, dtype, scale=width**-0.5) for shape in ((inner, width), (inner, width), (width, inner))
    )
    bias = torch.randn(inner)
    x, norm, act = torch.randn(rows, width), norms(width)[0], ACTIVATIONS[activation]
    layers = PackedLinear([gate, up], [None, bias]), PackedLinear([down], [torch.ones(width)])

    def expected(x: torch.Tensor, normed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        inside = act(normed @ gate.to(dtype).T) * F.linear(normed, up.to(dtype), bias.to(dtype))
        return x + F.linear(inside, down.to(dtype), torch.ones(width, dtype=dtype))

    oracle = expected(x.double(), apply_norm(norm, x.double()), torch.float64)
    found = x.clone()
    assert gated_mlp(found, norm, *layers, activation, found) is found
    assert_within_noise(found, oracle, expected(x, apply_norm(norm, x), torch.float32), activation)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize(("batch", "queries", "head_dim", "rotated"), [(3, 1, 20, 20), (2, 70, 64, 32), (1, 5, 33, 6)])
def test_into_cache(batch: int, queries: int, head_dim: int, rotated: int, head_norm: bool, interleaved: bool) -> None:
    q_heads, kv_heads, width = 4, 2, 50
    weights = [torch.randn(n * head_dim, width) * width**-0.5 for n in (q_heads, kv_heads, kv_heads)]
    layer = PackedLinear(weights, [torch.randn(q_heads * head_dim), None, None], heads=(q_heads, kv_heads, kv_heads))
    x, before = torch.randn(batch, queries, width), norms(width)[2]
    of_head = [Norm("rms", torch.rand(head_dim) + 0.5) for _ in range(2)] if head_norm else [None, None]
    angles = torch.randn(batch, queries, rotated)
    cos, sin = angles.cos(), angles.sin()
    # Views into the middle of a longer cache, whose other entries may not change.
    caches = [torch.full((batch, kv_heads, queries + 5, head_dim), 7.0) for _ in range(2)]
    views = [cache[:, :, 2 : 2 + queries] for cache in caches]
    query = into_cache(
        x, before, layer, q_heads, kv_heads, cos, sin, *views, interleaved=interleaved, q_norm=of_head[0],
        k_norm=of_head[1],
    )  # fmt: skip
    assert query.transpose(1, 2).is_contiguous()
    for cache in caches:
        assert (cache[:, :, :2] == 7).all() and (cache[:, :, 2 + queries :] == 7).all()

    def turned(x: torch.Tensor) -> torch.Tensor:
        part, rest = x[..., :rotated], x[..., rotated:]
        if interleaved:
            other = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
        else:
            other = torch.cat([-part[..., rotated // 2 :], part[..., : rotated // 2]], -1)
        return torch.cat([part * cos[:, None].to(x.dtype) + other * sin[:, None].to(x.dtype), rest], -1)

    def expected(normed: torch.Tensor) -> list[torch.Tensor]:
        heads = []
        for place, weight in enumerate(weights):
            bias = None if place else layer.bias[: weight.shape[0]].to(normed.dtype)
            head = F.linear(normed, weight.to(normed.dtype), bias).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            if place < 2:
                head = turned(head if of_head[place] is None else apply_norm(of_head[place], head))
            heads.append(head)
        return heads

    oracle = expected(apply_norm(before, x.double()))
    baseline = expected(apply_norm(before, x))
    for found, y, z in zip((query, *views), oracle, baseline, strict=True):
        assert_within_noise(found, y, z)


def test_results_do_not_depend_on_the_batch() -> None:
    """A row alone, and the row among others: the same sums in the same order."""
    layer, x = PackedLinear([torch.randn(70, 65)]), torch.randn(200, 65)
    whole = linear(x, layer)
    for row in (0, 7, 131, 199):
        assert torch.equal(linear(x[row : row + 1], layer), whole[row : row + 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedLinear([torch.zeros(4, 3), torch.zeros(4, 2)]), r"weights: expected \[N, 3\] on cpu"),
        (lambda: PackedLinear([torch.zeros(4, 3), torch.zeros(4, 3).half()]), "weight: expected one dtype"),
        (lambda: PackedLinear([torch.zeros(4, 3, device="meta")]), "weights: expected .* on cpu"),
        (
            lambda: linear(torch.zeros(2, 4), PackedLinear([torch.zeros(4, 3)])),
            r"x: expected \[M, 3\], found \[2, 4\]",
        ),
        (
            lambda: linear(torch.zeros(2, 3), PackedLinear([torch.zeros(4, 3)]), residual=torch.zeros(2, 2, 4)[:, 0]),
            r"residual: expected dense float32 \[2, 4\], found strided float32 \[2, 4\]",
        ),
        (lambda: Norm("batch"), "kind: expected one of none, rms, layer, found 'batch'"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
