# SPDX-License-Identifier: Apache-2.0
"""The fused decoder gives what the base's own pass gives, and steps aside (with a reason) where it would not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from models import assert_same_logits, make_base, make_model, make_prompt, make_rows, pad_rows
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

import softprompt_fast as spf
from softprompt_fast import SoftPromptModel
from softprompt_fast.backends import heuristics, native
from softprompt_fast.cache import OwnTokenCache, make_static_cache
from softprompt_fast.integrations import fused_decoder
from softprompt_fast.integrations.fused_decoder import FusedDecoder
from tests import families
from tests.families import FAMILIES

pytestmark = pytest.mark.skipif(not native.status()[0], reason=f"C++ extension: {native.status()[1]}")

FUSED = ("llama", "mistral_short_window", "mistral_long_window", "qwen2", "qwen3", "gemma")
ROWS = make_rows([4, 7, 1])
NAMES = ["a", None, "b"]


def switch_off(model: SoftPromptModel) -> SoftPromptModel:
    """The same model on the path of old."""
    model._fused._plans = dict.fromkeys(("cpu", "cuda"), "switched off by a test")
    return model


def of_family(name: str) -> SoftPromptModel:
    base = FAMILIES[name].make()
    model = SoftPromptModel(base)
    for prompt, length in (("a", 5), ("b", 9)):
        model.add_prompt(prompt, make_prompt(base, length=length, seed=length).requires_grad_(False))
    return model


def pair(name: str) -> tuple[SoftPromptModel, SoftPromptModel]:
    """A model that may be fused, and one that is not."""
    return of_family(name), switch_off(of_family(name))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of the embeddings of every fused pass."""
    seen: list[torch.Size] = []
    run = FusedDecoder.__call__

    def recorded(self: FusedDecoder, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(hidden.shape)
        return run(self, hidden, *args, **kwargs)

    monkeypatch.setattr(FusedDecoder, "__call__", recorded)
    return seen


@contextmanager
def counting(passes: list[torch.Size]) -> Iterator[Callable[[], int]]:
    """Fused passes from here on; those of planning and compiling lie behind."""
    before = len(passes)
    yield lambda: len(passes) - before


# ---- which bases it serves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_right_or_refused_with_a_reason(family: str) -> None:
    model, plain = pair(family)
    layer = model.explain().layers[0]
    assert (layer.path == "shared prefix, fused decoder") == (family in FUSED)
    assert family in FUSED or layer.reason
    for side in ("left", "right"):
        ids, mask = pad_rows(ROWS, side)
        found, expected = (m(ids, attention_mask=mask, prompt=NAMES).logits for m in (model, plain))
        assert_same_logits(found[mask.bool()], expected[mask.bool()])
    found, expected = (m.generate(ids, attention_mask=mask, prompt=NAMES, max_new_tokens=6) for m in (model, plain))
    assert torch.equal(found, expected)


def _ministral3() -> Any:
    # Queries grow with their position, from 32 on.
    rope = {"rope_type": "default", "rope_theta": 100.0, "llama_4_scaling_beta": 0.1}
    rope["original_max_position_embeddings"] = 32
    return families._llama_like(
        transformers.Ministral3Config, rope_parameters=rope, head_dim=8, max_position_embeddings=128
    )


LOOK_ALIKES = {
    "queries scaled by position": _ministral3,
    "layers without positions": lambda: families._llama_like(transformers.SmolLM3Config, num_hidden_layers=4),
    "embeddings scaled": lambda: families._llama_like(transformers.GraniteConfig, embedding_multiplier=1.001),
    "residuals scaled": lambda: families._llama_like(transformers.GraniteConfig, residual_multiplier=1.001),
    "logits scaled": lambda: families._llama_like(transformers.GraniteConfig, logits_scaling=1.001),
    "another activation": lambda: families._llama_like(transformers.LlamaConfig, hidden_act="relu"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_base_of_the_same_structure_that_computes_something_else_is_refused(name: str) -> None:
    base = AutoModelForCausalLM.from_config(LOOK_ALIKES[name]()).eval()
    families.randomise(base, 1)
    model = SoftPromptModel(base)
    reason = model.explain().layers[0].reason
    assert "its logits differ from the fused pass" in reason or "activation ReLU is not one of" in reason


VARIANTS = {
    "biases everywhere": lambda: families._llama_like(transformers.LlamaConfig, attention_bias=True, mlp_bias=True),
    "scores scaled": lambda: families._llama_like(transformers.GraniteConfig, attention_multiplier=0.2),
    "gelu": lambda: families._llama_like(transformers.LlamaConfig, hidden_act="gelu"),
    "heads wider than the model": lambda: families._llama_like(
        transformers.LlamaConfig, head_dim=24, num_key_value_heads=4
    ),
    "a window in one layer of two": lambda: families._llama_like(
        transformers.Qwen2Config, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_served(name: str, passes: list[torch.Size]) -> None:
    base = AutoModelForCausalLM.from_config(VARIANTS[name]()).eval()
    families.randomise(base, 1)
    model = SoftPromptModel(base)
    model.add_prompt("a", make_prompt(base).requires_grad_(False))
    ids = make_rows([9])[0][None]
    expected = switch_off(model)(ids, prompt="a").logits
    model.invalidate()
    model.compile_prompt("a")
    with counting(passes) as fused:
        assert_same_logits(model(ids, prompt="a").logits, expected)
        assert fused() == 1


def test_a_norm_of_another_formula_is_refused() -> None:
    base = make_base()
    norm = base.model.layers[1].input_layernorm
    for broken in (nn.LayerNorm(32), type("Doubled", (type(norm),), {"forward": lambda s, x: 2 * norm(x)})(32)):
        base.model.layers[1].input_layernorm = broken
        assert "is no RMS norm" in SoftPromptModel(base).explain().layers[0].reason


def test_prompts_compile_to_what_they_did(passes: list[torch.Size]) -> None:
    base = make_base()
    prompts = [make_prompt(base, "MULTITASK_PROMPT_TUNING"), make_prompt(base, length=1), make_prompt(base, length=60)]
    model, plain = SoftPromptModel(base), switch_off(SoftPromptModel(base))
    model.explain()
    for i, prompt in enumerate(prompts):
        task = 1 if i == 0 else None
        for m in (model, plain):
            m.add_prompt(str(i), prompt.requires_grad_(False))
        with counting(passes) as fused:
            found = model.compile_prompt(str(i), task=task)
            assert fused() == 1
        expected = plain.compile_prompt(str(i), task=task)
        for ours, theirs in zip(
            (*found.keys, *found.values, found.next_logits),
            (*expected.keys, *expected.values, expected.next_logits),
            strict=True,
        ):
            assert ours.is_contiguous()
            assert_same_logits(ours, theirs)


# ---- the same results -----------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral_long_window", "qwen3"])
def test_generate(family: str, options: str, passes: list[torch.Size]) -> None:
    model, plain = pair(family)
    rows = ROWS[1:2] if options == "lookup" else ROWS
    model.compile_prompt("a"), model.compile_prompt("b")
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, side)
        results = []
        for m in (model, plain):
            torch.manual_seed(0)
            with counting(passes) as fused:
                names = NAMES[: len(rows)]
                text = m.generate(ids, attention_mask=mask, prompt=names, max_new_tokens=12, **OPTIONS[options])
                results.append(text)
                assert bool(fused()) == (m is model)
        assert torch.equal(*results)


def test_generate_from_prompts_alone_and_with_empty_rows() -> None:
    model, plain = pair("llama")
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[1] = 0
    ids = torch.randint(0, 60, (3, 4))
    calls: list[Callable[[SoftPromptModel], torch.Tensor]] = [
        lambda m: m.generate(prompt=["a", "b"], max_new_tokens=8),
        lambda m: m.generate(ids, attention_mask=mask, prompt=["a", "b", None], max_new_tokens=8),
        lambda m: m.generate(ids, prompt=None, max_new_tokens=8),
    ]
    for call in calls:
        assert torch.equal(call(model), call(plain))


@pytest.mark.parametrize("make_cache", [lambda: OwnTokenCache(2), lambda: make_static_cache(2, 24), DynamicCache])
def test_a_cache_is_continued(make_cache: Callable[[], Any], passes: list[torch.Size]) -> None:
    model, plain = make_model(), switch_off(make_model())
    ids, mask = pad_rows(ROWS, "left")
    more = torch.randint(0, 60, (3, 5))
    model.compile_prompt("a"), model.compile_prompt("b")
    results = []
    for m in (model, plain):
        cache = make_cache()
        with counting(passes) as fused:
            out = m(ids, attention_mask=mask, prompt=NAMES, past_key_values=cache)
            whole = torch.cat([mask, torch.ones_like(more)], dim=1)
            steps = [m(more[:, :3], attention_mask=whole[:, :-2], prompt=NAMES, past_key_values=out.past_key_values)]
            steps += [m(more[:, i : i + 1], prompt=NAMES, past_key_values=out.past_key_values) for i in (3, 4)]
            assert fused() == (4 if m is model else 0)
        assert out.past_key_values is cache and int(cache.get_seq_length()) == 12
        results.append([out.logits[mask.bool()], *(step.logits for step in steps)])
    for found, expected in zip(*results, strict=True):
        assert_same_logits(found, expected)


def test_a_cache_changes_hands_between_fused_and_plain_passes() -> None:
    model, plain = make_model(), switch_off(make_model())
    ids = torch.stack([ROWS[1], ROWS[1].flip(0)])
    expected = plain(ids, prompt=None).logits
    cache = OwnTokenCache(2)
    parts = [
        m(part, prompt=None, past_key_values=cache).logits
        for m, part in zip((model, plain, model), ids.split([3, 2, 2], dim=1), strict=True)
    ]
    assert_same_logits(torch.cat(parts, dim=1), expected)


def test_a_cache_of_another_shape_is_refused() -> None:
    model = make_model()
    for make_cache in (lambda: OwnTokenCache(2), lambda: make_static_cache(2, 24)):
        for wrong in (torch.zeros(1, 3, 1, 8), torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 8).double()):
            cache = make_cache()
            model(ROWS[2][None], prompt=None, past_key_values=cache)
            for layer in cache.layers:
                layer.keys, layer.values = wrong, wrong
            with pytest.raises(ValueError, match="past_key_values: this model caches 2 heads of 8"):
                model(ROWS[2][None], prompt=None, past_key_values=cache)


@pytest.mark.parametrize("keep", [0, 1, 3, 99, torch.tensor([0, 5])], ids=str)
def test_logits_to_keep(keep: Any) -> None:
    model, plain = make_model(), switch_off(make_model())
    found, expected = (m(ROWS[1].expand(2, -1), prompt="a", logits_to_keep=keep).logits for m in (model, plain))
    assert_same_logits(found, expected)


def test_embeddings_are_served_and_left_as_they_are(passes: list[torch.Size]) -> None:
    model, plain = make_model(), switch_off(make_model())
    embeds = model.get_input_embeddings()(ROWS[1])[None]
    before = embeds.clone()
    model.compile_prompt("a")
    with counting(passes) as fused:
        found = model(inputs_embeds=embeds, prompt="a").logits
        assert fused() == 1
    assert torch.equal(embeds, before)
    assert_same_logits(found, plain(inputs_embeds=embeds, prompt="a").logits)


def test_losses_of_an_evaluation(passes: list[torch.Size]) -> None:
    model, plain = make_model(), switch_off(make_model())
    ids, mask = pad_rows(ROWS, "right")
    model.compile_prompt("a"), model.compile_prompt("b")
    with counting(passes) as fused:
        found = model(ids, attention_mask=mask, labels=ids, prompt=NAMES)
        assert fused() == 1
    expected = plain(ids, attention_mask=mask, labels=ids, prompt=NAMES)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    assert type(found) is type(expected)


def test_bad_index_values_are_refused_before_a_kernel_reads_them() -> None:
    model = make_model()
    for wrong, message in (
        ({"own_start": torch.tensor([9])}, r"own_start: expected values within 0\.\.1, found \[9\]"),
        ({"position_ids": torch.arange(3)[None]}, r"position_ids: expected shape \(1, 1\), found \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ROWS[2][None], prompt="a", **wrong)
    for wrong in (torch.zeros(1, 3, 31), torch.zeros(1, 3, 64)):
        with pytest.raises(RuntimeError):
            model(inputs_embeds=wrong, prompt="a")


# ---- stepping aside -------------------------------------------------------------------------------------------------


def _lora(model: SoftPromptModel) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model.base)


def _add_one(*args: Any) -> Any:
    return args[-1] + 1


def _patch_forward(model: SoftPromptModel) -> None:
    mlp = model.base.model.layers[0].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)


def _replace_weight(model: SoftPromptModel) -> None:
    linear = model.base.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 2, requires_grad=False)


def _set_data(model: SoftPromptModel) -> None:
    weight = model.base.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data * 2


def _add_hidden(model: SoftPromptModel) -> None:
    model.base.config.output_hidden_states = True


CHANGES: dict[str, tuple[Callable[[SoftPromptModel], Any], str]] = {
    "hook": (lambda m: m.base.model.layers[0].register_forward_hook(_add_one), "has hooks"),
    "pre-hook": (
        lambda m: m.base.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        "has hooks",
    ),
    "LoRA": (_lora, "were replaced"),
    "forward of its own": (_patch_forward, "has a forward of its own"),
    "weight in place": (lambda m: m.base.model.norm.weight.mul_(2), "weights changed"),
    "weight.data": (_set_data, "weights changed"),
    "new parameter": (_replace_weight, "parameters of the base were replaced"),
    "hidden states": (_add_hidden, "hidden states"),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_of_the_base_are_seen(change: str, passes: list[torch.Size], caplog: pytest.LogCaptureFixture) -> None:
    make_change, reason = CHANGES[change]
    model, plain = make_model(), switch_off(make_model())
    ids = torch.stack([ROWS[1], ROWS[1].flip(0)])
    before = model(ids, prompt=None).logits
    for m in (model, plain):
        torch.manual_seed(0)  # LoRA draws its weights
        make_change(m)
    expected = plain(ids, prompt=None).logits
    with counting(passes) as fused, caplog.at_level("INFO", logger="softprompt_fast"):
        found = model(ids, prompt=None)
        assert fused() == 0
    assert torch.equal(found.logits, expected)
    assert change == "hidden states" or not torch.allclose(found.logits, before)
    assert (found.get("hidden_states") is not None) == (change == "hidden states")
    assert reason in caplog.text and reason in model.explain().layers[0].reason
    if "weight" in change or "parameter" in change:
        model.invalidate()
        model.explain()
        with counting(passes) as fused:
            assert_same_logits(model(ids, prompt=None).logits, expected)
            assert fused() == 1


def test_one_call_with_hidden_states_does_not_end_it(passes: list[torch.Size]) -> None:
    model = make_model()
    assert model(ROWS[1][None], prompt=None, output_hidden_states=True).hidden_states
    with counting(passes) as fused:
        model(ROWS[1][None], prompt=None)
        assert fused() == 1


def test_a_hook_that_is_there_first_only_delays(passes: list[torch.Size]) -> None:
    model = make_model()
    handle = model.base.model.layers[0].register_forward_hook(lambda *_: None)
    model(ROWS[1][None], prompt="a")
    assert not passes and "has hooks" in model.explain().layers[0].reason
    handle.remove()
    assert model.explain().layers[0].path == "shared prefix, fused decoder"


def test_a_hook_for_all_modules_is_seen(passes: list[torch.Size]) -> None:
    model = make_model()
    model.compile_prompt("a")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with counting(passes) as fused:
            model(ROWS[1][None], prompt="a")
            assert fused() == 0
    finally:
        handle.remove()
    with counting(passes) as fused:
        model(ROWS[1][None], prompt="a")
        assert fused() == 1


def test_loading_weights_plans_anew(passes: list[torch.Size]) -> None:
    model, other = make_model(prompts={}), make_model(prompts={})
    with torch.no_grad():
        for weight in other.base.parameters():
            weight.mul_(1.1)
    model.explain(), other.invalidate()
    model.load_state_dict({f"base.{name}": weight for name, weight in other.base.state_dict().items()})
    model.explain()
    with counting(passes) as fused:
        assert_same_logits(model(ROWS[1][None]).logits, switch_off(other)(ROWS[1][None]).logits)
        assert fused() == 1


@pytest.mark.parametrize("fused_step", [False, True])
def test_steps_of_an_optimizer_are_seen(fused_step: bool, passes: list[torch.Size]) -> None:
    base = make_base().requires_grad_(True)
    model = SoftPromptModel(base, freeze_base=False)
    model.explain()
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.1, fused=fused_step)
    model(ROWS[1][None], labels=ROWS[1][None], prompt=None).loss.backward()
    optimizer.step()
    with torch.no_grad(), counting(passes) as fused:
        found = model(ROWS[1][None]).logits
        assert fused() == 0
        assert_same_logits(found, base(ROWS[1][None]).logits)


def test_gradients_take_the_base(passes: list[torch.Size]) -> None:
    model = make_model()
    trained = make_prompt(model.base, seed=4)
    model.add_prompt("t", trained)
    model.compile_prompt("a")
    embeds = model.get_input_embeddings()(ROWS[1])[None].requires_grad_()
    with counting(passes) as fused:
        model(ROWS[1][None], labels=ROWS[1][None], prompt="t").loss.backward()
        model(inputs_embeds=embeds, labels=ROWS[1][None], prompt="a").loss.backward()
        assert fused() == 0
    assert trained.embedding.weight.grad.any() and embeds.grad.any()
    with torch.no_grad(), counting(passes) as fused:
        model(ROWS[1][None], prompt="t")  # compiles anew, too
        assert fused() == 2
    model.base.requires_grad_(True)
    with counting(passes) as fused:
        assert model(ROWS[1][None], prompt="a").logits.requires_grad
        assert fused() == 0


def test_training_mode_matters_only_where_something_drops_out(passes: list[torch.Size]) -> None:
    for dropout in (0.0, 0.5):
        config = families._llama_like(transformers.LlamaConfig, attention_dropout=dropout)
        base = AutoModelForCausalLM.from_config(config).eval()
        model = SoftPromptModel(base)
        for planned in (False, True):
            model.train()
            with torch.no_grad(), counting(passes) as fused:
                model(ROWS[1][None])
                assert bool(fused()) == (dropout == 0.0)
            if not planned:
                model.eval()
                assert isinstance(model._fused.get(None), FusedDecoder)


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({}, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        ({"output_hidden_states": True}, nullcontext),
        ({"output_attentions": True}, nullcontext),
    ],
    ids=["autocast", "hidden states", "attention weights"],
)
def test_calls_that_ask_for_more_take_the_base(options: dict, context: Any, passes: list[torch.Size]) -> None:
    model, plain = make_model(), switch_off(make_model())
    model.explain()
    with counting(passes) as fused, context():
        found, expected = (m(ROWS[1][None], prompt=None, **options) for m in (model, plain))
        assert fused() == 0
    assert torch.equal(found.logits, expected.logits) and found.keys() == expected.keys()


def test_a_dispatch_mode_sees_the_products(passes: list[torch.Size]) -> None:
    model = make_model()
    model.explain()
    with counting(passes) as fused, FlopCounterMode(display=False) as counter:
        model(ROWS[1][None], prompt=None)
        assert fused() == 0
    assert counter.get_total_flops() > 0


def test_other_backends_and_dtypes_take_the_base(passes: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(backend="torch")(ROWS[1][None], prompt="a")
    assert not passes
    half = make_model().to(torch.bfloat16)
    half(ROWS[1][None], prompt="a")
    assert not passes
    assert "decoder not fused: it takes float32 weights on the CPU, found bfloat16" in half.explain().layers[0].reason
    model = make_model()
    monkeypatch.setenv("SOFTPROMPT_FAST_BACKEND", "torch")
    model(ROWS[1][None], prompt="a")
    assert not passes
    monkeypatch.setenv("SOFTPROMPT_FAST_BACKEND", "cpu")
    model(ROWS[1][None], prompt="a")
    assert passes
    half.float()
    assert half.explain().layers[0].path == "shared prefix, fused decoder"


def test_adapters_in_the_base_are_refused() -> None:
    base = make_base()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base)
    assert "a projection is no nn.Linear but a peft." in SoftPromptModel(base).explain().layers[0].reason


# ---- planning -------------------------------------------------------------------------------------------------------


def test_threads_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = make_model(), switch_off(make_model())
    plans = []
    make_plan = fused_decoder.plan
    monkeypatch.setattr(fused_decoder, "plan", lambda base, *how: plans.append(base) or make_plan(base, *how))
    expected = {name: plain(ROWS[1][None], prompt=name).logits for name in NAMES}
    found: list[tuple[str | None, torch.Tensor]] = []
    start = threading.Barrier(9)

    def work(name: str | None) -> None:
        start.wait()
        found.append((name, model(ROWS[1][None], prompt=name).logits))

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 1 and len(found) == 9
    for name, logits in found:
        assert_same_logits(logits, expected[name])


def test_a_plan_made_in_inference_mode_serves_later() -> None:
    model = make_model()
    with torch.inference_mode():
        found = model(ROWS[1][None], prompt="a").logits.clone()
    assert torch.equal(model(ROWS[1][None], prompt="a").logits, found)


def test_packing_follows_memory_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * sum(m.weight.numel() for m in make_base().modules() if isinstance(m, nn.Linear))
    for available, variable, packed in ((4 * weights, None, True), (4 * weights - 1, None, False), (0, "1", True)):
        monkeypatch.setattr(fused_decoder, "available_memory", lambda available=available: available)
        if variable is not None:
            monkeypatch.setenv(fused_decoder.PACK_VARIABLE, variable)
        told = str(spf.explain(make_model()))
        assert ("fused decoder, packed weights" in told) == packed
        assert ("more than a quarter of the available memory" in told) == (not packed)
    monkeypatch.setenv(fused_decoder.PACK_VARIABLE, "0")
    monkeypatch.setattr(fused_decoder, "available_memory", lambda: 1 << 60)
    model = make_model()
    assert "SOFTPROMPT_FAST_PACK_WEIGHTS=0" in str(model.explain())
    assert_same_logits(
        model(ROWS[1][None], prompt="a").logits, switch_off(make_model())(ROWS[1][None], prompt="a").logits
    )
    monkeypatch.setenv(fused_decoder.PACK_VARIABLE, "yes")
    with pytest.raises(ValueError, match="SOFTPROMPT_FAST_PACK_WEIGHTS: expected 0 or 1, found 'yes'"):
        make_model()(ROWS[1][None])


def testavailable_memory_is_this_machines() -> None:
    assert 0 < fused_decoder.available_memory() < 1 << 50


def test_heuristics() -> None:
    assert heuristics.pack_weights(538_000_000, 8 << 30) and not heuristics.pack_weights(3 << 30, 8 << 30)
    assert heuristics.copy_prefix(1, 100, fused=False) and not heuristics.copy_prefix(1, 100, fused=True)
    assert not heuristics.copy_prefix(2, 100, fused=False) and not heuristics.copy_prefix(1, 8192, fused=False)


def test_a_single_row_shares_its_prefix_where_the_decoder_is_fused(passes: list[torch.Size]) -> None:
    model, plain = make_model(), switch_off(make_model())
    model.compile_prompt("a")
    with counting(passes) as fused:
        found = model.generate(ROWS[1][None], prompt="a", max_new_tokens=6)
        assert fused() == 6
    assert torch.equal(found, plain.generate(ROWS[1][None], prompt="a", max_new_tokens=6))
