# SPDX-License-Identifier: Apache-2.0
"""Engines of other configurations, each in a process of its own (little cache, two ranks, windows), and refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softprompt_fast import PrefixKV
from softprompt_fast.integrations.vllm import _internals
from softprompt_fast.integrations.vllm import base as vllm_base
from softprompt_fast.integrations.vllm.connector import why_not
from softprompt_fast.prefix_kv import model_fingerprint
from tests.vllm_engine.engine import run
from tests.vllm_engine.tiny import Base, make_config, make_rows

NEW = 40


def check(base: Base, prefixes: dict[str, PrefixKV], asked: list[Any], answers: list[Any]) -> None:
    exact = {name: prefix.dequantize() for name, prefix in prefixes.items()}
    assert answers == [base.greedy(row, exact.get(name), NEW) for row, name in asked]


def mixed(prefixes: dict[str, PrefixKV], count: int) -> list[Any]:
    names = [None, *prefixes]
    return [(row, names[i % len(names)]) for i, row in enumerate(make_rows(count, seed=2))]


def test_little_cache_and_chunks(base: Base, folder: Path, prefixes: dict[str, PrefixKV], tmp_path: Path) -> None:
    """36 blocks: rows are preempted and load their prefix again; 48 tokens a step: own tokens come in chunks."""
    options = {"max_model_len": 768, "num_gpu_blocks_override": 36, "max_num_batched_tokens": 48, "max_num_seqs": 16}
    asked = mixed(prefixes, 35)
    answers, preemptions = run(base.folder, folder, tmp_path, options, asked, NEW)
    check(base, prefixes, asked, answers)
    assert preemptions > 0


def test_two_tensor_parallel_ranks(base: Base, folder: Path, prefixes: dict[str, PrefixKV], tmp_path: Path) -> None:
    asked = mixed(prefixes, 14)
    options = {"max_model_len": 768, "tensor_parallel_size": 2}
    answers, _ = run(base.folder, folder, tmp_path, options, asked, NEW)
    check(base, prefixes, asked, answers)


def test_sliding_windows_beside_full_attention(tmp_path: Path) -> None:
    """One group of cache, where every layer keeps every token: vLLM does so for connectors like ours."""
    from transformers import Gemma2Config

    fields = make_config().to_dict() | {"sliding_window": 24, "query_pre_attn_scalar": 32, "num_hidden_layers": 4}
    fields["tie_word_embeddings"] = True  # vLLM's Gemma has no other
    kept = set(Gemma2Config().to_dict()) - {"model_type", "architectures", "layer_types", "transformers_version"}
    config = Gemma2Config(**{name: value for name, value in fields.items() if name in kept})
    (tmp_path / "base").mkdir()
    base = Base(tmp_path / "base", config)
    prefixes = {"p20": base.prefix(20, seed=1), "p100": base.prefix(100, seed=2)}
    for name, prefix in prefixes.items():
        prefix.save_pretrained(tmp_path / "prompts" / name)
    asked = mixed(prefixes, 6)
    answers, _ = run(base.folder, tmp_path / "prompts", tmp_path, {"max_model_len": 256}, asked, NEW)
    check(base, prefixes, asked, answers)


def test_the_fingerprint_is_read_from_files(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        vllm_base.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("it was loaded")
    )
    assert vllm_base.base_fingerprint(str(base.folder)) == base.fingerprint
    changed = Base(tmp_path, make_config())
    with torch.no_grad():
        changed.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    changed.model.save_pretrained(tmp_path)
    assert vllm_base.base_fingerprint(str(tmp_path)) == model_fingerprint(changed.model) != base.fingerprint


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0", "dev"])
def test_other_versions_are_refused(version: str) -> None:
    _internals.check_version("0.32.7+cpu")
    with pytest.raises(ImportError, match=rf"expected vLLM >= 0.32, < 0.33 .*found {version}"):
        _internals.check_version(version)


def test_configurations_that_would_be_wrong_are_refused() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    fields = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full = SimpleNamespace(kv_cache_spec=FullAttentionSpec(**fields))
    window = SimpleNamespace(kv_cache_spec=SlidingWindowSpec(**fields, sliding_window=8))

    def reasons(groups: list[Any], **changes: Any) -> list[str]:
        config = {
            "kv_transfer_config": SimpleNamespace(kv_load_failure_policy=changes.get("policy", "fail")),
            "speculative_config": changes.get("speculative"),
            "cache_config": SimpleNamespace(cache_dtype=changes.get("cache", "auto")),
            "parallel_config": SimpleNamespace(decode_context_parallel_size=changes.get("context", 1)),
            "model_config": SimpleNamespace(dtype=torch.float32),
        }
        return why_not(SimpleNamespace(**config), SimpleNamespace(kv_cache_groups=groups))

    assert not reasons([full])
    for wrong, word in (
        ({"policy": "recompute"}, "placeholders"),
        ({"speculative": object()}, "speculative"),
        ({"cache": "fp8"}, "fp8"),
        ({"context": 2}, "context"),
    ):
        (reason,) = reasons([full], **wrong)
        assert word in reason
    assert any("2 groups" in reason for reason in reasons([full, window]))
    assert any("SlidingWindowSpec" in reason for reason in reasons([window]))
