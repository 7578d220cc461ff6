# SPDX-License-Identifier: Apache-2.0
"""The base models of the benchmarks: SmolLM2-135M as the demo has it, and others' shapes with random weights."""

from __future__ import annotations

from typing import Any

import torch

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-360M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560,
        "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "bos_token_id": 1, "eos_token_id": None,
        "pad_token_id": 2,
    },
    "Llama-3.2-1B": {
        **_LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
    },
    "Llama-3.1-8B": {
        **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    "Qwen3-4B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "bos_token_id": 151643,
        "eos_token_id": None, "pad_token_id": 0,
    },
}  # fmt: skip
TINY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip

DEMO = "demo"
NAMES = (DEMO, "tiny", *MODELS)


def make_base(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Any:
    """A base in eval mode: "demo", or one of `MODELS` with random weights, the same for one seed of torch.

    Args:
        tiny: the family of `name`, at sizes for tests. "tiny" is that of Llama-3.2-1B.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == DEMO:
        from softprompt_fast.demo.assets import load_demo_model

        return load_demo_model()[0].to(device, dtype)
    tiny = tiny or name == "tiny"
    sizes = MODELS["Llama-3.2-1B" if name == "tiny" else name]
    config = AutoConfig.for_model(**{**sizes, **(TINY if tiny else {})})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
