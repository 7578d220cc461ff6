# SPDX-License-Identifier: Apache-2.0
"""Prompts with vLLM's offline ``LLM``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.outputs import RequestOutput

from softprompt_fast.integrations.vllm.connector import SoftPromptConnector
from softprompt_fast.integrations.vllm.front import PromptFront, strip

_fronts: weakref.WeakKeyDictionary[Any, PromptFront] = weakref.WeakKeyDictionary()


def kv_transfer_config(**settings: Any) -> KVTransferConfig:
    """The configuration of an engine that serves prompts: ``LLM(model, kv_transfer_config=kv_transfer_config(...))``.

    Args:
        settings: see `connector`: ``prompts``, ``prompts_folder``, ``fingerprint``, ``resident_bytes``, ``pinned``.
    """
    return KVTransferConfig(
        kv_connector=SoftPromptConnector.__name__,
        kv_connector_module_path=SoftPromptConnector.__module__,
        kv_role="kv_consumer",
        kv_load_failure_policy="fail",
        kv_connector_extra_config={name: value for name, value in settings.items() if value is not None},
    )


def generate(
    llm: Any,
    prompts: Sequence[str | Sequence[int]],
    prompt_names: str | Sequence[str | None] | None = None,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    **options: Any,
) -> list[RequestOutput]:
    """``llm.generate``, each row behind its soft prompt.

    Args:
        llm: a ``vllm.LLM`` made with `kv_transfer_config`.
        prompts: text or token ids, one a row.
        prompt_names: a name for all rows or one a row; None: no soft prompt.
        sampling_params: one for all rows or one a row; None: the model's own.
        options: of ``llm.generate``.

    Returns:
        As ``llm.generate``, in the rows' order. ``prompt_token_ids`` holds own tokens alone. A row whose prompt broke
        after it was checked has the finish reason "error".

    Raises:
        UnknownPromptError: no such prompt; nothing has run.
        PrefixError, OSError: a prompt is damaged or can't be read; nothing has run.
        ValueError: rows and names differ in number, a row can't be served behind a prompt (says why), or `llm` has no
            connector.
    """
    names = [prompt_names] * len(prompts) if prompt_names is None or isinstance(prompt_names, str) else prompt_names
    if sampling_params is None:
        sampling_params = llm.get_default_sampling_params()
    many = [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else list(sampling_params)
    if not len(prompts) == len(names) == len(many):
        raise ValueError(
            f"expected as many names and sampling parameters as prompts, found {len(names)} and {len(many)} for "
            f"{len(prompts)}"
        )
    front = _front(llm)
    found = {name: front.find(name) for name in set(names) if name is not None}
    tokenizer = llm.get_tokenizer() if any(isinstance(prompt, str) for prompt in prompts) else None
    rows, params = [], []
    for prompt, name, own in zip(prompts, names, many, strict=True):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)  # type: ignore[union-attr]
        row: dict[str, Any] = {"prompt_token_ids": ids}
        if name is not None:
            row["prompt_token_ids"], row["cache_salt"], own = front.prepare(found[name], ids, own)
        if isinstance(prompt, str):
            row["prompt"] = prompt
        rows.append(row)
        params.append(own)
    outputs = llm.generate(rows, params, **options)
    return [
        output if name is None else strip(output, found[name]) for output, name in zip(outputs, names, strict=True)
    ]


def _front(llm: Any) -> PromptFront:
    if llm not in _fronts:
        tokenizer = None if llm.model_config.skip_tokenizer_init else llm.get_tokenizer()
        _fronts[llm] = PromptFront(llm.llm_engine.vllm_config, tokenizer)
    return _fronts[llm]
