# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching (``generate_batch``) behind soft prompts.

Its paged cache shares blocks between requests that begin with the same tokens. A prompt comes in through that door: a
request for it begins with P placeholders, which are ids that no vocabulary has and that one version of one prompt has
to itself, and its keys and values are written into blocks of the cache before the first such request is scheduled. The
request then begins with these blocks: full ones are shared by all requests and never copied, the last one, if P does
not fill it, is copied, by the methods with which transformers forks a request. Own tokens get the positions from P on,
as after any prefix, and blocks of own tokens are shared as before.

A prompt that no request uses is kept as blocks of finished requests are: it leaves, the longest unused first, when
room is needed. No placeholder reaches the model: a request whose prompt finds no room yet waits.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.prefix_kv import PrefixKV

try:
    from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
    from transformers.generation.continuous_batching.continuous_api import (
        ContinuousBatchingManager,
        ContinuousBatchProcessor,
        OutputRouter,
    )
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
    from transformers.generation.continuous_batching.utils import stream_context
except ImportError as error:
    raise ImportError(
        f"continuous batching: needs transformers 5.23 or newer, found {transformers.__version__}"
    ) from error

if TYPE_CHECKING:
    from softprompt_fast.model import SoftPromptModel

_ATTENTION = "sdpa"


class _AsSdpa:
    """The base as continuous batching has to see it. It asks the config's attention implementation by name whether to
    build masks; the layers ask their own config, and so keep the function that knows prompts, which without a context
    is the original one."""

    _supports_flash_attn = False

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self.config = copy.deepcopy(base.config)
        self.config._attn_implementation = _ATTENTION

    def __call__(self, **kwargs: Any) -> Any:
        # With masks it asks for is_causal=False, which changes nothing here, for the mask says all. But transformers
        # keeps it in the config that all threads share until the pass ends (`merge_with_config_defaults`): whatever
        # another one ran meanwhile was not causal, a prompt being compiled for instance, and the config might stay so.
        kwargs.pop("is_causal", None)
        return self._base(**kwargs)

    def eval(self) -> _AsSdpa:
        self._base.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def _why_not(base: PreTrainedModel, config: ContinuousBatchingConfig) -> str | None:
    """Why no prompt can be served so; None where one can."""
    attention = hooks.original_attention(base)
    if attention == base.config._attn_implementation:
        return f"{type(base).__name__}'s layers can't be given a prefix"
    if attention != _ATTENTION:
        return f"the base computes attention by {attention!r}; load it with attn_implementation={_ATTENTION!r}"
    text = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [FULL_ATTENTION])
    if kinds != {FULL_ATTENTION} or getattr(text, "sliding_window", None) is not None:
        return "blocks of layers with sliding windows are not shared between requests"
    if not config.allow_block_sharing:
        return "it needs allow_block_sharing=True in the continuous_batching_config"
    return None


@dataclass
class _Resident:
    """A prefix in the cache, held by a request of its own that never runs."""

    prefix: PrefixKV
    state: RequestState


class _Outputs(OutputRouter):
    """Takes the placeholders out of what is given back."""

    def deliver(self, output: GenerationOutput) -> None:
        super().deliver(_without_placeholders(output))

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        super().deliver_batch([_without_placeholders(output) for output in outputs])


def _without_placeholders(output: GenerationOutput) -> GenerationOutput:
    output.prompt_ids = [token for token in output.prompt_ids if token >= 0]
    return output


class PromptBatchingManager(ContinuousBatchingManager):
    """transformers' manager of continuous batching whose requests may each name a prompt of `model`.

    Made by :meth:`SoftPromptModel.init_continuous_batching`. A request keeps the version of its prompt that was there
    when it was added. Greedy text is that of the row alone. The arguments are ``ContinuousBatchingManager``'s.

    Raises:
        ValueError: the base can't be served so, or is spread over several devices; the message says why.
    """

    batch_processor: ContinuousBatchProcessor | None

    def __init__(
        self,
        model: SoftPromptModel,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: Any = None,
    ) -> None:
        base: Any = model.base
        if (why := _why_not(base, continuous_batching_config)) is not None:
            raise ValueError(f"continuous batching: {why}")
        self._prompts = model
        self._limit = hooks.position_limit(base)
        self._prefixes: dict[int, PrefixKV] = {}  # by placeholder
        self._newest: dict[tuple[str, int | None], int] = {}
        self._adding = threading.Lock()
        super().__init__(_AsSdpa(base), generation_config, continuous_batching_config, workload_hints)
        if self.distributed_helper.tp_size > 1:
            raise ValueError("continuous batching: prompts are not sliced for tensor parallelism")
        self.output_router = _Outputs()

    # ---- requests ------------------------------------------------------------------------------------------------

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        prompt: Any = ...,
        task: int | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Add a request, as transformers does; further arguments are its own.

        Args:
            input_ids: own tokens, at least one.
            prompt: name of its prompt, None for none; left out: the active prompt. task: of a multitask prompt.

        Raises:
            KeyError: unknown prompt.
            ValueError: no own token, or more positions than the base or the cache has.
            IndexError: a token id outside the vocabulary, which would end all requests.
        """
        ids = list(input_ids)
        size = self._prompts.base.get_input_embeddings().num_embeddings
        if not ids:
            raise ValueError("input_ids: expected at least one own token, e.g. the BOS token")
        if not 0 <= min(ids) <= max(ids) < size:
            raise IndexError(f"input_ids: a token id is outside the vocabulary of {size}")
        name = self._prompts.active_prompt if prompt is ... else prompt
        with self._adding:
            placeholders = [] if name is None else self._placeholders(name, task)
            new = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
            if self._limit is not None:
                self._limit.check(len(placeholders) + len(ids) + (new or 0), len(placeholders))
            self._check_fits(len(placeholders), len(ids), new or 0)
            return super().add_request(placeholders + ids, request_id, max_new_tokens, *args, **kwargs)

    def add_requests(
        self, inputs: Sequence[list[int]], *args: Any, prompt: Any = ..., task_ids: Any = None, **kwargs: Any
    ) -> list[str]:
        """:meth:`add_request` for each of `inputs`, with ``prompt`` and ``task_ids`` as in ``generate``; their
        request ids."""
        rows = self._prompts._row_prompts(prompt, task_ids, len(inputs))
        added = []
        for ids, row in zip(inputs, rows, strict=True):
            name, task = (None, None) if row is None else row
            added.append(self.add_request(ids, None, *args, prompt=name, task=task, **kwargs))
        return [request_id for request_id in added if request_id is not None]

    def start(self) -> None:
        """Start the thread that generates, as transformers does; its cache is there when this returns."""
        with self._adding:
            self._processor()
        super().start()

    def _processor(self) -> ContinuousBatchProcessor:
        """What has the cache: made before the thread needs it, or what fits would depend on when it does."""
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        return self.batch_processor

    def _check_fits(self, virtual: int, own: int, new: int) -> None:
        """Whether the whole cache could hold such a request: one that never finds room ends all others."""
        processor = self._processor()
        cache = processor.cache
        size = cache.cache_allocators[FULL_ATTENTION].tokens_per_page
        # No step reads the last new token. But one that is prepared while the step before it runs has room for it.
        cached = virtual + own + (new if processor.use_async_batching else max(new - 1, 0))
        pages = -(-cached // size) + (virtual % size > 0)  # a page that is not full is copied
        if pages > cache.num_blocks:
            raise ValueError(
                f"input_ids: {virtual} virtual, {own} own and {new} new tokens need {pages} pages of {size}, and the "
                f"cache has {cache.num_blocks}; give it more num_blocks"
            )

    def _placeholders(self, name: str, task: int | None) -> list[int]:
        """P times the id that stands for a prompt as it is now."""
        prefix = self._prompts.compile_prompt(name, task=task)
        number = self._newest.get((name, task))
        if number is None or self._prefixes[number] is not prefix:
            number = self._newest[name, task] = min(self._prefixes, default=0) - 1
            self._prefixes[number] = prefix
        return [number] * prefix.num_virtual_tokens

    # ---- the cache, in the thread that generates -----------------------------------------------------------------

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        cache = processor.cache
        if not isinstance(getattr(cache.search_prefix_match, "__self__", None), _PrefixPages):
            # Methods of this one cache that the scheduler calls: what to share, is there room, make some.
            pages = _PrefixPages(self, processor)
            cache.search_prefix_match = pages.search_prefix_match
            cache.can_store_request_tokens = pages.can_store_request_tokens
            cache.evict_cached_blocks = pages.evict_cached_blocks
        else:
            cache.search_prefix_match.__self__.residents.clear()  # it was reset
        return processor

    def prefix_of(self, placeholder: int) -> PrefixKV:
        return self._prefixes[placeholder]

    def forget_replaced(self, states: Iterable[RequestState]) -> list[int]:
        """Drop versions of prompts that were replaced and that none of `states` and no request in the queue asks for;
        their placeholders. None are dropped while a request is being added."""
        if not self._adding.acquire(blocking=False):
            return []
        try:
            asked = {state.initial_tokens[0] for state in (*states, *list(self.input_queue.queue))}
            gone = [number for number in self._prefixes.keys() - self._newest.values() if number not in asked]
            for number in gone:
                del self._prefixes[number]
            return gone
        finally:
            self._adding.release()


class _PrefixPages:
    """Prefixes in the blocks of one cache."""

    def __init__(self, manager: PromptBatchingManager, processor: ContinuousBatchProcessor) -> None:
        self.manager, self.processor, self.cache = manager, processor, processor.cache
        self.residents: dict[int, _Resident] = {}  # by placeholder, the longest unused first
        self.search = self.cache.search_prefix_match
        self.can_store = self.cache.can_store_request_tokens
        self.evict = self.cache.evict_cached_blocks
        self.allocator = self.cache.cache_allocators[FULL_ATTENTION]

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """transformers' method: gives a request the blocks that it shares, and says how many tokens they hold."""
        placeholder = prompt_ids[0]
        if placeholder >= 0:
            return self.search(request_id, prompt_ids)
        matched = len(self.allocator.match_prefix_blocks(prompt_ids)) * self.allocator.tokens_per_page
        resident = self._resident(placeholder)
        if resident is None:
            return 0
        if matched > resident.prefix.num_virtual_tokens:
            return self.search(request_id, prompt_ids)  # own tokens are known as well
        copies: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in self.cache.cache_allocators}
        if not self.cache.prepare_fork_request(resident.state, [request_id], copies):
            return 0
        with stream_context(self.processor.inputs_and_outputs.compute_stream):
            self.cache.perform_cache_copy(copies)
        return resident.prefix.num_virtual_tokens

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        """transformers' method: room for `request_len` more tokens of a request. There is none for placeholders."""
        tokens = state.initial_tokens
        if tokens and tokens[0] < 0 and state.current_len() == 0:
            return False
        return self.can_store(state, request_len, dry_run)

    def evict_cached_blocks(self) -> bool:
        """transformers' method: gives back blocks that no request uses, here also a prompt's; whether there were."""
        if self.evict():
            return True
        shared = self.allocator.ledger.shared_ref_counts
        for placeholder, resident in self.residents.items():
            if not shared.keys() & self.allocator.block_table[resident.state.request_id]:
                self._drop(placeholder)
                return True
        return False

    def _resident(self, placeholder: int) -> _Resident | None:
        """The prefix of `placeholder`, written now if it is not there; None: it has to wait for room."""
        resident = self.residents.pop(placeholder, None)
        if resident is None:
            scheduler = self.processor.scheduler
            for number in self.manager.forget_replaced(
                (*scheduler.active_requests.values(), *scheduler.waiting_requests.values())
            ):
                self._drop(number)
            resident = self._write(placeholder, self.manager.prefix_of(placeholder))
        if resident is not None:
            self.residents[placeholder] = resident
        return resident

    def _write(self, placeholder: int, prefix: PrefixKV) -> _Resident | None:
        length = prefix.num_virtual_tokens
        state = RequestState(request_id=f"soft prompt {placeholder}", initial_tokens=[placeholder] * length)
        while not self.can_store(state, length):
            if not self.evict_cached_blocks():
                return None
            self.cache.pool.try_to_free_sectors()
        values = prefix.dequantize(self.cache.dtype).to(device=self.cache.device)
        at = torch.tensor(self.allocator.get_write_indices(state.request_id, 0, length), device=self.cache.device)
        nothing = at[:0]  # to read back
        with stream_context(self.processor.inputs_and_outputs.compute_stream), torch.no_grad():
            for layer, pair in enumerate(zip(values.keys, values.values, strict=True)):
                key, value = (tensor.transpose(0, 1) for tensor in pair)  # [P, Hkv, D]
                self.allocator.update(key, value, layer, nothing, at)
        blocks = self.cache.count_new_complete_blocks(state, length)
        self.cache.mark_complete_blocks(state, blocks)
        state.position_offset = length
        return _Resident(prefix, state)

    def _drop(self, placeholder: int) -> None:
        if (resident := self.residents.pop(placeholder, None)) is not None:
            self.cache.free_blocks(resident.state.request_id, no_cache=True)


def init_continuous_batching(
    model: SoftPromptModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> PromptBatchingManager:
    """See :meth:`SoftPromptModel.init_continuous_batching`."""
    config = copy.deepcopy(generation_config or model.generation_config)
    if config.eos_token_id is None:
        config.eos_token_id = -1  # continuous batching's way to say that there is none
    return PromptBatchingManager(
        model, config, continuous_batching_config or ContinuousBatchingConfig(), workload_hints
    )


def generate_batch(
    model: SoftPromptModel,
    inputs: Sequence[list[int] | Tensor],
    *,
    prompt: Any = ...,
    task_ids: Any = None,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    max_new_tokens: int | None = None,
    warmup: bool = True,
) -> dict[str, GenerationOutput]:
    """See :meth:`SoftPromptModel.generate_batch`."""
    rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in inputs]
    found: dict[str, GenerationOutput] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation_config,
        continuous_batching_config=continuous_batching_config,
        warmup=warmup,
    ) as manager:
        asked = manager.add_requests(rows, max_new_tokens, prompt=prompt, task_ids=task_ids)
        wanted = [
            name
            for request_id in asked
            for name in (request_id, *(f"{request_id}__child#{i}" for i in range(manager.num_return_sequences - 1)))
        ]
        while len(found) < len(wanted):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                found[output.request_id] = output
            elif output is None and not manager.is_running():
                raise RuntimeError("generate_batch: it ended early") from manager.background_thread_status.fatal_error
    return {name: found[name] for name in wanted}
