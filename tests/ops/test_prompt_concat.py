# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise, product
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.backends import native_ops
from softprompt_fast.backends._registry import BackendError
from softprompt_fast.backends.native import load, load_cuda
from softprompt_fast.reference.prompt_concat import prompt_concat as reference
from softprompt_fast.testing import assert_within_noise, guarded, poisoned_memory
from tests.device import ON_GPU, cpu_only
from tests.isas import BACKENDS, CPU, CUDA, EVERY, TRITON, using

# ``ops.prompt_concat`` is the function; this is its module.
ops_module = sys.modules["softprompt_fast.ops.prompt_concat"]

VOCABULARY, WIDTH = 11, 6
IDS, TABLE, PROMPT = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(VOCABULARY, WIDTH), torch.zeros(5, WIDTH)
EMBEDS = torch.zeros(3, 9, WIDTH)
ROWS = ("prompt_offsets", "prompt_index", "own_start")
PACKED = {"prompt_offsets": [0, 2, 2, 5], "prompt_index": [2, -1, 0]}
CASES: dict[str, dict] = {
    "plain": {},
    "scaled": {"scale": 2.5, "prompt_scale": 0.5},
    "left padded": {"own_start": [0, 2, 4]},
    "left padded, right side": {"own_start": [0, 1, 3], "padding_side": "right"},
    "packed left": {**PACKED, "own_start": [0, 2, 3]},
    "packed right": {**PACKED, "padding_side": "right"},
    "packed scaled": {**PACKED, "scale": 2.5, "prompt_scale": 0.5, "prompt_length": 4},
    "packed no prompt": {"prompt_offsets": [0, 5], "prompt_index": [-1, -1, -1]},
    "wide prompt slots": {"prompt_length": 9, "own_start": [0, 0, 1]},
    "no prompt": {"prompt": 0},
    "no tokens": {"tokens": 0},
    "no rows": {"batch": 0},
    "empty": {"batch": 0, "tokens": 0, "prompt": 0},
    "one": {"batch": 1, "tokens": 1, "prompt": 1},
    "odd": {"batch": 2, "tokens": 63, "prompt": 129, "own_start": [0, 17]},
}


@pytest.fixture(params=[*BACKENDS, *CUDA])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as name:
        yield name


@pytest.fixture(params=CPU)
def cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as name:
        yield name


@pytest.fixture(params=[*CPU, *CUDA])
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those whose op is C++."""
    with using(request.param) as name:
        yield name


@pytest.fixture(params=[*CPU, *TRITON, *CUDA])
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param) as name:
        yield name


def make(
    name: str, dtype: torch.dtype = torch.float32, ids: bool = True, batch: int = 3, tokens: int = 4, prompt: int = 5
) -> tuple[list[Tensor | None], dict]:
    """``[tokens, table, prompt]`` and the keyword arguments."""
    options = dict(CASES[name])
    batch, tokens, prompt = (options.pop(k, v) for k, v in (("batch", batch), ("tokens", tokens), ("prompt", prompt)))
    for key, value in options.items():
        if isinstance(value, list):
            options[key] = torch.tensor(value, dtype=torch.int32)
    table = guarded((VOCABULARY, WIDTH), dtype) if ids else None
    own = torch.randint(0, VOCABULARY, (batch, tokens)) if ids else guarded((batch, tokens, WIDTH), dtype)
    return [own, table, guarded((prompt, WIDTH), dtype)], options


def run(inputs: list[Tensor | None], options: dict, backend: str = "torch") -> Tensor:
    return ops.prompt_concat(*inputs, **options, backend=backend)


def trained(inputs: list[Tensor | None]) -> list[Tensor]:
    """The differentiable inputs, marked so."""
    return [x.requires_grad_() for x in (inputs[2], inputs[0]) if x is not None and x.is_floating_point()]


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("name", CASES)
def test_layout(name: str, ids: bool) -> None:
    """The reference against the contract, slot by slot; and prompt_layout against both."""
    inputs, options = make(name, torch.float64, ids)
    tokens, table, prompt = inputs
    out = run(inputs, options, "reference")
    batch, own = tokens.shape[:2]
    offsets = options["prompt_offsets"].tolist() if "prompt_offsets" in options else [0, len(prompt)]
    index = options["prompt_index"].tolist() if "prompt_index" in options else [0] * batch
    starts = options["own_start"].tolist() if "own_start" in options else [0] * batch
    slots = options.get("prompt_length", max(b - a for a, b in pairwise(offsets)))
    assert out.shape == (batch, slots + own, WIDTH)
    layout = {k: v for k, v in options.items() if k not in ("scale", "prompt_scale")}
    mask, positions = ops.prompt_layout(tokens, prompt, **layout)
    assert mask.shape == positions.shape == out.shape[:2]
    for b in range(batch):
        virtual = list(range(offsets[index[b]], offsets[index[b] + 1])) if index[b] >= 0 else []
        row = [prompt[v] * options.get("prompt_scale", 1.0) for v in virtual]
        for t in range(starts[b], own):
            row.append((tokens[b, t] if table is None else table[tokens[b, t]]) * options.get("scale", 1.0))
        lead = starts[b]
        if options.get("padding_side", "left") == "left":
            lead += slots - len(virtual)
        for t in range(slots + own):
            inside = lead <= t < lead + len(row)
            assert torch.equal(out[b, t], row[t - lead] if inside else torch.zeros(WIDTH, dtype=torch.float64))
            assert mask[b, t] == inside
            if inside:
                assert positions[b, t] == t - lead
            assert positions[b, t] >= 0


def test_layout_with_right_padding() -> None:
    tokens, prompt = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 6)
    mask, positions = ops.prompt_layout(tokens, prompt, own_end=torch.tensor([4, 1]), padding_side="right")
    assert mask.tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert positions.tolist() == [list(range(7))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str, ids: bool, dtype: torch.dtype, backend: str) -> None:
    inputs, options = make(name, dtype, ids)
    exact = [x.detach().double() if x is not None and x.is_floating_point() else x for x in inputs]
    plain = [x.detach().clone() if x is not None and x.is_floating_point() else x for x in inputs]
    of, of_exact, of_plain = trained(inputs), trained(exact), trained(plain)
    with poisoned_memory():
        out = run(inputs, options, backend)
        weights = torch.randn(out.shape, dtype=torch.float64).to(dtype)
        found = torch.autograd.grad(out, of, weights)
    want, base = run(exact, options, "reference"), run(plain, options, "reference")
    assert out.dtype == dtype and out.is_contiguous()
    results = [("out", out, want, base)]
    oracle = torch.autograd.grad(want, of_exact, weights.double(), materialize_grads=True)
    grads = oracle, torch.autograd.grad(base, of_plain, weights, materialize_grads=True)
    results += [("gradient", x, y, z) for x, y, z in zip(found, *grads, strict=True)]
    for what, x, y, z in results:
        if x.numel():
            assert_within_noise(x, y, z, what)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("name", ["plain", "scaled", "packed left", "packed right", "left padded, right side"])
def test_gradcheck(name: str, ids: bool) -> None:
    inputs, options = make(name, torch.float64, ids)
    of = [x.detach().clone().requires_grad_() for x in trained(inputs)]

    def call(prompt: Tensor, own: Tensor | None = None) -> Tensor:
        return run([inputs[0] if own is None else own, inputs[1], prompt], options)

    assert torch.autograd.gradcheck(call, of)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("name", ["plain", "packed left", "no prompt", "no rows"])
def test_opcheck(name: str, ids: bool, backend: str) -> None:
    inputs, options = make(name, ids=ids)
    trained(inputs)
    given = [options.get(k) for k in ("prompt_offsets", "prompt_index", "own_start")]
    slots = 3 if name == "packed left" else len(inputs[2])
    args = (*inputs, *given, slots, 2.0, 0.5, torch.float32, True, backend)
    torch.library.opcheck(torch.ops.softprompt_fast.prompt_concat.default, args)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
def test_compiles_to_one_graph_and_once(ids: bool, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)

    def call(batch: int, tokens: int) -> None:
        inputs, _ = make("plain", ids=ids, batch=batch, tokens=tokens)
        # Dense: of a view, dynamo also guards on the relation to its base.
        inputs = [None if x is None else x.contiguous() for x in inputs]
        of, options = trained(inputs), {"scale": 2.0, "own_start": torch.ones(batch, dtype=torch.int32)}
        out, want = compiled(inputs, options, backend), run(inputs, options, backend)
        assert torch.equal(out, want)
        weights = torch.randn_like(out)
        for x, y in zip(torch.autograd.grad(out, of, weights), torch.autograd.grad(want, of, weights), strict=True):
            assert torch.equal(x, y)

    call(3, 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        call(3, 9)
        call(5, 4)


@pytest.mark.parametrize("served", [*BACKENDS, *CUDA])
@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(0, 4),
    own=st.integers(0, 5),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    ids=st.booleans(),
    data=st.data(),
)
def test_any_shape(
    served: tuple[str, str], batch: int, own: int, lengths: list[int], side: str, ids: bool, data: st.DataObject
) -> None:
    table = torch.randn(VOCABULARY, WIDTH) if ids else None
    tokens = torch.randint(0, VOCABULARY, (batch, own)) if ids else torch.randn(batch, own, WIDTH)
    inputs = [tokens, table, torch.randn(sum(lengths), WIDTH)]
    options = {
        "prompt_offsets": torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)]),
        "prompt_index": torch.tensor([data.draw(st.integers(-1, len(lengths) - 1)) for _ in range(batch)]).long(),
        "own_start": torch.tensor([data.draw(st.integers(0, own)) for _ in range(batch)]).long(),
        "padding_side": side,
    }
    of = trained(inputs)
    with using(served) as backend:
        out, want = run(inputs, options, backend), run(inputs, options, "reference")
        assert torch.equal(out, want)
        weights = torch.randn_like(out)
        grads = [torch.autograd.grad(o, of, weights, materialize_grads=True) for o in (out, want)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_a_prompt_a_row() -> None:
    """[B, P, H], as a multitask prompt gives it."""
    prompts, tokens, table = (
        torch.randn(3, 2, WIDTH),
        torch.randint(0, VOCABULARY, (3, 4)),
        torch.randn(VOCABULARY, WIDTH),
    )
    out = ops.prompt_concat(
        tokens, table, prompts.flatten(0, 1), prompt_offsets=torch.arange(4) * 2, prompt_index=torch.arange(3)
    )
    assert torch.equal(out, torch.cat([prompts, table[tokens]], 1))


def test_result_dtype(backend: str) -> None:
    """A float32 prompt before a bfloat16 model."""
    table, prompt = torch.randn(VOCABULARY, WIDTH).bfloat16(), torch.randn(2, WIDTH).requires_grad_()
    tokens = torch.randint(0, VOCABULARY, (3, 4))
    out = ops.prompt_concat(tokens, table, prompt, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.cat([prompt.bfloat16().expand(3, -1, -1), table[tokens]], 1))
    assert torch.autograd.grad(out.sum(), prompt)[0].dtype == torch.float32


def test_float64_is_for_pytorch() -> None:
    inputs, _ = make("plain")
    # With "auto": the C++ kernels, where there are any, refuse.
    assert ops.prompt_concat(*inputs, out_dtype=torch.float64).dtype == torch.float64


def test_what_the_kernels_refuse(compiled: str) -> None:
    inputs, _ = make("plain")
    with pytest.raises(BackendError, match="it gives float32, bfloat16 and float16, found float64"):
        ops.prompt_concat(*inputs, out_dtype=torch.float64, backend=compiled)
    with pytest.raises(BackendError, match="it takes float32, bfloat16 and float16, found float64"):
        ops.prompt_concat(inputs[0], inputs[1], inputs[2].double(), backend=compiled)
    with pytest.raises(BackendError, match="it gives no gradient for table"):
        ops.prompt_concat(inputs[0], inputs[1].requires_grad_(), inputs[2], backend=compiled)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("width", [1, 3, 16, 50])
@pytest.mark.parametrize("scale", [None, 1.7])
def test_every_mix_of_dtypes(scale: float | None, width: int, compiled: str) -> None:
    """Bit for bit what PyTorch's conversions and products in float32 give."""
    options = {"own_start": torch.tensor([0, 2]), "scale": scale, "prompt_scale": scale}
    for source, trained, target in product(DTYPES, repeat=3):
        inputs = [torch.randint(0, 7, (2, 5)), guarded((7, width), source), guarded((4, width), trained)]
        out, want = (ops.prompt_concat(*inputs, **options, out_dtype=target, backend=b) for b in (compiled, "torch"))
        assert torch.equal(out, want), (source, trained, target)


def spread(x: Tensor | None, step: int) -> Tensor | None:
    """The same numbers `step` apart in memory, between them NaN or ids that no vocabulary has."""
    if x is None:
        return None
    between = float("nan") if x.is_floating_point() else 1 << 40
    wide = torch.full((*x.shape[:-1], x.shape[-1] * step), between, dtype=x.dtype)
    wide[..., ::step] = x
    return wide[..., ::step]


def swapped(x: Tensor | None, a: int, b: int) -> Tensor | None:
    """The same numbers with two dimensions swapped in memory."""
    return None if x is None else x.transpose(a, b).contiguous().transpose(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("name", ["plain", "packed left", "packed right", "left padded, right side"])
def test_strides(name: str, ids: bool, dtype: torch.dtype, compiled: str) -> None:
    """Columns apart, transposed and broadcast inputs and gradients give the bits of dense ones."""
    inputs, options = make(name, dtype, ids)
    tokens, table, prompt = (None if x is None else x.contiguous() for x in inputs)
    variants = [
        (spread(tokens, 2), spread(table, 3), prompt),
        (tokens, swapped(table, 0, 1), swapped(prompt, 0, 1)),
        (swapped(tokens, 0, 1), table, spread(prompt, 2)),
    ]
    dense = [tokens, table, prompt]
    of = trained(dense)
    want = run(dense, options, compiled)
    weights = torch.randn(want.shape, dtype=torch.float64).to(dtype)
    apart = spread(weights, 2), swapped(weights, 0, 2), weights
    for variant, other in zip(variants, apart, strict=True):
        given = [None if x is None else x.detach() for x in variant]
        of_given = trained(given)
        out = run(given, options, compiled)
        assert torch.equal(out, want)
        found = torch.autograd.grad(out, of_given, other)
        wanted = torch.autograd.grad(want, of, weights, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    # One number for all, as sum() sends it back; and one token for all.
    one = torch.ones((), dtype=dtype)
    broadcast = torch.autograd.grad(want, of, one.expand_as(want), retain_graph=True)
    wanted = torch.autograd.grad(want, of, torch.ones_like(want))
    assert all(torch.equal(x, y) for x, y in zip(broadcast, wanted, strict=True))
    same = tokens[:1, :1].detach().expand_as(tokens)
    assert torch.equal(*(run([x, table, prompt], options, compiled) for x in (same, same.contiguous())))


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
def test_nothing_beside_the_views_is_read(ids: bool, compiled: str) -> None:
    """`guarded` puts NaN around the rows; here it stands behind the last column too."""
    width = 21
    table = guarded((7, width + 2), torch.float32)
    table[:, width:] = float("nan")
    prompt = guarded((4, width + 2), torch.float32)
    prompt[:, width:] = float("nan")
    tokens = torch.randint(0, 7, (2, 5)) if ids else table[torch.randint(0, 7, (2, 5))]
    inputs = [tokens if ids else tokens[..., :width], table[:, :width] if ids else None, prompt[:, :width]]
    out = run(inputs, {"scale": 2.0, "out_dtype": torch.bfloat16}, compiled)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("lengths", "width"), [([0, 37, 1, 90, 5], 700), ([1, 0, 2, 0, 0], 700), ([1, 0, 2, 0, 0], 2300)], ids=str
)
def test_threads_change_nothing(lengths: list[int], width: int, cpu: str) -> None:
    """Many tasks, ragged prompts that many rows share: the same bits from any number of threads, every time."""
    generator = torch.Generator().manual_seed(3)
    rows = 41
    inputs = [
        torch.randint(0, VOCABULARY, (rows, 30), generator=generator),
        torch.randn(VOCABULARY, width, generator=generator),
        torch.randn(sum(lengths) + 2, width, generator=generator).requires_grad_(),
    ]
    options = {
        "prompt_offsets": torch.tensor(lengths).cumsum(0) + 1,
        "prompt_index": torch.randint(-1, 4, (rows,), generator=generator),
        "own_start": torch.randint(0, 31, (rows,), generator=generator),
    }
    embeds = [torch.randn(rows, 30, width, generator=generator).requires_grad_(), None, inputs[2]]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            for given in (inputs, embeds):
                with poisoned_memory():
                    out = run(given, options, cpu)
                    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
                    grads = torch.autograd.grad(out, [x for x in given if x is not None and x.requires_grad], weights)
                results.append((out.detach(), *grads))
    finally:
        torch.set_num_threads(before)
    for i, found in enumerate(results):
        assert all(torch.equal(x, y) for x, y in zip(found, results[i % 2], strict=True))
    plain = run(inputs, options, "torch")
    assert torch.equal(results[0][0], plain)
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(4))
    exact = inputs[2].detach().double().requires_grad_()
    of_exact = run([inputs[0], inputs[1].double(), exact], options, "torch")
    oracle = torch.autograd.grad(of_exact, exact, weights.double())[0]
    baseline = torch.autograd.grad(plain, inputs[2], weights)[0]
    assert_within_noise(results[0][1], oracle, baseline, "gradient")


def test_many_rows_in_16_bits_sum_in_32(backend: str) -> None:
    """1000 gradients of 1: bfloat16 sums would stick at 256."""
    tokens, table = torch.zeros(1000, 1, dtype=torch.int64), torch.zeros(1, 4).bfloat16()
    for options in ({}, {"own_start": torch.zeros(1000, dtype=torch.int32)}):
        prompt = torch.zeros(2, 4).bfloat16().requires_grad_()
        ops.prompt_concat(tokens, table, prompt, backend=backend, **options).sum().backward()
        assert prompt.grad.eq(1000).all()


@cpu_only  # on a GPU: an assertion in the kernel, after which the process can do no more
@pytest.mark.parametrize("backend", EVERY, indirect=True)
@pytest.mark.parametrize("bad", [VOCABULARY, -1, 2**40])
def test_ids_out_of_range(bad: int, backend: str) -> None:
    inputs, _ = make("plain")
    inputs[0][1, 2] = bad
    message = f"tokens: id {bad} in row 1, column 2 is outside the vocabulary of {VOCABULARY} tokens"
    with pytest.raises(IndexError, match=message):
        run(inputs, {}, backend)
    # What is padding is not read, so it may hold anything.
    out = run(inputs, {"own_start": torch.tensor([0, 3, 0])}, backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_itself_reports_the_first_wrong_id(threads: int, cpu: str) -> None:
    """Without the op's own check: nothing outside the table is read, and of many places the first is named."""
    tokens, width = torch.randint(0, VOCABULARY, (60, 20)), 130
    wild = [(7, 3, -1), (7, 4, VOCABULARY), (20, 0, 2**62), (59, 19, -(2**63))]
    for row, column, bad in wild:
        tokens[row, column] = bad
    table, prompt = guarded((VOCABULARY, width)), guarded((5, width))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module = ops_module.BACKENDS[cpu]
        for start in (0, 4):
            own_start = torch.full((60,), start)
            row, column, bad = next(place for place in wild if place[1] >= start)
            with pytest.raises(IndexError, match=rf"id {bad} in row {row}, column {column} is outside the vocabulary"):
                module.forward(tokens, table, prompt, None, None, own_start, 5, 1.0, 1.0, torch.float32, True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("name", CASES)
def test_the_op_in_cpp_alone_gives_the_same(name: str, ids: bool, native: str) -> None:
    """As it is called first where no gradient is wanted, and as the op calls it with memory for the result."""
    inputs, options = make(name, ids=ids)
    with poisoned_memory():
        want = run(inputs, options, native)
    assert torch.equal(run(inputs, options, native), want)
    rows = [options.get(k) for k in ("prompt_offsets", "prompt_index", "own_start", "prompt_length")]
    rest = (options.get("scale"), options.get("prompt_scale"), options.get("padding_side", "left") == "left", None)
    found = ops_module.BACKENDS[native].NATIVE(*inputs, *rows, *rest)
    if ON_GPU and rows[0] is not None and rows[3] is None:  # a length that only the device knows
        assert found is None
    else:
        assert found.is_contiguous() and torch.equal(found, want)


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "embeds"])
def test_opcheck_of_the_ops_in_cpp(ids: bool, native: str) -> None:
    inputs, options = make("packed left", ids=ids)
    args = [*inputs, *(options[k] for k in ("prompt_offsets", "prompt_index", "own_start")), 3, None, 0.5, True]
    module, checks = ops_module.BACKENDS[native], ("test_schema", "test_faketensor")  # they have no gradient
    for dtype in (None, torch.bfloat16):
        assert module.NATIVE(*args, dtype) is not None
        torch.library.opcheck(module.NATIVE, (*args, dtype), test_utils=checks)
    torch.library.opcheck(module._OUT, args, {"out": torch.empty(3, 7, WIDTH)}, test_utils=checks)
    grad_tokens = None if ids else torch.empty(3, 4, WIDTH)
    args[1] = None
    args = [torch.randn(3, 7, WIDTH), *args, torch.empty(5, WIDTH), grad_tokens]
    torch.library.opcheck(module._BACKWARD, args, test_utils=checks)


@cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens: expected int64 \[B, S\] or floating \[B, S, H\]"),
        ({"tokens": torch.zeros(3, 4, dtype=torch.int32)}, r"tokens: expected int64 .*, found int32 \[3, 4\] on cpu"),
        ({"prompt": torch.zeros(1, 5, 6)}, r"prompt: expected \[L, H\] .*, found float32 \[1, 5, 6\]"),
        ({"prompt_offsets": torch.tensor([0])}, r"prompt_offsets: expected \[N \+ 1\], found int64 \[1\]"),
        ({"prompt_offsets": torch.tensor([0, 6])}, "prompt_offsets: expected .* 0..5, found 6 in place 1 behind 0"),
        ({"prompt_offsets": torch.tensor([-1, 2])}, "prompt_offsets: expected rising .* 0..5, found -1 in place 0"),
        ({"prompt_offsets": torch.tensor([0, 3, 2])}, "prompt_offsets: expected .* found 2 in place 2 behind 3"),
        ({"prompt_offsets": torch.tensor([0.0, 5.0])}, "prompt_offsets: expected int32 or int64"),
        ({"prompt_index": torch.tensor([0, 1, 0])}, r"prompt_index: expected values within -1..0, found 1 in row 1"),
        ({"prompt_index": torch.tensor([0, -2, 0])}, r"prompt_index: expected values within -1..0, found -2 in row 1"),
        ({"prompt_index": torch.tensor([0])}, r"prompt_index: expected int32 or int64 \[3\] .*, found int64 \[1\]"),
        ({"own_start": torch.tensor([0, 0, 5])}, r"own_start: expected values within 0..4, found 5 in row 2"),
        ({"own_start": torch.tensor([0, 0, -1])}, r"own_start: expected values within 0..4, found -1 in row 2"),
        ({"prompt_length": 4}, "prompt_length: expected at least 5, found 4"),
        ({"prompt_length": -1}, "prompt_length: expected at least 5, found -1"),
        ({"prompt_length": 2**62}, "prompt_length: expected at least 5, found"),
        ({"prompt_length": 2**39}, r"expected rows of at most 2\^40 numbers, found"),
        ({"prompt_length": 2, "prompt_offsets": torch.tensor([0, 3, 5])}, "prompt_length: .* at least 3, found 2"),
    ],
)  # fmt: skip
def test_the_op_in_cpp_checks_what_it_is_given(change: dict, message: str, native: str) -> None:
    """The op's own checks come behind it, or know no values while a graph is traced."""
    call = {"tokens": IDS, "table": TABLE, "prompt": PROMPT} | dict.fromkeys(ROWS)
    call |= {"prompt_length": 5, "scale": None, "prompt_scale": 1.0, "left": True}
    module, tail = ops_module.BACKENDS[native], {"grad": torch.zeros(3, 9, WIDTH), "of": torch.empty(5, WIDTH)}
    assert module.NATIVE(*call.values(), None) is not None
    assert module._BACKWARD(tail["grad"], *(call | {"table": None}).values(), tail["of"], None)
    call |= change
    assert module.NATIVE(*call.values(), None) is None
    with pytest.raises(ValueError, match=message):
        native_ops.served(extension(native), False)
    assert not module._BACKWARD(tail["grad"], *(call | {"table": None}).values(), tail["of"], None)
    with pytest.raises(ValueError, match=message):
        native_ops.served(extension(native), False)


@cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": None}, r"table: expected one beside int64 \[3, 4\] on cpu"),
        ({"tokens": torch.zeros(3, 4, 6)}, r"table: expected None beside float32 \[3, 4, 6\] on cpu"),
        ({"tokens": torch.zeros(3, 4, 7), "table": None}, r"tokens: does not fit .*, found float32 \[3, 4, 7\]"),
        ({"table": torch.zeros(VOCABULARY, 7)}, r"table: does not fit the others, found float32 \[11, 7\]"),
        ({"table": torch.zeros(())}, r"table: does not fit the others, found float32 \[\]"),
        ({"table": TABLE.double()}, "table: no kernel reads another dtype"),
        ({"tokens": EMBEDS, "table": None, "prompt": None, "prompt_length": 0}, "prompt: .* found None"),
        ({"prompt": PROMPT.to(torch.int8)}, "prompt: no kernel reads int8"),
        ({"out": torch.empty(3, 9, 7)}, r"out: does not fit the others, found float32 \[3, 9, 7\]"),
        ({"out": torch.empty(3, 9, WIDTH).double()}, "out: no kernel reads another dtype"),
        ({"out": torch.empty(3, 9, 2 * WIDTH)[..., ::2]}, r"out: expected a dense tensor, found float32 \[3, 9, 6\]"),
    ],
)  # fmt: skip
def test_the_op_in_cpp_checks_its_tensors(change: dict, message: str, native: str) -> None:
    call: dict = {"tokens": IDS, "table": TABLE, "prompt": PROMPT, **dict.fromkeys(ROWS), "prompt_length": 5}
    call |= {"scale": None, "prompt_scale": None, "left": True, "out": torch.empty(3, 9, WIDTH)}
    module = ops_module.BACKENDS[native]
    for changed in ({}, change):
        *args, out = (call | changed).values()
        assert module._OUT(*args, out=out) is (not changed)
    with pytest.raises(ValueError, match=message):
        native_ops.served(extension(native), False)


@cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_out": torch.zeros(3, 8, WIDTH)}, r"grad_out: does not fit the others, found float32 \[3, 8, 6\]"),
        ({"grad_out": torch.zeros(3, 9, WIDTH).double()}, "grad_out: no kernel reads another dtype"),
        ({"grad_prompt": torch.empty(4, WIDTH)}, r"grad_prompt: does not fit the others, found float32 \[4, 6\]"),
        ({"grad_prompt": torch.empty(WIDTH, 5).t()}, "grad_prompt: expected a dense tensor"),
        ({"grad_tokens": torch.empty(3, 4)}, r"grad_tokens: does not fit the others, found float32 \[3, 4\]"),
        ({"grad_tokens": torch.empty(4, 3, WIDTH).transpose(0, 1)}, "grad_tokens: expected a dense tensor"),
    ],
)  # fmt: skip
def test_the_gradient_in_cpp_checks_its_tensors(change: dict, message: str, native: str) -> None:
    rows = (None, None, None, 5, None, None, True)
    call = {"grad_out": torch.zeros(3, 9, WIDTH), "grad_prompt": torch.empty(5, WIDTH)}
    call |= {"grad_tokens": torch.empty(3, 4, WIDTH)}
    module, tokens = ops_module.BACKENDS[native], torch.zeros(3, 4, WIDTH)
    for changed in ({}, change):
        grad_out, *grads = (call | changed).values()
        assert module._BACKWARD(grad_out, tokens, None, PROMPT, *rows, *grads) is (not changed)
    with pytest.raises(ValueError, match=message):
        native_ops.served(extension(native), False)


def extension(backend: str) -> ModuleType:
    return (load() if backend == "cpu" else load_cuda())[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": torch.zeros(1, 5, WIDTH)}, r"prompt: expected floating \[L, H\], found float32 \[1, 5, 6\]"),
        ({"tokens": IDS.int()}, r"tokens: expected int64 \[B, S\] or floating \[B, S, 6\] on cpu, found int32"),
        ({"tokens": torch.zeros(3, 4, 7), "table": None}, r"tokens: expected floating \[B, S, 6\], as wide as prompt"),
        ({"table": None}, "table: expected an embedding table"),
        ({"tokens": torch.zeros(3, 4, 6)}, "table: expected None"),
        ({"table": torch.zeros(VOCABULARY, 7)}, r"table: expected floating \[V, 6\], as wide as prompt"),
        ({"table": TABLE.long()}, "table: expected a floating dtype"),
        ({"own_start": torch.tensor([0, 5, 0])}, r"own_start: expected values within 0..4, found \[0, 5, 0\]"),
        ({"prompt_index": torch.tensor([0, 1, 0])}, "prompt_index: expected values within -1..0"),
        ({"prompt_index": torch.tensor([0])}, r"prompt_index: expected int32 or int64 \[3\]"),
        ({"prompt_offsets": torch.tensor([0, 6])}, "prompt_offsets: expected rising values within 0..5"),
        ({"prompt_length": 4}, "prompt_length: expected at least 5, found 4"),
        ({"prompt_length": 1, "prompt_offsets": torch.tensor([0, 2])}, "prompt_length: expected at least 2"),
        ({"padding_side": "top"}, "padding_side: expected 'left' or 'right', found 'top'"),
        ({"out_dtype": torch.int32}, "out_dtype: expected a floating dtype"),
    ],
)  # fmt: skip
@cpu_only
@pytest.mark.parametrize("backend", EVERY, indirect=True)
def test_bad_input(change: dict, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.prompt_concat(**{"tokens": IDS, "table": TABLE, "prompt": PROMPT, **change}, backend=backend)


def test_reference_oracle_is_differentiable_in_the_table() -> None:
    inputs, options = make("plain", torch.float64)
    inputs[1].requires_grad_()
    out = run(inputs, options, "auto")  # no other backend gives this gradient
    grad = torch.autograd.grad(out.sum(), inputs[1])[0]
    counts = torch.bincount(inputs[0].flatten(), minlength=VOCABULARY).double()
    assert torch.equal(grad, counts[:, None].expand(-1, WIDTH))
    defaults = (None, None, None, 5, 1.0, 1.0, torch.float64, True)
    assert torch.equal(out, reference(*inputs, *defaults))


def test_triton_adds_many_rows_in_parts() -> None:
    """A short prompt's rows are split over programs, and the parts added: the same bits every time."""
    triton = pytest.importorskip("softprompt_fast.backends.triton.prompt_concat", exc_type=ImportError)
    rows = 41
    prompt = torch.randn(4, WIDTH)
    options = {"prompt_offsets": torch.tensor([0, 1, 4]), "prompt_index": torch.randint(-1, 2, (rows,))}
    options["own_start"] = torch.randint(0, 3, (rows,), dtype=torch.int32)
    tokens, table = torch.randint(0, VOCABULARY, (rows, 2)), torch.randn(VOCABULARY, WIDTH)
    grad = torch.randn(rows, 5, WIDTH)
    assert triton._parts(grad, prompt, rows) > 1
    found, again = (triton.backward(grad, tokens, prompt, *options.values(), 3, 1.0, 0.5, True)[0] for _ in range(2))
    assert torch.equal(found, again)
    of = [prompt.double().requires_grad_(), prompt.clone().requires_grad_()]
    outs = [run([tokens, table.to(x.dtype), x], {**options, "prompt_scale": 0.5}, "reference") for x in of]
    oracle, baseline = (torch.autograd.grad(o, x, grad.to(x.dtype))[0] for o, x in zip(outs, of, strict=True))
    assert_within_noise(found, oracle, baseline, "gradient")


def test_triton_follows_no_wild_id() -> None:
    """Past the op's own check, which a GPU does not have: such a row reads as zeros (there, the kernel also stops)."""
    triton = pytest.importorskip("softprompt_fast.backends.triton.prompt_concat", exc_type=ImportError)
    tokens, table, prompt = torch.randint(0, VOCABULARY, (3, 4)), guarded((VOCABULARY, WIDTH)), guarded((5, WIDTH))
    wild = [(0, 1, -1), (1, 3, VOCABULARY), (2, 0, 2**62), (2, 2, -(2**63))]
    for row, column, bad in wild:
        tokens[row, column] = bad
    out = triton.forward(tokens, table, prompt, None, None, None, 5, 1.0, 1.0, torch.float32, True)
    known = (tokens >= 0) & (tokens < VOCABULARY)
    want = table[tokens.where(known, 0)].where(known[..., None], 0)
    assert torch.equal(out[:, 5:], want) and torch.equal(out[:, :5], prompt.expand(3, -1, -1))
