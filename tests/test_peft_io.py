# SPDX-License-Identifier: Apache-2.0
"""Against the installed PEFT: the same values, gradients and files, in both directions."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from softprompt_fast.errors import AdapterError, IncompatibleBaseError
from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.prompt import METHODS, SoftPrompt

TASK_IDS = torch.tensor([0, 2])
COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
CPT_IDS = [3, 1, 4, 1, 5, 9, 2, 6]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(**COMMON),
    "PROMPT_TUNING-vocab": lambda: PromptTuningConfig(**COMMON, prompt_tuning_init="SAMPLE_VOCAB"),
    "P_TUNING": lambda: PromptEncoderConfig(**COMMON, encoder_hidden_size=12),
    "P_TUNING-LSTM": lambda: PromptEncoderConfig(
        **COMMON, encoder_hidden_size=12, encoder_reparameterization_type="LSTM", encoder_num_layers=1
    ),
    "MULTITASK_PROMPT_TUNING": lambda: MultitaskPromptTuningConfig(**COMMON, num_tasks=3, num_ranks=2),
    "CPT": lambda: CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=CPT_IDS,
        cpt_mask=[1] * 8,
        cpt_tokens_type_mask=[1, 2, 3, 4, 5, 6, 7, 8],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.8,
    ),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(**COMMON),
    "PREFIX_TUNING-projection": lambda: PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=12),
    "PREFIX_TUNING-zero": lambda: PrefixTuningConfig(
        **COMMON, prefix_projection=True, encoder_hidden_size=12, init_weights="zero"
    ),
    "CARTRIDGE": lambda: CartridgeConfig(**COMMON, num_frozen_tokens=2),
    "CARTRIDGE-none-frozen": lambda: CartridgeConfig(**COMMON, num_frozen_tokens=0),
}


def llama(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def peft_llama(variant: str, *, trained: bool = False) -> PeftModel:
    """A fresh PEFT model; `trained` moves every trainable parameter by random steps."""
    base = llama()
    torch.manual_seed(1)
    model = get_peft_model(base, CONFIGS[variant]())
    if trained:
        with torch.no_grad():
            for parameter in encoder_of(model).parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
            if variant == "CPT":
                # Well inside the ball: on its surface every projection, of which PEFT does one a call, rounds anew.
                delta = encoder_of(model).delta_embedding.weight
                delta.copy_(0.5 * encoder_of(model).get_projection())
    return model


def encoder_of(model: PeftModel) -> nn.Module:
    return model.prompt_encoder[model.active_adapter]


def peft_value(model: PeftModel) -> torch.Tensor:
    """PEFT's prompt for two rows: embeddings [2, P, H] or keys and values [layers * 2, 2, Hkv, P, D]."""
    prompt = model.get_prompt(2, task_ids=TASK_IDS)
    if isinstance(prompt, torch.Tensor):
        return prompt
    cache = getattr(prompt, "self_attention_cache", prompt)
    return torch.stack([tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])


def our_value(prompt: SoftPrompt) -> torch.Tensor:
    if prompt.kind == "embedding":
        embeddings = prompt.embeddings(TASK_IDS)
        return embeddings if embeddings.dim() == 3 else embeddings.expand(2, -1, -1)
    flat = torch.stack([tensor for pair in prompt.key_values() for tensor in pair])
    return flat[:, None].expand(-1, 2, -1, -1, -1)


def test_configs_cover_every_method() -> None:
    assert {variant.split("-")[0] for variant in CONFIGS} == set(METHODS)


# ---------------------------------------------------------------------------- live models


@pytest.mark.parametrize("variant", CONFIGS)
def test_same_seed_same_prompt(variant: str) -> None:
    model = peft_llama(variant)
    torch.manual_seed(1)
    ours = SoftPrompt.from_config(
        CONFIGS[variant]().to_dict() | model.peft_config["default"].to_dict(),
        token_embeddings=model.base_model.get_input_embeddings(),
    )
    theirs = dict(encoder_of(model).named_parameters())
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
        name: p.requires_grad for name, p in theirs.items()
    }
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert torch.equal(our_value(ours), peft_value(model))


@pytest.mark.parametrize("variant", CONFIGS)
def test_for_model_sizes_prompts_as_peft_does(variant: str) -> None:
    model = peft_llama(variant)
    options = {key: value for key, value in CONFIGS[variant]().to_dict().items() if value is not None}
    for derived in ("peft_type", "peft_version", "num_transformer_submodules"):
        options.pop(derived, None)
    if variant == "CPT":
        options.pop("num_virtual_tokens")
    ours = SoftPrompt.for_model(variant.split("-")[0], llama(), **options)
    theirs = model.peft_config["default"].to_dict()
    for name in ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
        assert ours.config[name] == theirs[name], name


@pytest.mark.parametrize("variant", CONFIGS)
def test_live_prompt_shares_parameters_values_and_gradients(variant: str) -> None:
    model = peft_llama(variant, trained=True)
    prompt = peft_io.from_peft_model(model)
    theirs = dict(encoder_of(model).named_parameters())
    assert all(parameter is theirs[name] for name, parameter in prompt.named_parameters())
    assert {id(parameter) for parameter in prompt.parameters()} == {id(parameter) for parameter in theirs.values()}
    before = {name: parameter.detach().clone() for name, parameter in theirs.items()}

    def gradients(value: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        for name, parameter in theirs.items():
            parameter.data.copy_(before[name])  # CPT projects its delta in place, which rounds again each time
            parameter.grad = None
        out = value()
        torch.manual_seed(2)
        (out * torch.randn_like(out)).sum().backward()
        return out.detach(), {name: parameter.grad for name, parameter in theirs.items()}

    expected, expected_grads = gradients(lambda: peft_value(model))
    found, found_grads = gradients(lambda: our_value(prompt))
    assert torch.equal(found, expected)
    trained = [name for name, grad in expected_grads.items() if grad is not None]
    assert trained == [name for name, grad in found_grads.items() if grad is not None]
    for name in trained:
        # The rows' sum is one reduction for us and another for PEFT: fp32 rounding apart
        torch.testing.assert_close(found_grads[name], expected_grads[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", CONFIGS)
def test_an_optimiser_step_on_either_moves_both(variant: str) -> None:
    model = peft_llama(variant)
    prompt = peft_io.from_peft_model(model)
    optimiser = torch.optim.SGD([p for p in prompt.parameters() if p.requires_grad], lr=0.1)
    before = peft_value(model).detach().clone()
    torch.manual_seed(2)
    (our_value(prompt) * torch.randn_like(before)).sum().backward()
    optimiser.step()
    with torch.no_grad():  # without grad our CPT leaves the delta in place for PEFT to project
        ours = our_value(prompt)
        assert torch.equal(ours, peft_value(model))
    assert not torch.equal(before, ours)


def test_from_peft_model_picks_the_adapter_and_says_what_it_is_not() -> None:
    model = peft_llama("PROMPT_TUNING")
    model.add_adapter("second", PromptTuningConfig(**(COMMON | {"num_virtual_tokens": 3})))
    assert peft_io.from_peft_model(model).num_virtual_tokens == 5
    assert peft_io.from_peft_model(model, "second").num_virtual_tokens == 3
    with pytest.raises(KeyError, match=r"adapter_name: expected one of \['default', 'second'\], found 'third'"):
        peft_io.from_peft_model(model, "third")
    with pytest.raises(TypeError, match=r"peft_model: expected a peft\.PeftModel, found LlamaForCausalLM"):
        peft_io.from_peft_model(llama())
    lora = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"found 'LORA'.*merge it into the base first"):
        peft_io.from_peft_model(lora)


@pytest.mark.parametrize("with_types", [False, True], ids=["all-labels", "typed"])
@pytest.mark.parametrize("weighting", ["none", "decay"])
def test_cpt_loss_is_pefts(weighting: str, with_types: bool) -> None:
    model = peft_llama("CPT", trained=True)
    model.peft_config["default"].opt_weighted_loss_type = weighting
    prompt = peft_io.from_peft_model(model)
    ids = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
    labels = torch.tensor([[-100, 8, -100, 10, 11], [12, 13, -100, -100, 16]])
    types = torch.tensor([[1, 2, 3, 4, 4], [4, 0, 3, 4, 8]]) if with_types else None
    extra = {"input_type_mask": types.clone()} if types is not None else {}  # PEFT writes into it
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **extra)

    targets, weights = prompt.cpt_targets(labels, types)
    terms = nn.functional.cross_entropy(
        expected.logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none", ignore_index=-100
    )
    valid = targets[:, 1:] != -100
    loss = (weights[:, 1:] * terms)[valid].sum() / valid.sum()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)
    assert valid.sum() == (4 if with_types else 6) + 2 * 2  # and two labels among the virtual tokens of each row


# ---------------------------------------------------------------------------- adapter directories


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_directories_round_trip_through_peft_bit_for_bit(variant: str, trained: bool, tmp_path: Path) -> None:
    model = peft_llama(variant, trained=trained)
    model.save_pretrained(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "peft")  # inference_mode=True
    expected = peft_value(loaded)

    prompt = peft_io.load_adapter(tmp_path / "peft")
    assert not prompt.trainable and not prompt.training
    assert torch.equal(our_value(prompt), expected)

    peft_io.save_adapter(prompt, tmp_path / "ours")  # from a loaded, merged prompt
    peft_io.save_adapter(peft_io.from_peft_model(model), tmp_path / "live")  # from one that still trains
    peft_io.save_adapter(peft_io.from_peft_model(loaded), tmp_path / "loaded")  # from PEFT in inference mode
    for name in ("ours", "live", "loaded"):
        again = PeftModel.from_pretrained(llama(), tmp_path / name)
        assert torch.equal(peft_value(again), expected), name
        assert torch.equal(our_value(peft_io.load_adapter(tmp_path / name)), expected), name
    theirs, ours = (
        load_file(tmp_path / "peft/adapter_model.safetensors"),
        load_file(tmp_path / "ours" / peft_io.WEIGHTS_NAME),
    )
    assert theirs.keys() == ours.keys()


@pytest.mark.parametrize("variant", CONFIGS)
def test_fresh_prompts_of_ours_load_in_peft(variant: str, tmp_path: Path) -> None:
    config = peft_llama(variant).peft_config["default"].to_dict()
    torch.manual_seed(3)
    prompt = SoftPrompt.from_config(config, token_embeddings=llama().get_input_embeddings())
    peft_io.save_adapter(prompt, tmp_path, base_model_name_or_path="some/base")
    model = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(peft_value(model), our_value(prompt))
    assert model.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize("variant", CONFIGS)
def test_loaded_prompts_train_on(variant: str, tmp_path: Path) -> None:
    peft_llama(variant, trained=True).save_pretrained(tmp_path)
    frozen = peft_io.load_adapter(tmp_path)
    prompt = peft_io.load_adapter(tmp_path, trainable=True, token_embeddings=llama().get_input_embeddings())
    # CPT takes the token embeddings off and puts them back on: one rounding
    torch.testing.assert_close(our_value(prompt), our_value(frozen), rtol=0, atol=1e-6 if variant == "CPT" else 0)
    our_value(prompt).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in prompt.named_parameters() if parameter.requires_grad}
    assert grads and all(grad is not None and (grad.abs().sum() > 0 or "zero" in variant) for grad in grads.values())
    if variant == "CPT":
        with pytest.raises(AdapterError, match=r"token_embeddings: .*found None"):
            peft_io.load_adapter(tmp_path, trainable=True)


def test_a_loaded_prompt_does_not_follow_its_file(tmp_path: Path) -> None:
    model = peft_llama("PROMPT_TUNING")
    model.save_pretrained(tmp_path)
    prompt = peft_io.load_adapter(tmp_path)
    expected = our_value(prompt).clone()
    with open(tmp_path / peft_io.WEIGHTS_NAME, "r+b") as file:  # as PEFT's own save does: in place
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    assert torch.equal(our_value(prompt), expected)
    assert not torch.equal(our_value(peft_io.load_adapter(tmp_path)), expected)


def test_keys_of_later_peft_versions_are_kept(tmp_path: Path) -> None:
    peft_llama("PROMPT_TUNING").save_pretrained(tmp_path)
    path = tmp_path / peft_io.CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_a_later_version": {"a": [1]}}))
    peft_io.save_adapter(peft_io.load_adapter(tmp_path), tmp_path / "again")
    assert peft_io.read_adapter_config(tmp_path / "again")["of_a_later_version"] == {"a": [1]}


@pytest.mark.parametrize("variant", CONFIGS)
def test_missing_keys_take_pefts_defaults(variant: str, tmp_path: Path) -> None:
    peft_llama(variant).save_pretrained(tmp_path)
    expected = our_value(peft_io.load_adapter(tmp_path))
    path = tmp_path / peft_io.CONFIG_NAME
    config = json.loads(path.read_text())
    # what neither PEFT's defaults nor the tensors' shapes tell
    needed = {"peft_type", "num_layers", "num_attention_heads"}
    needed |= {"MULTITASK_PROMPT_TUNING": {"num_tasks", "num_ranks"}, "CPT": {"cpt_token_ids"}}.get(variant, set())
    if variant == "CARTRIDGE-none-frozen":
        needed |= {"num_frozen_tokens"}
    path.write_text(json.dumps({key: value for key, value in config.items() if key in needed}))
    assert torch.equal(our_value(peft_io.load_adapter(tmp_path)), expected)


def test_pickled_weights_load_only_if_they_are_plain_tensors(tmp_path: Path) -> None:
    model = peft_llama("PROMPT_TUNING")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(our_value(peft_io.load_adapter(tmp_path)), peft_value(model))

    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(marker),)

    torch.save({"prompt_embeddings": Payload()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin: damaged, or holds more than tensors"):
        peft_io.load_adapter(tmp_path)
    assert not marker.exists()
    torch.save([torch.zeros(1)], tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="expected a dictionary of tensors"):
        peft_io.load_adapter(tmp_path)


# ---------------------------------------------------------------------------- other bases


def test_encoder_decoder_prompts(tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        torch.manual_seed(0)
        config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
        return T5ForConditionalGeneration(config).eval()

    for index, config_class in enumerate((PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)):
        directory = tmp_path / str(index)
        torch.manual_seed(1)
        model = get_peft_model(base(), config_class(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
        assert torch.equal(our_value(peft_io.from_peft_model(model)), peft_value(model)), config_class
        model.save_pretrained(directory)
        prompt = peft_io.load_adapter(directory)
        assert torch.equal(our_value(prompt), peft_value(model)), config_class
        peft_io.check_compatible(prompt, base())
        peft_io.save_adapter(prompt, directory)
        assert torch.equal(peft_value(PeftModel.from_pretrained(base(), directory)), peft_value(model)), config_class


def test_multi_query_prefixes(tmp_path: Path) -> None:
    config = GPTBigCodeConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, multi_query=True)
    torch.manual_seed(1)
    model = get_peft_model(GPTBigCodeForCausalLM(config), PrefixTuningConfig(**COMMON))
    prompt = peft_io.from_peft_model(model)
    assert prompt.key_values()[0][0].shape == (1, 5, 8)
    assert torch.equal(our_value(prompt), peft_value(model))
    peft_io.check_compatible(prompt, model.base_model)


def test_classification_heads_travel_with_the_prompt(tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=3,
        )
        return BertForSequenceClassification(config).eval()

    model = get_peft_model(base(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    live = peft_io.from_peft_model(model)
    assert {name: tuple(t.shape) for name, t in live.modules_to_save.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }
    assert live.modules_to_save["classifier.weight"].requires_grad  # PEFT's own parameter

    model.save_pretrained(tmp_path)
    prompt = peft_io.load_adapter(tmp_path)
    for name, tensor in prompt.modules_to_save.items():
        assert torch.equal(tensor, live.modules_to_save[name])
        base().get_parameter(name)  # raises unless the base has it under this name
    ids = torch.tensor([[5, 6, 7]])
    for name, source in (("ours", prompt), ("live", live)):
        peft_io.save_adapter(source, tmp_path / name)
        again = PeftModel.from_pretrained(base(), tmp_path / name).eval()
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits), name

    prompt.modules_to_save["classifier.bias"][1] = float("nan")
    with pytest.raises(ValueError, match=r"'classifier\.bias': 1 of 3 values"):
        peft_io.save_adapter(prompt, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("PROMPT_TUNING", {"hidden_size": 48}, r"embedding size \(token_dim\): the base has 48, the adapter 32"),
        ("PREFIX_TUNING", {"num_hidden_layers": 3}, r"layers \(num_layers\): the base has 3, the adapter 2"),
        ("CARTRIDGE", {"num_key_value_heads": 1}, "key/value heads .*: the base has 1, the adapter 2"),
        ("PREFIX_TUNING", {"hidden_size": 48}, "head dimension .*: the base has 12, the adapter 8"),
        ("CPT", {"vocab_size": 6}, r"cpt_token_ids: the base's vocabulary has 6 entries, found ids \[9, 6\]"),
    ],
)
def test_adapter_of_another_base(variant: str, changes: dict, message: str, tmp_path: Path) -> None:
    model = peft_llama(variant)
    model.save_pretrained(tmp_path)
    prompt = peft_io.load_adapter(tmp_path)
    peft_io.check_compatible(prompt, llama())
    peft_io.check_compatible(prompt, llama().config)
    with pytest.raises(IncompatibleBaseError, match=message):
        peft_io.check_compatible(prompt, llama(**changes))


# ---------------------------------------------------------------------------- damaged and foreign files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    peft_llama("PROMPT_TUNING").save_pretrained(tmp_path)
    return tmp_path


def test_lora_directory_is_refused_with_advice(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"found 'LORA'.*merge it into the base first.*merge_and_unload"):
        peft_io.load_adapter(tmp_path)


def test_missing_files_are_named(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing: directory .*nowhere"):
        peft_io.load_adapter(saved / "nowhere")
    (saved / peft_io.WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected adapter_model\.safetensors"):
        peft_io.load_adapter(saved)
    (saved / peft_io.CONFIG_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: .*adapter_config\.json"):
        peft_io.load_adapter(saved)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_tensors(saved: Path, keep: int) -> None:
    path = saved / peft_io.WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: damaged or truncated"):
        peft_io.load_adapter(saved)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_damaged_configuration(saved: Path, content: bytes) -> None:
    (saved / peft_io.CONFIG_NAME).write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        peft_io.load_adapter(saved)


def test_tensors_that_contradict_the_configuration(saved: Path) -> None:
    path = saved / peft_io.WEIGHTS_NAME
    save_file({"prompt_embeddings": torch.zeros(4, 32)}, path)
    with pytest.raises(AdapterError, match=r"expected prompt_embeddings of shape \[5, 32\].*found \[4, 32\]"):
        peft_io.load_adapter(saved)
    save_file({"something": torch.zeros(4, 32)}, path)
    with pytest.raises(AdapterError, match=r"no tensor 'prompt_embeddings'; it has \['something'\]"):
        peft_io.load_adapter(saved)
    save_file({"prompt_embeddings": torch.full((5, 32), float("nan"))}, path)
    with pytest.raises(ValueError, match=r"'embedding\.weight': 160 of 160 values are NaN or infinite"):
        peft_io.load_adapter(saved)


def test_a_failed_save_leaves_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    prompt = peft_io.load_adapter(saved)
    with torch.no_grad():
        prompt.embedding.weight.add_(1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            peft_io.save_adapter(prompt, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    peft_io.save_adapter(prompt, saved)
    assert torch.equal(peft_io.load_adapter(saved).embeddings(), prompt.embeddings())
    with pytest.raises(NotADirectoryError, match="save_directory"):
        peft_io.save_adapter(prompt, saved / peft_io.CONFIG_NAME)


def test_an_adapter_replaced_while_it_is_read_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one, with other sizes, takes its place between the two files."""
    old, new = (SoftPrompt.for_model("PROMPT_TUNING", llama(), num_virtual_tokens=length) for length in (3, 6))
    peft_io.save_adapter(old, tmp_path)
    read, reads = peft_io._read_tensors, []

    def replaced(directory: Path) -> dict[str, torch.Tensor]:
        reads.append(1)
        if len(reads) == 1:
            peft_io.save_adapter(new, tmp_path)
        return read(directory)

    monkeypatch.setattr(peft_io, "_read_tensors", replaced)
    found = peft_io.load_adapter(tmp_path)
    assert len(reads) == 2 and torch.equal(found.embedding.weight, new.embedding.weight)
