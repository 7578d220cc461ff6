# SPDX-License-Identifier: Apache-2.0
"""The kernels, usable with no model at all. Importing this registers them under ``torch.ops.softprompt_fast``."""

from __future__ import annotations

from softprompt_fast.ops.merge_states import merge_states
from softprompt_fast.ops.prefix_attention import prefix_attention
from softprompt_fast.ops.prompt_concat import prompt_concat, prompt_layout
from softprompt_fast.ops.prompt_qkv import prompt_qkv

__all__ = ["merge_states", "prefix_attention", "prompt_concat", "prompt_layout", "prompt_qkv"]
