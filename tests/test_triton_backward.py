# SPDX-License-Identifier: Apache-2.0
"""What is particular to the Triton backward of prefix_attention; tests/ops/test_prefix_attention.py checks the op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softprompt_fast.backends.heuristics import prefix_splits
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import AttentionInputs, assert_within_noise, attention_inputs, guarded, poisoned_memory

pytest.importorskip("triton")

from softprompt_fast.backends.triton import _prefix_attention_backward, _runtime

NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "sinks")
INDICES = ("prefix_offsets", "prefix_index", "own_start", "own_end", "query_start")
# Three prompts and a row without one, prompts of one entry and of several blocks, unused entries at both ends.
MANY_ROWS: dict[str, Any] = {
    "batch": 13, "q_heads": 2, "kv_heads": 1, "queries": 3, "own": 4, "prefix": 60,
    "prefix_offsets": [2, 3, 24, 24, 57],
    "prefix_index": [3, 1, -1, 3, 0, 3, 3, 1, 3, 2, 1, 3, 3],
}  # fmt: skip


def gradients(inputs: AttentionInputs, grad_out: torch.Tensor, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    """The kernels' gradients, of what the reference computes forward."""
    o = inputs.options
    out, lse = reference(*inputs.tensors, **o)
    scale = o.get("scale", inputs.query.shape[-1] ** -0.5)
    tensors = [o.get(name) for name in INDICES]
    options = [scale, o.get("causal", True), o.get("sliding_window"), o.get("softcap"), o.get("sinks"), o.get("bias")]
    with poisoned_memory():
        return _prefix_attention_backward.backward(grad_out, grad_lse, *inputs.tensors, *tensors, *options, out, lse)


def upstream(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, _ = inputs.query.shape
    grad_out = guarded((batch, heads, queries, inputs.value.shape[-1]), inputs.query.dtype, order=(0, 2, 1, 3))
    return grad_out, guarded((batch, heads, queries), torch.float32)


def oracle(inputs: AttentionInputs, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    exact = inputs.to(torch.float64).requires_grad_()
    results = reference(*exact.tensors, **exact.options)
    return torch.autograd.grad(results, exact.gradient_inputs, (grad_out.double(), grad_lse.double()))


def check(inputs: AttentionInputs) -> tuple[Any, ...]:
    grad_out, grad_lse = upstream(inputs)
    found = gradients(inputs, grad_out, grad_lse)
    for name, x, y in zip(NAMES, found, oracle(inputs, grad_out, grad_lse), strict=False):
        assert_within_noise(x, y, y.to(x.dtype), f"gradient of {name}")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_rows_of_few_prompts(dtype: torch.dtype) -> None:
    inputs = attention_inputs(**MANY_ROWS, dtype=dtype)
    grad_out, grad_lse = upstream(inputs)
    found = gradients(inputs, grad_out, grad_lse)
    want = oracle(inputs, grad_out, grad_lse)
    plain = inputs.to(dtype).requires_grad_()
    baseline = torch.autograd.grad(plain.baseline(), plain.gradient_inputs, (grad_out, grad_lse))
    for name, x, y, z in zip(NAMES, found, want, baseline, strict=False):
        assert_within_noise(x, y, z, f"gradient of {name}")
    assert not found[3][:, :2].any() and not found[3][:, 57:].any()  # nobody's entries


@pytest.mark.parametrize(
    "options, processors", [({}, 1), ({}, 200), ({"sliding_window": 20}, 16)], ids=["one", "plain", "window"]
)
def test_partial_sums(options: dict[str, Any], processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share a prefix's rows, more than there are rows included."""
    monkeypatch.setattr(_runtime, "processors", lambda device: processors)
    check(attention_inputs(batch=3, prefix=33, queries=18, own=18, **options))
    check(attention_inputs(**MANY_ROWS, **options))


def test_repeats_bit_for_bit() -> None:
    inputs = attention_inputs(**MANY_ROWS)
    given = upstream(inputs)
    for x, y in zip(gradients(inputs, *given)[:5], gradients(inputs, *given)[:5], strict=True):
        assert torch.equal(x, y)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    inputs = attention_inputs(**MANY_ROWS)
    grad_out, grad_lse = upstream(inputs)
    found = gradients(inputs, grad_out, grad_lse)
    for row in (1, 2, 12):
        own = [x[row : row + 1] for x in inputs.tensors[:3]]
        options = {**inputs.options, "prefix_index": inputs.options["prefix_index"][row : row + 1]}
        alone = AttentionInputs(*own, *inputs.tensors[3:], options)  # type: ignore[arg-type]
        for x, y in zip(gradients(alone, grad_out[row : row + 1], grad_lse[row : row + 1])[:3], found, strict=False):
            assert torch.equal(x[0], y[row])


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that are made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "empty" in function.__name__:
            self.bytes += result.untyped_storage().nbytes()
        return result


def test_memory_of_prefix_gradients_does_not_grow_with_the_batch() -> None:
    """Besides gradients and row sums, 8 bytes a query and head, there are partial sums: two blocks a processor."""
    beyond = []
    for batch in (2, 8, 32):
        inputs = attention_inputs(batch=batch, queries=1, own=1, prefix=30, q_heads=2, kv_heads=1)
        given = upstream(inputs)
        grads = [torch.empty_like(x) for x in inputs.tensors]
        out, lse = reference(*inputs.tensors)
        with Allocations() as allocations:
            _prefix_attention_backward.backward(
                *given, *inputs.tensors, *[None] * 5, 0.25, True, None, None, None, None, out, lse
            )
        row_sums = 2 * 4 * batch * 2 * 16  # one query is a block of 16
        beyond.append(allocations.bytes - sum(x.numel() * x.element_size() for x in grads) - row_sums)
    assert (
        beyond[0] > 0 and max(beyond) <= 2 * 4 * (16 * 16 * 2) * 4
    )  # processors x a block's keys and values x float32
    assert beyond[1] == beyond[2]


def test_what_sees_nothing_or_is_padding_stays_finite() -> None:
    """Whatever comes in for them: the gradient of lse is infinite where two empty states have been merged."""
    inputs = attention_inputs(queries=7, own_start=[0, 7, 3], own_end=[7, 7, 5], prefix_index=[0, -1, 0])
    grad_out, grad_lse = upstream(inputs)
    grad_lse[1] = math.inf
    found = gradients(inputs, grad_out, grad_lse)
    assert all(x.isfinite().all() for x in found[:5])
    assert not any(x[1].any() for x in found[:3])


@pytest.mark.parametrize("order", [(3, 0, 1, 2), (1, 2, 0, 3)], ids=str)
def test_any_strides(order: tuple[int, ...]) -> None:
    inputs = attention_inputs(v_dim=8, prefix=20)
    moved = [guarded(x.shape, order=order).copy_(x) for x in inputs.tensors[:3]]
    packed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs.tensors[3:]]
    strided = AttentionInputs(*moved, *packed)  # type: ignore[arg-type]
    # As autograd hands out the gradient of a sum: one element for all.
    ones = torch.ones(()).expand(3, 4, 5, 8), torch.ones(()).expand(3, 4, 5)
    for x, y in zip(gradients(strided, *ones)[:5], oracle(inputs, *ones), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_sums_of_many_parts() -> None:
    for parts in (guarded((150, 5)).contiguous(), guarded((3, 1500)).contiguous(), torch.empty(0, 7)):
        with poisoned_memory():
            total = torch.empty(parts.shape[1])
            _prefix_attention_backward._add_up_parts(parts, total)
        torch.testing.assert_close(total, parts.sum(0))


def test_prefix_splits() -> None:
    assert prefix_splits(32, 16, 132) == 4 and prefix_splits(70, 16, 132) == 3 and prefix_splits(133, 16, 132) == 1
    assert prefix_splits(1, 3, 132) == 3  # no more than rows
    assert prefix_splits(32, 0, 132) == 1 and prefix_splits(0, 16, 132) == 1
    for blocks in range(1, 300):
        for rows in (1, 7, 1000):
            splits = prefix_splits(blocks, rows, 132)
            assert 1 <= splits <= rows and (splits == 1 or blocks * splits <= 2 * 132)
