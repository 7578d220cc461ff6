# SPDX-License-Identifier: Apache-2.0
"""The KV connector: prefixes saved on disk become the first blocks of requests that name them.

A request for a prompt of P virtual tokens begins with P placeholder ids, whose keys and values are never computed: the
connector says that they come from outside, and writes the prefix's there. vLLM then shares the full blocks between
requests as it does for any common text, told apart from other texts by the salt.

What a request carries (`front.PromptFront` writes it): ``P`` placeholder ids before its own, a ``cache_salt`` that
starts with `salt_of`, and ``SamplingParams.extra_args["kv_transfer_params"] = {"soft_prompt": name, "digest": str,
"num_virtual_tokens": P}``.

``KVTransferConfig(kv_connector="SoftPromptConnector", kv_connector_module_path="softprompt_fast.integrations.vllm
.connector", kv_role="kv_consumer", kv_connector_extra_config={...})`` with, all optional:

- ``prompts``: name -> directory of a saved `PrefixKV`; ``prompts_folder``: a folder whose subfolders are such;
- ``fingerprint``: what prefixes must have been computed with; default: that of the model served, read from its files;
- ``resident_bytes``: for prefixes that each worker keeps on its device, beside the cache's blocks (default 1 GiB);
- ``pinned``: names of prompts whose full blocks stay in the cache once they are there.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

from softprompt_fast.errors import PrefixError
from softprompt_fast.integrations.vllm import _internals
from softprompt_fast.integrations.vllm.base import make_registry
from softprompt_fast.integrations.vllm.kv_heads import rank_kv_heads
from softprompt_fast.integrations.vllm.registry import Entry, load
from softprompt_fast.prefix_kv import PrefixKV

logger = logging.getLogger("vllm.softprompt_fast")
_SALT = "soft-prompt:"


def salt_of(digest: str, salt: str | None = None) -> str:
    """The salt of requests behind the prompt of `digest`; `salt` is the client's own, which separates its blocks from
    those of other clients."""
    return f"{_SALT}{digest}" + (f":{salt}" if salt else "")


@dataclass(frozen=True)
class Load:
    """Entries `start` to P of a prompt, to be written to a request's blocks."""

    entry: Entry
    start: int
    block_ids: tuple[int, ...]


@dataclass
class LoadMetadata(KVConnectorMetadata):
    """What the scheduler tells the workers of a step.

    Attributes:
        loads: what to write before it runs.
        broken: blocks to report as failed, of requests that can't be served.
        unused: digests that no unfinished request needs any longer.
    """

    loads: list[Load] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


class SoftPromptConnector(KVConnectorBase_V1):
    """See the module. Each process has one: the scheduler decides what to load, each worker loads it.

    Raises:
        ValueError: a configuration under which prompts would be wrong, with the reasons.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        reasons = why_not(vllm_config, kv_cache_config)
        if reasons:
            raise ValueError("soft prompts can't be served with this configuration: " + "; ".join(reasons))
        settings = vllm_config.kv_transfer_config.kv_connector_extra_config
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = _SchedulerSide(vllm_config, settings)
        else:
            self._worker = _WorkerSide(vllm_config, int(settings.get("resident_bytes", 1 << 30)))

    # ------------------------------------------------------------------ the scheduler's side

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._scheduler.pool = gpu_block_pool

    def on_new_request(self, request: Any) -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return self._scheduler.missing(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduler.on_blocks(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> LoadMetadata:
        return self._scheduler.take()

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduler.on_failed_blocks(connector_output.invalid_block_ids or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.on_finished(request)
        return False, None

    # ------------------------------------------------------------------ the workers' side

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self._worker.set_layers(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LoadMetadata)
        self._worker.run(metadata)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is there when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved: prompts come from training."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


class _SchedulerSide:
    """No method may raise: an exception in a scheduler's hook ends the engine, and every request with it."""

    def __init__(self, vllm_config: Any, settings: dict[str, Any]) -> None:
        self._registry = make_registry(vllm_config, settings)
        self._block_size = vllm_config.cache_config.block_size
        self._pin = frozenset(settings.get("pinned", ()))
        self._pinned: dict[str, tuple[str, list[Any]]] = {}
        self._entries: dict[str, Entry] = {}  # by request
        self._broken: set[str] = set()  # requests that must fail
        self._users: Counter[str] = Counter()  # unfinished requests by digest
        self._next = LoadMetadata()
        self.pool: Any = None

    def on_new_request(self, request: Any) -> None:
        params = request.kv_transfer_params or {}
        if "soft_prompt" not in params:
            # Blocks under our salt hold a prefix; those of a request without a prompt would not.
            if (request.cache_salt or "").startswith(_SALT):
                _internals.set_salt(request, f"foreign:{request.cache_salt}")
            return
        try:
            entry = self._registry.find(params["soft_prompt"])
            self._check(request, params, entry)
        except Exception as error:
            logger.error("request %s fails: %s", request.request_id, error)
            self._broken.add(request.request_id)
            # Alone: whoever shared its blocks would fail with it.
            _internals.set_salt(request, f"broken:{request.request_id}")
            _internals.make_failable(request)
            return
        if not (request.cache_salt or "").startswith(salt_of(entry.digest)):
            _internals.set_salt(request, salt_of(entry.digest, request.cache_salt))
        self._entries[request.request_id] = entry
        self._users[entry.digest] += 1

    @staticmethod
    def _check(request: Any, params: dict[str, Any], entry: Entry) -> None:
        if params.get("digest") != entry.digest or params.get("num_virtual_tokens") != entry.num_virtual_tokens:
            raise PrefixError(
                f"prompt {entry.name!r}: the request was made for another version of it, or by something else than "
                "softprompt_fast.integrations.vllm; send it again"
            )
        if request.num_prompt_tokens <= entry.num_virtual_tokens:
            raise ValueError(f"prompt {entry.name!r}: expected a token of the request's own behind the virtual ones")
        if request.prompt_token_ids is None or request.has_encoder_inputs or request.prompt_embeds is not None:
            raise ValueError(f"prompt {entry.name!r}: expected token ids, found embeddings or images")
        if request.skip_reading_prefix_cache:
            raise ValueError(f"prompt {entry.name!r}: prompt_logprobs would need the placeholders to be computed")

    def missing(self, request: Any, num_computed_tokens: int) -> int:
        if request.request_id in self._broken:
            return max(0, 1 - num_computed_tokens)
        entry = self._entries.get(request.request_id)
        return 0 if entry is None else max(0, entry.num_virtual_tokens - num_computed_tokens)

    def on_blocks(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens == 0:
            return
        (block_ids,) = blocks.get_block_ids()
        if request.request_id in self._broken:
            self._next.broken.append(block_ids[0])
            return
        entry = self._entries[request.request_id]
        end = -(-entry.num_virtual_tokens // self._block_size)
        start = entry.num_virtual_tokens - num_external_tokens
        self._next.loads.append(Load(entry, start, tuple(block_ids[:end])))
        if entry.name in self._pin and self._pinned.get(entry.name, ("", []))[0] != entry.digest:
            self._unpin(entry.name)
            full = list(blocks.blocks[0][: entry.num_virtual_tokens // self._block_size])
            self.pool.touch(full)
            self._pinned[entry.name] = entry.digest, full

    def take(self) -> LoadMetadata:
        metadata, self._next = self._next, LoadMetadata()
        metadata.unused = [digest for digest in metadata.unused if digest not in self._users]
        return metadata

    def on_failed_blocks(self, block_ids: Iterable[int]) -> None:
        failed = set(block_ids)
        for name, (_, blocks) in list(self._pinned.items()):
            if any(block.block_id in failed for block in blocks):
                self._unpin(name)

    def on_finished(self, request: Any) -> None:
        self._broken.discard(request.request_id)
        entry = self._entries.pop(request.request_id, None)
        if entry is not None:
            self._users[entry.digest] -= 1
            if not self._users[entry.digest]:
                del self._users[entry.digest]
                self._next.unused.append(entry.digest)

    def _unpin(self, name: str) -> None:
        if name in self._pinned:
            self.pool.free_blocks(reversed(self._pinned.pop(name)[1]))


class _WorkerSide:
    """Writes prefixes to the cache's blocks.

    Two stores: memory-mapped files of prompts that unfinished requests use, which cost no memory and keep the version
    that a request started with though its file be replaced; and, within a budget, keys and values as the cache takes
    them, of this rank's heads, least recently used first to go.
    """

    def __init__(self, vllm_config: Any, resident_bytes: int) -> None:
        self._vllm_config = vllm_config
        self._block_size = vllm_config.cache_config.block_size
        self._budget = resident_bytes
        self._dtype = vllm_config.model_config.dtype
        self._layers: list[tuple[int, Any]] = []
        self._files: dict[str, PrefixKV] = {}
        self._resident: OrderedDict[str, list[tuple[Tensor, Tensor]]] = OrderedDict()
        self._failed: set[int] = set()

    def set_layers(self, kv_caches: dict[str, Tensor]) -> None:
        """Take the attention layers of this rank (with pipeline parallelism not all of the model's)."""
        context = self._vllm_config.compilation_config.static_forward_context
        self._layers = [(extract_layer_index(name), context[name]) for name in kv_caches]
        for name in kv_caches:
            if getattr(context[name], "kv_sharing_target_layer_name", None) is not None:
                raise ValueError(f"soft prompts can't be served: layer {name} reads another layer's keys and values")

    def run(self, metadata: LoadMetadata) -> None:
        for digest in metadata.unused:
            self._files.pop(digest, None)
        self._failed.update(metadata.broken)
        loads = []
        for item in metadata.loads:
            try:
                loads.append((self._pairs(item.entry), item))
            except Exception as error:  # whatever it is, it is this prompt's: its requests fail, the engine goes on
                logger.error("prompt %r can't be loaded: %s", item.entry.name, error)
                self._failed.update(item.block_ids[item.start // self._block_size :])
        if not loads:
            return
        slots = torch.cat([self._slots(item) for _, item in loads])
        with torch.inference_mode():
            for position, (_, layer) in enumerate(self._layers):
                parts = [pairs[position] for pairs, _ in loads]
                keys = torch.cat([key[item.start :] for (key, _), (_, item) in zip(parts, loads, strict=True)])
                values = torch.cat([value[item.start :] for (_, value), (_, item) in zip(parts, loads, strict=True)])
                layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

    def take_failed(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def _slots(self, item: Load) -> Tensor:
        """Where each entry goes: ``int64 [P - start]``."""
        position = torch.arange(item.start, item.entry.num_virtual_tokens)
        blocks = torch.tensor(item.block_ids)[position // self._block_size]
        return (blocks * self._block_size + position % self._block_size).to(self._layers[0][1].kv_cache.device)

    def _pairs(self, entry: Entry) -> list[tuple[Tensor, Tensor]]:
        """Per layer of this rank keys and values ``[P, Hkv of the rank, D]``, in the model's dtype on its device."""
        if entry.digest in self._resident:
            self._resident.move_to_end(entry.digest)
            return self._resident[entry.digest]
        prefix = self._files.get(entry.digest)
        if prefix is None:
            prefix = self._files[entry.digest] = load(entry)
        floating = prefix.dequantize(self._dtype)
        pairs = [
            (self._share(floating.keys[index], layer), self._share(floating.values[index], layer))
            for index, layer in self._layers
        ]
        size = sum(key.nbytes + value.nbytes for key, value in pairs)
        while self._resident and self.resident_bytes + size > self._budget:
            self._resident.popitem(last=False)
        if size <= self._budget:
            self._resident[entry.digest] = pairs
        return pairs

    def _share(self, whole: Tensor, layer: Any) -> Tensor:
        size = self._vllm_config.parallel_config.tensor_parallel_size
        heads = rank_kv_heads(whole.shape[0], size, get_tensor_model_parallel_rank())
        return whole[heads].transpose(0, 1).to(layer.kv_cache.device).contiguous()

    @property
    def resident_bytes(self) -> int:
        return sum(key.nbytes + value.nbytes for pairs in self._resident.values() for key, value in pairs)


def why_not(vllm_config: Any, kv_cache_config: Any) -> list[str]:
    """The reasons why prompts would be wrong under this configuration; none: they can be served."""
    reasons = []
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "fail":
        reasons.append("kv_load_failure_policy must be 'fail': recomputing would compute placeholders as if text")
    if vllm_config.speculative_config is not None:
        reasons.append("speculative decoding is untested: a draft model has no prefix")
    if cache.cache_dtype not in ("auto", *_names_of(vllm_config.model_config.dtype)):
        reasons.append(f"a KV cache in {cache.cache_dtype} is untested; leave kv_cache_dtype at 'auto'")
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        reasons.append("context parallelism spreads a row's blocks over ranks")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        reasons.append(f"the model has {len(groups)} groups of KV cache, a prefix fits one (full attention)")
    for group in groups:
        spec = group.kv_cache_spec
        specs = spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
        for kind in {type(one) for one in specs}:
            if not issubclass(kind, FullAttentionSpec) or issubclass(kind, MLAAttentionSpec):
                reasons.append(
                    f"a KV cache of kind {kind.__name__}: its blocks don't hold every token's keys and values"
                )
    return reasons


def _names_of(dtype: torch.dtype) -> tuple[str, ...]:
    return (str(dtype).removeprefix("torch."),)
