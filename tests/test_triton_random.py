# SPDX-License-Identifier: Apache-2.0
"""Random calls of the ops, with every option, stride and tile, through the Triton kernels in the interpreter.

What is allowed is a bound on rounding errors (Higham, 2002, chapter 3), element by element: the sum of the absolute
values of what was added up, times the units in the last place that the kernels may lose. Where nothing is added
nothing is allowed. The accuracy itself is held to PyTorch's own by tests/ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from softprompt_fast import ops
from softprompt_fast.backends import heuristics
from softprompt_fast.backends.triton import _runtime, _tuning
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import AttentionInputs, poisoned_memory
from tests.random_tensors import far_apart, strided

DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
INDEX = ["dense", "dense", "sliced"]
#: Of biases and sinks: some of them minus infinity.
HIDING = [torch.clone, lambda x: x.masked_fill(x > 0.8, -math.inf)]
random_calls = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# ---- drawing --------------------------------------------------------------------------------------------------------


@st.composite
def index(draw: Callable[..., Any], values: Sequence[int]) -> Tensor:
    """An index tensor: either width of integers, dense or not."""
    tensor = draw(strided((len(values),), draw(st.sampled_from([torch.int32, torch.int64])), INDEX))
    return tensor.copy_(torch.tensor(values, dtype=torch.int64))


@st.composite
def pack(draw: Callable[..., Any], longest: int) -> tuple[list[int], int]:
    """Offsets of prefixes, some of them empty, and how many entries the pack has: unused ones at both ends."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=4))
    first, last = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    offsets = [first + sum(lengths[:n]) for n in range(len(lengths) + 1)]
    return offsets, offsets[-1] + last


@st.composite
def configurations(draw: Callable[..., Any], op: str, kernels: dict[str, dict[str, Sequence[Any]]]) -> dict:
    """Tiles of each kernel, or what the tables say."""
    if draw(st.booleans()):
        return {}
    drawn = {k: {name: draw(st.sampled_from(c)) for name, c in sizes.items()} for k, sizes in kernels.items()}
    return {(op, kernel): {**sizes, "num_warps": 4, "num_stages": 1} for kernel, sizes in drawn.items()}


@contextmanager
def under(tiles: dict, processors: int, **choices: bool | None) -> Iterator[None]:
    """Within it kernels run with these tiles, on a device of so many processors, and heuristics choose so."""
    with ExitStack() as stack:
        for (op, kernel), config in tiles.items():
            stack.enter_context(_tuning.overridden(op, kernel, config))
        stack.enter_context(mock.patch.object(_runtime, "processors", lambda device: processors))
        stack.enter_context(choosing(**choices))
        stack.enter_context(poisoned_memory())
        yield


@contextmanager
def choosing(**choices: bool | None) -> Iterator[None]:
    with ExitStack() as stack:
        for name, choice in choices.items():
            if choice is not None:
                stack.enter_context(mock.patch.object(heuristics, name, lambda *args, choice=choice: choice))
        yield


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def assert_within(found: Tensor, want: Tensor, bound: Tensor, what: str) -> None:
    assert found.shape == want.shape, (what, found.shape, want.shape)
    infinite = want.isinf()
    assert torch.equal(found[infinite].double(), want[infinite]), f"{what}: infinities differ"
    error = (found.double() - want).masked_fill(infinite, 0.0).abs()
    # Not "error > bound": a NaN has to fail.
    wrong = ~(error <= bound + 1e-30)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        values = [x.expand_as(wrong)[place].item() for x in (found, want, bound)]
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, at {place}: %g, %g +- %g" % (*values,)
        )


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Of a result and of what a product reads: half a unit relative, and absolute where float16 ends."""
    return torch.finfo(dtype).eps, 2.0**-24 if dtype == torch.float16 else 1e-37


EPS = torch.finfo(torch.float32).eps  # of every sum


# ---- prefix_attention -----------------------------------------------------------------------------------------------

ATTENTION_TILES: dict[str, dict[str, Sequence[Any]]] = {
    "prefill": {"BLOCK_M": [16, 32, 64], "BLOCK_N": [16, 32, 64], "DESCRIPTORS": [False, True]},
    "decode": {
        "BLOCK_M": [16, 32, 64], "BLOCK_N": [16, 32], "MIN_KEYS": [1, 16, 30], "OWN_PROGRAMS": [1, 2, 5],
        "PREFIX_PROGRAMS": [1, 3],
    },
    "combine": {"BLOCK_ROWS": [1, 4, 16], "BLOCK_PARTIALS": [1, 4, 16]},
    "plan": {"BLOCK": [2, 16]},
    "backward_sums": {"BLOCK_M": [16, 32]},
    **{f"backward_{k}": {"BLOCK_M": [16, 32], "BLOCK_N": [16, 32, 64]} for k in ("query", "own", "prefix")},
}  # fmt: skip


@st.composite
def attention_calls(
    draw: Callable[..., Any], dtypes: Sequence[torch.dtype] = DTYPES, biased: bool = True
) -> AttentionInputs:
    dtype = draw(st.sampled_from(dtypes))
    batch, kv_heads, groups = draw(st.integers(0, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 6))
    queries, own = draw(st.integers(0, 5) | st.integers(0, 40)), draw(st.integers(0, 60))
    head_dim, v_dim = draw(st.integers(1, 40)), draw(st.integers(0, 40))
    if draw(st.booleans()):
        head_dim = v_dim = draw(st.sampled_from([16, 32]))
    options: dict[str, Any] = {}
    packed = draw(st.integers(0, 60))
    longest = packed
    if draw(st.booleans()):
        offsets, packed = draw(pack(40))
        longest = max(b - a for a, b in pairwise(offsets))
        options["prefix_offsets"] = draw(index(offsets))
    if draw(st.booleans()):
        last = len(options.get("prefix_offsets", (0, packed))) - 2
        options["prefix_index"] = draw(index(draw(st.lists(st.integers(-1, last), min_size=batch, max_size=batch))))
    rows = st.lists(st.integers(0, own), min_size=batch, max_size=batch)
    if draw(st.booleans()):
        options["own_start"] = draw(index(draw(rows)))
    if draw(st.booleans()):
        options["own_end"] = draw(index(draw(rows)))
    if draw(st.booleans()):  # a static cache: queries stand anywhere, some beyond the own keys
        position = st.integers(-3, own + 3) | st.sampled_from([-(2**31), 2**31 - 1])
        options["query_start"] = draw(index(draw(st.lists(position, min_size=batch, max_size=batch))))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, -0.4, 0.3, 1.0, -1e-30, 2.5]))
    if draw(st.booleans()):
        options["sliding_window"] = draw(st.integers(1, 70) | st.sampled_from([2**31 - 1, 2**31, 2**40]))
    elif draw(st.booleans()):
        options["causal"] = False
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.1, 2.0, 30.0]))
    if draw(st.booleans()):
        kind = draw(st.sampled_from([torch.float32, dtype]))
        options["sinks"] = draw(strided((kv_heads * groups,), kind, change=draw(st.sampled_from(HIDING))))
    if biased and draw(st.booleans()):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, kv_heads * groups, queries)]
        width = packed
        if "prefix_offsets" in options:
            width = draw(st.integers(max(longest, min(packed, 1)), packed))
        kind = draw(st.sampled_from([torch.float32, dtype]))
        options["bias"] = draw(strided((*shape, width + own), kind, change=draw(st.sampled_from(HIDING))))
    prefix_dtype = dtype
    if draw(st.integers(0, 3)) == 0:
        prefix_dtype = draw(st.sampled_from(EIGHT_BITS))
        options["prefix_scale_block"] = block = draw(st.integers(1, 40))
        largest = 64.0 if prefix_dtype == torch.int8 else 1.0
        for name in ("key", "value"):
            options[f"prefix_{name}_scale"] = draw(
                strided((kv_heads, -(-packed // block)), change=lambda x: x.abs() / largest)
            )
    return AttentionInputs(
        draw(strided((batch, kv_heads * groups, queries, head_dim), dtype)),
        draw(strided((batch, kv_heads, own, head_dim), dtype)),
        draw(strided((batch, kv_heads, own, v_dim), dtype)),
        draw(strided((kv_heads, packed, head_dim), prefix_dtype)),
        draw(strided((kv_heads, packed, v_dim), prefix_dtype)),
        options,
    )


def exactly(inputs: AttentionInputs) -> AttentionInputs:
    """What the inputs stand for, in float64."""
    exact = inputs.to(torch.float64)
    block = exact.options.pop("prefix_scale_block", None)
    scales = [exact.options.pop(f"prefix_{name}_scale", None) for name in ("key", "value")]
    if block is not None:
        for name, scale in zip(("prefix_key", "prefix_value"), scales, strict=True):
            x = getattr(exact, name)
            setattr(exact, name, x * scale.repeat_interleave(block, 1)[:, : x.shape[1], None])
    return exact


class Bounds:
    """Of the errors of a call's results and gradients. The weights themselves come from the oracle, as what it gives
    for values that are unit vectors, one for every entry of the pack and every own key."""

    def __init__(self, exact: AttentionInputs, dtype: torch.dtype, quantized: bool) -> None:
        query, key, value, prefix_key, prefix_value = (x.detach() for x in exact.tensors)
        (self.batch, self.heads, self.queries, head_dim), (kv_heads, own) = query.shape, key.shape[1:3]
        self.packed, self.groups = prefix_key.shape[1], self.heads // kv_heads
        keys = self.packed + own
        units = torch.eye(keys, dtype=torch.float64)
        prefix_units = units[: self.packed].expand(kv_heads, -1, -1)
        own_units = units[self.packed :].expand(self.batch, kv_heads, -1, -1)
        with torch.no_grad():
            self.weights, lse = reference(query, key, own_units, prefix_key, prefix_units, **exact.options)
        self.scale = abs(exact.options.get("scale", head_dim**-0.5))
        self.key, self.value = (
            torch.cat([x.expand(self.batch, -1, -1, -1), y], 2).abs().repeat_interleave(self.groups, 1)
            for x, y in ((prefix_key, key), (prefix_value, value))
        )
        self.query = query.abs()
        self.eps, self.least = rounding(dtype)
        # A weight's relative error: that of its score and of the LSE.
        scores = (self.query @ self.key.mT * self.scale).where(self.weights > 0, 0.0)
        largest = scores.amax(-1) if keys else scores.sum(-1)  # [B, Hq, S]
        for name in ("bias", "sinks"):
            x = exact.options.get(name)
            if x is not None and x.numel():
                largest = largest + x.where(x.isfinite(), 0.0).abs().max()
        self.score = (head_dim + 24) * EPS * (largest + 1.0)
        self.lse = self.score + (keys + 8) * EPS + EPS * lse.where(lse.isfinite(), 0.0).abs()
        self.weight = (self.score + self.lse)[..., None]
        self.count, self.products = keys, head_dim + value.shape[-1]
        self.rounded_keys = self.eps * largest[..., None] if quantized else 0.0  # in the backward
        self.mass = self.weights @ self.value
        self.out = self.mass * (2 * self.eps + self.weight + (keys + 8) * EPS)
        if self.value.numel():  # a weight, unnormalised, below what float16 holds; then the result
            self.out = self.out + (keys + 1) * self.least * (1.0 + self.value.abs().max())

    def hold(self, results: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], real: Tensor) -> None:
        """For out and lse, where the queries are no padding."""
        for which, mask, bound in ((0, real, self.out), (1, real[..., 0], self.lse)):
            found, exact = (x[which].detach().masked_fill(~mask, 0.0) for x in (results, want))
            assert_within(found, exact, bound, ("out", "lse")[which])

    def gradients(self, grad_out: Tensor, grad_lse: Tensor, sinks: Tensor | None, lse: Tensor) -> list[Tensor]:
        """Of query, key, value, prefix_key, prefix_value, sinks."""
        grad_out, grad_lse = grad_out.abs(), grad_lse.abs()[..., None]
        delta = (grad_out * self.mass).sum(-1, keepdim=True) + grad_lse
        slopes = self.weights * (grad_out @ self.value.mT + delta)
        relative = 3 * self.eps + 2 * self.weight + 2 * self.rounded_keys + (self.count + self.products + 16) * EPS
        summed = (self.batch * self.groups * self.queries + 8) * EPS
        slope_error = slopes * (relative + summed) + self.least
        weight_error = self.weights * (relative + summed) + self.least
        query = self.scale * slope_error @ self.key + self.least
        key = self._over_queries(self.scale * slope_error, self.query) + self.least
        value = self._over_queries(weight_error, grad_out) + self.least
        found = [query, key[:, :, self.packed :], value[:, :, self.packed :]]
        found += [key[:, :, : self.packed].sum(0), value[:, :, : self.packed].sum(0)]
        if sinks is not None:
            seen = lse.isfinite()
            weight = (sinks.double()[:, None] - lse.where(seen, math.inf)).exp()[..., None]
            found.append((weight * (relative + summed) * delta).sum((0, 2, 3)) + self.least)
        return found

    def _over_queries(self, weights: Tensor, x: Tensor) -> Tensor:
        each = weights.mT @ x  # [B, Hq, keys, D]
        return each.unflatten(1, (self.heads // self.groups, self.groups)).sum(2)


@random_calls
@given(
    inputs=attention_calls(),
    tiles=configurations("prefix_attention", ATTENTION_TILES),
    processors=st.integers(1, 12),
    stacked=st.none() | st.booleans(),
    use=st.sampled_from([(0, 1), (0,), (1,)]),
    data=st.data(),
)
def test_prefix_attention(
    inputs: AttentionInputs, tiles: dict, processors: int, stacked: bool | None, use: tuple[int, ...], data: Any
) -> None:
    dtype, o = inputs.query.dtype, inputs.options
    quantized = "prefix_scale_block" in o
    exact = exactly(inputs)
    bounds = Bounds(exact, dtype, quantized)
    sinks = [o["sinks"]] if "sinks" in o else []
    trained = leaves([*inputs.tensors[: 3 if quantized else 5], *sinks])
    options = {**o, "sinks": trained[-1]} if sinks else o
    prefix = inputs.tensors[3:] if quantized else trained[3:5]
    with under(tiles, processors, stack_queries=stacked):
        results = ops.prefix_attention(*trained[:3], *prefix, **options, return_lse=True, backend="triton")
    exact_trained = leaves([*exact.tensors, *(x.double() for x in sinks)])
    exact_options = {**exact.options, "sinks": exact_trained[5]} if sinks else exact.options
    want = reference(*exact_trained[:5], **exact_options)
    real = inputs.real_queries()
    assert results[0].isfinite().all() and not results[1].isnan().any()
    assert (results[0].dtype, results[1].dtype) == (dtype, torch.float32)
    assert results[0].transpose(1, 2).is_contiguous()
    bounds.hold(results, want, real)

    # Padding gets no gradient. A gradient of nothing is given as None, or autograd would make it zeros.
    shapes = (inputs.query.shape[:3] + inputs.value.shape[3:], inputs.query.shape[:3])
    grads = [data.draw(strided(shape, kind)) for shape, kind in zip(shapes, (dtype, torch.float32), strict=True)]
    if data.draw(st.booleans()):
        grads = [g.where(mask, 0.0) for g, mask in zip(grads, (real, real[..., 0]), strict=True)]
    else:
        grads = [g * mask for g, mask in zip(grads, (real, real[..., 0]), strict=True)]
    grads = [g if i in use else torch.zeros_like(g) for i, g in enumerate(grads)]
    with under(tiles, processors):
        found_grads = torch.autograd.grad([results[i] for i in use], trained, [grads[i] for i in use])
    want_grads = torch.autograd.grad(want, exact_trained, [g.double() for g in grads])
    want_grads = want_grads[:3] + want_grads[5:] if quantized else want_grads
    limits = bounds.gradients(grads[0].double(), grads[1].double(), sinks[0] if sinks else None, want[1].detach())
    limits = limits[:3] + limits[5:] if quantized else limits
    names = ("query", "key", "value") + (() if quantized else ("prefix_key", "prefix_value")) + ("sinks",)
    for name, x, y, bound in zip(names, found_grads, want_grads, limits, strict=False):
        assert x.dtype == (o["sinks"].dtype if name == "sinks" else dtype)
        eps = torch.finfo(x.dtype).eps
        assert_within(x, y, bound + eps * y.abs(), f"gradient of {name}")


# ---- merge_states ---------------------------------------------------------------------------------------------------


@random_calls
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    head_dim=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    tiles=configurations("merge_states", {k: {"BLOCK_ROWS": [1, 4, 32]} for k in ("forward", "backward")}),
    use=st.sampled_from([(0, 1), (0,), (1,)]),
    data=st.data(),
)
def test_merge_states(
    shape: list[int], head_dim: int, dtype: torch.dtype, tiles: dict, use: tuple[int, ...], data: Any
) -> None:
    kinds = [dtype, torch.float32] * 2
    shapes = [(*shape, head_dim), tuple(shape)] * 2
    far = data.draw(st.sampled_from([1.0, 30.0, 1e4]))
    changes = [torch.clone, lambda x: (x * far).masked_fill(x > 0.8, -math.inf)] * 2
    given_states = [data.draw(strided(x, y, change=z)) for x, y, z in zip(shapes, kinds, changes, strict=True)]
    trained, exact = leaves(given_states), leaves([x.double() for x in given_states])
    with under(tiles, 4):
        results = ops.merge_states(*trained, backend="triton")
    want = ops.merge_states(*exact, backend="reference")
    with torch.no_grad():
        out_a, lse_a, out_b, lse_b = exact
        empty = want[1].isneginf()
        weights = [(lse - want[1]).exp().masked_fill(empty, 0.0)[..., None] for lse in (lse_a, lse_b)]
        # The difference of the LSEs is rounded, then its exponential; far apart there is nothing to lose.
        difference = (lse_a - lse_b).masked_fill(empty, 0.0).abs().clamp(max=90.0)[..., None]
        least, relative = rounding(dtype)[1], (difference + 12) * EPS
        both = weights[0] * weights[1]
        mass = weights[0] * out_a.abs() + weights[1] * out_b.abs()
        eps = torch.finfo(dtype).eps
        finite_lse = want[1].masked_fill(empty, 0.0).abs()
        assert_within(results[0], want[0], mass * (relative + eps) + least, "out")
        assert_within(results[1], want[1], (finite_lse + 8) * EPS, "lse")
    assert [x.stride() for x in results] == [torch.empty_like(x).stride() for x in given_states[:2]]

    grads = [data.draw(strided(x.shape, x.dtype)) for x in results]
    grads = [g if i in use else torch.zeros_like(g) for i, g in enumerate(grads)]
    with under(tiles, 4):
        found = torch.autograd.grad([results[i] for i in use], trained, [grads[i] for i in use])
    grads = [g.double() for g in grads]
    want_grads = torch.autograd.grad(want, exact, grads)
    with torch.no_grad():
        grad_out, grad_lse = (g.abs() for g in grads)
        along = (grad_out * (out_a.abs() + out_b.abs())).sum(-1) * both[..., 0]
        along = along * (2 * relative[..., 0] + head_dim * EPS)
        # The oracle's own rounding: it adds up both sides' parts, which may cancel.
        along = along + 1e-14 * ((grad_out * (out_a.abs() + out_b.abs())).sum(-1) + grad_lse)
        for i, name in enumerate(("out_a", "lse_a", "out_b", "lse_b")):
            weight = weights[i // 2]
            if i % 2:
                bound = along + (weight * relative)[..., 0] * grad_lse + 1e-37
            else:
                bound = grad_out * weight * (relative + eps) + least
            assert_within(found[i], want_grads[i], bound, f"gradient of {name}")


# ---- prompt_concat --------------------------------------------------------------------------------------------------

CONCAT_TILES: dict[str, dict[str, Sequence[Any]]] = {
    "forward": {"BLOCK_ROWS": [2, 8, 32], "BLOCK_COLUMNS": [16, 32]},
    "backward_prompt": {"BLOCK_ROWS": [1, 2, 8], "BLOCK_COLUMNS": [16, 32]},
    "backward_tokens": {"BLOCK_ROWS": [2, 8, 32], "BLOCK_COLUMNS": [16, 32]},
}
SCALES = st.none() | st.sampled_from([0.0, 0.5, -3.7, 1.0])


@st.composite
def prologues(draw: Callable[..., Any], batch: int, own: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments that prompt_concat and prompt_qkv share; of which tokens, table and prompt are tensors."""
    other = draw(st.sampled_from([dtype, torch.float32]))
    offsets, packed = draw(pack(8))
    call: dict[str, Any] = {"table": None}
    longest = packed
    if draw(st.booleans()):
        call["prompt_offsets"] = draw(index(offsets))
        longest = max(b - a for a, b in pairwise(offsets))
    call["prompt"] = draw(strided((packed, width), other))
    if draw(st.booleans()):
        last = len(call.get("prompt_offsets", (0, packed))) - 2
        call["prompt_index"] = draw(index(draw(st.lists(st.integers(-1, last), min_size=batch, max_size=batch))))
    if draw(st.booleans()):
        call["own_start"] = draw(index(draw(st.lists(st.integers(0, own), min_size=batch, max_size=batch))))
    if draw(st.booleans()):
        call["prompt_length"] = longest + draw(st.integers(0, 3))
    call["scale"], call["prompt_scale"] = draw(SCALES), draw(SCALES)
    call["out_dtype"] = draw(st.sampled_from([None, dtype]))
    call["padding_side"] = draw(st.sampled_from(["left", "right"]))
    if draw(st.booleans()):
        vocabulary = draw(st.integers(1, 9))
        call["table"] = draw(strided((vocabulary, width), dtype))
        ids = draw(strided((batch, own), torch.int64, ["dense", "sliced"]))
        call["tokens"] = ids.copy_(torch.randint(0, vocabulary, (batch, own)))
        hidden = call.get("own_start")
        if hidden is not None:  # not read, so not checked either
            call["tokens"].masked_fill_(torch.arange(own) < hidden[:, None], 1 << 40)
    else:
        call["tokens"] = draw(strided((batch, own, width), dtype))
    return call


def in_float64(call: dict[str, Any]) -> dict[str, Any]:
    def one(x: Any) -> Any:
        if isinstance(x, list):
            return [one(y) for y in x]
        return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: one(x) for name, x in {**call, "out_dtype": None}.items()}


def train(call: dict[str, Any]) -> list[Tensor]:
    """Mark prompt and floating tokens, which are replaced in the call."""
    names = [name for name in ("prompt", "tokens") if name in call and call[name].is_floating_point()]
    for name in names:
        call[name] = call[name].detach().requires_grad_()
    return [call[name] for name in names]


def magnitudes(call: dict[str, Any]) -> dict[str, Any]:
    """The call with the absolute value of all that is multiplied and added up."""
    call = {**call, **{name: call[name].detach().abs() for name in ("prompt", "table") if call[name] is not None}}
    if call["tokens"].is_floating_point():
        call["tokens"] = call["tokens"].detach().abs()
    return {**call, **{name: None if call[name] is None else abs(call[name]) for name in ("scale", "prompt_scale")}}


@random_calls
@given(
    batch=st.integers(0, 12),
    own=st.integers(0, 9),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    tiles=configurations("prompt_concat", CONCAT_TILES),
    processors=st.integers(1, 12),
    data=st.data(),
)
def test_prompt_concat(
    batch: int, own: int, width: int, dtype: torch.dtype, tiles: dict, processors: int, data: Any
) -> None:
    call = data.draw(prologues(batch, own, width, dtype))
    exact = in_float64(call)
    trained, exact_trained = train(call), train(exact)
    with under(tiles, processors):
        out = ops.prompt_concat(**call, backend="triton")
    want = ops.prompt_concat(**exact, backend="reference")
    assert out.is_contiguous() and out.dtype == (call["out_dtype"] or dtype)
    eps, least = rounding(out.dtype)
    assert_within(out, want.detach(), want.detach().abs() * (eps + EPS) + least, "out")

    grad = data.draw(strided(out.shape, out.dtype))
    with under(tiles, processors):
        found = torch.autograd.grad(out, trained, grad)
    want_grads = torch.autograd.grad(want, exact_trained, grad.double(), materialize_grads=True)
    sums = absolute_gradients(magnitudes(exact), grad)
    for x, y, mass in zip(found, want_grads, sums, strict=True):
        eps, least = rounding(x.dtype)
        assert_within(x, y, mass * (batch + 4) * EPS + y.abs() * eps + least, "gradient")


def absolute_gradients(call: dict[str, Any], grad: Tensor) -> tuple[Tensor, ...]:
    """Of prompt and tokens, summed over the absolute values of ``grad``."""
    call = dict(call)
    of = train(call)
    out = ops.prompt_concat(**call, backend="reference")
    return torch.autograd.grad(out, of, grad.double().abs(), materialize_grads=True)


# ---- prompt_qkv -----------------------------------------------------------------------------------------------------

QKV_TILES: dict[str, dict[str, Sequence[Any]]] = {
    "one_kernel": {
        "BLOCK_M": [16, 32],
        "BLOCK_N": [16, 64],
        "BLOCK_K": [16, 32],
        "BLOCK_COPY": [16, 64],
        "GROUP_M": [1, 3],
    },
    "normalise": {"BLOCK_ROWS": [1, 4]},
    "normalise_backward": {"BLOCK_ROWS": [1, 4]},
    "turn": {"BLOCK_ROWS": [1, 8]},
}  # fmt: skip
CONCAT = (
    "table", "prompt", "prompt_offsets", "prompt_index", "own_start", "prompt_length", "scale", "prompt_scale",
    "out_dtype", "padding_side",
)  # fmt: skip


@st.composite
def layer_calls(draw: Callable[..., Any]) -> dict[str, Any]:
    """Keyword arguments of prompt_qkv."""
    dtype = draw(st.sampled_from(DTYPES))
    batch, own, width = draw(st.integers(0, 4)), draw(st.integers(0, 9)), draw(st.integers(1, 50))
    kv_heads, groups, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 20))
    call: dict[str, Any] = {"q_heads": kv_heads * groups, "kv_heads": kv_heads}
    if draw(st.booleans()):
        call |= draw(prologues(batch, own, width, dtype))
        length = call.get("prompt_length")
        if length is None:
            offsets = call.get("prompt_offsets")
            length = call["prompt"].shape[0] if offsets is None else int(offsets.diff().max())
        length += own
    else:
        call["tokens"], length = draw(strided((batch, own, width), dtype)), own
    v_dim = draw(st.integers(1, 20))
    rows = [kv_heads * groups * head_dim, kv_heads * head_dim, kv_heads * v_dim]
    if draw(st.booleans()):
        rows = [sum(rows[:2]) + kv_heads * head_dim]
    kinds = st.sampled_from([dtype, dtype, dtype, torch.float32])
    steps = ["dense", "dense", "sliced"]
    weights = [draw(strided((n, width), draw(kinds), steps, lambda x: x * width**-0.5)) for n in rows]
    call["weight"] = weights if len(rows) == 3 else weights[0]
    if draw(st.booleans()):
        biases = [draw(strided((n,), draw(kinds))) for n in rows]
        call["bias"] = biases if len(rows) == 3 else biases[0]
    call["norm"] = norm = draw(st.sampled_from(["rms", "layer", "none"]))
    if norm != "none" and draw(st.booleans()):
        call["norm_weight"] = draw(strided((width,), draw(kinds)))
        call["norm_offset"] = draw(st.sampled_from([0.0, 1.0]))
    if norm == "layer" and draw(st.booleans()):
        call["norm_bias"] = draw(strided((width,), draw(kinds)))
    call["eps"] = draw(st.sampled_from([1e-6, 1e-2]))
    if draw(st.booleans()):
        size = (draw(st.sampled_from([1, batch])), length, 2 * draw(st.integers(0, head_dim // 2)))
        kind = draw(kinds)
        call["cos"], call["sin"] = (draw(strided(size, kind)) for _ in range(2))
        call["interleaved"] = draw(st.booleans())
    return call


def turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, back: bool = False) -> Tensor:
    """Magnitudes of what RoPE adds up: ``x [B, heads, S, D]`` and the angles are not negative."""
    if cos is None or sin is None:
        return x
    cos, sin, size = cos[:, None], sin[:, None], cos.shape[-1]
    head, rest = x[..., :size], x[..., size:]

    def swapped(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else y.roll(size // 2, -1)

    if size:
        head = head * cos + (swapped(head * sin) if back else swapped(head) * sin)
    return torch.cat([head, rest], -1)


def layer_bounds(
    exact: dict[str, Any], x: Tensor, grads: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Bounds of the errors of query, key and value, and of the gradient of ``x``, the layer's input ``[B, S', H]``."""
    eps, least = rounding(dtype)
    width, q_heads, kv_heads = x.shape[-1], exact["q_heads"], exact["kv_heads"]
    weights, biases = exact["weight"], exact.get("bias")
    if isinstance(weights, Tensor):
        sizes = [n * (len(weights) // (q_heads + 2 * kv_heads)) for n in (q_heads, kv_heads, kv_heads)]
        weights = weights.split(sizes)
        biases = None if biases is None else biases.split(sizes)
    centred, size = x, x.abs()
    inverse = torch.ones_like(x[..., :1])
    if exact["norm"] == "layer":
        centred, size = x - x.mean(-1, keepdim=True), size + x.abs().mean(-1, keepdim=True)
    if exact["norm"] != "none":
        inverse = (centred.square().mean(-1, keepdim=True) + exact["eps"]).rsqrt()
    gain = torch.ones(width, dtype=torch.float64)
    if exact.get("norm_weight") is not None:
        gain = exact["norm_weight"].abs() + exact["norm_offset"]
    # Of 1 / deviation: what is lost where the mean is taken away is large beside a small deviation.
    relative = (width + 16) * EPS * (1.0 + (size.amax(-1, keepdim=True) * inverse).square())
    hidden = centred.abs() * inverse * gain
    error = hidden * (relative + eps) + size * inverse * gain * (width + 16) * EPS
    if exact.get("norm_bias") is not None:
        hidden = hidden + exact["norm_bias"].abs()
        error = error + exact["norm_bias"].abs() * eps
    angles = [None if exact.get(n) is None else exact[n].abs() for n in ("cos", "sin")]
    bounds = []
    for place, (weight, count) in enumerate(zip(weights, (q_heads, kv_heads, kv_heads), strict=True)):
        mass, off = (hidden + least) @ weight.abs().T, (error + least) @ weight.abs().T
        if biases is not None:
            mass = mass + biases[place].abs()
        off = off + mass * (2.5 * eps + (width + 8) * EPS) + least
        off = off.unflatten(-1, (count, -1)).transpose(1, 2)
        mass = mass.unflatten(-1, (count, -1)).transpose(1, 2)
        if place < 2:
            off = turned(off + mass * (eps + 4 * EPS), *angles, exact.get("interleaved", False))
        bounds.append(off + least)
    through = torch.zeros_like(x)
    for place, (grad, weight) in enumerate(zip(grads[:3], weights, strict=True)):
        grad = grad.abs()
        if place < 2:
            grad = turned(grad, *angles, exact.get("interleaved", False), back=True)
        through = through + (grad.transpose(1, 2).flatten(2) + least) @ weight.abs()
    lost = 5 * eps + (sum(len(w) for w in weights) + width + 24) * EPS
    through = through * gain
    if exact["norm"] != "none":
        normed = size * inverse
        along = normed * (through * normed).mean(-1, keepdim=True)
        if exact["norm"] == "layer":
            through = through + through.mean(-1, keepdim=True)
        through, lost = (through + along) * inverse, lost + 4 * relative
    return bounds, through * lost + grads[3].abs() * (2 * eps) + least * (1 + inverse * gain)


@random_calls
@given(
    call=layer_calls(),
    tiles=configurations("prompt_qkv", QKV_TILES),
    processors=st.integers(1, 12),
    fused=st.booleans(),
    use=st.sets(st.integers(0, 3), min_size=1),
    data=st.data(),
)
def test_prompt_qkv(call: dict[str, Any], tiles: dict, processors: int, fused: bool, use: set[int], data: Any) -> None:
    exact = in_float64(call)
    trained, exact_trained = train(call), train(exact)
    with under(tiles, processors, fuse_projection=fused):
        results = ops.prompt_qkv(**call, backend="triton")
    want = ops.prompt_qkv(**exact, backend="reference")
    residual = results[3].detach()
    dtype = residual.dtype
    eps, least = rounding(dtype)
    assert_within(residual, want[3].detach(), want[3].detach().abs() * (eps + EPS) + least, "residual")
    grads = [data.draw(strided(x.shape, x.dtype)) for x in results]
    grads = [g if i in use else torch.zeros_like(g) for i, g in enumerate(grads)]
    # The rest follows the residual as it was rounded.
    layer = {name: x for name, x in exact.items() if name not in CONCAT}
    layer["tokens"] = residual.double().requires_grad_()
    want = ops.prompt_qkv(**layer, backend="reference")
    bounds, grad_bound = layer_bounds(exact, residual.double(), [g.double() for g in grads], dtype)
    for name, x, y, bound in zip(("query", "key", "value"), results, want, bounds, strict=False):
        assert x.dtype == dtype and x.transpose(1, 2).is_contiguous()
        assert_within(x.detach(), y.detach(), bound + y.detach().abs() * eps, name)

    with under(tiles, processors):
        found = torch.autograd.grad([results[i] for i in use], trained, [grads[i] for i in use])
    (through,) = torch.autograd.grad(want, [layer["tokens"]], [g.double() for g in grads])
    if call.get("prompt") is None:
        wanted, limits = (through,), (grad_bound,)
    else:
        concat = {name: exact[name] for name in ("tokens", *CONCAT) if name in exact}
        out = ops.prompt_concat(**concat, backend="reference")
        wanted = torch.autograd.grad(out, exact_trained, through, materialize_grads=True)
        error = grad_bound + through.abs() * (len(call["tokens"]) + 4) * EPS
        limits = absolute_gradients(magnitudes(concat), error)
    for x, y, bound in zip(found, wanted, limits, strict=True):
        eps, least = rounding(x.dtype)
        assert_within(x, y, bound + y.abs() * eps + least, "gradient")


# ---- every op -------------------------------------------------------------------------------------------------------


def far_calls() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Of each op and form, a call of its tensors."""

    def half(*shape: int) -> Tensor:
        return torch.randn(*shape).half()

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.prefix_attention(*tensors[:5], bias=tensors[5], return_lse=True, backend="triton")

    def project(tokens: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return ops.prompt_qkv(tokens, weight, q_heads=2, kv_heads=1, cos=cos, sin=sin, backend="triton")

    keys = [half(2, 2, 20, 16), half(2, 2, 20, 16), half(2, 20, 16), half(2, 20, 16)]
    layer = [half(2, 3, 20), half(32, 20), half(1, 3, 8), half(1, 3, 8)]
    return {
        "decode": (attend, [half(2, 2, 2, 16), *keys, half(2, 2, 2, 40)]),
        "prefill": (attend, [half(2, 2, 20, 16), *keys, half(2, 2, 20, 40)]),
        "merge_states": (
            lambda a, b: ops.merge_states(a, torch.zeros(2, 3), b, torch.ones(2, 3), backend="triton"),
            [half(2, 3, 8), half(2, 3, 8)],
        ),
        "prompt_concat": (
            lambda tokens, prompt: (ops.prompt_concat(tokens, None, prompt, backend="triton"),),
            [half(2, 3, 20), half(4, 20)],
        ),
        "prompt_qkv, one kernel": (project, layer),
        "prompt_qkv, composed": (project, layer),
    }


@pytest.mark.parametrize("name", far_calls())
def test_features_far_apart(name: str) -> None:
    """Offsets of features take 64 bits too: layouts may have them outermost."""
    call, tensors = far_calls()[name]
    choices = {
        "stack_queries": {"decode": True, "prefill": False}.get(name),
        "fuse_projection": {"prompt_qkv, one kernel": True, "prompt_qkv, composed": False}.get(name),
    }
    with choosing(**choices):
        want = call(*tensors)
        for place, x in enumerate(tensors):
            spread = [*tensors[:place], far_apart(x, x.dim() - 1), *tensors[place + 1 :]]
            for y, z in zip(call(*spread), want, strict=True):
                # Not to the bit: pointers instead of descriptors, another order within a product.
                torch.testing.assert_close(y, z, rtol=2e-3, atol=2e-3)
