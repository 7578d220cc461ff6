# SPDX-License-Identifier: Apache-2.0
"""The fused decoder on backend "cuda": a layer's step in two launches (three where heads have norms) and a library's
products, in 16 bits. On a CPU the kernels are emulated.

Logits are held to the noise floor of ``softprompt_fast.testing``: against float64, the base's own modules in the same
dtype (with the same attention kernels) are the baseline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")  # the tables of families and changes want it

from models import make_prompt, make_rows, pad_rows
from test_fused_decoder import CHANGES, LOOK_ALIKES, VARIANTS, switch_off
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import softprompt_fast as spf
from softprompt_fast import SoftPromptModel
from softprompt_fast.backends import heuristics, native
from softprompt_fast.cache import OwnTokenCache, make_static_cache
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.integrations.decoder_pass import CudaDecoder
from softprompt_fast.testing import assert_within_noise, poisoned_memory
from tests import families
from tests.device import ON_GPU
from tests.families import FAMILIES

module, reason = native.load_cuda()
pytestmark = pytest.mark.skipif(module is None, reason=f"CUDA kernels: {reason}")

DTYPES = [torch.bfloat16, torch.float16]
FUSED = ("llama", "mistral_short_window", "mistral_long_window", "qwen2", "qwen3", "gemma")
ROWS = make_rows([4, 7, 1])
NAMES = ["a", None, "b"]
PATH = "shared prefix, fused decoder"


def with_prompts(base: PreTrainedModel, backend: str | None) -> SoftPromptModel:
    model = SoftPromptModel(base, backend=backend)
    for prompt, length in (("a", 5), ("b", 9)):
        # As `dtype` rounds them: what differs later is what is computed from them.
        made = make_prompt(base.float(), length=length, seed=length).to(torch.bfloat16).requires_grad_(False)
        model.add_prompt(prompt, made)
    return model.eval()


def trio(make: Callable[[], PreTrainedModel], dtype: torch.dtype) -> list[SoftPromptModel]:
    """A model that may be fused, one that is not, and the same weights and prompts in float64."""
    fused, plain = (with_prompts(make(), "cuda").to(dtype) for _ in range(2))
    exact = with_prompts(make(), "torch").to(dtype).to(torch.float64)
    return [fused, switch_off(plain), exact]


def of_family(name: str, dtype: torch.dtype = torch.bfloat16) -> list[SoftPromptModel]:
    return trio(FAMILIES[name].make, dtype)


def of_config(make_config: Callable[[], Any], dtype: torch.dtype = torch.bfloat16) -> list[SoftPromptModel]:
    def make() -> PreTrainedModel:
        base = AutoModelForCausalLM.from_config(make_config()).eval()
        families.randomise(base, 1)
        return base

    return trio(make, dtype)


def check(results: list[Tensor], what: str = "logits") -> None:
    found, plain, exact = results
    assert_within_noise(found, exact, plain, what)


class Launches(list[str]):
    """The kernels of ours that ran, in order."""

    def recorded(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **results: (self.append(name), op(*args, **results))[1]

    @contextmanager
    def of(self, *expected: str) -> Iterator[None]:
        before = len(self)
        yield
        assert self[before:] == [*expected]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    from softprompt_fast.backends.cuda import prefix_attention, prompt_qkv

    seen = Launches()

    ops = ((prompt_qkv, "prompt_qkv", "_OP"), (prompt_qkv, "head_norm", "_HEAD_NORM"))
    attention = ((prefix_attention, "prefix_attention", name) for name in ("NATIVE", "_OUT"))
    for where, kernel, name in (*ops, *attention):
        monkeypatch.setattr(where, name, seen.recorded(kernel, getattr(where, name)))
    many, triton = prompt_qkv.many_rows.forward, prefix_attention.triton.forward
    monkeypatch.setattr(prompt_qkv.many_rows, "forward", lambda *a: (seen.append("many rows"), many(*a))[1])
    monkeypatch.setattr(prefix_attention.triton, "forward", lambda *a: (seen.append("Triton"), triton(*a))[1])
    return seen


TWO_LAYERS = ("prompt_qkv", "prefix_attention") * 2
TWO_NORMED_LAYERS = ("prompt_qkv", "head_norm", "prefix_attention") * 2


def two_layers(family: str) -> tuple[str, ...]:
    return TWO_NORMED_LAYERS if family == "qwen3" else TWO_LAYERS


# ---- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_a_padded_batch_of_different_prompts(family: str, dtype: torch.dtype, launches: Launches) -> None:
    models = of_family(family, dtype)
    assert {layer.path for layer in models[0].explain().layers} == {PATH}
    for m in models[:2]:
        m.compile_prompt("a"), m.compile_prompt("b")
    for side in ("left", "right"):
        ids, mask = pad_rows(ROWS, side)

        def logits(m: SoftPromptModel, ids: Tensor = ids, mask: Tensor = mask) -> Tensor:
            with torch.no_grad(), poisoned_memory():
                return m(ids, attention_mask=mask, prompt=NAMES).logits[mask.bool()]

        with launches.of(*two_layers(family)):
            found = logits(models[0])
        with launches.of("prefix_attention", "prefix_attention"):
            plain = logits(models[1])
        check([found, plain, logits(models[2])])


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "heads wider than the model"])
def test_variants(name: str, launches: Launches) -> None:
    models = of_config(VARIANTS[name])
    assert models[0].explain().layers[0].path == PATH
    models[0].compile_prompt("a")
    ids = make_rows([9])[0][None]
    with launches.of(*TWO_LAYERS):
        found = models[0](ids, prompt="a").logits
    check([found, *(m(ids, prompt="a").logits for m in models[1:])])


CACHES: dict[str, Callable[[], Any]] = {
    "growing": lambda: OwnTokenCache(2),
    "static": lambda: make_static_cache(2, 40),
    "transformers'": DynamicCache,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_cache_is_continued_by_one_to_sixteen_tokens(
    family: str, kind: str, dtype: torch.dtype, launches: Launches
) -> None:
    """As speculative decoding and chunked prompts continue it, behind left padding."""
    models = of_family(family, dtype)
    ids, mask = pad_rows(ROWS, "left")
    more = torch.randint(0, 60, (3, 22))
    results: list[list[Tensor]] = []
    for m in models:
        m.compile_prompt("a"), m.compile_prompt("b")
        cache = CACHES[kind]()
        out = m(ids, attention_mask=mask, prompt=NAMES, past_key_values=cache)
        logits = [out.logits[mask.bool()]]
        for part in more.split([1, 16, 1, 4], dim=1):
            before = len(launches)
            logits.append(m(part, prompt=NAMES, past_key_values=cache).logits)
            assert m is not models[0] or launches[before:] == [*two_layers(family)]
        assert out.past_key_values is cache and int(cache.get_seq_length()) == 29
        results.append(logits)
    for step, parts in enumerate(zip(*results, strict=True)):
        check([*parts], f"logits of call {step}")


@torch.no_grad()
def test_a_cache_changes_hands_between_fused_and_plain_passes() -> None:
    fused, plain, exact = of_family("llama")
    ids = torch.stack([ROWS[1], ROWS[1].flip(0)])
    for make_cache in CACHES.values():
        results = []
        for turns in ((fused, plain, fused), (plain, plain, plain), (exact, exact, exact)):
            cache = make_cache()
            parts = zip(turns, ids.split([3, 2, 2], dim=1), strict=True)
            results.append(torch.cat([m(part, prompt=None, past_key_values=cache).logits for m, part in parts], dim=1))
        check(results)


@pytest.mark.parametrize("keep", [0, 1, 3, 99, torch.tensor([0, 5])], ids=str)
def test_logits_to_keep(keep: Any) -> None:
    models = of_family("llama")
    for make_cache in CACHES.values():
        options = {"prompt": "a", "logits_to_keep": keep}
        check([m(ROWS[1].expand(2, -1), past_key_values=make_cache(), **options).logits for m in models])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_more_rows_than_a_steps_take_the_backends_other_forms(family: str, launches: Launches) -> None:
    models, norm = of_family(family), ["head_norm"] * (family == "qwen3")
    models[0].compile_prompt("a")
    for kind, shape, attention in (("growing", (4, 33), "Triton"), ("static", (129, 1), "prefix_attention")):
        ids = torch.randint(0, 60, shape)
        results = []
        for m in models:
            cache = CACHES[kind]()
            before = len(launches)
            logits = m(ids, prompt="a", past_key_values=cache, logits_to_keep=1).logits
            # The last layer's attention is that of one query a row.
            expected = ["many rows", *norm, attention, "many rows", *norm, "prefix_attention"]
            assert m is not models[0] or launches[before:] == expected
            step = m(ids[:, :1], prompt="a", past_key_values=cache).logits
            results.append(torch.cat([logits, step], 1))
        check(results)


def test_norms_of_heads_whose_weights_are_distances_from_1(launches: Launches) -> None:
    """As Gemma's are, in a base of Qwen3's structure; one norm has another eps."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    def make() -> PreTrainedModel:
        base = FAMILIES["qwen3"].make()
        for layer in base.model.layers:
            for name in ("q_norm", "k_norm"):
                norm = GemmaRMSNorm(16, eps=0.3 if name == "k_norm" else 1e-6)
                norm.weight = nn.Parameter(getattr(layer.self_attn, name).weight.detach() - 1.0)
                setattr(layer.self_attn, name, norm)
        return base

    models = trio(make, torch.bfloat16)
    models[0].compile_prompt("a")
    with launches.of(*TWO_NORMED_LAYERS):
        found = models[0](ROWS[1][None], prompt="a").logits
    check([found, *(m(ROWS[1][None], prompt="a").logits for m in models[1:])])


def test_embeddings_are_served_and_left_as_they_are(launches: Launches) -> None:
    models = of_family("llama")
    models[0].compile_prompt("a")
    embeds = [m.get_input_embeddings()(ROWS[1])[None] for m in models]
    before = embeds[0].clone()
    with launches.of(*TWO_LAYERS):
        found = models[0](inputs_embeds=embeds[0], prompt="a").logits
    assert torch.equal(embeds[0], before)
    check([found, *(m(inputs_embeds=x, prompt="a").logits for m, x in zip(models[1:], embeds[1:], strict=True))])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_8_bit_prefixes(dtype: torch.dtype, launches: Launches) -> None:
    models = of_family("llama")
    prefix = models[0].compile_prompt("a")
    for m in models:
        m.add_prompt("q", prefix.quantize(block=4, dtype=dtype))
    with launches.of(*TWO_LAYERS):
        found = models[0](ROWS[1][None], prompt="q").logits
    check([found, *(m(ROWS[1][None], prompt="q").logits for m in models[1:])])


def test_prompts_compile_through_it(launches: Launches) -> None:
    fused, plain, exact = of_family("qwen2")
    fused.explain()
    with launches.of(*TWO_LAYERS):
        found = fused.compile_prompt("b")
    with launches.of():  # the base's own attention, and its own modules
        base = plain.compile_prompt("b")
    want = exact.compile_prompt("b")
    for what in ("keys", "values"):
        for three in zip(getattr(found, what), getattr(base, what), getattr(want, what), strict=True):
            assert_within_noise(three[0], three[2], three[1], what)
    check([found.next_logits, base.next_logits, want.next_logits])


# ---- text -----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral_long_window", "qwen2", "qwen3"])
def test_greedy_text_is_that_of_the_row_alone(family: str, options: str, launches: Launches) -> None:
    """Of the base's own modules in float64."""
    model, _, exact = of_family(family)
    new = 8
    rows = ROWS[:1] if options == "lookup" else ROWS
    names = NAMES[: len(rows)]
    alone = [
        exact.generate(row[None], prompt=name, max_new_tokens=new)[0, -new:].tolist()
        for row, name in zip(rows, names, strict=True)
    ]
    model.compile_prompt("a"), model.compile_prompt("b")
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, side)
        before = len(launches)
        found = model.generate(ids, attention_mask=mask, prompt=names, max_new_tokens=new, **OPTIONS[options])
        ran = launches[before:]
        layers = ran.count("prompt_qkv") // 2
        assert layers >= 1 and ran == [*two_layers(family)] * layers
        assert found[:, -new:].tolist() == alone


# ---- a layer's launches ---------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts operators that launch a kernel, and refuses those that read a value."""

    FREE = (
        "view",
        "empty",
        "t",
        "transpose",
        "slice",
        "alias",
        "detach",
        "expand",
        "unsqueeze",
        "new_empty",
        "select",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__.removeprefix("_unsafe_").removeprefix("_")
        if name == "local_scalar_dense":
            raise AssertionError("a value is read on the host")
        if name not in self.FREE:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen3Config"])
@torch.no_grad()
def test_a_layer_takes_nine_or_ten_launches_and_reads_no_value(config: str, kind: str, launches: Launches) -> None:
    """RMSNorm, QKV, RoPE and the append to the cache (with norms of heads, they and RoPE are one more); attention;
    seven behind it: the output projection and the residual, a norm, gate, activation, up, product, down and the
    residual. The first layer starts from token ids."""
    import transformers

    counts = []
    context = hooks.PrefixContext(None, None)
    normed = ["head_norm"] * (config == "Qwen3Config")
    for layers in (2, 3):
        of = getattr(transformers, config)
        base = of_config(lambda of=of, layers=layers: families._llama_like(of, num_hidden_layers=layers))[0].base
        decoder = decoder_of(base)
        cache = OwnTokenCache(layers) if kind == "growing" else make_static_cache(layers, 24)
        ids, positions = torch.randint(0, 60, (3, 1)), torch.zeros(1, 1, dtype=torch.long)
        decoder(ids, positions, context, cache)  # makes the buffers
        with Operators() as operators, launches.of(*["prompt_qkv", *normed, "prefix_attention"] * layers):
            decoder(ids, positions, context, cache)
        counts.append(operators.found)
    behind = counts[1] - counts[0]
    norm = {"fused_rms_norm"} if ON_GPU else {"pow", "mean", "add_", "rsqrt", "mul", "to_copy"}
    plain = Counter({name: count for name, count in behind.items() if name not in norm})
    ours = {f"{name}_cuda": 1 for name in ("prompt_qkv", *normed, "prefix_attention")}
    assert plain == {**ours, "addmm_": 2, "mm": 2, "silu": 1, "mul_": 1}, behind
    assert not counts[0]["embedding"] and counts[0]["foreach_add_"] == (kind == "static")


def decoder_of(base: PreTrainedModel) -> CudaDecoder:
    from softprompt_fast.integrations.fused_decoder import plan

    decoder = plan(base, "cuda")
    assert isinstance(decoder, CudaDecoder), decoder
    return decoder


# ---- stepping aside -------------------------------------------------------------------------------------------------


def reason_of(model: SoftPromptModel) -> str:
    layer = model.explain().layers[0]
    assert layer.backend == "cuda"
    return layer.reason


def test_explain_names_the_path() -> None:
    llama, qwen3, gemma = (spf.explain(of_family(name)[0]) for name in ("llama", "qwen3", "gemma"))
    for found in (llama, qwen3):
        assert f"layers 0-1: {PATH}, backend cuda" in str(found)
        assert "CUDA kernels, first layer from token ids" in found.note
    assert "CUDA kernels, first layer from embeddings" in gemma.note


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].shares_prefix and name not in FUSED])
def test_other_families_have_a_reason(family: str) -> None:
    base = FAMILIES[family].make().to(torch.bfloat16)
    why = reason_of(SoftPromptModel(base, backend="cuda"))
    assert why.startswith("asked for by name; decoder not fused: ")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in LOOK_ALIKES if "scaled" not in name or "position" in name])
def test_what_only_looks_alike_is_refused(name: str, dtype: torch.dtype) -> None:
    model = of_config(LOOK_ALIKES[name], dtype)[0]
    assert "its logits differ from the fused pass" in reason_of(model) or "activation ReLU" in reason_of(model)


@pytest.mark.parametrize(
    "multiplier",
    [{"embedding_multiplier": 1.1}, {"residual_multiplier": 0.9}, {"logits_scaling": 1.05}],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multipliers_are_seen_through_the_noise_of_16_bits(multiplier: dict, dtype: torch.dtype) -> None:
    import transformers

    model = of_config(lambda: families._llama_like(transformers.GraniteConfig, **multiplier), dtype)[0]
    assert "its logits differ from the fused pass" in reason_of(model)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_of_the_base_are_seen(change: str, launches: Launches) -> None:
    make_change, why = CHANGES[change]
    model, plain, _ = of_family("llama")
    ids = torch.stack([ROWS[1], ROWS[1].flip(0)])
    model(ids, prompt=None)
    for m in (model, plain):
        torch.manual_seed(0)  # LoRA draws its weights
        make_change(m)
    expected = plain(ids, prompt=None).logits
    with launches.of("prefix_attention", "prefix_attention"):
        found = model(ids, prompt=None).logits
    assert torch.equal(found, expected)
    assert why in reason_of(model)


class OtherLinear(nn.Linear):
    """As quantised layers are: a class of their own."""


def _adapters(base: PreTrainedModel) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base)


def _other_linear(base: PreTrainedModel) -> None:
    linear = base.model.layers[1].mlp.up_proj
    linear.__class__ = OtherLinear


def _narrow(base: PreTrainedModel) -> None:
    """Weights whose rows do not begin at multiples of 16 bytes."""
    linear = base.model.layers[0].self_attn.k_proj
    shifted = torch.cat([linear.weight.flatten()[:1], linear.weight.flatten()])[1:].view_as(linear.weight)
    linear.weight = nn.Parameter(shifted, requires_grad=False)


BASES: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "float32": (lambda b: b.float(), "it takes bfloat16 or float16 weights on one device, found float32"),
    "LoRA": (_adapters, "a projection is no nn.Linear but a peft."),
    "another linear": (_other_linear, "a projection is no nn.Linear but a"),
    "unaligned weights": (_narrow, "do not suit the CUDA kernel's loads of 16 bytes"),
}


@pytest.mark.parametrize("change", BASES)
def test_bases_that_it_does_not_take(change: str) -> None:
    make_change, why = BASES[change]
    base = FAMILIES["llama"].make().to(torch.bfloat16)
    make_change(base)
    if change == "LoRA":
        base.to(torch.bfloat16)
    assert why in reason_of(SoftPromptModel(base, backend="cuda"))


def test_calls_that_it_does_not_take(launches: Launches) -> None:
    model = of_family("llama")[0]
    model.explain()
    embeds = model.get_input_embeddings()(ROWS[1])[None].requires_grad_()
    calls: list[Callable[[], Any]] = [
        lambda: model(ROWS[1][None], prompt=None, output_hidden_states=True),
        lambda: model(inputs_embeds=embeds, prompt=None).logits.sum().backward(),
        torch.no_grad()(lambda: model(ROWS[1][None], labels=ROWS[1][None], prompt=None, return_logits=False)),
    ]
    for call in calls:
        before = len(launches)
        call()
        assert "prompt_qkv" not in launches[before:]
    assert embeds.grad is not None and embeds.grad.any()


def test_only_where_backend_cuda_serves(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" does not pick it before it has run on a GPU; the environment may."""
    model = with_prompts(FAMILIES["llama"].make(), None).to(torch.bfloat16)
    model(ROWS[1][None], prompt="a")
    assert not launches
    monkeypatch.setenv("SOFTPROMPT_FAST_BACKEND", "cuda")
    model.invalidate()
    model.compile_prompt("a")
    with launches.of(*TWO_LAYERS):
        model(ROWS[1][None], prompt="a")
    monkeypatch.setattr(heuristics, "backend_order", lambda device: ("cuda", "torch", "reference"))
    monkeypatch.delenv("SOFTPROMPT_FAST_BACKEND")
    with launches.of(*TWO_LAYERS):
        model(ROWS[1][None], prompt="a")


def test_nothing_is_planned_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_family("llama")[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "a CUDA graph is being captured" in str(model._fused.get("cuda"))
    monkeypatch.undo()
    assert isinstance(model._fused.get("cuda"), CudaDecoder)
