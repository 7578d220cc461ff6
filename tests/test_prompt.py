# SPDX-License-Identifier: Apache-2.0
"""Soft prompts on their own: sizes, initialisation, what trains, CPT's loss, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config

from softprompt_fast.errors import AdapterError
from softprompt_fast.prompt import METHODS, BaseShape, SoftPrompt

SIZES = {"task_type": "CAUSAL_LM", "token_dim": 12, "num_layers": 3, "num_attention_heads": 2}
CPT_IDS = {"cpt_token_ids": [3, 1, 4, 1, 5, 9, 2, 6], "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8]}
VARIANTS: dict[str, dict] = {
    "PROMPT_TUNING": {},
    "P_TUNING": {"encoder_hidden_size": 7},
    "P_TUNING-LSTM": {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM"},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 3, "num_ranks": 2},
    "CPT": CPT_IDS,
    "PREFIX_TUNING": {},
    "PREFIX_TUNING-projection": {"prefix_projection": True, "encoder_hidden_size": 7},
    "CARTRIDGE": {"num_frozen_tokens": 2},
}


def config_of(variant: str, **changes: object) -> dict:
    method = variant.split("-")[0]
    return {"peft_type": method, "num_virtual_tokens": 5, **SIZES, **VARIANTS[variant], **changes}


def table() -> torch.Tensor:
    return torch.randn(20, SIZES["token_dim"], generator=torch.Generator().manual_seed(0))


def make(variant: str, **changes: object) -> SoftPrompt:
    return SoftPrompt.from_config(config_of(variant, **changes), token_embeddings=table())


def output(prompt: SoftPrompt) -> torch.Tensor:
    """All that a prompt gives, as one tensor."""
    if prompt.kind == "embedding":
        return prompt.embeddings(torch.tensor([0, 2]) if prompt.method.startswith("MULTITASK") else None)
    return torch.stack([tensor for pair in prompt.key_values() for tensor in pair])


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    return LlamaForCausalLM(config)


def test_variants_cover_every_method() -> None:
    assert {variant.split("-")[0] for variant in VARIANTS} == set(METHODS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_gradients_reach_every_trainable_parameter(variant: str) -> None:
    prompt = make(variant)
    tokens = prompt.num_virtual_tokens
    got = output(prompt)
    if prompt.kind == "prefix":
        assert got.shape == (2 * 3, 2, tokens, 6)
    else:
        assert got.shape == ((2, tokens, 12) if prompt.method.startswith("MULTITASK") else (tokens, 12))
    got.square().sum().backward()
    for name, parameter in prompt.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_keeps_the_value_bit_for_bit(variant: str) -> None:
    prompt = make(variant)
    if variant == "CPT":
        nn.init.normal_(prompt.delta_embedding.weight, std=1e-3)
    tensors = prompt.adapter_tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == prompt.adapter_shapes()
    merged = SoftPrompt.from_tensors(prompt.config, tensors)
    assert not merged.trainable
    assert torch.equal(output(merged), output(prompt))


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_pickles_are_equal(variant: str) -> None:
    prompt = make(variant)
    for twin in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert torch.equal(output(twin), output(prompt))
        assert twin.config == prompt.config


@pytest.mark.parametrize("variant", ["CPT", "CARTRIDGE"])
def test_requires_grad_leaves_frozen_what_the_method_never_trains(variant: str) -> None:
    prompt = make(variant).requires_grad_(False)
    assert not prompt.trainable
    prompt.requires_grad_(True)
    trained = {name for name, parameter in prompt.named_parameters() if parameter.requires_grad}
    assert trained == {"delta_embedding.weight" if variant == "CPT" else "trainable_embedding"}


def test_wrong_kind_says_which_method_to_call() -> None:
    with pytest.raises(TypeError, match="use key_values"):
        make("CARTRIDGE").embeddings()
    with pytest.raises(TypeError, match="use embeddings"):
        make("P_TUNING").key_values()
    with pytest.raises(TypeError, match="only CPT"):
        make("P_TUNING").cpt_targets(torch.zeros(1, 1, dtype=torch.long))


def test_multitask_needs_valid_task_ids() -> None:
    prompt = make("MULTITASK_PROMPT_TUNING")
    with pytest.raises(ValueError, match=r"task_ids.*None"):
        prompt.embeddings()
    with pytest.raises(IndexError, match=r"task_ids: expected values in \[0, 3\), found \[0, 3\]"):
        prompt.embeddings(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"task_ids: expected shape \[B\]"):
        prompt.embeddings(torch.tensor([[0]]))


def test_encoder_decoder_prompts_are_doubled() -> None:
    assert make("PROMPT_TUNING", task_type="SEQ_2_SEQ_LM").embeddings().shape == (10, 12)
    assert make("PREFIX_TUNING", task_type="SEQ_2_SEQ_LM").key_values()[0][0].shape == (2, 5, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "found 'LORA'.*merge it into the base first"),
        ({"peft_type": "NO_SUCH"}, "peft_type: expected one of .*found 'NO_SUCH'"),
        ({"peft_type": None}, "peft_type: missing"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens: PREFIX_TUNING expected a positive integer, found None"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: .* found 0"),
        ({"num_layers": None}, "num_layers"),
        ({"num_attention_heads": 5}, r"token_dim: .*multiple of num_attention_heads \(5\), found 12"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules: .* 1 or 2, found 3"),
        ({"peft_type": "CARTRIDGE", "num_frozen_tokens": 6}, "num_frozen_tokens: .* found 6"),
        ({"peft_type": "P_TUNING", "encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type"),
        ({"peft_type": "CPT"}, "cpt_token_ids: .* found None"),
        ({"peft_type": "CPT", "cpt_token_ids": [1, 2], "cpt_mask": [1]}, "cpt_mask: .* as cpt_token_ids"),
        ({"peft_type": "CPT", "cpt_token_ids": [1], "opt_weighted_loss_type": "x"}, "opt_weighted_loss_type"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 0}, "num_tasks"),
    ],
)
def test_bad_configurations_name_the_option(changes: dict, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        SoftPrompt.from_config(config_of("PREFIX_TUNING", **changes), token_embeddings=table())


def test_unknown_configuration_keys_are_kept() -> None:
    assert make("PROMPT_TUNING", of_a_later_version=[1, 2]).config["of_a_later_version"] == [1, 2]


def test_for_model_sizes_the_prompt_and_refuses_unknown_options() -> None:
    model = llama()
    prefix = SoftPrompt.for_model("PREFIX_TUNING", model, num_virtual_tokens=3)
    assert [tuple(key.shape) for key, _ in prefix.key_values()] == [(2, 3, 6)] * 2
    assert SoftPrompt.for_model("P_TUNING", model, num_virtual_tokens=3).embeddings().shape == (3, 32)
    with pytest.raises(AdapterError, match="encoder_hiden_size"):
        SoftPrompt.for_model("P_TUNING", model, num_virtual_tokens=3, encoder_hiden_size=4)
    with pytest.raises(AdapterError, match="LORA"):
        SoftPrompt.for_model("LORA", model, num_virtual_tokens=3)


def test_for_model_starts_from_tokens() -> None:
    model = llama()
    weight = model.get_input_embeddings().weight
    prompt = SoftPrompt.for_model("PROMPT_TUNING", model, num_virtual_tokens=5, init_token_ids=[7, 8])
    assert torch.equal(prompt.embeddings(), weight[torch.tensor([7, 8, 7, 8, 7])])
    sampled = SoftPrompt.for_model("PROMPT_TUNING", model, num_virtual_tokens=2, prompt_tuning_init="SAMPLE_VOCAB")
    assert all((row == weight).all(dim=1).any() for row in sampled.embeddings())
    cpt = SoftPrompt.for_model("CPT", model, cpt_token_ids=[5, 6])
    assert torch.equal(cpt.embeddings(), weight[torch.tensor([5, 6])])
    with pytest.raises(AdapterError, match=r"expected values in \[0, 64\), found \[5, 64\]"):
        SoftPrompt.for_model("CPT", model, cpt_token_ids=[5, 64])
    with pytest.raises(AdapterError, match="init_token_ids"):
        SoftPrompt.for_model("P_TUNING", model, num_virtual_tokens=2, init_token_ids=[1])
    with pytest.raises(AdapterError, match=r"token_embeddings.*found None"):
        SoftPrompt.for_model("CPT", model.config, cpt_token_ids=[5])


def test_base_shape_reads_what_families_call_differently() -> None:
    assert BaseShape.of(llama()) == BaseShape(32, 32, 2, 4, 2, 6, 64)
    gpt2 = BaseShape.of(GPT2Config(n_embd=24, n_head=3, n_layer=5, vocab_size=11))
    assert gpt2 == BaseShape(24, 24, 5, 3, 3, 8, 11)
    t5 = BaseShape.of(T5Config(d_model=24, num_heads=3, num_layers=2, d_kv=10, vocab_size=11))
    assert t5 == BaseShape(24, 24, 2, 3, 3, 10, 11)
    # OPT's token table may be narrower than its layers
    opt = OPTConfig(hidden_size=24, word_embed_proj_dim=12, num_attention_heads=2, num_hidden_layers=1, ffn_dim=8)
    assert BaseShape.of(opt).embedding_dim == BaseShape.of(OPTForCausalLM(opt)).embedding_dim == 12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_named_and_counted(variant: str, bad: float) -> None:
    prompt = make(variant)
    name, tensor = next(iter(prompt.named_parameters()))
    prompt.check_finite()
    tensor.data.view(-1)[:3] = bad
    with pytest.raises(ValueError, match=f"{name}': 3 of {tensor.numel()} values"):
        prompt.check_finite()


def test_cpt_targets_by_hand() -> None:
    prompt = make("CPT", opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
    labels = torch.tensor([[10, -100, 12]])
    targets, weights = prompt.cpt_targets(labels)
    # labels among the virtual tokens stand where the type is 4 (id 1) and 8 (id 6)
    assert targets.tolist() == [[-100, -100, -100, 1, -100, -100, -100, 6, 10, -100, 12]]
    assert weights.tolist() == [[0, 0, 0, 0.25, 0, 0, 0, 0.5, 1, 0, 1]]
    # own tokens of type 1 (template) become 9 and carry no loss
    targets, weights = prompt.cpt_targets(labels, torch.tensor([[1, 4, 4]]))
    assert targets[0, 8:].tolist() == [-100, -100, 12]
    assert weights[0, 8:].tolist() == [0, 0, 1]
    _, equal = make("CPT").cpt_targets(labels)
    assert equal.unique().tolist() == [0, 1]


def test_cpt_targets_refuse_what_peft_makes_nan() -> None:
    prompt = make("CPT", cpt_tokens_type_mask=None)  # PEFT's default is all ones
    labels = torch.tensor([[10, 11]])
    with pytest.raises(ValueError, match=r"cpt_tokens_type_mask: .* found 1"):
        prompt.cpt_targets(labels)
    targets, _ = prompt.cpt_targets(labels, torch.tensor([[3, 3]]))  # 3 + 1 is a label
    assert targets[0, -2:].tolist() == [10, 11]
    with pytest.raises(ValueError, match=r"input_type_mask: .*\[1, 2\], found \[1, 3\]"):
        prompt.cpt_targets(labels, torch.tensor([[3, 3, 3]]))


@given(st.integers(0, 2**31), st.floats(1e-4, 1e2), st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_cpt_delta_stays_inside_its_ball(seed: int, scale: float, epsilon: float) -> None:
    prompt = make("CPT", opt_projection_epsilon=epsilon, opt_projection_format_epsilon=2 * epsilon)
    torch.manual_seed(seed)
    nn.init.normal_(prompt.delta_embedding.weight, std=scale)
    before = prompt.delta_embedding.weight.detach().clone()
    moved = (prompt.embeddings() - prompt.embedding.weight).norm(dim=1)
    radii = torch.tensor([2.0, 1.0, 2.0, 0.0] * 2) * epsilon * (12 / 2048) ** 0.5
    assert (moved <= radii + 1e-5).all()
    # the projection is where training goes on from, and rows inside the ball do not move
    after = prompt.delta_embedding.weight
    assert (after.norm(dim=1) <= radii * (1 + 1e-5) + 1e-9).all()
    inside = before.norm(dim=1) < radii * (1 - 1e-5)
    assert torch.equal(after[inside], before[inside])


def test_cpt_without_grad_leaves_its_parameters_alone() -> None:
    prompt = make("CPT")
    nn.init.normal_(prompt.delta_embedding.weight)
    before = prompt.delta_embedding.weight.detach().clone()
    with torch.no_grad():
        value = prompt.embeddings()
    assert torch.equal(prompt.delta_embedding.weight, before)
    assert torch.equal(prompt.embeddings(), value)


def test_half_precision_prompts_stay_half() -> None:
    for variant in VARIANTS:
        prompt = make(variant).to(torch.bfloat16)
        assert output(prompt).dtype == torch.bfloat16, variant


def test_prompts_need_neither_peft_nor_transformers() -> None:
    program = """
import sys
sys.modules["peft"] = sys.modules["transformers"] = None  # importing either now raises ImportError
from softprompt_fast.prompt import SoftPrompt
from softprompt_fast.integrations.peft import load_adapter, save_adapter
import tempfile
config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "token_dim": 4, "num_layers": 1,
          "num_attention_heads": 2}
prompt = SoftPrompt.from_config(config)
with tempfile.TemporaryDirectory() as directory:
    save_adapter(prompt, directory)
    assert (load_adapter(directory).key_values()[0][0] == prompt.key_values()[0][0]).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
