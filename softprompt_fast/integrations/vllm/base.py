# SPDX-License-Identifier: Apache-2.0
"""Which base model a vLLM serves: its fingerprint, without loading it a second time, and the registry for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt_fast.integrations.vllm.registry import Registry
from softprompt_fast.prefix_kv import model_fingerprint


class _Checkpoint:
    """As much of a transformers model as `model_fingerprint` reads: its configuration and its parameters, which stay
    in their memory-mapped files."""

    def __init__(self, config: Any, folder: Path) -> None:
        self.config = config
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(file.keys(), file))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self._shapes = {name: weight.shape for name, weight in model.named_parameters()}

    @property
    def complete(self) -> bool:
        """Whether every parameter is saved under its own name (some families' are converted when they are loaded)."""
        return all(
            name in self._files and self._files[name].get_slice(name).get_shape() == list(shape)
            for name, shape in self._shapes.items()
        )

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self._files[name].get_tensor(name)) for name in self._shapes)


@functools.lru_cache(maxsize=4)
def base_fingerprint(model: str, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """`model_fingerprint` of a saved base, read from its files: some thousand values of each weight.

    Args:
        model: folder or hub name, as vLLM takes it.
        revision: of a hub name.

    Raises:
        OSError: it can't be read.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    checkpoint = _Checkpoint(config, folder)
    if checkpoint.complete:
        return model_fingerprint(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    return model_fingerprint(loaded)


def make_registry(vllm_config: Any, settings: Mapping[str, Any]) -> Registry:
    """The registry that `settings` (a connector's extra config) name, for the base of `vllm_config`."""
    model = vllm_config.model_config
    fingerprint = settings.get("fingerprint")
    if fingerprint is None:
        fingerprint = base_fingerprint(model.model, model.revision, model.trust_remote_code)
    return Registry(
        settings.get("prompts"),
        settings.get("prompts_folder"),
        fingerprint=fingerprint,
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
    )
