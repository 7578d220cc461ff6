# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: nothing waits for it, its graphs hold a decode step, and real sizes are right.

``make gpu`` runs this file; everywhere else it is skipped. Tests of the ops at small, odd shapes are with the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Oracle, make_model, make_rows, pad_rows
from torch import Tensor

from softprompt_fast import SoftPromptModel, ops
from softprompt_fast.backends import native
from softprompt_fast.cache import make_static_cache
from softprompt_fast.reference.prefix_attention import prefix_attention as reference
from softprompt_fast.testing import AttentionInputs, assert_within_noise, attention_inputs
from tests.device import DEVICE, gpu_only

pytestmark = gpu_only
CUDA_BUILT = pytest.mark.skipif(native.load_cuda()[0] is None, reason="no CUDA kernels are built")
CUDA = pytest.param("cuda", marks=CUDA_BUILT)
BACKENDS = ["triton", "torch", CUDA]
B, CAPACITY = 3, 64


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever reads a value from the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, allocates
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def decode_step(dtype: torch.dtype = torch.bfloat16, **change: Any) -> AttentionInputs:
    """One query a row behind packed prefixes, over a static cache whose filled part is a tensor."""
    options: dict[str, Any] = {
        "prefix": 90,
        "prefix_offsets": [0, 40, 90],
        "prefix_index": [1, -1, 0],
        "query_start": [9, 9, 9],
        "own_start": [0, 2, 0],
        "own_end": [10, 10, 10],
        **change,
    }
    return attention_inputs(B, 8, 2, 1, CAPACITY, 64, dtype=dtype, **options)


# ---- every op without waiting ---------------------------------------------------------------------------------------


def calls(backend: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of every op, from inputs that are there."""
    dtype = torch.bfloat16
    prefill = attention_inputs(
        B, 8, 2, 24, 24, 64, prefix=90, dtype=dtype, prefix_offsets=[0, 40, 90], prefix_index=[1, -1, 0],
        own_start=[0, 2, 0], sinks=True,
    ).requires_grad_()  # fmt: skip
    decode = decode_step()
    states = [torch.randn(B, 8, 5, 64).to(dtype), torch.randn(B, 8, 5), torch.randn(B, 8, 5, 64).to(dtype)]
    states = [x.requires_grad_() for x in (*states, torch.randn(B, 8, 5))]
    tokens, table = torch.randint(0, 50, (B, 7)), torch.randn(50, 128).to(dtype)
    prompt = torch.randn(9, 128).to(dtype).requires_grad_()
    packed = {"prompt_offsets": torch.tensor([0, 4, 9]), "prompt_index": torch.tensor([1, -1, 0]), "prompt_length": 5}
    weight, norm = torch.randn(12 * 16, 128).to(dtype) / 11, torch.randn(128).to(dtype)
    angle = torch.rand(1, 12, 16)
    layer = {"q_heads": 8, "kv_heads": 2, "norm_weight": norm}

    def both(results: Any, of: list[Tensor]) -> list[Tensor]:
        results = [results] if isinstance(results, Tensor) else [*results]
        return [*results, *torch.autograd.grad(results, of, [torch.ones_like(x) for x in results])]

    return {
        "prefix_attention": lambda: both(
            ops.prefix_attention(*prefill.tensors, **prefill.options, return_lse=True, backend=backend),
            prefill.gradient_inputs,
        ),
        "prefix_attention decode": lambda: [*_attend(decode, backend)],
        "merge_states": lambda: both(ops.merge_states(*states, backend=backend), states),
        "prompt_concat without gradients": lambda: [
            ops.prompt_concat(tokens, table, prompt.detach(), **packed, backend=backend)
        ],
        "prompt_concat": lambda: both(ops.prompt_concat(tokens, table, prompt, **packed, backend=backend), [prompt]),
        "prompt_qkv": lambda: both(
            ops.prompt_qkv(
                tokens, weight, **layer, cos=angle.cos().to(dtype), sin=angle.sin().to(dtype), table=table,
                prompt=prompt, **packed, backend=backend,
            ),
            [prompt],
        ),
    }  # fmt: skip


def _attend(inputs: AttentionInputs, backend: str) -> tuple[Tensor, Tensor]:
    return ops.prefix_attention(*inputs.tensors, **inputs.options, return_lse=True, backend=backend)


CALLS = (
    "prefix_attention",
    "prefix_attention decode",
    "merge_states",
    "prompt_concat",
    "prompt_concat without gradients",
    "prompt_qkv",
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_gpu(name: str, backend: str) -> None:
    call = calls(backend)[name]
    call()  # compiles
    with no_waiting():
        call()


@pytest.mark.parametrize("backend", ["triton", CUDA])
@pytest.mark.parametrize("name", CALLS)
def test_results_repeat_bit_for_bit(name: str, backend: str) -> None:
    call = calls(backend)[name]
    first = call()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(call(), first, strict=True))


@pytest.mark.parametrize("backend", ["triton", CUDA])
@pytest.mark.parametrize("name", CALLS)
def test_on_a_stream_of_its_own(name: str, backend: str) -> None:
    call = calls(backend)[name]
    want = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = call()
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_holds_a_decode_step(backend: str) -> None:
    """Lengths, padding and the prefix of a row change between replays, in their tensors."""
    inputs = decode_step()
    graph, (out, lse) = captured(lambda: _attend(inputs, backend))
    for own, index, start in ((10, [1, -1, 0], [0, 2, 0]), (17, [0, 0, 1], [3, 0, 16]), (CAPACITY, [-1] * 3, [0] * 3)):
        with torch.no_grad():
            inputs.query.normal_()
            inputs.options["query_start"].fill_(own - 1)
            inputs.options["own_end"].fill_(own)
            inputs.options["prefix_index"].copy_(torch.tensor(index))
            inputs.options["own_start"].copy_(torch.tensor(start))
        graph.replay()
        want_out, want_lse = _attend(inputs, backend)
        assert torch.equal(out, want_out) and torch.equal(lse, want_lse)
        exact = inputs.to(torch.float64)
        assert_within_noise(out, reference(*exact.tensors, **exact.options)[0], inputs.baseline()[0])


@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_reduce_overhead(backend: str) -> None:
    """torch.compile's CUDA graphs, in one graph and without compiling anew for new values."""
    torch._dynamo.reset()
    inputs = decode_step()
    compiled = torch.compile(_attend, fullgraph=True, mode="reduce-overhead")
    for own in (10, 11, 33):
        inputs.options["query_start"].fill_(own - 1)
        inputs.options["own_end"].fill_(own)
        with torch.compiler.set_stance("default" if own == 10 else "fail_on_recompile"):
            found = [x.clone() for x in compiled(inputs, backend)]
        assert all(torch.equal(x, y) for x, y in zip(found, _attend(inputs, backend), strict=True))


def test_growing_keys_compile_no_new_kernel() -> None:
    """A decode loop without a static cache: Triton specialises on no length (beyond a first few)."""
    cache = [torch.randn(B, 2, CAPACITY, 64).bfloat16() for _ in range(2)]
    prefix = [torch.randn(2, 90, 64).bfloat16() for _ in range(2)]
    query = torch.randn(B, 1, 8, 64).bfloat16().transpose(1, 2)
    compiled = kernels_compiled()
    counts = []
    for own in range(1, CAPACITY + 1):
        ops.prefix_attention(query, *(x[:, :, :own] for x in cache), *prefix, backend="triton")
        counts.append(next(compiled))
    assert counts[-1] == counts[20], counts


def kernels_compiled() -> Iterator[int]:
    """How many variants Triton holds of all kernels of prefix_attention on this device, each time it is asked."""
    from triton.runtime.jit import JITFunction

    from softprompt_fast.backends import triton as package

    while True:
        total, seen = 0, set()
        for module in vars(package).values():
            for value in vars(module).values() if hasattr(module, "__file__") else ():
                if isinstance(value, JITFunction) and id(value) not in seen:
                    seen.add(id(value))
                    caches = value.device_caches.get(torch.cuda.current_device())
                    total += len(caches[0]) if caches else 0
        yield total


# ---- the model ------------------------------------------------------------------------------------------------------


def test_a_graph_holds_a_models_decode_step() -> None:
    model, oracle = make_model(), Oracle()
    rows, names = make_rows([4, 4, 4]), ["a", "b", None]
    ids = torch.stack(rows)
    expected = [oracle.greedy(r, n and model.get_prompt(n), 6) for r, n in zip(rows, names, strict=True)]
    with torch.no_grad():
        selected = model._select(names, None, 3)
        packed, index = selected.packed, selected.index
        cache = make_static_cache(2, 32)
        options = {"prompt": packed, "prompt_index": index, "past_key_values": cache, "use_cache": True}
        token = model(ids, **options).logits[:, -1].argmax(-1, keepdim=True)
        found = [token.clone()]
        # Warming up and capturing write to the cache, which then forgets it.
        kept = [layer.cumulative_length.clone() for layer in cache.layers]
        graph, logits = captured(lambda: model(token, **options).logits)
        for layer, length in zip(cache.layers, kept, strict=True):
            layer.cumulative_length.copy_(length)
        for _ in range(5):
            graph.replay()
            token.copy_(logits[:, -1].argmax(-1, keepdim=True))
            found.append(token.clone())
    assert torch.cat(found, 1).tolist() == expected


def fused_model(dtype: torch.dtype) -> SoftPromptModel:
    """On the CUDA backend's fused decoder (tests/test_cuda_step.py has its results)."""
    model = make_model(backend="cuda").to(dtype)
    assert {layer.path for layer in model.explain().layers} == {"shared prefix, fused decoder"}, model.explain()
    return model


@CUDA_BUILT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_graph_holds_a_fused_decode_step(dtype: torch.dtype) -> None:
    """Replayed over a static cache it gives the bits of eager steps, from token ids on."""
    model = fused_model(dtype)
    ids, mask = pad_rows(make_rows([4, 7, 2]), "left")
    results = []
    with torch.no_grad():
        selected = model._select(["a", None, "b"], None, 3)
        for graphed in (False, True):
            cache, token = make_static_cache(2, 40), torch.full((3, 1), 5)
            options: dict[str, Any] = {"prompt": selected.packed, "prompt_index": selected.index, "use_cache": True}
            options |= {"own_start": (mask == 0).sum(1).int(), "past_key_values": cache}
            model(ids, **options)
            step, logits = None, None
            if graphed:
                kept = [layer.cumulative_length.clone() for layer in cache.layers]
                step, logits = captured(lambda token=token, options=options: model(token, **options).logits)
                for layer, length in zip(cache.layers, kept, strict=True):
                    layer.cumulative_length.copy_(length)
            found = []
            for _ in range(6):
                if step is None:
                    logits = model(token, **options).logits
                else:
                    step.replay()
                found.append(logits.clone())
                token.copy_(logits[:, -1].argmax(-1, keepdim=True))
            assert int(cache.get_seq_length()) == 13
            results.append([*found, *(layer.keys.clone() for layer in cache.layers)])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.parametrize("kind", ["modules", pytest.param("fused", marks=CUDA_BUILT)])
@pytest.mark.parametrize("cache", ["growing", "static"])
def test_a_models_decode_step_waits_for_nothing(cache: str, kind: str) -> None:
    model = make_model() if kind == "modules" else fused_model(torch.bfloat16)
    ids, mask = pad_rows(make_rows([4, 7, 2]), "left")
    with torch.no_grad():
        selected = model._select(["a", None, "b"], None, 3)
        packed, index = selected.packed, selected.index
        options: dict[str, Any] = {"prompt": packed, "prompt_index": index, "use_cache": True}
        options["own_start"] = (mask == 0).sum(1).int()
        past = make_static_cache(2, 40) if cache == "static" else None
        options["past_key_values"] = model(ids, past_key_values=past, **options).past_key_values
        token = torch.full((3, 1), 5)
        model(token, **options)
        with no_waiting():
            for _ in range(3):
                model(token, **options)


def test_generate_with_steps_that_transformers_compiles() -> None:
    """cache_implementation="static" on a GPU: inductor and CUDA graphs, in transformers' own way."""
    model, oracle = make_model(), Oracle()
    rows, names = make_rows([4, 7, 2]), ["a", None, "b"]
    ids, mask = pad_rows(rows, "left")
    expected = [oracle.greedy(r, n and model.get_prompt(n), 6) for r, n in zip(rows, names, strict=True)]
    for _ in range(2):
        found = model.generate(ids, attention_mask=mask, prompt=names, max_new_tokens=6, cache_implementation="static")
        assert found[:, 7:].tolist() == expected


# ---- real sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("queries", "own", "prefix"), [(1, 128, 8192), (1, 1000, 512), (512, 512, 512), (200, 333, 1000)], ids=str
)
@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_real_sizes(backend: str, queries: int, own: int, prefix: int, head_dim: int, dtype: torch.dtype) -> None:
    """Against float64, with the noise of PyTorch's fused attention over the expanded prefix as the measure."""
    if backend == "cuda" and (queries > 1 or dtype == torch.float32):
        pytest.skip("Triton's kernels serve it")
    inputs = attention_inputs(2, 8, 2, queries, own, head_dim, prefix=prefix, dtype=dtype).requires_grad_()
    exact = inputs.to(torch.float64).requires_grad_()
    plain = inputs.to(dtype).requires_grad_()
    out = ops.prefix_attention(*inputs.tensors, backend=backend)
    want = reference(*exact.tensors)[0]
    base = fused(plain)
    assert_within_noise(out, want, base, "out")
    grad = torch.randn(out.shape, dtype=torch.float64)
    results = [
        torch.autograd.grad(x, of.tensors, grad.to(x.dtype)) for x, of in ((out, inputs), (want, exact), (base, plain))
    ]
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    for what, *three in zip(names, *results, strict=True):
        assert_within_noise(*three, f"gradient of {what}")


def fused(inputs: AttentionInputs) -> Tensor:
    query, key, value, *prefix = inputs.tensors
    groups = query.shape[1] // key.shape[1]
    keys, values = (
        torch.cat([p.expand(len(query), -1, -1, -1), x], 2).repeat_interleave(groups, 1)
        for p, x in zip(prefix, (key, value), strict=True)
    )
    queries, columns = query.shape[2], keys.shape[2]
    hidden = torch.ones(queries, columns, dtype=torch.bool).triu(columns - queries + 1)
    mask = torch.zeros(queries, columns, dtype=query.dtype).masked_fill(hidden, float("-inf"))
    return F.scaled_dot_product_attention(query, keys, values, mask)


def test_offsets_beyond_two_to_the_31() -> None:
    """A cache of more than 2^31 elements, of which the last row is used."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    rows, own = 70, 8192
    cache = torch.empty(2, rows, 8, own, 256, dtype=torch.bfloat16)  # 2.3e9 elements
    cache[:, -1, :, :40].normal_()
    key, value = (x[-1:, :, :40] for x in cache)
    query = torch.randn(1, 8, 1, 256).bfloat16()
    prefix = [torch.randn(8, 10, 256).bfloat16() for _ in range(2)]
    want = ops.prefix_attention(query, key.clone(), value.clone(), *prefix, backend="triton")
    assert torch.equal(ops.prefix_attention(query, key, value, *prefix, backend="triton"), want)
    many = query.expand(rows, -1, -1, -1)
    end = torch.zeros(rows, dtype=torch.int32)
    end[-1] = 40
    with torch.no_grad():
        cache[:, :-1].zero_()
        cache[:, -1, :, 40:].zero_()
    start = torch.full((rows,), 39, dtype=torch.int32)
    found = ops.prefix_attention(many, *cache, *prefix, own_end=end, query_start=start, backend="triton")
    torch.testing.assert_close(found[-1:], want, rtol=2e-2, atol=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_another_than_the_current_gpu(name: str) -> None:
    with torch.device("cuda:1"):
        found = calls("triton")[name]()
    assert torch.cuda.current_device() == (DEVICE.index or 0)
    assert all(x.device.index == 1 and not x.isnan().any() for x in found)
