# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softprompt_fast import ops
from softprompt_fast.backends import heuristics
from softprompt_fast.backends._registry import BackendError
from softprompt_fast.testing import assert_within_noise, guarded, poisoned_memory
from tests.device import cpu_only, randn, seeded
from tests.isas import BACKENDS, using

VOCABULARY, HEAD_DIM, Q_HEADS, KV_HEADS = 11, 8, 4, 2
NAMES = ("query", "key", "value", "residual")
CASES: dict[str, dict] = {
    "plain": {},
    "apart": {"apart": True},
    "bias": {"bias": True},
    "apart with bias, other value size": {"apart": True, "bias": True, "v_dim": 3},
    "no norm": {"norm": "none"},
    "rms without weight": {"weighted": False},
    "gemma": {"norm_offset": 1.0, "eps": 1e-5},
    "layer": {"norm": "layer", "bias": True},
    "layer without weight": {"norm": "layer", "weighted": False},
    "no rotation": {"rotation": 0},
    "partial rotation": {"rotation": 4},
    "interleaved": {"interleaved": True},
    "interleaved partial": {"interleaved": True, "rotation": 6},
    "positions per row": {"per_row": True},
    "prompt": {"prompt": 5},
    "prompt, embeds": {"prompt": 5, "ids": False},
    "prompt, padded": {"prompt": 5, "own_start": [0, 1, 4], "scale": 2.0, "prompt_scale": 3.0},
    "prompts packed": {"prompt": 5, "prompt_offsets": [0, 2, 5], "prompt_index": [1, -1, 0], "norm": "layer"},
    "no tokens": {"tokens": 0},
    "no rows": {"batch": 0},
    "prompt alone": {"prompt": 3, "tokens": 0},
    "odd": {"batch": 2, "tokens": 63, "width": 129},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that there is, the C++ one once for each instruction set."""
    with using(request.param) as name:
        yield name


def make(name: str, dtype: torch.dtype = torch.float32, **change) -> dict:
    """Keyword arguments of ``prompt_qkv``."""
    made = {
        "batch": 3, "tokens": 4, "width": 12, "apart": False, "bias": False, "v_dim": HEAD_DIM, "norm": "rms",
        "weighted": True, "rotation": HEAD_DIM, "per_row": False, "prompt": None, "ids": True, **CASES[name], **change,
    }  # fmt: skip
    batch, tokens, width, prompt = (made.pop(k) for k in ("batch", "tokens", "width", "prompt"))
    rows = [Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * made.pop("v_dim")]
    if not made.pop("apart"):
        rows = [sum(rows)]
    weights = [guarded((n, width), dtype, scale=width**-0.5) for n in rows]
    biases = [torch.randn(n).to(dtype) for n in rows]
    call = {
        "weight": weights if len(rows) == 3 else weights[0],
        "bias": (biases if len(rows) == 3 else biases[0]) if made.pop("bias") else None,
        "q_heads": Q_HEADS,
        "kv_heads": KV_HEADS,
    }
    weighted, norm = made.pop("weighted"), made["norm"]
    call["norm_weight"] = torch.randn(width).to(dtype) if weighted and norm != "none" else None
    call["norm_bias"] = torch.randn(width).to(dtype) if weighted and norm == "layer" else None
    ids, length = made.pop("ids"), tokens
    call["tokens"] = guarded((batch, tokens, width), dtype)
    if prompt is not None:
        call["prompt"] = guarded((prompt, width), dtype)
        length += 3 if "prompt_offsets" in made else prompt
        if ids:
            call["table"] = guarded((VOCABULARY, width), dtype)
            call["tokens"] = torch.randint(0, VOCABULARY, (batch, tokens))
    rotation, per_row = made.pop("rotation"), made.pop("per_row")
    if rotation:
        angles = torch.randn(batch if per_row else 1, length, rotation, dtype=torch.float64)
        call["cos"], call["sin"] = angles.cos().to(dtype), angles.sin().to(dtype)
    for key, value in made.items():
        call[key] = torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
    return call


def convert(call: dict, dtype: torch.dtype) -> dict:
    def one(x):
        if isinstance(x, list):
            return [one(y) for y in x]
        return x.detach().to(dtype, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: one(x) for name, x in call.items()}


def trained(call: dict) -> list[Tensor]:
    """The differentiable inputs, marked so."""
    tensors = (call.get("prompt"), call["tokens"])
    return [x.requires_grad_() for x in tensors if x is not None and x.is_floating_point()]


def run(call: dict, backend: str = "torch") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ops.prompt_qkv(**call, backend=backend)


def gradients(results: tuple[Tensor, ...], of: list[Tensor]) -> tuple[Tensor, ...]:
    generator = seeded(1)
    weights = [randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    return torch.autograd.grad(results, of, weights, materialize_grads=True)


def test_reference_is_a_llama_layer() -> None:
    """The reference against the layer written out with PyTorch's modules and transformers' rotation."""
    call = make("prompt", torch.float64)
    query, key, value, residual = run(call, "reference")
    want = torch.cat([call["prompt"].expand(3, -1, -1), call["table"][call["tokens"]]], 1)
    assert torch.equal(residual, want)
    projected = F.linear(F.rms_norm(want, want.shape[-1:], call["norm_weight"], 1e-6), call["weight"])
    q, k, v = projected.split([Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
    q, k, v = (x.view(3, 9, -1, HEAD_DIM).transpose(1, 2) for x in (q, k, v))
    half = HEAD_DIM // 2

    def rotate(x: Tensor) -> Tensor:
        return x * call["cos"][:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * call["sin"][:, None]

    for found, expected in ((query, rotate(q)), (key, rotate(k)), (value, v)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_relative_positions(interleaved: bool) -> None:
    """RoPE's point: q . k depends on the distance alone. And half-split pairs are interleaved pairs, reordered."""
    call = make("no rotation", torch.float64, batch=1, tokens=1)
    call["tokens"] = call["tokens"].expand(1, 6, -1)
    angles = torch.arange(6.0, dtype=torch.float64)[:, None] * torch.rand(HEAD_DIM // 2, dtype=torch.float64)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    query, key, _, _ = run({**call, "cos": angles.cos()[None], "sin": angles.sin()[None], "interleaved": interleaved})
    products = query[0, 0] @ key[0, 0].T  # [6, 6]
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-10, atol=1e-10)
    assert products.std() > 0


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms(norm: str) -> None:
    """Against PyTorch's own, read through an identity projection."""
    hidden, gain, shift = torch.randn(2, 3, 8, dtype=torch.float64), *torch.randn(2, 8, dtype=torch.float64)
    shift = shift if norm == "layer" else None
    want = F.layer_norm(hidden, (8,), gain + 1, shift) if norm == "layer" else F.rms_norm(hidden, (8,), gain + 1, 1e-5)
    weights = [torch.eye(8, dtype=torch.float64)] * 3
    for backend in ("torch", "reference"):
        results = ops.prompt_qkv(
            hidden, weights, q_heads=1, kv_heads=1, norm=norm, norm_weight=gain, norm_bias=shift, norm_offset=1.0,
            eps=1e-5, backend=backend,
        )  # fmt: skip
        for x in results[:3]:
            torch.testing.assert_close(x[:, 0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str, dtype: torch.dtype, backend: str) -> None:
    call = make(name, dtype)
    exact, plain = convert(call, torch.float64), convert(call, dtype)
    of, of_exact, of_plain = trained(call), trained(exact), trained(plain)
    with poisoned_memory():
        results = run(call, backend)
        found = gradients(results, of)
    oracle, baseline = run(exact, "reference"), run(plain, "reference")
    for what, x, y, z in zip(NAMES, results, oracle, baseline, strict=True):
        assert x.dtype == dtype
        if what != "residual":
            assert x.transpose(1, 2).is_contiguous()
        if x.numel():
            assert_within_noise(x, y, z, what)
    if results[3].numel():
        for x, y, z in zip(found, gradients(oracle, of_exact), gradients(baseline, of_plain), strict=True):
            if x.numel():
                assert_within_noise(x, y, z, "gradient")


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_the_reference(name: str) -> None:
    call = make(name, torch.float64)
    of = trained(call)
    results, want = run(call), run(call, "reference")
    for x, y in zip(results, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    for x, y in zip(gradients(results, of), gradients(want, of), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    for which in range(4):  # each result's gradient alone: the others are absent, not zero
        alone = (gradients(run(call, backend)[which : which + 1], of) for backend in ("torch", "reference"))
        for x, y in zip(*alone, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["gemma", "layer", "interleaved partial", "prompt, embeds", "prompts packed"])
def test_gradcheck(name: str) -> None:
    call = make(name, torch.float64, batch=3, tokens=2, width=5)
    of = [x.detach().clone().requires_grad_() for x in trained(call)]
    names = [n for n in ("prompt", "tokens") if n in call and call[n].is_floating_point()]
    assert torch.autograd.gradcheck(lambda *x: run({**call, **dict(zip(names, x, strict=True))}), of, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "apart with bias, other value size", "layer", "prompt", "prompt, embeds"])
def test_opcheck(name: str, backend: str) -> None:
    call = make(name)
    trained(call)
    apart = isinstance(call["weight"], list)
    listed = [] if call["bias"] is None else call["bias"] if apart else [call["bias"]]
    length = 0 if "prompt" not in call else len(call["prompt"])
    args = (
        call["tokens"],
        call.get("table"),
        call.get("prompt"),
        None,
        None,
        None,
        length,
        1.0,
        1.0,
        torch.float32,
        True,
    )
    args += (call["weight"] if apart else [call["weight"]], listed, Q_HEADS, KV_HEADS, call["norm"])
    args += (call["norm_weight"], call["norm_bias"], 0.0, 1e-6, call["cos"], call["sin"], False, backend)
    torch.library.opcheck(torch.ops.softprompt_fast.prompt_qkv.default, args)


@pytest.mark.parametrize("name", ["plain", "prompt"])
def test_compiles_to_one_graph_and_once(name: str, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    call = make(name, per_row=True)
    call["weight"] = call["weight"].contiguous()

    def check(batch: int, tokens: int) -> None:
        fresh = make(name, batch=batch, tokens=tokens, per_row=True)
        for key in ("tokens", "table", "prompt"):  # dense: of a view, dynamo also guards on the relation to its base
            if key in fresh:
                fresh[key] = fresh[key].contiguous()
        inputs = {**fresh, "weight": call["weight"], "norm_weight": call["norm_weight"]}
        of = trained(inputs)
        results, want = compiled(inputs, backend), run(inputs, backend)
        assert all(torch.equal(x, y) for x, y in zip(results, want, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(gradients(results, of), gradients(want, of), strict=True))

    check(3, 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(3, 9)
        check(5, 4)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 4),
    width=st.integers(1, 9),
    rotation=st.sampled_from([0, 2, 6, 8]),
    norm=st.sampled_from(["rms", "layer", "none"]),
    interleaved=st.booleans(),
    prompt=st.none() | st.integers(0, 3),
    ids=st.booleans(),
)
def test_any_shape(**change) -> None:
    call = make("plain", torch.float64, **change)
    of = trained(call)
    results, want = run(call), run(call, "reference")
    for x, y in zip((*results, *gradients(results, of)), (*want, *gradients(want, of)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_rows_do_not_see_each_other(backend: str) -> None:
    call = make("prompt, padded", torch.float64 if backend == "torch" else torch.float32)
    tolerance = 1e-12 if backend == "torch" else 1e-5
    whole = run(call, backend)
    alone = run({**call, "tokens": call["tokens"][1:2], "own_start": call["own_start"][1:2]}, backend)
    for x, y in zip(alone, whole, strict=True):
        torch.testing.assert_close(x[0], y[1], rtol=tolerance, atol=tolerance)


@cpu_only
def test_weights_are_packed_once_and_again_when_written_to() -> None:
    linear = pytest.importorskip("softprompt_fast.backends.cpu._linear", exc_type=ImportError)
    call = make("apart with bias, other value size")
    heads = (Q_HEADS, KV_HEADS, KV_HEADS)
    first = linear.packed(call["weight"], call["bias"], heads=heads)
    assert linear.packed(call["weight"], call["bias"], heads=heads) is first
    for written in (call["weight"][1], call["bias"][2]):
        with torch.no_grad():
            written.mul_(2.0)
        assert_within_noise(
            run(call, "cpu")[1], run(convert(call, torch.float64), "reference")[1], run(call, "reference")[1]
        )
    assert linear.packed(call["weight"], call["bias"], heads=heads) is not first


def test_residual_is_its_own_memory(backend: str) -> None:
    call = make("plain")
    assert run(call, backend)[3].data_ptr() != call["tokens"].data_ptr()


@pytest.mark.parametrize("what", ["weight", "bias", "norm_weight", "norm_bias", "cos", "table"])
def test_other_gradients_come_from_the_reference(what: str) -> None:
    call = make("prompt", torch.float64, norm="layer", bias=True)
    call[what].requires_grad_()
    reason = {"weight": "weights", "bias": "biases"}.get(what, what)
    with pytest.raises(BackendError, match=f"gives no gradient for {reason}"):
        run(call, "torch")
    (grad,) = gradients(run(call, "auto")[:1], [call[what]])
    (want,) = gradients(run(call, "reference")[:1], [call[what]])
    assert torch.equal(grad, want) and grad.abs().sum() > 0


@cpu_only  # on a GPU: an assertion in the kernel, after which the process can do no more
def test_ids_out_of_range(backend: str) -> None:
    call = make("prompt")
    call["tokens"][2, 1] = VOCABULARY
    with pytest.raises(IndexError, match=f"tokens: id {VOCABULARY} in row 2, column 1 is outside the vocabulary"):
        run(call, backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, 4, dtype=torch.int64)}, r"tokens: expected floating \[B, S, H\] without a prompt"),
        ({"table": torch.zeros(3, 12)}, "table: expected None without a prompt"),
        ({"scale": 2.0}, "scale: expected None without a prompt, found 2.0"),
        ({"weight": [torch.zeros(32, 12)] * 2}, "weight: expected one tensor or three"),
        ({"weight": torch.zeros(64, 11)}, r"weight: expected \[a multiple of 8 heads, 12\], found float32 \[64, 11\]"),
        ({"weight": torch.zeros(63, 12)}, r"weight: expected \[a multiple of 8 heads, 12\]"),
        ({"weight": [torch.zeros(n, 12) for n in (32, 12, 16)]}, "weight: expected one head dimension .* 8 and 6"),
        ({"q_heads": 3}, "q_heads: expected a multiple of kv_heads, 2, found 3"),
        ({"bias": torch.zeros(63)}, r"bias: expected shapes \[\[64\]\] beside these weights, found \[\[63\]\]"),
        ({"norm": "batch"}, "norm: expected 'rms', 'layer' or 'none', found 'batch'"),
        ({"norm_weight": torch.zeros(11)}, r"norm_weight: expected \[12\], found float32 \[11\]"),
        ({"norm": "none"}, "norm_weight: expected None with norm='none'"),
        ({"norm_bias": torch.zeros(12)}, "norm_bias: expected None with norm='rms'"),
        ({"sin": None}, "cos, sin: expected both or neither"),
        ({"cos": torch.zeros(1, 5, 8)}, r"cos: expected \[3 or 1, 4, even and at most 8\], found float32 \[1, 5, 8\]"),
        ({"sin": torch.zeros(1, 4, 10)}, "sin: expected"),
        ({"sin": torch.zeros(3, 4, 8)}, r"sin: expected the shape of cos, \[1, 4, 8\]"),
    ],
)  # fmt: skip
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run({**make("plain"), **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_around_library_products(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Triton backend does with many rows; the other tests' are few."""
    monkeypatch.setattr(heuristics, "fuse_projection", lambda rows: False)
    test_forward_and_gradients(name, dtype, "triton")


LAYOUTS: dict[str, dict] = {
    "transposed weight": {"name": "bias"},
    "weights apart, strides of their own": {"name": "apart"},
    "weights of two dtypes": {"name": "apart"},
    "float32 weights": {"name": "layer"},
    "float32 rotation, columns apart": {"name": "positions per row", "rotation": 6},
    "hidden states transposed": {"name": "gemma"},
    "every second hidden element": {"name": "plain"},
    "float32 prompt": {"name": "prompt, padded"},
    "odd heads": {"name": "layer", "rotation": 4},
    "many rows, in groups": {"name": "prompt", "batch": 9, "tokens": 11, "width": 20},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["one kernel", "composed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_takes_every_layout(
    layout: str, fused: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = {**LAYOUTS[layout]}
    call = make(change.pop("name"), dtype, **change)
    weight, tokens = call["weight"], call["tokens"]
    if layout == "transposed weight":
        call["weight"] = weight.T.contiguous().T
    elif layout == "weights apart, strides of their own":
        call["weight"] = [weight[0], weight[1].T.contiguous().T, weight[2].repeat(1, 2)[:, :12]]
    elif layout == "weights of two dtypes":
        call["weight"] = [weight[0].half(), *weight[1:]]
    elif layout == "float32 weights":
        call["weight"], call["norm_weight"], call["bias"] = weight.float(), call["norm_weight"].float(), None
    elif layout == "float32 rotation, columns apart":
        call["cos"], call["sin"] = (call[x].float().repeat_interleave(2, -1)[..., ::2] for x in ("cos", "sin"))
    elif layout == "hidden states transposed":
        call["tokens"] = tokens.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    elif layout == "every second hidden element":
        call["tokens"] = tokens.repeat_interleave(2, -1)[..., ::2]
    elif layout == "float32 prompt":
        call["prompt"] = call["prompt"].float()
    elif layout == "odd heads":
        call["weight"], call["bias"] = weight[:56], None  # 8 heads of 7
        call["weight"] = call["weight"].repeat(1, 2)[:, :12]
    elif layout == "many rows, in groups":
        assert not heuristics.fuse_projection(9 * 16)
    if layout == "many rows, in groups" and fused:
        monkeypatch.setattr(triton_module(), "composed", triton_module().one_kernel)
    else:
        monkeypatch.setattr(heuristics, "fuse_projection", lambda rows: fused)
    exact, plain = convert(call, torch.float64), convert(call, dtype)
    of, of_exact, of_plain = trained(call), trained(exact), trained(plain)
    with poisoned_memory():
        results = run(call, "triton")
        found = gradients(results, of)
    oracle, baseline = run(exact, "reference"), run(plain, "reference")
    for what, x, y, z in zip(NAMES, results, oracle, baseline, strict=True):
        assert_within_noise(x, y, z, what)
    for x, y, z in zip(found, gradients(oracle, of_exact), gradients(baseline, of_plain), strict=True):
        assert_within_noise(x.to(z.dtype), y, z, "gradient")


def triton_module():
    return pytest.importorskip("softprompt_fast.backends.triton.prompt_qkv", exc_type=ImportError)


def test_triton_one_kernel_says_what_it_takes() -> None:
    module = triton_module()
    weights = [torch.zeros(32, 12), torch.zeros(12, 16).T, torch.zeros(16, 12)]
    tokens = torch.zeros(2, 3, 12)
    start = (tokens, None, None, None, None, None, 0, 1.0, 1.0, torch.float32, True)
    layer = (4, 2, "none", None, None, 0.0, 1e-6, None, None, False)
    with pytest.raises(ValueError, match="one dtype and, of the weights, one stride between columns"):
        module.one_kernel(*start, weights, [], *layer)
    assert module.forward(*start, weights, [], *layer)[0].shape == (2, 4, 3, 8)


def test_triton_follows_no_wild_id() -> None:
    """Past the op's own check, which a GPU does not have: such a row reads as zeros (there, the kernel also stops)."""
    module = triton_module()
    call = make("prompt", norm="none")
    known = call["tokens"].clone()
    call["tokens"][0, 1], call["tokens"][2, 3] = 2**62, -1
    start = (call["tokens"], call["table"], call["prompt"], None, None, None, 5, 1.0, 1.0, torch.float32, True)
    layer = (Q_HEADS, KV_HEADS, "none", None, None, 0.0, 1e-6, None, None, False)
    want = torch.cat([call["prompt"].expand(3, -1, -1), call["table"][known]], 1)
    want[0, 6] = want[2, 8] = 0
    for form in (module.one_kernel, module.composed):
        query, _, _, residual = form(*start, [call["weight"]], [], *layer)
        assert torch.equal(residual, want) and query[0, :, 6].eq(0).all() and query[2, :, 8].eq(0).all()


@pytest.mark.parametrize("which", range(4))
def test_triton_gradient_of_one_result(which: int) -> None:
    """The other results' gradients are absent, not zero; and no result is an argument."""
    call = make("plain")
    of = trained(call)
    want = gradients(run(call, "torch")[which : which + 1], of)
    result = run(call, "triton")[which]
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    found = torch.autograd.grad(result, of, grad)
    torch.testing.assert_close(found[0], want[0], rtol=1e-4, atol=1e-5)
    assert found[0].data_ptr() != grad.data_ptr()
