# SPDX-License-Identifier: Apache-2.0
"""A small vLLM, the base that it serves, and prompts for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import pytest

from softprompt_fast import PrefixKV
from tests.vllm_engine.tiny import LENGTHS, Base, make_config


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("base"), make_config())


@pytest.fixture(scope="module")
def prefixes(base: Base) -> dict[str, PrefixKV]:
    """``p16`` to ``p512``, lengths that fill blocks of 32 and that do not, and one in 8 bits."""
    found = {f"p{length}": base.prefix(length, seed=length) for length in LENGTHS}
    return found | {"int8": base.prefix(48, seed=7).quantize()}


@pytest.fixture(scope="module")
def folder(prefixes: dict[str, PrefixKV], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each prefix in a subfolder of its name."""
    parent = tmp_path_factory.mktemp("prompts")
    for name, prefix in prefixes.items():
        prefix.save_pretrained(parent / name)
    return parent


@pytest.fixture(scope="session")
def make_llm() -> Iterator[Callable[..., Any]]:
    """``vllm.LLM`` of a `Base`: small, eager, blocks of 32."""
    import vllm

    def make(base: Base, **options: Any) -> Any:
        fields = {"dtype": "float32", "block_size": 32, "max_model_len": 768, "enforce_eager": True, "seed": 0}
        return vllm.LLM(str(base.folder), **fields | options)

    yield make
