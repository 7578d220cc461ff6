# SPDX-License-Identifier: Apache-2.0
"""Tiny random causal LMs of every supported family, and a visible adapter of every prompt-learning method for each.

A model of this table is useful only if a mistake shows: norms, biases and sinks are away from their initial values,
attention is neither flat nor saturated, windows and soft caps bite within a dozen tokens, and no special token ends a
generation early. Everything is seeded by the family's name, so a failure repeats.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.device import randn, seeded

VOCAB_SIZE = 101
HIDDEN_SIZE = 32
NUM_VIRTUAL_TOKENS = 5
NUM_TASKS = 3

# Windows are counted in keys, the query's own included. SHORT hides part of the prompt from the first own token on;
# LONG shows that token the whole prompt and hides it little by little from the next ones.
SHORT_WINDOW = 3
LONG_WINDOW = 8


@dataclass(frozen=True)
class Family:
    """One architecture.

    `shares_prefix`: its attention can be handed a shared prefix; the others take the exact, expanded path.
    `adapter_config`, `prefix_config`: what PEFT must be told where it cannot guess it.
    """

    name: str
    config: Callable[[], transformers.PreTrainedConfig]
    notes: str = ""
    shares_prefix: bool = True
    adapter_config: dict[str, int] = field(default_factory=dict)
    prefix_config: dict[str, int] = field(default_factory=dict)  # for PREFIX_TUNING and CARTRIDGE only

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def make(self) -> PreTrainedModel:
        """A fresh copy of the family's model: eager attention, float32, CPU, eval mode. Same weights at every call."""
        return copy.deepcopy(_base_model(self.name))


def _llama_like(config_class: type, **overrides: Any) -> transformers.PreTrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        # A small base turns even the slowest rotary pair visibly within a dozen positions.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    values |= overrides
    # An override of None drops the entry: PEFT stumbles over a `num_key_value_heads` that is there and None.
    return config_class(**{name: value for name, value in values.items() if value is not None}, eos_token_id=None)


def _partial_rope(factor: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": factor}


def _gemma(config_class: type, **overrides: Any) -> transformers.PreTrainedConfig:
    return _llama_like(config_class, head_dim=16, tie_word_embeddings=True, **overrides)


def _gemma3() -> transformers.PreTrainedConfig:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    return _gemma(
        transformers.Gemma3TextConfig,
        num_hidden_layers=len(layer_types),
        layer_types=layer_types,
        sliding_window=LONG_WINDOW,
        query_pre_attn_scalar=24,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        },
    )


def _falcon(**overrides: Any) -> transformers.PreTrainedConfig:
    return _llama_like(transformers.FalconConfig, num_key_value_heads=None, activation="gelu", **overrides)


_FAMILIES = [
    Family("llama", lambda: _llama_like(transformers.LlamaConfig), "grouped-query attention"),
    Family(
        "mistral_short_window",
        lambda: _llama_like(transformers.MistralConfig, sliding_window=SHORT_WINDOW),
        "window shorter than the prompt",
    ),
    Family(
        "mistral_long_window",
        lambda: _llama_like(transformers.MistralConfig, sliding_window=LONG_WINDOW),
        "window longer than the prompt, shorter than prompt + own tokens",
    ),
    Family("qwen2", lambda: _llama_like(transformers.Qwen2Config), "biases on q, k, v"),
    Family("qwen3", lambda: _llama_like(transformers.Qwen3Config, head_dim=16), "q, k norms; heads wider than hidden"),
    Family("gemma", lambda: _gemma(transformers.GemmaConfig, num_key_value_heads=1), "scaled embeddings, one kv head"),
    Family(
        "gemma2",
        lambda: _gemma(
            transformers.Gemma2Config,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            sliding_window=SHORT_WINDOW,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=4.0,
        ),
        "soft caps on scores and logits, sliding + full layers",
    ),
    Family("gemma3", _gemma3, "sliding + full layers with a rope each, q, k norms, scaled embeddings"),
    Family(
        "phi",
        lambda: _llama_like(transformers.PhiConfig, rope_parameters=_partial_rope(0.5), qk_layernorm=True),
        "parallel block, LayerNorm, partial rope",
    ),
    Family(
        "phi3",
        lambda: _llama_like(transformers.Phi3Config, sliding_window=LONG_WINDOW, rope_parameters=_partial_rope(0.5)),
        "fused qkv, sliding window, partial rope",
    ),
    Family(
        "gpt_neox",
        lambda: _llama_like(
            transformers.GPTNeoXConfig,
            num_key_value_heads=None,
            rope_parameters=_partial_rope(0.5),
            hidden_dropout=0.0,
        ),
        "fused qkv, parallel residual, partial rope",
    ),
    Family(
        "gpt2",
        lambda: transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=64,
            n_embd=HIDDEN_SIZE,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        "learned positions, a scale per layer",
    ),
    Family(
        "opt",
        lambda: _llama_like(
            transformers.OPTConfig,
            num_key_value_heads=None,
            rope_parameters=None,
            ffn_dim=48,
            word_embed_proj_dim=HIDDEN_SIZE,
            dropout=0.0,
        ),
        "learned positions, counted from the attention mask, offset by 2",
    ),
    Family(
        "gpt_oss",
        lambda: _llama_like(
            transformers.GptOssConfig,
            head_dim=8,
            sliding_window=LONG_WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=None,
        ),
        "sinks, yarn, sliding + full layers, experts",
    ),
    Family(
        "mixtral",
        lambda: _llama_like(transformers.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
        "experts",
    ),
    Family("olmo2", lambda: _llama_like(transformers.Olmo2Config), "norms after the blocks, q and k normed whole"),
    Family(
        "granite",
        lambda: _llama_like(
            transformers.GraniteConfig,
            embedding_multiplier=0.7,
            residual_multiplier=0.8,
            attention_multiplier=0.2,
            logits_scaling=0.5,
        ),
        "multipliers on embeddings, residuals, scores, logits",
    ),
    Family(
        "cohere",
        lambda: _llama_like(transformers.CohereConfig, use_qk_norm=True, logit_scale=0.5, tie_word_embeddings=True),
        "parallel block, q, k norms, interleaved rope, scaled logits",
    ),
    Family(
        "starcoder2",
        lambda: _llama_like(transformers.Starcoder2Config, sliding_window=LONG_WINDOW),
        "LayerNorm, biases, sliding window",
    ),
    Family(
        "bloom",
        lambda: transformers.BloomConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            n_layer=2,
            n_head=4,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=None,
        ),
        "ALiBi, embeddings normed",
        shares_prefix=False,
    ),
    Family(
        "falcon_rope",
        lambda: _falcon(multi_query=True),
        "multi-query, parallel block",
        shares_prefix=False,
        # PEFT looks for `num_key_value_heads`; falcon calls it `num_kv_heads`, so PEFT sizes the prefix for all heads.
        prefix_config={"num_attention_heads": 1, "token_dim": HIDDEN_SIZE // 4},
    ),
    Family(
        "falcon_alibi",
        lambda: _falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
        "ALiBi",
        shares_prefix=False,
    ),
    Family(
        "mpt",
        lambda: transformers.MptConfig(
            vocab_size=VOCAB_SIZE,
            d_model=HIDDEN_SIZE,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            use_cache=True,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=None,
        ),
        "ALiBi",
        shares_prefix=False,
        # PEFT looks for `n_head` and `num_heads`; mpt calls it `n_heads`.
        adapter_config={"num_attention_heads": 4},
    ),
    Family(
        "gptj",
        lambda: transformers.GPTJConfig(
            vocab_size=VOCAB_SIZE,
            n_positions=64,
            n_embd=HIDDEN_SIZE,
            n_layer=2,
            n_head=4,
            rotary_dim=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        "parallel block, partial interleaved rope",
        shares_prefix=False,
    ),
    Family(
        "stablelm",
        lambda: _llama_like(
            transformers.StableLmConfig, rope_parameters=_partial_rope(0.5), use_qkv_bias=True, qk_layernorm=True
        ),
        "LayerNorm, biases, partial rope, norms per head",
        shares_prefix=False,
    ),
    # Not on the list of supported families: each hides a trap that a prefix could fall into silently.
    Family(
        "llama4_text",
        lambda: _llama_like(
            transformers.Llama4TextConfig,
            head_dim=8,
            num_local_experts=4,
            attention_chunk_size=LONG_WINDOW,
            num_hidden_layers=4,
            intermediate_size_mlp=48,
        ),
        "attention in chunks, known to the mask only",
        shares_prefix=False,
    ),
    Family(
        "phimoe_window",
        lambda: _llama_like(
            transformers.PhimoeConfig,
            num_local_experts=4,
            num_experts_per_tok=2,
            router_jitter_noise=0.0,
            sliding_window=LONG_WINDOW,
        ),
        "a sliding window known to the mask only",
        shares_prefix=False,
    ),
    Family(
        "ctrl",
        lambda: transformers.CTRLConfig(
            vocab_size=VOCAB_SIZE,
            n_embd=HIDDEN_SIZE,
            n_positions=64,
            dff=48,
            n_layer=3,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
        "scales the embeddings it is given in place",
    ),
]
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}


@functools.cache
def _base_model(name: str) -> PreTrainedModel:
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        # Vectors keep their initial value and move from there, and some (gpt_oss's sinks) start from a random one.
        torch.manual_seed(family.seed)
        model = AutoModelForCausalLM.from_config(family.config(), attn_implementation="eager")
    randomise(model, family.seed)
    return model.eval()


def randomise(module: PreTrainedModel, seed: int) -> None:
    """Give every parameter a seeded value of visible size, whatever this version of transformers starts it from.

    Matrices become normal with variance 1 / fan_in, which keeps activations of order one from layer to layer; vectors
    (norm weights, biases, sinks) move away from their constants by a third. Embeddings are normal too, but small where
    they double as the output layer: greedy text would only repeat its last token else.
    """
    generator = seeded(seed)
    embeddings = module.get_input_embeddings()
    tied = module.get_output_embeddings().weight is embeddings.weight
    embedding_std = 0.5 / max(2.0, getattr(embeddings, "scalar_embed_scale", 1.0)) if tied else 1.0
    tables = {child.weight for child in module.modules() if isinstance(child, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(noise / 3)
            else:
                parameter.copy_(noise * (embedding_std if parameter in tables else HIDDEN_SIZE**-0.5))


# -- adapters ---------------------------------------------------------------------------------------------------------


def _cpt_config() -> CPTConfig:
    return CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[17, 42, 5, 88, 23],
        cpt_mask=[1] * NUM_VIRTUAL_TOKENS,
        # Input template, input, input, output template, label: the last one has a loss term of its own.
        cpt_tokens_type_mask=[1, 2, 2, 3, 4],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.7,
        # PEFT scales these by sqrt(hidden / 2048): balls of radius 2 and 3 around the tokens' own embeddings.
        opt_projection_epsilon=2.0 * (2048 / HIDDEN_SIZE) ** 0.5,
        opt_projection_format_epsilon=3.0 * (2048 / HIDDEN_SIZE) ** 0.5,
    )


_COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": NUM_VIRTUAL_TOKENS}

METHODS: dict[str, Callable[[Family], Any]] = {
    "prompt_tuning": lambda family: PromptTuningConfig(**_COMMON),
    "p_tuning": lambda family: PromptEncoderConfig(encoder_hidden_size=24, **_COMMON),
    "multitask": lambda family: MultitaskPromptTuningConfig(num_tasks=NUM_TASKS, num_ranks=2, **_COMMON),
    "cpt": lambda family: _cpt_config(),
    "prefix_tuning": lambda family: PrefixTuningConfig(**_COMMON, **family.prefix_config),
    "prefix_projection": lambda family: PrefixTuningConfig(
        prefix_projection=True, encoder_hidden_size=24, **_COMMON, **family.prefix_config
    ),
    "cartridge": lambda family: CartridgeConfig(num_frozen_tokens=2, **_COMMON, **family.prefix_config),
}
PREFIX_METHODS = frozenset({"prefix_tuning", "prefix_projection", "cartridge"})


def make_peft(family: Family, method: str) -> PeftModel:
    """The family's model under a seeded adapter of the method: fresh at every call, same values at every call."""
    base = family.make()
    config = METHODS[method](family)
    for name, value in family.adapter_config.items():
        setattr(config, name, value)  # CPTConfig takes no such argument, but honours the attribute
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial values from the global generator
        torch.manual_seed(family.seed)
        peft_model = get_peft_model(base, config)
    randomise_prompt(peft_model, seed=zlib.crc32(f"{family.name}/{method}".encode()))
    return peft_model.eval()


def randomise_prompt(peft_model: PeftModel, seed: int) -> None:
    """Seeded prompt values as large as the model's own embeddings (a prefix: keys and values of order one)."""
    generator = seeded(seed)
    encoder = peft_model.prompt_encoder[peft_model.active_adapter]
    is_prefix = peft_model.active_peft_config.peft_type.value in {"PREFIX_TUNING", "CARTRIDGE"}
    with torch.no_grad():
        size = 1.0 if is_prefix else peft_model.word_embeddings(torch.arange(VOCAB_SIZE)).std().item()
        for name, parameter in encoder.named_parameters():
            if name == "embedding.weight" and hasattr(encoder, "delta_embedding"):
                continue  # CPT: these are the tokens' own embeddings
            noise = randn(parameter.shape, generator=generator)
            if name == "delta_embedding.weight":
                # Norms from well inside the projection's balls to well outside.
                noise *= torch.linspace(0.1, 2.0, NUM_VIRTUAL_TOKENS).flip(0)[:, None]
            elif name in {"prefix_task_rows", "prefix_task_cols"}:
                noise /= 2**0.25
            elif name.endswith(("head.0.weight", "head.2.weight", "transform.0.weight", "transform.2.weight")):
                noise /= parameter.shape[1] ** 0.5
            elif name.endswith("head.4.weight"):
                noise *= size * (2 / parameter.shape[1]) ** 0.5
            elif name.endswith(".bias"):
                noise /= 3
            else:
                noise *= size
            parameter.copy_(noise)
