# SPDX-License-Identifier: Apache-2.0
"""PEFT: adapter directories and live models, read and written without importing PEFT.

An adapter directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or the older
``adapter_model.bin``). The tensors are those of `SoftPrompt.adapter_tensors`, plus fully trained modules of the base
under ``base_model.<name in the base's state dict>``. Source: PEFT 0.21, `peft.utils.save_and_load`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softprompt_fast._io import atomic_path, atomic_write_bytes, make_directory, read_one_version
from softprompt_fast.errors import AdapterError, IncompatibleBaseError
from softprompt_fast.prompt import BaseShape, ContextAwarePromptTuning, SoftPrompt, TokenEmbeddings

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
_BASE_PREFIX = "base_model."


def load_adapter(
    directory: str | os.PathLike[str],
    *,
    trainable: bool = False,
    token_embeddings: TokenEmbeddings | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftPrompt:
    """Read a PEFT prompt-learning adapter from a local directory.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``. An ``adapter_model.bin`` is read
            with ``torch.load(weights_only=True)``, which runs no code.
        trainable: let the prompt train on. Adapter files hold merged prompts, so P_TUNING and projected
            PREFIX_TUNING go on as free matrices, without their former reparameterisation.
        token_embeddings: the base's token table; CPT needs it to train on (its delta is not stored alone).
        dtype: of the parameters.

    Raises:
        FileNotFoundError: the directory or one of its two files is missing.
        AdapterError: not a prompt-learning adapter, an option missing or out of range, tensors damaged, missing or of
            another shape than the configuration says.
        ValueError: NaN or infinities in a tensor; names the tensor and the count.
    """
    directory = Path(directory)
    config, tensors = read_one_version(
        lambda: (read_adapter_config(directory), _read_tensors(directory)), *adapter_files(directory)
    )
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BASE_PREFIX)}
    prompt = SoftPrompt.from_tensors(config, own, dtype=dtype)
    prompt.modules_to_save = {
        name.removeprefix(_BASE_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_BASE_PREFIX)
    }
    prompt.check_finite()
    if not trainable:
        return prompt.eval()
    if isinstance(prompt, ContextAwarePromptTuning):
        prompt = prompt.unmerged(token_embeddings)
    return prompt.requires_grad_(True)


def is_adapter_at(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` holds an adapter (of any kind, whole or not)."""
    return (Path(directory) / CONFIG_NAME).is_file()


def adapter_files(directory: Path) -> tuple[Path, ...]:
    """The files that an adapter may consist of."""
    return tuple(directory / name for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLED_WEIGHTS_NAME))


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Content of the directory's ``adapter_config.json``, as it stands.

    Raises:
        FileNotFoundError: no such directory or file.
        AdapterError: it holds no JSON object.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        missing = path if path.parent.is_dir() else f"directory {path.parent}"
        raise FileNotFoundError(
            f"adapter directory: expected a local directory with {CONFIG_NAME}; missing: {missing}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: damaged, no valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def save_adapter(
    prompt: SoftPrompt, directory: str | os.PathLike[str], *, base_model_name_or_path: str | None = None
) -> None:
    """Write `prompt` as an adapter directory that `peft.PeftModel.from_pretrained` loads, bit for bit.

    Like PEFT's own, the file holds the merged prompt. Each of the two files is replaced atomically, tensors first: an
    interrupted save leaves a loadable directory or, where old and new differ in shape, one that is refused on loading.

    Args:
        base_model_name_or_path: written to the configuration where `prompt.config` names no base model.

    Raises:
        ValueError: NaN or infinities in a tensor (nothing is written).
        OSError: the disk is full, or `directory` is a file; existing files stay whole.
    """
    prompt.check_finite()
    tensors = prompt.adapter_tensors()
    tensors |= {_BASE_PREFIX + name: tensor.detach() for name, tensor in prompt.modules_to_save.items()}
    # safetensors refuses views of shared memory, and PEFT reads on the CPU
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    config = prompt.config | {"inference_mode": True}
    config["base_model_name_or_path"] = config["base_model_name_or_path"] or base_model_name_or_path

    directory = make_directory(directory)
    with atomic_path(directory / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    atomic_write_bytes(directory / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode())


def from_peft_model(peft_model: nn.Module, adapter_name: str | None = None) -> SoftPrompt:
    """The prompt of a live `peft.PeftModel`, sharing its `nn.Parameter`s: an optimiser step on either changes both.

    Args:
        peft_model: a model with prompt-learning adapters.
        adapter_name: which one; None is the active one.

    Raises:
        TypeError: `peft_model` is no PEFT model.
        KeyError: no adapter of that name; lists the known ones.
        AdapterError: the adapter is of another kind, e.g. LoRA.
    """
    configs = getattr(peft_model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise TypeError(f"peft_model: expected a peft.PeftModel, found {type(peft_model).__name__}")
    model: Any = peft_model
    active = model.active_adapter
    name = adapter_name if adapter_name is not None else active if isinstance(active, str) else active[0]
    if name not in configs:
        raise KeyError(f"adapter_name: expected one of {sorted(configs)}, found {name!r}")
    config = configs[name].to_dict()
    encoders = getattr(model, "prompt_encoder", {})
    prompt = SoftPrompt.from_encoder(config, encoders[name] if name in encoders else nn.Module())
    prompt.modules_to_save = _live_modules_to_save(model.base_model, name)
    return prompt


def check_compatible(prompt: SoftPrompt, base: Any) -> None:
    """Check that `prompt` fits `base`, a transformers model or its configuration.

    Raises:
        IncompatibleBaseError: it was made for another base; says which sizes were expected and found.
    """
    shape = BaseShape.of(base)
    config = prompt.config
    wrong: list[str] = []

    def check(what: str, expected: int | None, found: int) -> None:
        if expected is None:
            wrong.append(f"{what}: the base's layers differ from one another, the adapter has {found} for all")
        elif expected != found:
            wrong.append(f"{what}: the base has {expected}, the adapter {found}")

    if prompt.kind == "embedding":
        check("embedding size (token_dim)", shape.embedding_dim, config["token_dim"])
    else:
        heads = config["num_attention_heads"]
        check("layers (num_layers)", shape.num_layers, config["num_layers"])
        check("key/value heads (num_attention_heads)", shape.num_kv_heads, heads)
        check("head dimension (token_dim / num_attention_heads)", shape.head_dim, config["token_dim"] // heads)
    if prompt.method == "CPT" and shape.vocab_size is not None:
        outside = [i for i in config["cpt_token_ids"] if not 0 <= i < shape.vocab_size]
        if outside:
            wrong.append(f"cpt_token_ids: the base's vocabulary has {shape.vocab_size} entries, found ids {outside}")
    if wrong:
        made_for = config.get("base_model_name_or_path")
        raise IncompatibleBaseError(
            f"this {prompt.method} adapter was made for another base model"
            + (f" ({made_for})" if made_for else "")
            + ": "
            + "; ".join(wrong)
        )


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path, pickled = directory / WEIGHTS_NAME, directory / PICKLED_WEIGHTS_NAME
    if path.is_file():
        try:
            # Copied: load_file maps the file, and PEFT rewrites adapters in place, under the feet of a map.
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        except SafetensorError as error:
            raise AdapterError(f"{path}: damaged or truncated ({error})") from error
    if not pickled.is_file():
        raise FileNotFoundError(
            f"adapter directory: expected {WEIGHTS_NAME} (or {PICKLED_WEIGHTS_NAME}) in {directory}"
        )
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        raise AdapterError(f"{pickled}: damaged, or holds more than tensors, which could run code") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise AdapterError(f"{pickled}: expected a dictionary of tensors")
    return tensors


def _live_modules_to_save(base_model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Parameters of PEFT's wrappers around fully trained modules, by their name in the base's own state dict."""
    found: dict[str, Tensor] = {}
    for path, module in base_model.named_modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and hasattr(module, "original_module") and adapter_name in copies:
            state = copies[adapter_name].state_dict(keep_vars=True)
            found |= {f"{path}.{name}": tensor for name, tensor in state.items()}
    return found
