# SPDX-License-Identifier: Apache-2.0
"""Which path a base takes is found by running it; what can be served on neither is refused, never served wrongly."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import softprompt_fast as spf
from softprompt_fast.integrations import probe
from softprompt_fast.integrations import transformers as hooks
from tests.families import FAMILIES, _llama_like


def test_probe_leaves_the_model_as_it_was():
    base = FAMILIES["llama"].make().train()
    base.model.layers[0].eval()
    before = {name: module.training for name, module in base.named_modules()}
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    assert probe.why_not_shared(base, None) is None
    assert {name: module.training for name, module in base.named_modules()} == before
    assert all(torch.equal(weights[name], weight) for name, weight in base.state_dict().items())


def test_a_model_that_cannot_share_gets_its_own_attention_back():
    base = FAMILIES["stablelm"].make()
    name = base.config._attn_implementation
    model = spf.SoftPromptModel(base)
    assert base.config._attn_implementation == name
    assert "does not reach" in model.explain().layers[0].reason


def test_an_attention_function_that_ignores_the_prefix_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """The logits are compared: a layer that asks for its prefix and then attends without it is not trusted."""
    attend = hooks._shared_prefix

    def forgetful(module, query, key, value, context, original, **kwargs):
        if context.options is not None:
            context.options[module.layer_idx] = {"sliding_window": None}
        nothing = hooks.PrefixContext(keys=None, values=None)
        return attend(module, query, key, value, nothing, original, **kwargs)

    monkeypatch.setattr(hooks, "_shared_prefix", forgetful)
    model = spf.SoftPromptModel(FAMILIES["llama"].make())
    assert "differ from the whole" in model.explain().layers[0].reason


def test_layers_without_keys_and_values_are_refused():
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(TypeError, match="MambaForCausalLM can't be served"):
        spf.SoftPromptModel(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rope_that_depends_on_the_whole_length_is_refused_beyond_its_limit(rope_type: str):
    if rope_type == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
        config = _llama_like(transformers.LlamaConfig, max_position_embeddings=16, rope_parameters=rope)
    else:
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 5.0]}
        rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16, **factors}
        config = _llama_like(transformers.Phi3Config, original_max_position_embeddings=16, rope_parameters=rope)
    model = spf.SoftPromptModel(AutoModelForCausalLM.from_config(config).eval())
    model.add_prompt("p", spf.SoftPrompt.for_model("PROMPT_TUNING", model.base, num_virtual_tokens=5))
    with torch.no_grad():
        model(input_ids=torch.ones(1, 11, dtype=torch.long))
        with pytest.raises(ValueError, match=r"5 virtual and 12 own tokens need 17 positions"):
            model(input_ids=torch.ones(1, 12, dtype=torch.long))
