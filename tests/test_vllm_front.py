# SPDX-License-Identifier: Apache-2.0
"""The parts of the vLLM plugin that need no vLLM; tests/vllm_engine has the rest, in vLLM's own environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from softprompt_fast import PrefixKV, SoftPromptModel
from softprompt_fast.errors import AdapterError, PrefixError, PrefixFingerprintError
from softprompt_fast.integrations.vllm import Registry, UnknownPromptError, serve
from softprompt_fast.integrations.vllm.kv_heads import rank_kv_heads
from softprompt_fast.integrations.vllm.registry import load
from softprompt_fast.serving.settings import ServeSettings
from tests.models import make_base, make_prompt


def save(directory: Path, length: int = 3, fingerprint: str = "a-b", seed: int = 0) -> PrefixKV:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(2, length, 4, generator=generator) for _ in range(4)]
    prefix = PrefixKV(draws[:2], draws[2:], method="PREFIX_TUNING", fingerprint=fingerprint)
    prefix.save_pretrained(directory)
    return prefix


def test_names_come_from_the_mapping_and_the_folder(tmp_path: Path) -> None:
    given, inside, hidden = save(tmp_path / "x", seed=1), save(tmp_path / "all" / "b", 5), tmp_path / "all" / ".c"
    save(hidden)
    save(tmp_path / "all" / "a", seed=3)
    (tmp_path / "all" / "empty").mkdir()
    (tmp_path / "all" / "file").write_text("")
    registry = Registry({"a": tmp_path / "x"}, tmp_path / "all")
    assert registry.names() == ["a", "b"]
    assert registry.find("a").digest == given.digest
    entry = registry.find("b")
    assert (entry.digest, entry.num_virtual_tokens, entry.name) == (inside.digest, 5, "b")
    for name in (".c", "empty", "file", "nobody"):
        assert name not in registry
        with pytest.raises(UnknownPromptError, match=f"no prompt named '{name}'; there are: a, b"):
            registry.find(name)


@pytest.mark.parametrize("name", ["../x", "a/../a", "a/", "/a", "", ".", "..", "a\0"])
def test_a_name_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    save(tmp_path / "all" / "a")
    save(tmp_path / "x")
    registry = Registry(folder=tmp_path / "all")
    assert name not in registry
    with pytest.raises(UnknownPromptError):
        registry.find(name)


def test_few_of_many_names_are_told(tmp_path: Path) -> None:
    registry = Registry({f"p{i:04}": tmp_path / str(i) for i in range(3000)})
    with pytest.raises(UnknownPromptError, match=r"p0009 and 2990 more$"):
        registry.find("nobody")


def test_each_look_up_sees_what_is_there_now(tmp_path: Path) -> None:
    registry = Registry(folder=tmp_path)
    with pytest.raises(UnknownPromptError, match="there are: none"):
        registry.find("a")
    first = save(tmp_path / "a", seed=1)
    old = registry.find("a")
    assert old.digest == first.digest and registry.find("a") is old
    second = save(tmp_path / "a", length=7, seed=2)
    assert registry.find("a").digest == second.digest and registry.find("a").num_virtual_tokens == 7
    assert torch.equal(load(registry.find("a")).keys[0], second.keys[0])
    with pytest.raises(PrefixError, match="replaced by another version"):
        load(old)
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    assert registry.names() == []


def test_another_bases_prefix_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a")
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4}
    assert Registry(folder=tmp_path, fingerprint="a-b", **shape).find("a")
    with pytest.raises(PrefixFingerprintError, match="fingerprint a-b, the base served here has a-c"):
        Registry(folder=tmp_path, fingerprint="a-c", **shape).find("a")
    for field, found in shape.items():
        with pytest.raises(PrefixFingerprintError, match=rf"{field} \(base: 9, prefix: {found}\)"):
            Registry(folder=tmp_path, **shape | {field: 9}).find("a")


def test_damage_is_found(tmp_path: Path) -> None:
    save(tmp_path / "a", length=40)
    file = tmp_path / "a" / "prefix_kv.safetensors"
    content = bytearray(file.read_bytes())
    registry = Registry(folder=tmp_path)
    entry = registry.find("a")
    registry.verify(entry)
    file.write_bytes(content[:-9])
    with pytest.raises(PrefixError, match="truncated"):
        registry.find("a")
    content[-9] ^= 1
    file.write_bytes(content)
    other = Registry(folder=tmp_path)
    with pytest.raises(PrefixError, match="digest"):
        other.verify(other.find("a"))


def test_an_adapter_says_how_to_compile_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(PrefixError, match="softprompt-fast compile"):
        Registry(folder=tmp_path).find("a")


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_heads_of_a_rank(heads: int, ranks: int) -> None:
    """Every head is somewhere, in order, and as often as the others."""
    if max(heads, ranks) % min(heads, ranks):
        with pytest.raises(ValueError, match="divide"):
            rank_kv_heads(heads, ranks, 0)
        return
    shares = [range(heads)[rank_kv_heads(heads, ranks, rank)] for rank in range(ranks)]
    copies = max(1, ranks // heads)
    assert [head for share in shares for head in share] == [head for head in range(heads) for _ in range(copies)]


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_must_exist(rank: int) -> None:
    with pytest.raises(ValueError, match=f"found rank {rank}"):
        rank_kv_heads(8, 4, rank)


# ------------------------------------------------------------------ softprompt-fast serve --engine vllm


def settings(**changes: Any) -> ServeSettings:
    fields: dict[str, Any] = {"model": "folder", "engine": "vllm", "max_prefill_tokens": 16, "grace": 2.6}
    return ServeSettings(**fields | changes)


def test_options_of_vllms_server(tmp_path: Path) -> None:
    prompts = {"a": "dir", "found": str(tmp_path / "found"), "alias": str(tmp_path / "found")}
    line = serve.options(settings(prompts_folder=tmp_path, device_bytes=5, api_key="secret"), prompts)
    given = dict(zip(line[::2], line[1::2], strict=True))
    assert given["--block-size"] == "32" and given["--max-num-seqs"] == "32" and given["--shutdown-timeout"] == "3"
    assert int(given["--max-num-batched-tokens"]) == 32  # vLLM wants no fewer than rows
    assert "--max-model-len" not in given and "--chat-template" not in given
    extra = json.loads(given["--kv-transfer-config"])["kv_connector_extra_config"]
    # What lies in the folder is named by the folder alone, so that it goes when it is removed there.
    assert extra.pop("prompts") == {"a": "dir", "alias": str(tmp_path / "found")}
    assert extra == {"prompts_folder": str(tmp_path), "resident_bytes": 5}
    assert not any("secret" in text for text in line)  # vLLM logs its options


@pytest.mark.parametrize(
    "given",
    [{"admin": True}, {"host_bytes": 1}, {"prefix_dtype": "int8"}, {"timeout": 5.0}],
    ids=lambda given: next(iter(given)),
)
def test_what_vllm_lacks_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    serve.refuse_what_vllm_lacks(settings())
    with pytest.raises(ValueError, match=f"--{next(iter(given)).replace('_', '-')}: not with --engine vllm"):
        serve.refuse_what_vllm_lacks(settings(**given, api_key="key", prompts_folder=tmp_path))


def test_adapters_are_compiled_first(tmp_path: Path) -> None:
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path / "base")
    model = SoftPromptModel(base)
    model.add_prompt("a", make_prompt(base))
    model.save_prompt("a", tmp_path / "all" / "adapter")
    model.compile_prompt("a").save_pretrained(tmp_path / "all" / "prefix")
    found = settings(prompts_folder=tmp_path / "all", prompts={"also": tmp_path / "all" / "prefix"}).adapters
    assert list(found) == ["adapter", "prefix", "also"]
    made = serve.compile_adapters(found, str(tmp_path / "base"), "float32", tmp_path / "made")
    assert made["prefix"] == made["also"] == str(tmp_path / "all" / "prefix")
    assert torch.equal(PrefixKV.from_pretrained(made["adapter"]).keys[1], model.compile_prompt("a").keys[1])
    (tmp_path / "all" / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"prompt 'adapter' can't be compiled: \S+adapter_config.json: damaged"):
        serve.compile_adapters(found, str(tmp_path / "base"), "float32", tmp_path / "made")
