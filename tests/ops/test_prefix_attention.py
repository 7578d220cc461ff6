# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt_fast import ops
from softprompt_fast.backends import _registry, native
from softprompt_fast.backends._registry import BackendError
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import (
    AttentionInputs,
    assert_within_noise,
    attention_inputs,
    guarded,
    poisoned_memory,
    rows_of,
    visible,
)
from tests.device import DEVICE, cpu_only, randn, seeded
from tests.isas import BACKENDS, CUDA, needs_extension, using

# ``ops.prefix_attention`` is the function; this is its module.
ops_module = sys.modules["softprompt_fast.ops.prefix_attention"]

EXTENSION, _ = native.load()
NAMES = ["torch", pytest.param("cpu", marks=needs_extension), "triton"]

PACKED = {"prefix": 9, "prefix_offsets": [0, 4, 4, 9], "prefix_index": [2, -1, 0]}
CASES: dict[str, dict] = {
    "plain": {},
    "decode": {"queries": 1},
    "decode one row": {"batch": 1, "queries": 1},
    "decode left padded": {"queries": 1, "own_start": [0, 3, 5]},
    "prefill": {"queries": 7},
    "prefill left padded": {"queries": 7, "own_start": [0, 3, 6]},
    "prefill right padded": {"queries": 7, "own_end": [7, 2, 4]},
    "nothing visible": {"queries": 7, "own_start": [0, 7, 7], "prefix": 0},
    "static cache": {"own": 12, "query_start": [0, 2, 2], "own_start": [0, 2, 0], "own_end": [5, 7, 7]},
    "static cache decode": {"own": 12, "queries": 1, "query_start": [4, 4, 4], "own_end": [5, 5, 5]},
    "static cache decode ragged": {"own": 12, "queries": 1, "query_start": [1, 4, 11]},
    "bidirectional": {"queries": 7, "causal": False},
    "bidirectional padded": {"queries": 7, "causal": False, "own_start": [0, 2, 0], "own_end": [7, 7, 4]},
    "bidirectional right padded": {"queries": 7, "causal": False, "own_end": [7, 2, 4]},
    "cross": {"queries": 2, "own": 7, "causal": False},
    "one head": {"q_heads": 1, "kv_heads": 1},
    "multi query": {"q_heads": 3, "kv_heads": 1},
    "no groups": {"q_heads": 3, "kv_heads": 3},
    "other value size": {"v_dim": 8},
    "other value size decode": {"v_dim": 8, "queries": 1},
    "scale": {"scale": 0.7},
    "window in own": {"queries": 7, "sliding_window": 3},
    "window in prefix": {"sliding_window": 9, "own_start": [0, 1, 2]},
    "window decode": {"queries": 1, "sliding_window": 9, "own_start": [0, 2, 5]},
    "window decode short": {"queries": 1, "sliding_window": 2},
    "window hides one own key": {"queries": 7, "sliding_window": 6},
    "window hides one prefix entry": {"sliding_window": 12},
    "window hides nothing": {"sliding_window": 13},
    "window beyond all": {"sliding_window": 100},
    "softcap": {"softcap": 1.5},
    "softcap prefill": {"softcap": 1.5, "queries": 7},
    "softcap window": {"softcap": 1.5, "sliding_window": 4, "own_start": [0, 1, 2]},
    "sinks": {"sinks": True, "q_heads": 16},  # one gradient a head: fewer make no mean
    "sinks decode window": {"sinks": True, "q_heads": 16, "queries": 1, "sliding_window": 5},
    "sinks alone": {"sinks": True, "queries": 7, "own_start": [0, 7, 7], "prefix": 0},
    "bias": {"bias": (3, 4, 5, 13)},
    "bias broadcast": {"bias": (1, 4, 1, 13), "queries": 5},
    "bias prefill softcap": {"bias": (1, 1, 7, 13), "queries": 7, "softcap": 2.0},
    "bias decode": {"bias": (1, 4, 1, 13), "queries": 1},
    "packed": PACKED,
    "packed decode": {**PACKED, "queries": 1, "own_start": [0, 1, 2]},
    "packed same": {**PACKED, "prefix_index": [2, 2, 2]},
    "packed empty": {**PACKED, "prefix_index": [1, 1, -1]},
    "packed first": {"prefix": 9, "prefix_offsets": [2, 6, 9]},
    "packed window bias": {**PACKED, "sliding_window": 5, "bias": (3, 1, 1, 5 + 7)},
    "packed padded": {**PACKED, "queries": 7, "own_start": [0, 7, 3]},
    "index only": {"prefix_index": [0, -1, 0]},
    "no prefix": {"prefix": 0},
    "no own": {"own": 0, "causal": False},
    "no keys": {"own": 0, "prefix": 0, "causal": False},
    "no rows": {"batch": 0},
    "no queries": {"queries": 0},
    "odd 63": {"batch": 2, "queries": 63, "own": 63, "prefix": 129, "head_dim": 20},
    "odd 129": {"batch": 2, "queries": 1, "own": 129, "prefix": 63, "own_start": [0, 65]},
}
# Mask and layout variants of every code path of the backend, for the slower checks.
SOME = (
    "decode",
    "decode left padded",
    "prefill left padded",
    "static cache",
    "other value size",
    "softcap window",
    "sinks",
    "bias",
    "packed window bias",
    "nothing visible",
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def make(name: str, dtype: torch.dtype = torch.float32) -> AttentionInputs:
    return attention_inputs(dtype=dtype, **CASES[name])


def run(inputs: AttentionInputs, backend: str = "torch") -> tuple[torch.Tensor, torch.Tensor]:
    return ops.prefix_attention(*inputs.tensors, **inputs.options, return_lse=True, backend=backend)


def weights(out: torch.Tensor, lse: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream gradients, in out's and lse's dtypes, zero where a query is padding or saw nothing."""
    generator = seeded(1)
    grad_out = randn(out.shape, generator=generator, dtype=torch.float64) * real
    grad_lse = randn(lse.shape, generator=generator, dtype=torch.float64) * real[..., 0]
    return grad_out.to(out.dtype), grad_lse.masked_fill(torch.isneginf(lse), 0.0).to(lse.dtype)


def gradients(
    inputs: AttentionInputs, out: torch.Tensor, lse: torch.Tensor, real: torch.Tensor, use: tuple[int, ...] = (0, 1)
) -> tuple[torch.Tensor, ...]:
    upstream = weights(out, lse, real)
    results = [(out, lse)[i] for i in use]
    return torch.autograd.grad(
        results, inputs.gradient_inputs, [upstream[i] for i in use], materialize_grads=True, allow_unused=True
    )


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_contract(name: str) -> None:
    """The oracle against the formula, evaluated query by query over the keys the contract's sentences let it see."""
    inputs = make(name, torch.float64)
    out, lse = reference(*inputs.tensors, **inputs.options)
    o, seen = inputs.options, visible(inputs)
    batch, q_heads, queries, head_dim = inputs.query.shape
    columns = seen.shape[-1] - inputs.key.shape[2]
    offsets = [0, inputs.prefix_key.shape[1]] if o.get("prefix_offsets") is None else o["prefix_offsets"].tolist()
    index = [0] * batch if o.get("prefix_index") is None else o["prefix_index"].tolist()
    for b in range(batch):
        first = offsets[max(index[b], 0)]
        for h in range(q_heads):
            kv = h * inputs.key.shape[1] // q_heads
            for i in range(queries):
                total, weighted = 0.0, torch.zeros(inputs.value.shape[-1], dtype=torch.float64)
                for c in seen[b, i].nonzero().flatten().tolist():
                    own = c >= columns
                    k = inputs.key[b, kv, c - columns] if own else inputs.prefix_key[kv, first + c]
                    v = inputs.value[b, kv, c - columns] if own else inputs.prefix_value[kv, first + c]
                    score = (inputs.query[b, h, i] @ k).item() * o.get("scale", head_dim**-0.5)
                    if "softcap" in o:
                        score = o["softcap"] * math.tanh(score / o["softcap"])
                    if "bias" in o:
                        score += o["bias"].expand(batch, q_heads, queries, -1)[b, h, i, c].item()
                    total += math.exp(score)
                    weighted += math.exp(score) * v
                total += math.exp(o["sinks"][h].item()) if "sinks" in o else 0.0
                if total == 0.0:
                    assert torch.equal(out[b, h, i], weighted) and lse[b, h, i] == -math.inf
                else:
                    torch.testing.assert_close(out[b, h, i], weighted / total, rtol=1e-12, atol=1e-12)
                    assert math.isclose(lse[b, h, i].item(), math.log(total), rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("served", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, dtype: torch.dtype, served: tuple[str, str]) -> None:
    check_forward(make(name, dtype), served)


# What the CUDA kernels take.
CUDA_DTYPES = [torch.bfloat16, torch.float16]
CUDA_CASES = [name for name, case in CASES.items() if "bias" not in case]


@pytest.mark.parametrize("served", CUDA)
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("name", CUDA_CASES)
def test_forward_in_cuda(name: str, dtype: torch.dtype, served: tuple[str, str]) -> None:
    check_forward(make(name, dtype), served)


def check_forward(inputs: AttentionInputs, served: tuple[str, str]) -> None:
    dtype = inputs.query.dtype
    with poisoned_memory(), using(served) as backend:
        out, lse = run(inputs, backend)
    exact = inputs.to(torch.float64)
    oracle_out, oracle_lse = reference(*exact.tensors, **exact.options)
    base_out, base_lse = inputs.baseline()
    batch, q_heads, queries, _ = inputs.query.shape
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == (batch, q_heads, queries, inputs.value.shape[-1])
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    assert out.isfinite().all() and not lse.isnan().any()  # padding too
    real = inputs.real_queries()
    if not real.any():
        return
    assert_within_noise(*(x.masked_fill(~real, 0.0) for x in (out, oracle_out, base_out)), "out")
    real = real[..., 0]
    assert_within_noise(*(x.masked_fill(~real, 0.0) for x in (lse, oracle_lse, base_lse)), "lse")


Gradients = tuple[torch.Tensor, ...]


def three_gradients(
    inputs: AttentionInputs, backend: str, use: tuple[int, ...] = (0, 1)
) -> tuple[Gradients, Gradients, Gradients]:
    """Every gradient through the given results (out, lse): found, in float64, and as PyTorch's operators have it."""
    inputs.requires_grad_()
    exact = inputs.to(torch.float64).requires_grad_()
    plain = inputs.to(inputs.query.dtype).requires_grad_()
    real = inputs.real_queries()
    with poisoned_memory():
        found = gradients(inputs, *run(inputs, backend), real, use)
    want = reference(*exact.tensors, **exact.options)
    oracle = gradients(exact, *want, real, use)
    # Where a query sees nothing PyTorch's own softmax has NaN gradients: no baseline, so the floor alone is allowed.
    exactly = tuple(x.to(inputs.query.dtype) for x in oracle)
    baseline = exactly if torch.isneginf(want[1]).any() else gradients(plain, *plain.baseline(), real, use)
    return found, oracle, baseline


def check_gradients(inputs: AttentionInputs, backend: str, use: tuple[int, ...] = (0, 1)) -> Gradients:
    found, oracle, baseline = three_gradients(inputs, backend, use)
    names = ("query", "key", "value", "prefix_key", "prefix_value", "sinks")
    for what, x, y, z in zip(names, found, oracle, baseline, strict=False):
        if x.numel():
            assert_within_noise(x, y, z, f"gradient of {what}")
    return found


@pytest.mark.parametrize("served", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("no rows", "no queries", "no keys")])
def test_gradients(name: str, dtype: torch.dtype, served: tuple[str, str]) -> None:
    with using(served) as backend:
        check_gradients(make(name, dtype), backend)


@pytest.mark.parametrize("served", CUDA)
@pytest.mark.parametrize("name", ["plain", "decode left padded", "packed decode", "sinks decode window"])
def test_gradients_in_cuda(name: str, served: tuple[str, str]) -> None:
    """Triton's, of what the CUDA kernel has found."""
    check_gradients(make(name, torch.bfloat16), served[0])


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", ["no rows", "no queries", "no keys"])
def test_gradients_of_nothing(name: str, backend: str) -> None:
    inputs = make(name).requires_grad_()
    with poisoned_memory():
        found = gradients(inputs, *run(inputs, backend), inputs.real_queries())
    for x, y in zip(found, inputs.gradient_inputs, strict=True):
        assert x.shape == y.shape and not x.any()


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("use", [(0,), (1,)], ids=["out", "lse"])
@pytest.mark.parametrize("name", ["plain", "sinks decode window", "packed", "softcap"])
def test_gradients_of_one_result(name: str, use: tuple[int, ...], backend: str) -> None:
    check_gradients(make(name), backend, use)


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_the_reference(name: str) -> None:
    """Forward and every gradient, without noise to hide in; lse's gradient too, and out's alone (another kernel)."""
    inputs = make(name, torch.float64).requires_grad_()
    real = inputs.real_queries()
    (out, lse), (want_out, want_lse) = run(inputs), run(inputs, "reference")
    assert lse.dtype == torch.float64
    torch.testing.assert_close(out * real, want_out * real, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        lse.masked_fill(~real[..., 0], 0.0), want_lse.masked_fill(~real[..., 0], 0.0), rtol=1e-12, atol=1e-12
    )
    for x, y in zip(gradients(inputs, out, lse, real), gradients(inputs, want_out, want_lse, real), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    out, want = run(inputs)[0], run(inputs, "reference")[0]
    grad_out = weights(out, lse, real)[0]
    for x, y in zip(
        torch.autograd.grad(out, inputs.gradient_inputs, grad_out),
        torch.autograd.grad(want, inputs.gradient_inputs, grad_out),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_as_on_an_accelerator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path without CPU kernels that reads no value of an index tensor, run where it can be checked."""
    inputs = make(name, torch.float64).requires_grad_()
    real = inputs.real_queries()
    want = run(inputs, "reference")
    module = ops_module.BACKENDS["torch"]
    monkeypatch.setattr(module.Visibility, "reads_values", False)
    monkeypatch.setattr(module, "_flash_serves", lambda *args: False)
    out, lse = run(inputs)
    assert out.isfinite().all() and not lse.isnan().any()
    torch.testing.assert_close(out * real, want[0] * real, rtol=1e-12, atol=1e-12)
    hidden = ~real[..., 0]
    torch.testing.assert_close(lse.masked_fill(hidden, 0.0), want[1].masked_fill(hidden, 0.0), rtol=1e-12, atol=1e-12)
    for x, y in zip(gradients(inputs, out, lse, real), gradients(inputs, *want, real), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in SOME if n not in ("nothing visible", "prefill left padded")])
def test_gradcheck(name: str) -> None:
    small = {"batch": 3, "q_heads": 4, "kv_heads": 2, "head_dim": 4, **CASES[name]}
    small["v_dim"] = 2 if "v_dim" in small else 4
    inputs = attention_inputs(dtype=torch.float64, **small).requires_grad_()
    tensors = [x.detach().clone().requires_grad_() for x in inputs.gradient_inputs]
    real = inputs.real_queries()

    def call(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        options = {**inputs.options, **({"sinks": x[5]} if len(x) > 5 else {})}
        out, lse = ops.prefix_attention(*x[:5], **options, return_lse=True, backend="torch")
        return out * real, lse.masked_fill(~real[..., 0], 0.0)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", SOME)
def test_opcheck(name: str, backend: str) -> None:
    check_op(make(name), backend)


@pytest.mark.parametrize("served", CUDA)
@pytest.mark.parametrize("name", ["decode left padded", "packed decode"])
def test_opcheck_in_cuda(name: str, served: tuple[str, str]) -> None:
    check_op(make(name, torch.bfloat16), served[0])


def check_op(inputs: AttentionInputs, backend: str) -> None:
    inputs.requires_grad_()
    o = {"causal": True, **inputs.options}
    names = ("prefix_offsets", "prefix_index", "own_start", "own_end", "query_start")
    args = [*inputs.tensors, *(o.get(n) for n in names), 0.25]
    args += [o["causal"], o.get("sliding_window"), o.get("softcap"), o.get("sinks"), o.get("bias")]
    args += [None, None, None, 3, backend]
    torch.library.opcheck(torch.ops.softprompt_fast.prefix_attention.default, args)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", SOME)
def test_compiles_to_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    inputs = make(name).requires_grad_()
    real = inputs.real_queries()
    out, lse = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs, backend)
    want_out, want_lse = run(inputs, backend)
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)
    for x, y in zip(gradients(inputs, out, lse, real), gradients(inputs, want_out, want_lse, real), strict=True):
        assert torch.equal(x, y)


def test_automatic_choice_compiles() -> None:
    """Choosing a backend is traced too: a backend's node, or all of the reference where bias is trained."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.prefix_attention, fullgraph=True, backend="aot_eager")
    for name, trained in (("plain", False), ("bias", True)):
        inputs = make(name)
        if trained:
            inputs.options["bias"].requires_grad_()
        torch.testing.assert_close(
            compiled(*inputs.tensors, **inputs.options), ops.prefix_attention(*inputs.tensors, **inputs.options)
        )


@pytest.mark.parametrize("backend", NAMES)
def test_inductor(backend: str) -> None:
    torch._dynamo.reset()
    inputs = make("decode left padded")
    out, lse = torch.compile(run, fullgraph=True)(inputs, backend)
    want_out, want_lse = run(inputs, backend)
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("backend", NAMES)
def test_no_recompilation(backend: str) -> None:
    """As a decode loop sees it: own tokens grow, and the batch changes between requests."""
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)

    def call(batch: int, own: int) -> None:
        inputs = attention_inputs(batch=batch, queries=1, own=own, own_start=[0] * batch)
        for x in (*inputs.tensors[:3], inputs.options["own_start"]):
            torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(inputs, backend)[0], run(inputs, backend)[0])

    call(3, 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, own in ((3, 8), (3, 9), (3, 33), (5, 9), (2, 64)):
            call(batch, own)


@pytest.mark.parametrize("backend", [*NAMES, "reference"])
def test_a_hint_of_lengths_changes_nothing(backend: str) -> None:
    inputs = make("packed").requires_grad_()
    real = inputs.real_queries()
    want = run(inputs, backend)
    for hint in (0, 10**6):
        found = ops.prefix_attention(
            *inputs.tensors, **inputs.options, max_prefix_length=hint, return_lse=True, backend=backend
        )
        torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(list(gradients(inputs, *results, real)) for results in (found, want)))
    with pytest.raises(ValueError, match="max_prefix_length: expected None or >= 0, found -1"):
        ops.prefix_attention(*inputs.tensors, **inputs.options, max_prefix_length=-1)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)], ids=str)
def test_any_strides(order: tuple[int, ...]) -> None:
    inputs = attention_inputs(dtype=torch.float64)
    moved = [guarded(x.shape, torch.float64, order=order).copy_(x) for x in inputs.tensors[:3]]
    packed = [
        guarded(x.shape, torch.float64, order=[d - 1 for d in order if d > 0]).copy_(x) for x in inputs.tensors[3:]
    ]
    out = ops.prefix_attention(*moved, *packed, backend="torch")
    torch.testing.assert_close(out, run(inputs)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("queries", [1, 5])
def test_expanded_inputs(queries: int, dim: int) -> None:
    """Strides of zero: one row, head or position that stands for all; and so in the gradient that comes in."""
    inputs = attention_inputs(dtype=torch.float64, queries=queries)
    tensors = [x.narrow(dim, 0, 1).expand(x.shape) for x in inputs.tensors[:3]] + [*inputs.tensors[3:]]
    dense = [x.contiguous().requires_grad_() for x in tensors]
    out = ops.prefix_attention(*tensors, backend="torch")
    want = ops.prefix_attention(*dense, backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn(out.shape, dtype=torch.float64).narrow(dim, 0, 1).expand(out.shape)
    found = torch.autograd.grad(ops.prefix_attention(*dense, backend="torch"), dense, grad)
    for x, y in zip(found, torch.autograd.grad(want, dense, grad), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "decode left padded", "static cache", "packed", "sinks decode window"])
def test_rows_do_not_see_each_other(name: str) -> None:
    inputs = make(name, torch.float64)
    out, lse = run(inputs)
    for rows in ([2, 0, 1], [1], [0, 0, 2]):
        some_out, some_lse = run(rows_of(inputs, rows))
        torch.testing.assert_close(some_out, out[rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(some_lse, lse[rows], rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing() -> None:
    """A row alone without padding, and the same row left-padded, right-padded, and in a wider buffer of junk."""
    inputs = attention_inputs(batch=1, queries=5, own=5, dtype=torch.float64)
    want, want_lse = run(inputs)
    query, key, value, *prefix = inputs.tensors
    before, behind = (torch.randn(1, 2, 3, 16, dtype=torch.float64) * 50 for _ in range(2))
    wide_query = torch.cat([before.repeat(1, 2, 1, 1), query, behind.repeat(1, 2, 1, 1)], 2)
    wide_key, wide_value = (torch.cat([before, x, behind], 2) for x in (key, value))
    padding = {n: torch.tensor([v]) for n, v in (("own_start", 3), ("own_end", 8), ("query_start", 0))}
    for window in (None, 4, 9):
        want, want_lse = ops.prefix_attention(*inputs.tensors, sliding_window=window, return_lse=True)
        out, lse = ops.prefix_attention(
            wide_query, wide_key, wide_value, *prefix, **padding, sliding_window=window, return_lse=True
        )
        torch.testing.assert_close(out[:, :, 3:8], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[:, :, 3:8], want_lse, rtol=1e-12, atol=1e-12)


def moved(x: torch.Tensor, *order: int) -> torch.Tensor:
    """A copy whose dimensions lie in memory in another order: places of the last three, outermost first."""
    front = x.dim() - 3
    return guarded(x.shape, x.dtype, order=[*range(front), *(front + d for d in order)]).copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads inside": lambda x: moved(x, 1, 0, 2),
    "features outside": lambda x: moved(x, 0, 2, 1),
    "every other feature": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one head for all": lambda x: x.narrow(-3, 0, 1).expand(x.shape),
    "one entry for all": lambda x: x.narrow(-2, 0, 1).expand(x.shape),
    "one row for all": lambda x: x[:1].expand(x.shape) if x.dim() == 4 else x,
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (*(7, 6, 5)[4 - x.dim() :], 1)),
}


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "decode left padded", "packed window bias", "other value size", "odd 63"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_no_bit(name: str, layout: str, dtype: torch.dtype) -> None:
    """Results and gradients of views with any strides, zero and overlapping ones too, equal those of dense copies."""
    inputs = make(name, dtype)
    batch, q_heads, queries, _ = inputs.query.shape
    grad_out = LAYOUTS[layout](torch.randn(batch, q_heads, queries, inputs.value.shape[-1]).to(dtype))
    grad_lse = torch.randn(1, q_heads, 1).expand(batch, q_heads, queries)
    views = [LAYOUTS[layout](x).detach() for x in inputs.tensors]
    assert not all(x.is_contiguous() for x in views)
    results = []
    for tensors in (views, [x.contiguous() for x in views]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = ops.prefix_attention(*leaves, **inputs.options, return_lse=True, backend="cpu")
        grad = (grad_out, grad_lse) if tensors is views else (grad_out.contiguous(), grad_lse.contiguous())
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, grad)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@needs_extension
@pytest.mark.parametrize("name", ["plain", "decode left padded", "static cache", "packed", "sinks decode window"])
def test_other_rows_change_no_bit(name: str) -> None:
    """What one row gives and gets does not depend on what stands in its neighbours, nor in its own padding."""
    inputs = make(name)
    real = inputs.real_queries()
    first = torch.arange(len(real)).view(-1, 1, 1, 1) == 0
    seen = visible(inputs)[..., -inputs.key.shape[2] :].any(1)[:, None, :, None] & first
    used = (real & first, seen, seen, torch.tensor(True), torch.tensor(True))
    results = []
    for _ in range(2):
        leaves = [torch.where(kept, x, torch.randn_like(x)) for x, kept in zip(inputs.tensors, used, strict=True)]
        for x in leaves:
            x.requires_grad_()
        out, lse = ops.prefix_attention(*leaves, **inputs.options, return_lse=True, backend="cpu")
        upstream = weights(out, lse, real)
        grads = torch.autograd.grad((out, lse), leaves[:3], upstream)
        results.append([out[0] * real[0], lse[0].masked_fill(~real[0, ..., 0], 0.0), *(x[0] for x in grads)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


# Large enough for several threads: rows in chunks of several, rows cut into chunks, and neither.
SPREAD: dict[str, dict] = {
    "head a thread": {"batch": 2, "queries": 70, "own": 70, "prefix": 70, "head_dim": 32},
    "rows in chunks": {"batch": 5, "q_heads": 2, "kv_heads": 1, "queries": 33, "own": 40, "prefix": 130},
    "row cut": {"batch": 1, "q_heads": 4, "kv_heads": 1, "queries": 90, "own": 100, "prefix": 70, "head_dim": 20},
    "rows cut": {"batch": 2, "q_heads": 4, "kv_heads": 1, "queries": 70, "own": 70, "prefix": 70, "own_start": [0, 9]},
    "row cut window": {
        "batch": 1, "q_heads": 3, "kv_heads": 1, "queries": 130, "own": 150, "prefix": 70, "sliding_window": 90
    },
    "packed in chunks": {
        "batch": 6, "q_heads": 4, "kv_heads": 1, "queries": 30, "own": 30, "prefix": 140,
        "prefix_offsets": [3, 70, 70, 139], "prefix_index": [0, 2, -1, 0, 1, 0],
    },
}  # fmt: skip


@needs_extension
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("name", SPREAD)
def test_threads(name: str, count: int) -> None:
    """Right, and the same to the last bit at every call, for any number of threads."""
    inputs = attention_inputs(**SPREAD[name])
    with threads(count):
        first = check_gradients(inputs, "cpu")
        others = [gradients(inputs, *run(inputs, "cpu"), inputs.real_queries()) for _ in range(3)]
    for again in others:
        for x, y in zip(first, again, strict=True):
            assert torch.equal(x, y)


@needs_extension
@pytest.mark.parametrize("name", ["plain", "odd 63", "bias", "softcap window", "other value size", "sinks", *SPREAD])
def test_scratch_leaves_no_trace(name: str) -> None:
    """Memory kept from an earlier call, here full of NaN, is never read before it is written."""
    inputs = attention_inputs(**(CASES | SPREAD)[name]).requires_grad_()
    real = inputs.real_queries()
    spoiled = attention_inputs(q_heads=6, kv_heads=3, queries=130, own=150, prefix=150, head_dim=64)
    tensors = [torch.full_like(x, math.nan).requires_grad_() for x in spoiled.tensors]
    with threads(3):
        want = gradients(inputs, *run(inputs, "cpu"), real)
        for x in torch.autograd.grad(ops.prefix_attention(*tensors, backend="cpu").sum(), tensors):
            assert x.isnan().all()
        found = gradients(inputs, *run(inputs, "cpu"), real)
    for x, y in zip(found, want, strict=True):
        assert torch.equal(x, y)


@needs_extension
@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ((96, 3, 3, 544, 2), (48, 1)),  # 3 heads on 2 threads: two blocks a head
        ((96, 3, 3, 544, 1), (96, 1)),
        ((4, 4, 8, 4096, 16), (4, 8)),  # one row: its keys are split
        ((4096, 512, 8, 640, 2), (96, 1)),  # blocks end with their rows
        ((3, 3, 1, 64, 2), (3, 1)),  # too few keys to split
    ],
)
def test_forward_plan(shape: tuple[int, int, int, int, int], plan: tuple[int, int]) -> None:
    assert EXTENSION.plan_prefix_attention(*shape) == plan


@needs_extension
@settings(max_examples=300, deadline=None)
@given(st.integers(1, 64), st.integers(1, 2000), st.integers(1, 40), st.integers(0, 9000), st.integers(1, 64))
def test_forward_plan_is_sound(rows: int, per_row: int, kv_heads: int, keys: int, threads: int) -> None:
    block, splits = EXTENSION.plan_prefix_attention(rows * per_row, per_row, kv_heads, keys, threads)
    assert block >= 1 and (per_row > 96 or block % per_row == 0)
    assert block <= 96 + per_row if per_row <= 96 else block <= 96
    assert 1 <= splits <= max(1, keys // 128)
    assert threads > 1 or splits == 1


@needs_extension
@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ((8, 512, 8, 2), (96, 8, 0)),  # an even load as it is
        ((8, 512, 3, 2), (96, 4, 0)),  # 3 heads on 2 threads: 6 chunks
        ((1, 512, 1, 2), (96, 1, 3)),  # one row: cut between its 6 blocks
        ((1, 512, 1, 16), (96, 1, 1)),
        ((16, 96, 3, 2), (96, 8, 0)),
        ((1, 4, 8, 64), (96, 1, 0)),  # one block a head
        ((32, 3, 8, 1), (96, 32, 0)),
        ((2, 97, 1, 1), (64, 2, 0)),
    ],
)
def test_backward_plan(shape: tuple[int, int, int, int], plan: tuple[int, int, int]) -> None:
    assert EXTENSION.plan_prefix_attention_backward(*shape) == plan


@needs_extension
@settings(max_examples=300, deadline=None)
@given(st.integers(1, 64), st.integers(1, 2000), st.integers(1, 40), st.integers(1, 64))
def test_backward_plan_is_sound(batch: int, per_row: int, kv_heads: int, threads: int) -> None:
    block, rows, blocks = EXTENSION.plan_prefix_attention_backward(batch, per_row, kv_heads, threads)
    assert 0 < block <= 96 and (per_row > block or block % per_row == 0)
    assert 1 <= rows <= batch and (blocks == 0 or rows == 1)
    chunks = -(-batch // rows) * (1 if blocks == 0 else -(-per_row // (block * blocks)))
    assert kv_heads * chunks <= max(kv_heads, 2 * threads + kv_heads - 1)  # each costs a partial as long as the prefix
    busiest = -(-kv_heads * chunks // threads) * (rows * per_row if blocks == 0 else blocks * block)
    assert busiest <= -(-kv_heads // threads) * batch * per_row


def test_prefix_gradient_sums_over_rows() -> None:
    inputs = attention_inputs(batch=4, dtype=torch.float64).requires_grad_()
    whole = torch.autograd.grad(run(inputs)[0].square().sum(), inputs.tensors[3:])
    for which, total in enumerate(whole):
        rows = [
            torch.autograd.grad(run(rows_of(inputs, [b]))[0].square().sum(), inputs.tensors[3 + which])[0]
            for b in range(4)
        ]
        torch.testing.assert_close(total, sum(rows), rtol=1e-10, atol=1e-10)


def test_unused_lse_and_frozen_inputs() -> None:
    """Only some inputs require a gradient, and only out (or only lse) is used."""
    inputs = make("plain", torch.float64)
    inputs.prefix_key.requires_grad_()
    for pick in (0, 1):
        found = torch.autograd.grad(run(inputs)[pick].sum(), inputs.prefix_key)[0]
        want = torch.autograd.grad(run(inputs, "reference")[pick].sum(), inputs.prefix_key)[0]
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", NAMES)
def test_autocast_does_not_round_inside(backend: str) -> None:
    inputs = make("softcap")
    want = run(inputs, backend)[0]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(run(inputs, backend)[0], want)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("queries", [1, 5, 30])
def test_bias_may_hide_everything(queries: int, backend: str) -> None:
    """One query's bias is -inf all along: it sees nothing, gives zeros, gets no gradient, disturbs no other."""
    inputs = attention_inputs(queries=queries, own=30, bias=(3, 4, queries, 36)).requires_grad_()
    inputs.options["bias"][1, :, -1] = -math.inf
    out, lse = run(inputs, backend)
    assert not out[1, :, -1].any() and torch.isneginf(lse[1, :, -1]).all()
    found = check_gradients(inputs, backend)
    assert not found[0][1, :, -1].any()


@pytest.mark.parametrize("backend", NAMES)
def test_bias_gradient_is_refused(backend: str) -> None:
    inputs = make("bias")
    inputs.options["bias"].requires_grad_()
    with pytest.raises(BackendError, match="gives no gradient for bias"):
        run(inputs, backend)
    with torch.no_grad():
        run(inputs, backend)


def test_bias_gradient_goes_to_the_reference(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_registry, "_told", set())
    inputs = make("bias", torch.float64)
    bias = inputs.options["bias"].requires_grad_()
    for _ in range(2):
        out = ops.prefix_attention(*inputs.tensors, **inputs.options)
    assert sum("no gradient for bias" in r.message for r in caplog.records) == 1
    grad = torch.autograd.grad(out.sum(), bias)[0]
    want = torch.autograd.grad(reference(*inputs.tensors, **inputs.options)[0].sum(), bias)[0]
    assert torch.equal(grad, want)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs)[0], out)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(0, 5),
    extra=st.integers(0, 5),
    head_dim=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 12),
    data=st.data(),
)
def test_any_shape(batch, kv_heads, groups, queries, extra, head_dim, lengths, window, data) -> None:
    own = queries + extra
    starts = [data.draw(st.integers(0, own)) for _ in range(batch)]
    inputs = attention_inputs(
        batch=batch,
        q_heads=kv_heads * groups,
        kv_heads=kv_heads,
        queries=queries,
        own=own,
        head_dim=head_dim,
        prefix=sum(lengths),
        dtype=torch.float64,
        own_start=starts,
        own_end=[data.draw(st.integers(s, own)) for s in starts],
        query_start=[data.draw(st.integers(0, own - queries)) for _ in range(batch)],
        prefix_offsets=[sum(lengths[:n]) for n in range(len(lengths) + 1)],
        prefix_index=[data.draw(st.integers(-1, len(lengths) - 1)) for _ in range(batch)],
        sliding_window=window,
    )
    out, lse = run(inputs)
    want_out, want_lse = run(inputs, "reference")
    real = inputs.real_queries()
    assert out.isfinite().all() and not lse.isnan().any()
    torch.testing.assert_close(out * real, want_out * real, rtol=1e-10, atol=1e-10)
    real = real[..., 0]
    torch.testing.assert_close(lse.masked_fill(~real, 0.0), want_lse.masked_fill(~real, 0.0), rtol=1e-10, atol=1e-10)


@needs_extension
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 5),
    queries=st.integers(1, 40),
    extra=st.integers(0, 70),
    head_dim=st.integers(1, 40),
    v_dim=st.integers(1, 40),
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {}, optional={"sliding_window": st.integers(1, 150), "softcap": st.floats(0.5, 3), "sinks": st.just(True)}
    ),
    count=st.integers(1, 4),
    data=st.data(),
)
def test_any_gradient(batch, kv_heads, groups, queries, extra, head_dim, v_dim, lengths, options, count, data) -> None:
    own = queries + extra
    starts = [data.draw(st.integers(0, own)) for _ in range(batch)]
    inputs = attention_inputs(
        batch=batch,
        q_heads=kv_heads * groups,
        kv_heads=kv_heads,
        queries=queries,
        own=own,
        head_dim=head_dim,
        v_dim=v_dim,
        prefix=sum(lengths),
        own_start=starts,
        own_end=[data.draw(st.integers(s, own)) for s in starts],
        query_start=[data.draw(st.integers(0, own - queries)) for _ in range(batch)],
        prefix_offsets=[sum(lengths[:n]) for n in range(len(lengths) + 1)],
        prefix_index=[data.draw(st.integers(-1, len(lengths) - 1)) for _ in range(batch)],
        **options,
    )
    with threads(count):
        found, oracle, baseline = three_gradients(inputs, "cpu")
    # As one vector: of a tensor with one element or two there is no mean. Scaled alike, and by powers of two, exactly.
    scales = [2.0 ** -math.frexp(x.abs().max().item())[1] if x.numel() else 1.0 for x in oracle]
    assert_within_noise(
        *(torch.cat([x.flatten() * f for x, f in zip(xs, scales, strict=True)]) for xs in (found, oracle, baseline))
    )


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 4, 5)}, r"query: expected floating \[B, Hq, S, D\].*found float32 \[3, 4, 5\]"),
        ({"query": torch.zeros(3, 3, 5, 16)}, "query: expected a multiple of value's 2 heads, found 3 heads"),
        ({"query": torch.zeros(3, 4, 5, 8)}, r"key: expected float32 \[3, 2, 7, 8\] .*found float32 \[3, 2, 7, 16\]"),
        ({"key": torch.zeros(3, 2, 6, 16)}, r"key: expected float32 \[3, 2, 7, 16\] .*found float32 \[3, 2, 6, 16\]"),
        ({"value": torch.zeros(3, 2, 7)}, r"value: expected \[B, Hkv, T, Dv\]"),
        ({"value": torch.zeros(3, 2, 7, 16, dtype=torch.bfloat16)}, "value: expected float32 .* found bfloat16"),
        ({"prefix_key": torch.zeros(1, 6, 16)}, r"prefix_key: expected float32 \[2, 6, 16\]"),
        ({"prefix_key": torch.zeros(6, 16)}, r"prefix_key: expected float32 \[2, L, 16\]"),
        ({"prefix_value": torch.zeros(2, 5, 16)}, r"prefix_value: expected float32 \[2, 6, 16\]"),
        ({"prefix_index": int32(0, 0)}, r"prefix_index: expected int32 or int64 \[3\] on cpu, found int32 \[2\]"),
        ({"prefix_index": torch.zeros(3)}, r"prefix_index: expected int32 or int64 \[3\]"),
        ({"prefix_index": int32(0, 1, 0)}, r"prefix_index: expected values within -1..0, found \[0, 1, 0\]"),
        ({"prefix_index": int32(0, -2, 0)}, r"prefix_index: expected values within -1..0"),
        ({"prefix_offsets": int32(0)}, r"prefix_offsets: expected int32 or int64 \[N \+ 1\]"),
        ({"prefix_offsets": int32(0, 7)}, r"prefix_offsets: expected rising values within 0..6, found \[0, 7\]"),
        ({"prefix_offsets": int32(3, 1)}, "prefix_offsets: expected rising values within 0..6"),
        ({"own_start": int32(0, 8, 0)}, r"own_start: expected values within 0..7, found \[0, 8, 0\]"),
        ({"own_end": int32(0, -1, 0)}, "own_end: expected values within 0..7"),
        ({"query_start": int32(0)}, r"query_start: expected int32 or int64 \[3\]"),
        ({"sliding_window": 0}, "sliding_window: expected None, or > 0"),
        ({"sliding_window": 3, "causal": False}, "sliding_window: .*causal=False"),
        ({"softcap": 0.0}, "softcap: expected None or > 0, found 0.0"),
        ({"sinks": torch.zeros(2)}, r"sinks: expected \[4\] on cpu, found float32 \[2\]"),
        ({"bias": torch.zeros(1, 1, 5, 7)}, r"bias: expected floating \[3 or 1, 4 or 1, 5 or 1, 13\] on cpu"),
        ({"bias": torch.zeros(2, 1, 5, 13)}, "bias: expected floating"),
        ({"bias": torch.zeros(1, 1, 1, 10), "prefix_offsets": int32(0, 2, 6)}, r"bias: expected at least 4 \+ 7"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of .*, found 'fast'"),
    ],
)  # fmt: skip
@cpu_only
@pytest.mark.parametrize("backend", [*NAMES, "reference"])
def test_bad_input(change: dict, message: str, backend: str) -> None:
    inputs = attention_inputs()
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    call = {**dict(zip(names, inputs.tensors, strict=True)), "backend": backend, **change}
    tensors = [call.pop(n) for n in names]
    with pytest.raises(ValueError, match=message):
        ops.prefix_attention(*tensors, **call)
