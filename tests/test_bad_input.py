# SPDX-License-Identifier: Apache-2.0
"""Bad input to the model API: an error that names the knob, says what was expected and found, and loses nothing.

Caches that don't fit have their tests in test_cache.py.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MAX_POSITIONS, VOCAB_SIZE, assert_same_logits, make_base, make_model, make_prompt, make_rows
from transformers import LlamaConfig, LlamaForCausalLM

from softprompt_fast import PrefixKV, SoftPrompt, SoftPromptModel
from softprompt_fast.backends._registry import BackendError

IDS = make_rows([7])[0][None]


@pytest.fixture(scope="module")
def model() -> SoftPromptModel:
    """Prompts "a" and "b" on llama. Tests must not change it."""
    return make_model()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A whole adapter directory, of prompt "a"."""
    make_model().save_prompt("a", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def saved_prefix(tmp_path: Path) -> Path:
    make_model().compile_prompt("a").save_pretrained(tmp_path / "prefix")
    return tmp_path / "prefix"


def other_base(**sizes: int) -> LlamaForCausalLM:
    config = make_base().config.to_dict() | sizes
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def forward(model: SoftPromptModel, **kwargs: Any) -> Any:
    return model(**{"input_ids": IDS} | kwargs)


def generate(model: SoftPromptModel, **kwargs: Any) -> Any:
    return model.generate(**{"input_ids": IDS, "max_new_tokens": 2} | kwargs)


CALLS = pytest.mark.parametrize("call", [forward, generate])
FAMILIES = pytest.mark.parametrize("family", ["llama", "bloom"])  # a shared and an expanded prefix


# ---- adapters and prefixes ------------------------------------------------------------------------------------------


def test_an_adapter_for_another_base(tmp_path: Path) -> None:
    base = make_base()
    for method, sizes, message in (
        ("PROMPT_TUNING", {"hidden_size": 64, "head_dim": 8}, "embedding size.*the base has 64, the adapter 32"),
        ("PREFIX_TUNING", {"num_hidden_layers": 3}, "layers.*the base has 3, the adapter 2"),
        ("PREFIX_TUNING", {"num_key_value_heads": 4}, "key/value heads.*the base has 4, the adapter 2"),
        ("CARTRIDGE", {"head_dim": 16}, "head dimension.*the base has 16, the adapter 8"),
    ):
        model = SoftPromptModel(base)
        model.add_prompt("p", make_prompt(base, method))
        directory = tmp_path / method
        model.save_prompt("p", directory)
        other = other_base(**sizes)
        with pytest.raises(ValueError, match=message):
            SoftPromptModel.from_pretrained(other, directory)
        model = SoftPromptModel(other)
        with pytest.raises(ValueError, match=message):
            model.load_prompt("p", directory)
        assert model.prompt_names == [] and model.active_prompt is None


def test_a_lora_adapter(adapter: Path, model: SoftPromptModel) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "task_type": "CAUSAL_LM"}))
    with pytest.raises(ValueError, match=r"peft_type: expected one of \[.*PROMPT_TUNING.*\], found 'LORA'"):
        model.load_prompt("lora", adapter)
    assert "lora" not in model.prompt_names


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_adapter(keep: int, adapter: Path, model: SoftPromptModel) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: damaged or truncated"):
        model.load_prompt("damaged", adapter)
    assert "damaged" not in model.prompt_names


def test_an_incomplete_adapter(adapter: Path, tmp_path: Path, model: SoftPromptModel) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 8}))
    with pytest.raises(ValueError, match=r"prompt_embeddings of shape \[8, 32\].*found \[5, 32\]"):
        model.load_prompt("x", adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: damaged"):
        model.load_prompt("x", adapter)
    (adapter / "adapter_config.json").unlink()
    for directory in (adapter, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
            model.load_prompt("x", directory)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_prefix(keep: int, saved_prefix: Path, model: SoftPromptModel) -> None:
    path = saved_prefix / "prefix_kv.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"prefix_kv\.safetensors: truncated or damaged"):
        model.load_prompt("damaged", saved_prefix)


def test_an_altered_prefix(saved_prefix: Path, model: SoftPromptModel) -> None:
    path = saved_prefix / "prefix_kv.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="altered or damaged, its content does not have the digest"):
        model.load_prompt("altered", saved_prefix)
    assert "altered" not in model.prompt_names


def test_a_prefix_of_another_base(saved_prefix: Path) -> None:
    base = make_base()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"base_model: .*fingerprint .*differ in the weights"):
        SoftPromptModel(base).load_prompt("k", saved_prefix)
    with pytest.raises(ValueError, match=r"base_model: .*num_hidden_layers \(prefix: 2, base: 3\)"):
        SoftPromptModel(other_base(num_hidden_layers=3)).load_prompt("k", saved_prefix)
    with pytest.raises(ValueError, match=r"base_model: .*fingerprint"):
        SoftPromptModel(base).add_prompt("k", PrefixKV.from_pretrained(saved_prefix))


def test_nan_and_infinity_in_a_prompt(model: SoftPromptModel, tmp_path: Path) -> None:
    for value in (torch.nan, torch.inf):
        prompt = make_prompt(model.base)
        with torch.no_grad():
            prompt.embedding.weight[0, :2] = value
        with pytest.raises(ValueError, match=r"'embedding.weight': 2 of 160 values are NaN or infinite"):
            model.add_prompt("bad", prompt)
        good = model.compile_prompt("a")
        keys = [key.clone() for key in good.keys]
        keys[1][0, 0, 0] = value
        prefix = PrefixKV(keys, good.values, method=good.method, fingerprint=good.fingerprint)
        with pytest.raises(ValueError, match=r"layers.1.key': 1 of 80 values are NaN or infinite"):
            model.add_prompt("bad", prefix)
    assert "bad" not in model.prompt_names


def test_a_prompt_that_became_nan_is_not_saved(tmp_path: Path) -> None:
    model = make_model()
    model.save_prompt("a", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.get_prompt("a").embedding.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 160 values are NaN or infinite"):
        model.save_prompt("a", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Killed(BaseException):
    """What a signal handler raises, which no ``except Exception`` catches."""


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(*args: Any, **kwargs: Any) -> None:
    raise Killed


@pytest.mark.parametrize("failure", [full_disk, killed])
@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "softprompt_fast.integrations.peft.save_file"])
def test_a_failed_save_leaves_the_old_adapter(
    failure: Callable[..., None], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.save_prompt("a", tmp_path)
    expected = model(IDS, prompt="a").logits
    with torch.no_grad():
        model.get_prompt("a").embedding.weight.mul_(2.0)
    with monkeypatch.context() as patched:
        patched.setattr(where, failure)
        with pytest.raises((OSError, Killed)):
            model.save_prompt("a", tmp_path)
    model.load_prompt("old", tmp_path)
    assert_same_logits(model(IDS, prompt="old").logits, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model.save_prompt("a", tmp_path)  # and a later save succeeds
    model.load_prompt("new", tmp_path)
    assert torch.equal(model(IDS, prompt="new").logits, model(IDS, prompt="a").logits)


def test_saving_a_prefix_as_an_adapter(tmp_path: Path) -> None:
    model = make_model()
    model.add_prompt("k", model.compile_prompt("a"))
    with pytest.raises(TypeError, match=r"prompt: 'k' is a PrefixKV.*save_pretrained\(directory\)"):
        model.save_prompt("k", tmp_path)
    model.set_prompt(None)
    with pytest.raises(ValueError, match="prompt: no active prompt to save"):
        model.save_pretrained(tmp_path)


def test_what_is_no_prompt_and_no_base(model: SoftPromptModel) -> None:
    with pytest.raises(TypeError, match="prompt: expected SoftPrompt or PrefixKV, found dict"):
        model.add_prompt("x", {})
    with pytest.raises(TypeError, match="base: expected a transformers causal LM, found Linear"):
        SoftPromptModel(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="base: expected a transformers causal LM, found LlamaModel"):
        SoftPromptModel(make_base().model)
    with pytest.raises(ValueError, match="SOFT"):
        SoftPrompt.for_model("SOFT", model.base, num_virtual_tokens=3)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .*torch.*, found 'opencl'"):
        make_model(backend="opencl")


def test_a_backend_that_cannot_serve_does_not_fall_back() -> None:
    base = make_base().double()  # which no kernel takes
    before = base.config._attn_implementation
    with pytest.raises(BackendError, match="prefix_attention: backend 'triton' cannot serve this call"):
        SoftPromptModel(base, backend="triton")
    assert base.config._attn_implementation == before


# ---- prompt= and task_ids= ------------------------------------------------------------------------------------------


@CALLS
@FAMILIES
def test_an_unknown_prompt_lists_the_known_ones(call: Callable[..., Any], family: str) -> None:
    model = make_model(family)
    for prompt in ("c", ["c"], ""):
        with pytest.raises(KeyError, match=r"unknown prompt '.?'; known prompts: 'a', 'b'"):
            call(model, prompt=prompt)
    for method in (model.set_prompt, model.remove_prompt, model.get_prompt, model.compile_prompt):
        with pytest.raises(KeyError, match=r"unknown prompt 'c'; known prompts: 'a', 'b'"):
            method("c")


@CALLS
@FAMILIES
def test_a_prompt_list_of_the_wrong_length(call: Callable[..., Any], family: str) -> None:
    model = make_model(family)
    for prompt in (["a", "b"], []):
        with pytest.raises(ValueError, match=rf"prompt: expected one name per row \(1 rows\), found .*{len(prompt)}"):
            call(model, prompt=prompt)


@CALLS
def test_a_prompt_of_the_wrong_type(call: Callable[..., Any], model: SoftPromptModel) -> None:
    for prompt in (5, [5], model.get_prompt("a"), {"a": 1}):
        with pytest.raises(TypeError, match=f"prompt: expected a name.*found {type(prompt).__name__}"):
            call(model, prompt=prompt)


@CALLS
@pytest.mark.parametrize(
    ("task_ids", "error", "message"),
    [
        (None, ValueError, r"task_ids: .*multitask.*\(0\.\.2\)"),
        ([0, 1], ValueError, "task_ids: expected one per row .1 rows., found 2"),
        ([3], ValueError, "task_ids: .*tasks 0..2, found 3"),
        ([-1], ValueError, "task_ids: .*tasks 0..2, found -1"),
        ([1.5], TypeError, "task_ids: expected integers, found 1.5"),
        (["x"], TypeError, "task_ids: expected integers, found 'x'"),
    ],
    ids=str,
)
def test_task_ids(call: Callable[..., Any], task_ids: Any, error: type[Exception], message: str) -> None:
    model = make_model(prompts={"t": make_prompt(make_base(), "MULTITASK_PROMPT_TUNING")})
    with pytest.raises(error, match=message):
        call(model, task_ids=task_ids)


def test_compiling_a_task_that_is_not_there() -> None:
    model = make_model(prompts={"t": make_prompt(make_base(), "MULTITASK_PROMPT_TUNING")})
    for task in (None, 3):
        with pytest.raises(ValueError, match="task_ids: prompt 't'"):
            model.compile_prompt("t", task=task)


@FAMILIES
def test_trainable_and_frozen_prompts_in_one_training_call(family: str) -> None:
    model = make_model(family)
    model.add_prompt("t", make_prompt(model.base, seed=5))
    ids = torch.cat([IDS, IDS])
    model.train()
    with pytest.raises(ValueError, match=r"prompt: .*trainable prompts \['t'\] with frozen ones \['a'\]"):
        model(ids, labels=ids, prompt=["t", "a"])
    assert model(ids, labels=ids, prompt=["t", None]).loss.requires_grad
    assert model.eval()(ids, labels=ids, prompt=["t", "a"]).loss.isfinite()


def test_cpt_mixed_with_others_in_a_call_with_labels() -> None:
    base = make_base()
    model = make_model(prompts={"cpt": make_prompt(base, "CPT"), "a": make_prompt(base)})
    ids = torch.cat([IDS, IDS])
    with pytest.raises(ValueError, match=r"prompt: .*labels mixes CPT"):
        model(ids, labels=ids, prompt=["cpt", "a"])


# ---- tokens, masks, labels ------------------------------------------------------------------------------------------


@CALLS
@FAMILIES
@pytest.mark.parametrize("ids", [[[3, VOCAB_SIZE, 4]], [[-1, 3]], [[999]]], ids=str)
def test_token_ids_out_of_range(call: Callable[..., Any], family: str, ids: list[list[int]]) -> None:
    wrong = next(i for i in ids[0] if not 0 <= i < VOCAB_SIZE)
    message = rf"input_ids: token id {wrong} at row 0, position {ids[0].index(wrong)} .*vocabulary of {VOCAB_SIZE}"
    with pytest.raises(IndexError, match=message):
        call(make_model(family), input_ids=torch.tensor(ids))


@CALLS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_more_positions_than_the_model_has(call: Callable[..., Any], family: str) -> None:
    model = make_model(family)
    most = MAX_POSITIONS - 9
    assert model(torch.ones(1, most, dtype=torch.long), prompt="b").logits.isfinite().all()
    needed = f"9 virtual and {most + 1} own tokens need {MAX_POSITIONS + 1} positions"
    with pytest.raises(ValueError, match=f"input_ids: {needed}.*max_position_embeddings={MAX_POSITIONS}"):
        call(model, input_ids=torch.ones(1, most + 1, dtype=torch.long), prompt="b")
    # Padding needs no position.
    wide, mask = torch.ones(1, MAX_POSITIONS + 5, dtype=torch.long), torch.ones(1, MAX_POSITIONS + 5)
    mask[:, 20:] = 0
    assert model(wide, attention_mask=mask, prompt="b").logits[:, :20].isfinite().all()


@CALLS
@FAMILIES
def test_a_mask_with_holes(call: Callable[..., Any], family: str) -> None:
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask: row 0 has masked positions between its tokens"):
        call(make_model(family), attention_mask=mask)


@CALLS
@FAMILIES
@pytest.mark.parametrize("shape", [(1, 6), (1, 12), (3, 7), (7,), (1, 1, 7, 7)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_of_another_shape(call: Callable[..., Any], family: str, shape: tuple[int, ...], padded: bool) -> None:
    mask = torch.ones(shape, dtype=torch.long)
    if padded:
        mask[..., 0] = 0
    with pytest.raises(ValueError, match=rf"attention_mask: expected shape \(1, 7\).*found {re.escape(str(shape))}"):
        call(make_model(family), attention_mask=mask)


@FAMILIES
@pytest.mark.parametrize("shape", [(1, 6), (2, 7), (7,)], ids=str)
def test_labels_of_another_shape(family: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"labels: expected shape \(1, 7\), found {re.escape(str(shape))}"):
        make_model(family)(IDS, labels=torch.zeros(shape, dtype=torch.long))


def test_labels_with_what_they_rule_out(model: SoftPromptModel) -> None:
    with pytest.raises(ValueError, match="logits_to_keep: can't be combined with labels"):
        model(IDS, labels=IDS, logits_to_keep=1)
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="labels: can't be combined with past_key_values that hold tokens"):
        model(IDS, labels=IDS, past_key_values=cache)


@CALLS
@FAMILIES
def test_an_empty_batch(call: Callable[..., Any], family: str) -> None:
    for rows in (torch.zeros(0, 7, dtype=torch.long), torch.zeros(0, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"input_ids: the batch is empty, found shape \(0, "):
            call(make_model(family), input_ids=rows)


@FAMILIES
def test_a_call_without_a_column(family: str) -> None:
    model, none = make_model(family), IDS[:, :0]
    for call in ({}, {"labels": none}, {"labels": none, "attention_mask": none}, {"use_cache": True}):
        with pytest.raises(ValueError, match="input_ids: expected at least one column, found none; generate"):
            model(none, **call)
    with pytest.raises(ValueError, match="inputs_embeds: expected at least one column"):
        model(inputs_embeds=model.get_input_embeddings()(none))


@CALLS
def test_input_of_other_dimensions(call: Callable[..., Any], model: SoftPromptModel) -> None:
    with pytest.raises(ValueError, match=r"input_ids: expected 2 dimensions, found shape \(7,\)"):
        call(model, input_ids=IDS[0])
    with pytest.raises(ValueError, match=r"inputs_embeds: expected 3 dimensions, found shape \(7, 32\)"):
        call(model, input_ids=None, inputs_embeds=torch.zeros(7, 32))


def test_both_kinds_of_input_or_none(model: SoftPromptModel) -> None:
    with pytest.raises(ValueError, match="input_ids: pass exactly one of input_ids and inputs_embeds"):
        model(IDS, inputs_embeds=torch.zeros(1, 7, 32))
    with pytest.raises(ValueError, match="input_ids: pass exactly one of input_ids and inputs_embeds"):
        model(prompt="a")
    with pytest.raises(ValueError, match="inputs: pass either inputs or input_ids, not both"):
        model.generate(IDS, input_ids=IDS)


# ---- generation options ---------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("prompt", [None, "keys"])
def test_nothing_predicts_the_first_token(family: str, prompt: str | None) -> None:
    base = make_base(family)
    model = make_model(family, {"keys": make_prompt(base, "PREFIX_TUNING")})
    why = "has no own token and .*BOS"
    with pytest.raises(ValueError, match=f"input_ids: row 0 {why}"):
        model.generate(prompt=prompt, max_new_tokens=2)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ValueError, match=f"input_ids: row 1 {why}"):
        model.generate(IDS.expand(2, 7), attention_mask=mask, prompt=prompt, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["quantized", "offloaded"])
def test_a_cache_kind_that_is_not_served(kind: str, model: SoftPromptModel) -> None:
    with pytest.raises(
        ValueError, match=f"cache_implementation: expected None, 'dynamic' or 'static', found '{kind}'"
    ):
        generate(model, cache_implementation=kind)


def test_a_cache_and_a_cache_kind(model: SoftPromptModel) -> None:
    cache = model(IDS, use_cache=True).past_key_values
    ids = torch.cat([IDS, IDS], dim=1)
    with pytest.raises(ValueError, match="cache_implementation: can't be combined with past_key_values"):
        generate(model, input_ids=ids, past_key_values=cache, cache_implementation="static")


def test_options_that_are_not_served(model: SoftPromptModel) -> None:
    with pytest.raises(ValueError, match=r"assistant_model: .*use prompt_lookup_num_tokens"):
        generate(model, assistant_model=make_base())
    ids, mask = torch.cat([IDS, IDS]), torch.ones(2, 7, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="prefill_chunk_size: can't be combined with padded rows"):
        generate(model, input_ids=ids, attention_mask=mask, prefill_chunk_size=2)


@FAMILIES
def test_a_misspelt_option(family: str) -> None:
    with pytest.raises(ValueError, match="max_new_tokns"):
        generate(make_model(family), max_new_tokns=3)


@CALLS
@FAMILIES
def test_attention_that_is_not_causal(call: Callable[..., Any], family: str) -> None:
    model = make_model(family)
    with pytest.raises(ValueError, match="is_causal: expected True or None"):
        call(model, is_causal=False)
    found, expected = call(model, is_causal=True), call(model)
    assert torch.equal(getattr(found, "logits", found), getattr(expected, "logits", expected))


def test_what_the_expanded_path_refuses() -> None:
    model = make_model("bloom")
    ids = torch.cat([IDS, IDS])
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 0] = 0
    for option in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"BloomForCausalLM takes the expanded path.*{option}"):
            model(ids, attention_mask=mask, **{option: True})
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: BloomForCausalLM takes the expanded path"):
        model.generate(ids[:1].repeat(1, 2), past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="inputs_embeds: BloomForCausalLM takes the expanded path"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2)
    with pytest.raises(
        ValueError, match="return_dict_in_generate and streamer need rows of one prompt and one length"
    ):
        model.generate(ids, attention_mask=mask, return_dict_in_generate=True, max_new_tokens=2)


@pytest.mark.parametrize("rows", [1, 2])
@FAMILIES
def test_generation_options_without_a_meaning_here(family: str, rows: int) -> None:
    model, ids = make_model(family), IDS.repeat(rows, 1)
    with pytest.raises(ValueError, match="guidance_scale: not supported"):
        generate(model, input_ids=ids, guidance_scale=1.5)
    with pytest.raises(ValueError, match="position_ids: generate counts positions itself"):
        generate(model, input_ids=ids, position_ids=torch.arange(3, 10)[None])
