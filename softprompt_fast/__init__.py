# SPDX-License-Identifier: Apache-2.0
"""Soft-prompted language models, as fast as the hardware allows.

A soft prompt in front of a frozen causal LM is, for every layer, a fixed pair of keys and values. This package
computes them once, keeps one copy, and lets every row of every batch attend to it::

    import softprompt_fast as spf

    model = spf.accelerate(peft_model)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32)

Submodules are imported at first use, so that ``import softprompt_fast`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from softprompt_fast._version import __version__

if TYPE_CHECKING:
    import softprompt_fast.nn as nn
    import softprompt_fast.ops as ops
    from softprompt_fast.bank import BankOptions
    from softprompt_fast.encoder import EncoderDecoderSoftPromptModel, EncoderSoftPromptModel
    from softprompt_fast.explanation import Explanation, explain
    from softprompt_fast.model import SoftPromptModel
    from softprompt_fast.prefix_kv import PrefixKV
    from softprompt_fast.prompt import SoftPrompt
    from softprompt_fast.wrap import accelerate

_HOME = {
    "accelerate": "softprompt_fast.wrap",
    "BankOptions": "softprompt_fast.bank",
    "EncoderDecoderSoftPromptModel": "softprompt_fast.encoder",
    "EncoderSoftPromptModel": "softprompt_fast.encoder",
    "Explanation": "softprompt_fast.explanation",
    "explain": "softprompt_fast.explanation",
    "SoftPromptModel": "softprompt_fast.model",
    "PrefixKV": "softprompt_fast.prefix_kv",
    "SoftPrompt": "softprompt_fast.prompt",
}
_SUBMODULES = ("nn", "ops")

__all__ = [
    "BankOptions",
    "EncoderDecoderSoftPromptModel",
    "EncoderSoftPromptModel",
    "Explanation",
    "PrefixKV",
    "SoftPrompt",
    "SoftPromptModel",
    "__version__",
    "accelerate",
    "explain",
    "nn",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"softprompt_fast.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'softprompt_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
