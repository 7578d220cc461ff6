# SPDX-License-Identifier: Apache-2.0
"""Soft prompts in vLLM: a KV connector, prompts as models of its OpenAI server, and a helper for offline use::

    import vllm
    import softprompt_fast as spf

    llm = vllm.LLM(model, kv_transfer_config=spf.vllm.kv_transfer_config(prompts_folder="prompts"), block_size=32)
    spf.vllm.generate(llm, ["Clause 4 says", "Hello"], ["legal", None], vllm.SamplingParams(temperature=0))

Importing it needs no vLLM; using it does. ``docs/vllm.md`` says what is served and what is refused.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt_fast.integrations.vllm.offline import generate, kv_transfer_config
    from softprompt_fast.integrations.vllm.registry import Registry, UnknownPromptError

_HOME = {
    "generate": "offline",
    "kv_transfer_config": "offline",
    "Registry": "registry",
    "UnknownPromptError": "registry",
}

__all__ = ["Registry", "UnknownPromptError", "generate", "kv_transfer_config"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
