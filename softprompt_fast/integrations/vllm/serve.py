# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast serve --engine vllm``: vLLM's own OpenAI server with the connector and the middleware."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt_fast.errors import AdapterError
from softprompt_fast.prefix_kv import PrefixKV

_CONNECTOR = "softprompt_fast.integrations.vllm.connector"
_MIDDLEWARE = "softprompt_fast.integrations.vllm.server.SoftPromptMiddleware"
#: Tokens a block: virtual tokens that fill no block are not shared, and vLLM's own choice on a CPU is 128.
BLOCK_SIZE = 32


def run(settings: Any, extra_args: Sequence[str] = ()) -> None:
    """Serve until told to stop. PEFT adapters among the prompts are compiled first, each in a process of its own, so
    that the base's weights are gone again when vLLM takes its memory.

    Args:
        settings: a ``serving.settings.ServeSettings``; ``model`` is a folder or a hub name, and not "demo".
        extra_args: further options of ``vllm serve``.

    Raises:
        ValueError: a setting that vLLM has nothing for; says which.
        AdapterError: an adapter that can't be compiled, with the reason.
    """
    refuse_what_vllm_lacks(settings)
    if settings.api_key is not None:
        os.environ["VLLM_API_KEY"] = settings.api_key  # options are logged
    with tempfile.TemporaryDirectory(prefix="softprompt-fast-") as folder:
        prompts = compile_adapters(settings.adapters, settings.model, settings.dtype, Path(folder))
        from softprompt_fast.integrations.vllm import _internals

        _internals.run_server([*options(settings, prompts), *extra_args])


def refuse_what_vllm_lacks(settings: Any) -> None:
    """
    Raises:
        ValueError: names the setting, and why it means nothing here.
    """
    for name, why in (
        ("admin", "prompts of the folder are served as soon as they are saved there, and not once they are removed"),
        ("host_bytes", "prefixes are memory-mapped files, and blocks of vLLM's cache (--device-bytes)"),
        ("prefix_dtype", "vLLM keeps prefixes in its cache, in the cache's dtype"),
        ("timeout", "its server has no limit on the time that a request takes; a proxy in front of it may"),
    ):
        if getattr(settings, name):
            raise ValueError(f"--{name.replace('_', '-')}: not with --engine vllm: {why}")


def compile_adapters(adapters: Mapping[str, Path], model: str, dtype: str, folder: Path) -> dict[str, str]:
    """Directories of the `PrefixKV` of each prompt; those of PEFT adapters are made in `folder`.

    Raises:
        AdapterError: one can't be compiled, with the reason.
    """
    prompts = {}
    for number, (name, directory) in enumerate(adapters.items()):
        if PrefixKV.is_saved_at(directory) or not (directory / "adapter_config.json").is_file():
            prompts[name] = str(directory)
            continue
        made = folder / str(number)
        command = [sys.executable, "-m", "softprompt_fast.cli", "compile", str(directory), "--base", model]
        command += ["--dtype", dtype, "--output", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AdapterError(f"prompt {name!r} can't be compiled: {done.stderr.rpartition('error: ')[2].strip()}")
        prompts[name] = str(made)
    return prompts


def options(settings: Any, prompts: Mapping[str, str]) -> list[str]:
    """The command line of ``vllm serve`` for `settings`."""
    extra: dict[str, Any] = {"prompts": dict(prompts)}
    if settings.prompts_folder is not None:
        folder = Path(settings.prompts_folder)
        extra["prompts_folder"] = str(folder)
        # Prefixes that lie there are served for as long as they do, and none longer for being there now.
        extra["prompts"] = {name: made for name, made in prompts.items() if Path(made) != folder / name}
    if settings.device_bytes is not None:
        extra["resident_bytes"] = settings.device_bytes
    connector = {
        "kv_connector": "SoftPromptConnector",
        "kv_connector_module_path": _CONNECTOR,
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }
    given = {
        "--model": settings.model,
        "--served-model-name": settings.base_name,
        "--host": settings.host,
        "--port": settings.port,
        "--dtype": settings.dtype,
        "--block-size": BLOCK_SIZE,
        "--max-num-seqs": settings.max_batch,
        "--max-num-queued-reqs": settings.max_waiting,
        "--max-num-batched-tokens": max(settings.max_prefill_tokens, settings.max_batch),
        "--max-model-len": settings.max_model_len,
        "--chat-template": settings.chat_template,
        "--shutdown-timeout": round(settings.grace),
        "--kv-transfer-config": json.dumps(connector),
        "--middleware": _MIDDLEWARE,
    }
    return [text for name, value in given.items() if value is not None for text in (name, str(value))]
