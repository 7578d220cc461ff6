# SPDX-License-Identifier: Apache-2.0
"""Before the engine: a request that names a prompt gets its placeholders, and its answer loses them again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.outputs import RequestOutput

from softprompt_fast.integrations.vllm import _internals
from softprompt_fast.integrations.vllm.base import make_registry
from softprompt_fast.integrations.vllm.connector import SoftPromptConnector, salt_of
from softprompt_fast.integrations.vllm.registry import Entry

logger = logging.getLogger("vllm.softprompt_fast")


class PromptFront:
    """What a process that sends requests to an engine knows of prompts.

    Args:
        vllm_config: the engine's.
        tokenizer: the model's; None if there is none.

    Raises:
        ValueError: the engine was started without the connector.
    """

    def __init__(self, vllm_config: Any, tokenizer: Any = None) -> None:
        settings = _internals.connector_settings(vllm_config, SoftPromptConnector.__name__)
        if settings is None:
            raise ValueError(
                "this vLLM was started without the connector of soft prompts: pass kv_transfer_config="
                "softprompt_fast.integrations.vllm.kv_transfer_config(...)"
            )
        self.registry = make_registry(vllm_config, settings)
        self.placeholder = placeholder_id(vllm_config.model_config, tokenizer)
        self._longest = vllm_config.model_config.max_model_len

    def find(self, name: str) -> Entry:
        """As `Registry.find`, and the content is compared with its digest, once for each version."""
        entry = self.registry.find(name)
        self.registry.verify(entry)
        return entry

    def prepare(
        self, entry: Entry, ids: Sequence[int], params: SamplingParams, salt: str | None = None
    ) -> tuple[list[int], str, SamplingParams]:
        """Ids with placeholders, the salt, and sampling parameters with what the connector needs.

        Args:
            ids: the row's own tokens.
            params: left as they are; a copy is returned.
            salt: the request's own cache salt.

        Raises:
            ValueError: no own token, too long, or options that a prompt can't be served with; says which.
        """
        if not ids:
            raise ValueError(f"prompt {entry.name!r}: expected at least one token of the request's own, found none")
        if entry.num_virtual_tokens + len(ids) >= self._longest:
            raise ValueError(
                f"prompt {entry.name!r}: its {entry.num_virtual_tokens} virtual tokens and {len(ids)} own ones leave "
                f"no room for a new one in the model's {self._longest}"
            )
        if params.prompt_logprobs is not None or params.skip_reading_prefix_cache:
            raise ValueError(
                "prompt_logprobs (also what echo with logprobs asks for) and skip_reading_prefix_cache would need the "
                "virtual tokens to be computed, whose keys and values are given"
            )
        params = params.clone()
        extra = dict(params.extra_args or {})
        extra["kv_transfer_params"] = {
            **(extra.get("kv_transfer_params") or {}),
            "soft_prompt": entry.name,
            "digest": entry.digest,
            "num_virtual_tokens": entry.num_virtual_tokens,
        }
        params.extra_args = extra
        return [self.placeholder] * entry.num_virtual_tokens + list(ids), salt_of(entry.digest, salt), params


def strip(output: RequestOutput, entry: Entry) -> RequestOutput:
    """The same answer without placeholders: its prompt's ids, and how many of those came from a cache."""
    output = copy.copy(output)
    if output.prompt_token_ids is not None:
        output.prompt_token_ids = output.prompt_token_ids[entry.num_virtual_tokens :]
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = max(0, output.num_cached_tokens - entry.num_virtual_tokens)
    return output


def placeholder_id(model_config: Any, tokenizer: Any) -> int:
    """An id that no text contains, so that repetition penalties, which look at a request's ids, punish no word: one
    behind the tokenizer's, or its last special token that does not end a text."""
    size = model_config.get_vocab_size()
    if tokenizer is None:
        return size - 1
    if len(tokenizer) < size:
        return len(tokenizer)
    ends = model_config.try_get_generation_config().get("eos_token_id", [])
    forbidden = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    special = [i for i in tokenizer.all_special_ids if i not in forbidden and i < size]
    added = [i for i in getattr(tokenizer, "added_tokens_decoder", {}) if i not in forbidden and i < size]
    return max(special or added or [size - 1])
