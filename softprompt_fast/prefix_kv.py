# SPDX-License-Identifier: Apache-2.0
"""PrefixKV: the frozen keys and values that a soft prompt becomes, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from softprompt_fast._io import atomic_path, atomic_write_bytes, make_directory, read_one_version
from softprompt_fast.backends import quantized
from softprompt_fast.errors import IncompatibleBaseError, PrefixError, PrefixFingerprintError
from softprompt_fast.prompt import BaseShape, check_finite

#: The newest that is read. Version 2 has 8-bit keys and values; floating ones are still written as version 1, for
#: older readers.
FORMAT_VERSION = 2
TENSORS_NAME = "prefix_kv.safetensors"
METADATA_NAME = "prefix_kv.json"
_HEADER_KEY = "prefix_kv"

# Configuration fields that say nothing about what a model computes from token embeddings on.
# fmt: off
_IGNORED_FIELDS = frozenset({
    "_name_or_path", "name_or_path", "architectures", "transformers_version", "transformers_weights", "auto_map",
    "dtype", "torch_dtype", "_attn_implementation", "attn_implementation", "experts_implementation", "pretraining_tp",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "id2label", "label2id", "num_labels", "problem_type", "initializer_range", "initializer_factor",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
})
# fmt: on
_SAMPLES_PER_WEIGHT = 1024
_PROBE_QUERIES = 64


@dataclass(frozen=True)
class Scales:
    """What int8 or float8_e4m3fn keys and values are multiples of.

    Attributes:
        keys, values: per layer float32 ``[Hkv, ceil(L / block)]``: entry l of head h stands for
            ``key[h, l] * scale[h, l // block]``.
        block: tokens that share a scale.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block: int

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """The last three arguments of ``prefix_attention``, as its backends take them."""
        return self.keys[layer], self.values[layer], self.block

    def dequantize(
        self, layer: int, key: Tensor, value: Tensor, dtype: torch.dtype, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """A layer's 8-bit ``key`` and ``value``, entries from `first` (a multiple of the block) on, in `dtype`."""
        blocks = slice(first // self.block, (first + key.shape[1] + self.block - 1) // self.block)
        return (
            quantized.dequantize(key, self.keys[layer][:, blocks], self.block, dtype),
            quantized.dequantize(value, self.values[layer][:, blocks], self.block, dtype),
        )

    def to(self, device: torch.device | str | None) -> Scales:
        return Scales(
            tuple(scale.to(device=device) for scale in self.keys),
            tuple(scale.to(device=device) for scale in self.values),
            self.block,
        )


class PrefixKV:
    """Keys and values of P virtual tokens for every layer, frozen; what every row attends to.

    Args:
        keys, values: one tensor a layer, ``[Hkv, P, D]`` and ``[Hkv, P, Dv]``. Only P must be the same in all layers.
        next_logits: ``[V]``, logits of the last virtual token (they predict a row's first own token), or None.
        method: PEFT's name of the method the prompt was trained with.
        fingerprint: `model_fingerprint` of the base model that these belong to.
        metadata: anything JSON can hold, saved along. With `base_config_fields` of the base under ``"base_config"``, a
            fingerprint error can name the fields that differ.
        scales: of 8-bit keys and values (see :meth:`quantize`); None: they are floating.

    Tensors are detached and kept as given, without a copy. Instances compare by identity.

    Raises:
        ValueError: shapes that do not fit together (names the layer), or metadata that JSON cannot hold.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        next_logits: Tensor | None = None,
        method: str,
        fingerprint: str,
        metadata: Mapping[str, Any] | None = None,
        scales: Scales | None = None,
    ) -> None:
        if not keys or len(keys) != len(values):
            raise ValueError(f"keys, values: expected one tensor each a layer, found {len(keys)} and {len(values)}")
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            if key.dim() != 3 or key.shape[:2] != value.shape[:2] or key.shape[1] != keys[0].shape[1]:
                raise ValueError(
                    f"keys, values of layer {layer}: expected [Hkv, P, D] with P = {keys[0].shape[-2]}, found "
                    f"{list(key.shape)} and {list(value.shape)}"
                )
        _check_scales(keys, values, scales)
        self.scales = scales
        self.keys: tuple[Tensor, ...] = tuple(key.detach() for key in keys)
        self.values: tuple[Tensor, ...] = tuple(value.detach() for value in values)
        self.next_logits = None if next_logits is None else next_logits.detach()
        self.method = method
        self.fingerprint = fingerprint
        #: Whether the tensors are pages of a file, which the system reads as they are used and may drop again.
        self.is_mapped = False
        try:
            self.metadata: dict[str, Any] = json.loads(json.dumps(dict(metadata or {})))
        except TypeError as error:
            raise ValueError(f"metadata: expected what JSON can hold ({error})") from error

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.keys[0].shape[1]

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values; int8 or float8_e4m3fn where there are scales."""
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, their scales and `next_logits`; independent of any batch."""
        return sum(tensor.nbytes for _, tensor in self._tensors())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that is saved: tensors, method, fingerprint, metadata. Computed once, at first
        use (it reads every byte)."""
        return _digest(self._description(), dict(self._tensors()))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PrefixKV:
        """A copy on `device` in `dtype`; the same object if nothing changes. `next_logits` keep their dtype, and 8-bit
        keys and values theirs: as a module's ``to``, this casts what is floating (:meth:`dequantize` does more)."""
        if self.scales is not None:
            dtype = None
        if (device is None or torch.device(device) == self.device) and (dtype is None or dtype == self.dtype):
            return self
        return PrefixKV(
            [key.to(device=device, dtype=dtype) for key in self.keys],
            [value.to(device=device, dtype=dtype) for value in self.values],
            next_logits=None if self.next_logits is None else self.next_logits.to(device=device),
            method=self.method,
            fingerprint=self.fingerprint,
            metadata=self.metadata,
            scales=None if self.scales is None else self.scales.to(device),
        )

    # ------------------------------------------------------------------ 8 bits

    def quantize(self, block: int = 16, dtype: torch.dtype = torch.int8) -> PrefixKV:
        """The same prefix in 8 bits, with a scale per head and `block` tokens: a quarter of float32's memory, half of
        bfloat16's. Symmetric: a block's largest magnitude becomes `dtype`'s. :attr:`quantization` says what it costs.

        Args:
            block: tokens that share a scale.
            dtype: ``torch.int8``, or ``torch.float8_e4m3fn``, whose steps shrink with the value.

        Raises:
            ValueError: it is quantised already, `block` is not positive, `dtype` is another one, or values are NaN or
                infinite.
        """
        if self.scales is not None:
            kind = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"quantize: the prefix is {kind} already; dequantize() it first to choose another block")
        if dtype not in quantized.LARGEST:
            raise ValueError(f"dtype: expected torch.int8 or torch.float8_e4m3fn, found {dtype!r}")
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"block: expected a number of tokens > 0, found {block!r}")
        self.check_finite()
        keys, key_scales = zip(*(quantized.quantize(key, block, dtype) for key in self.keys), strict=True)
        values, value_scales = zip(*(quantized.quantize(value, block, dtype) for value in self.values), strict=True)
        scales = Scales(key_scales, value_scales, block)
        errors: dict[str, list[float]] = {"key_error": [], "value_error": [], "output_error": []}
        for layer, exact in enumerate(zip(self.keys, self.values, strict=True)):
            exact_key, exact_value = (x.to(torch.float32) for x in exact)
            key, value = scales.dequantize(layer, keys[layer], values[layer], torch.float32)
            errors["key_error"].append(_relative_rms(key, exact_key))
            errors["value_error"].append(_relative_rms(value, exact_value))
            query = _probe_queries(exact_key)
            outs = _attend(query, key, value), _attend(query, exact_key, exact_value)
            errors["output_error"].append(_relative_rms(*outs))
        facts = {"block": block, "from": str(self.dtype).removeprefix("torch."), **errors}
        return PrefixKV(
            keys,
            values,
            next_logits=self.next_logits,
            method=self.method,
            fingerprint=self.fingerprint,
            metadata={**self.metadata, "quantization": facts},
            scales=scales,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> PrefixKV:
        """The floating prefix, in `dtype`, that an 8-bit one stands for; a floating one merely becomes `dtype`."""
        if self.scales is None:
            return self.to(dtype=dtype)
        pairs = [
            self.scales.dequantize(layer, key, value, dtype)
            for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True))
        ]
        return PrefixKV(
            [key for key, _ in pairs],
            [value for _, value in pairs],
            next_logits=self.next_logits,
            method=self.method,
            fingerprint=self.fingerprint,
            metadata=self.metadata,
        )

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What :meth:`quantize` did to these values, kept through saving and :meth:`dequantize`; None: nothing.

        ``block`` (tokens a scale) and ``from`` (the dtype before); and per layer, as root mean square of the
        difference over root mean square of the original: ``key_error``, ``value_error``, and ``output_error``, of
        the attention of 64 normal random queries a head, as large as the keys, to the prefix alone. The last is a
        probe and no bound: real queries may weigh other keys, and own tokens dilute the prefix's share.
        """
        return self.metadata.get("quantization")

    def check_finite(self) -> None:
        """Look at every value.

        Raises:
            ValueError: a tensor holds NaN or infinities; names it and how many.
        """
        for name, tensor in self._tensors():
            check_finite(f"{self.method} prefix, tensor {name!r}", tensor)

    def check_compatible(self, base: Any) -> None:
        """Check the shapes against `base`, a transformers model or its configuration; `check_base` compares weights.

        Raises:
            IncompatibleBaseError: made for a base of another shape; says what was expected and found.
        """
        shape = BaseShape.of(base)
        wrong = []
        if shape.num_layers != self.num_layers:
            wrong.append(f"layers: the base has {shape.num_layers}, the prefix {self.num_layers}")
        heads_and_dims = {(key.shape[0], key.shape[2]) for key in self.keys}
        expected = (shape.num_kv_heads, shape.head_dim)
        if None not in expected and heads_and_dims != {expected}:
            found = sorted(heads_and_dims)
            wrong.append(f"(key/value heads, head dimension): the base has {expected}, the prefix {found}")
        if self.next_logits is not None and shape.vocab_size not in (None, len(self.next_logits)):
            wrong.append(f"vocabulary: the base has {shape.vocab_size}, the prefix {len(self.next_logits)}")
        if wrong:
            raise IncompatibleBaseError(
                f"this {self.method} prefix was made for another base model: {'; '.join(wrong)}"
            )

    # ------------------------------------------------------------------ on disk

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``prefix_kv.safetensors`` and, to be read by people and scripts, ``prefix_kv.json``.

        The safetensors file carries the metadata too, in its header, and is replaced atomically: a reader finds the
        old prefix or the new one, whole, also when this process is killed or the disk is full midway.

        Raises:
            ValueError: NaN or infinities; nothing is written.
            OSError: the disk is full, or `directory` is a file.
        """
        self.check_finite()
        header = {"digest": self.digest, **self._description()}
        content = json.dumps(header, sort_keys=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors()}
        if len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(tensors):
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
        directory = make_directory(directory)
        with atomic_path(directory / TENSORS_NAME) as temporary:
            try:
                save_file(tensors, temporary, metadata={_HEADER_KEY: content})
            except SafetensorError as error:  # its form of an I/O error, e.g. a full disk
                raise OSError(f"could not write {directory / TENSORS_NAME}: {error}") from error
        atomic_write_bytes(directory / METADATA_NAME, json.dumps(header, indent=2, sort_keys=True).encode())

    @staticmethod
    def is_saved_at(directory: str | os.PathLike[str]) -> bool:
        """Whether `directory` holds a saved prefix (of any format version, whole or not)."""
        return (Path(directory) / TENSORS_NAME).is_file()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        base_model: Any = None,
        *,
        device: torch.device | str = "cpu",
        verify: bool = True,
    ) -> PrefixKV:
        """Load a saved prefix; on the CPU its tensors are memory-mapped, so pages are read as they are used.

        Args:
            base_model: the transformers model it is to serve, of the same fingerprint. None: unchecked.
            device: where the tensors go.
            verify: compare the content with its digest, which reads the file once. False leaves it unread.

        Raises:
            FileNotFoundError: no saved prefix there.
            PrefixError: truncated or altered, or written by a newer version of the format.
            PrefixFingerprintError: computed with another base model; names what differs.
        """
        path = Path(directory) / TENSORS_NAME
        if not path.is_file():
            raise FileNotFoundError(f"prefix directory: expected {TENSORS_NAME} in {directory}")
        header, tensors = read_one_version(lambda: _read(path, str(device)), path)
        _check_sidecar(path.with_name(METADATA_NAME), header)

        digest = header.pop("digest", None)
        if verify and digest != _digest(header, tensors):
            raise PrefixError(f"{path}: altered or damaged, its content does not have the digest {digest}")
        try:
            layers = range(header["num_layers"])
            prefix = cls(
                [tensors[f"layers.{layer}.key"] for layer in layers],
                [tensors[f"layers.{layer}.value"] for layer in layers],
                next_logits=tensors.get("next_logits"),
                method=header["method"],
                fingerprint=header["fingerprint"],
                metadata=header["metadata"],
                scales=_scales_on_disk(header, tensors),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PrefixError(f"{path}: altered or damaged, header and tensors disagree ({error})") from error
        prefix.is_mapped = prefix.device.type == "cpu"
        if verify:
            prefix.__dict__["digest"] = digest  # known to be right: fills the cached property
        if base_model is not None:
            prefix.check_base(base_model)
        return prefix

    def check_base(self, base_model: Any, *, fingerprint: str | None = None) -> None:
        """Check that this prefix belongs to `base_model`. `fingerprint` saves computing the model's again.

        Raises:
            PrefixFingerprintError: it does not; names both fingerprints and what differs.
        """
        found = fingerprint if fingerprint is not None else model_fingerprint(base_model)
        if found == self.fingerprint:
            return
        ours, theirs = self.fingerprint.split("-"), found.split("-")
        differs = []
        if ours[0] != theirs[0]:
            differs.append("the configuration")
            saved = self.metadata.get("base_config")
            if isinstance(saved, Mapping):
                now = base_config_fields(base_model)
                fields = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
                told = (f"{name} (prefix: {_told(saved, name)}, base: {_told(now, name)})" for name in fields)
                differs[-1] += ", " + ", ".join(told)
        if ours[1:] != theirs[1:]:
            differs.append("the weights")
        raise PrefixFingerprintError(
            f"base_model: this prefix was computed with another base model: fingerprint {self.fingerprint}, the base "
            f"given has {found}; they differ in {' and '.join(differs)}"
        )

    def __repr__(self) -> str:
        return (
            f"PrefixKV(method={self.method!r}, num_virtual_tokens={self.num_virtual_tokens}, "
            f"num_layers={self.num_layers}, dtype={self.dtype}, device={str(self.device)!r}, nbytes={self.nbytes})"
        )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            yield f"layers.{layer}.key", key
            yield f"layers.{layer}.value", value
        if self.scales is not None:
            for layer, (key_scale, value_scale) in enumerate(zip(self.scales.keys, self.scales.values, strict=True)):
                yield f"layers.{layer}.key_scale", key_scale
                yield f"layers.{layer}.value_scale", value_scale
        if self.next_logits is not None:
            yield "next_logits", self.next_logits

    def _description(self) -> dict[str, Any]:
        """The metadata on disk. Sizes repeat what the tensors' own headers say, for whoever reads the JSON."""
        scale_fields = {} if self.scales is None else {"scale_block": self.scales.block}
        return {
            "format_version": 1 if self.scales is None else 2,
            "method": self.method,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_layers": self.num_layers,
            "num_kv_heads": [key.shape[0] for key in self.keys],
            "head_dim": [key.shape[2] for key in self.keys],
            "value_head_dim": [value.shape[2] for value in self.values],
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
            "metadata": self.metadata,
            **scale_fields,
        }


def _check_scales(keys: Sequence[Tensor], values: Sequence[Tensor], scales: Scales | None) -> None:
    dtypes = {x.dtype for x in (*keys, *values)}
    eight_bits = {dtype in quantized.LARGEST for dtype in dtypes}
    if eight_bits != {scales is not None} or (scales is not None and len(dtypes) > 1):
        found = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"keys, values: expected int8 or float8_e4m3fn throughout with scales, floating without, found "
            f"{', '.join(found)} "
            f"{'without' if scales is None else 'with'} scales"
        )
    if scales is None:
        return
    if not isinstance(scales.block, int) or scales.block < 1:
        raise ValueError(f"scales: expected a block of > 0 tokens, found {scales.block!r}")
    if len(scales.keys) != len(keys) or len(scales.values) != len(keys):
        raise ValueError(
            f"scales: expected {len(keys)} layers, found {len(scales.keys)} of keys and {len(scales.values)} of values"
        )
    for layer, pair in enumerate(zip(scales.keys, scales.values, strict=True)):
        shape = (keys[layer].shape[0], -(-keys[layer].shape[1] // scales.block))
        for scale in pair:
            if scale.shape != shape or scale.dtype != torch.float32:
                dtype = str(scale.dtype).removeprefix("torch.")
                raise ValueError(
                    f"scales of layer {layer}: expected float32 {list(shape)}, found {dtype} {list(scale.shape)}"
                )


def _scales_on_disk(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scales | None:
    if header["format_version"] < 2:
        return None
    layers = range(header["num_layers"])
    return Scales(
        tuple(tensors[f"layers.{layer}.key_scale"] for layer in layers),
        tuple(tensors[f"layers.{layer}.value_scale"] for layer in layers),
        header["scale_block"],
    )


def _relative_rms(found: Tensor, exact: Tensor) -> float:
    size = float(exact.norm())
    return float((found - exact).norm()) / size if size else 0.0


def _probe_queries(key: Tensor) -> Tensor:
    heads, _, dim = key.shape
    normal = torch.randn(heads, _PROBE_QUERIES, dim, generator=torch.Generator().manual_seed(0))
    return normal.to(key.device) * key.square().mean().sqrt()


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5, dim=-1) @ value


def model_fingerprint(model: Any) -> str:
    """A short name for what a model computes, ``<hash of the configuration>-<hash of the weights>``.

    Hashed are the configuration's fields (`base_config_fields`), the name and shape of every parameter, and of each
    up to 1024 evenly spaced values, rounded to bf16: so an fp32 model and its bf16 copy share a fingerprint (one
    rounded to fp16 first does not). It tells checkpoints apart; single values changed between the samples escape it.

    Args:
        model: a transformers model with its weights loaded.

    Raises:
        ValueError: weights on the meta device have no values.
    """
    config = json.dumps(base_config_fields(model), sort_keys=True, default=str)
    weights = hashlib.sha256()
    samples: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.device.type == "meta":
                raise ValueError(f"base_model: weight {name} is on the meta device, load the weights first")
            weights.update(f"{name}{list(weight.shape)}".encode())
            stride = max(1, -(-weight.numel() // _SAMPLES_PER_WEIGHT))
            if isinstance(weight, DTensor):  # sharded: every process has to ask
                weight = weight.full_tensor()
            sample = weight.reshape(-1)[::stride]
            # Quantised weights are integers already; their bytes are their values.
            sample = sample.to(torch.bfloat16) if sample.is_floating_point() else sample.contiguous()
            samples.setdefault(weight.device, []).append(sample.contiguous().view(torch.uint8))
        for chunks in samples.values():  # one transfer a device
            weights.update(_bytes(torch.cat(chunks)))
    return f"{hashlib.sha256(config.encode()).hexdigest()[:16]}-{weights.hexdigest()[:16]}"


def base_config_fields(model: Any) -> dict[str, Any]:
    """The fields of a model's configuration that decide what it computes: those that differ from their class's
    defaults (so that a later transformers may add some), less names, token ids, dtype, dropout and the like."""
    config = getattr(model, "config", model)
    try:
        defaults = type(config)().to_dict()
    except Exception:  # a class that needs arguments has no defaults: everything counts
        defaults = {}
    fields = {
        name: value for name, value in config.to_dict().items() if name not in defaults or value != defaults[name]
    }
    return {"model_type": config.model_type} | _computing_fields(fields)


def _told(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "default"


def _computing_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in sorted(fields.items()):
        if name in _IGNORED_FIELDS or "dropout" in name or name.endswith("_pdrop"):
            continue
        if isinstance(value, Mapping):
            value = _computing_fields(value)
        kept[str(name)] = value
    return json.loads(json.dumps(kept, default=str))


def _digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(_bytes(tensor))
    return content.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes as a buffer, without a copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _parse_header(path: Path, content: str | None) -> dict[str, Any]:
    if content is None:
        raise PrefixError(f"{path}: a safetensors file, but no PrefixKV (its header has no {_HEADER_KEY!r})")
    try:
        header = json.loads(content)
        version = int(header["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise PrefixError(f"{path}: altered or damaged, its metadata is no description of a prefix") from error
    if version > FORMAT_VERSION:
        raise PrefixError(
            f"{path}: format_version {version} is newer than this softprompt_fast reads (up to {FORMAT_VERSION}); "
            "upgrade it, or compile the prompt again"
        )
    return header


def _read(path: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors. safetensors opens a file twice, once for its header and once (by name) to map its tensors,
    so a replacement in between would mix two versions: call it by ``read_one_version``."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = _parse_header(path, (file.metadata() or {}).get(_HEADER_KEY))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PrefixError(f"{path}: truncated or damaged ({error})") from error


def _check_sidecar(path: Path, header: Mapping[str, Any]) -> None:
    """The JSON file is a copy for readers other than us. One of another digest is a save cut short between the two
    files, and the tensors' header is right; one of the same digest with other content was edited, and a user who did
    that should hear that it has no effect."""
    if not path.is_file():
        return
    try:
        copy = json.loads(path.read_text(encoding="utf-8"))
        edited = copy["digest"] == header.get("digest") and copy != header
    except (ValueError, KeyError, TypeError) as error:
        raise PrefixError(f"{path}: altered or damaged ({error!r})") from error
    if edited:
        names = sorted(name for name in copy.keys() | header.keys() if copy.get(name) != header.get(name))
        raise PrefixError(f"{path}: altered, {names} differ from the header of {TENSORS_NAME}")
