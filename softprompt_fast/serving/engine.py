# SPDX-License-Identifier: Apache-2.0
"""Continuous batching over a SoftPromptModel: rows join and leave the running batch between two steps."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.bank import Held
from softprompt_fast.cache import OwnTokenCache
from softprompt_fast.errors import BankFullError, SoftPromptError
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.model import SoftPromptModel
from softprompt_fast.serving.batch import BatchCache
from softprompt_fast.serving.requests import (
    Chunk,
    EngineClosedError,
    QueueFullError,
    Request,
    RequestError,
    Stream,
    UnknownPromptError,
    wake_listeners,
)
from softprompt_fast.serving.sampler import Choice, RowSampler, choose
from softprompt_fast.serving.text import TextStream

logger = logging.getLogger("softprompt_fast")

#: Threads that load and compile prompts, beside the one that runs the model.
_LOADERS = 4
#: Seconds after which a request whose prompt found no room in the bank fails, where no request here holds anything
#: that could make some.
_GIVE_UP = 2.0


class _Row:
    """A request on its way through the engine."""

    def __init__(self, request: Request, stream: Stream, deadline: float | None) -> None:
        self.request, self.stream, self.deadline = request, stream, deadline
        self.stage = "new"  # then "loading" or "full" (no room in the bank), and "ready" or "failed"
        self.refused: BankFullError | None = None  # why the bank had no room for its prompt, if it has been asked
        self.held: Held | None = None  # its prompt in the bank
        self.left = 0  # new tokens that it may still have
        self.last = 0  # the newest token
        self.ends: frozenset[int] = frozenset()  # tokens that end it
        self.sampler: RowSampler | None = None
        self.text: TextStream | None = None


class Engine:
    """Serves requests with different soft prompts in one running batch.

    One thread runs the model; :meth:`submit` may be called from any. A request waits for a place, its prompt is held
    in the bank (loaded or compiled by another thread where it has to be), its own tokens are prefilled, and it then
    decodes beside the others until it ends. Greedy text equals the row's alone; a replaced prompt goes on serving the
    requests that started with it.

    Args:
        model: in eval mode. Its prompts may be added, replaced and removed while the engine runs.
        tokenizer: makes text of tokens; None: requests give and get token ids only, and stop strings are refused.
        max_batch: rows that decode together at most. Their keys and values take at most ``2 * max_batch`` times those
            of the longest row.
        max_waiting: requests that wait at most; one more raises QueueFullError.
        max_prefill_tokens: own tokens, padding included, that are prefilled between two decode steps at most. A longer
            request is prefilled in pieces.
        max_model_len: virtual, own and new tokens of a row at most; None: the model's positions.
        timeout: seconds a request may take that says nothing else; None for no limit.
        on_finish: called with every request's stream when it ends, in the engine's thread; it should be quick.

    Raises:
        ValueError: a model in training mode, or one whose prefixes are expanded into an ordinary cache
            (``explain(model)`` says why): that cache's rows can't come and go.
    """

    def __init__(
        self,
        model: SoftPromptModel,
        tokenizer: Any = None,
        *,
        max_batch: int = 32,
        max_waiting: int = 256,
        max_prefill_tokens: int = 512,
        max_model_len: int | None = None,
        timeout: float | None = None,
        on_finish: Callable[[Stream], None] | None = None,
    ) -> None:
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_waiting", max_waiting, 0),
            ("max_prefill_tokens", max_prefill_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        if model.training:
            raise ValueError("model: expected one in eval mode; call model.eval()")
        path = model.explain().layers[0]
        if path.path == "expanded prefix":
            raise ValueError(
                f"model: the engine needs prefixes that are shared, and those of {type(model.base).__name__} are "
                f"expanded into an ordinary cache: {path.reason}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_waiting, self.max_prefill_tokens = max_batch, max_waiting, max_prefill_tokens
        limit = hooks.position_limit(model.base)
        limits = [n for n in (max_model_len, None if limit is None else limit.positions) if n is not None]
        #: Virtual, own and new tokens of a row at most; None where nothing limits them.
        self.max_model_len: int | None = min(limits, default=None)
        self.timeout = timeout
        self.on_finish = on_finish
        self._bank = model.bank
        self._num_layers = hooks.num_attention_layers(model.base)
        self._vocab_size: int = model.base.get_input_embeddings().num_embeddings
        self._eos = _end_tokens(model, tokenizer)
        self._decode_text = _text_decoder(tokenizer)

        self._changed = threading.Condition()
        self._news = False  # something happened that the thread should look at
        self._waiting: deque[_Row] = deque()
        self._closing = False
        self._stopped = False
        # Of the engine's thread alone:
        self._running: list[_Row] = []
        self._cache = BatchCache(self._num_layers, max_batch)
        self._prefilling: list[_Row] = []  # the rows of a prefill, several or one that is prefilled in pieces
        self._prefilled: OwnTokenCache | None = None  # their own tokens so far
        self._touched: list[Stream] = []
        self._unsettled = False
        self._rooms = 0  # how often the bank said that there may be room
        self._stuck_since: float | None = None  # there is none, and nothing here will change that
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="softprompt-fast-load")
        self._bank.listeners.add(self._room)
        self._thread = threading.Thread(target=self._run, name="softprompt-fast-engine", daemon=True)
        self._thread.start()

    # ---- from any thread -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Queue a request.

        Raises:
            RequestError: token ids outside the vocabulary, none and no prompt, or more tokens than the model has
                positions (where the prompt has to be loaded first, the stream fails with it).
            QueueFullError: as many wait as may.
            EngineClosedError: the engine is draining or closed.
        """
        self._check(request)
        stream = Stream(request, self._wake)
        timeout = self.timeout if request.timeout is None else request.timeout
        row = _Row(request, stream, None if timeout is None else stream.submitted + timeout)
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is shutting down and takes no new request")
            if len(self._waiting) >= self.max_waiting + self.max_batch - self.num_running:
                raise QueueFullError(f"{len(self._waiting)} requests wait already, which is the limit")
            self._waiting.append(row)
            self._start_holds()
            self._news = True
            self._changed.notify()
        return stream

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place or for their prompt."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Rows that decode now or are being prefilled."""
        return len(self._running) + len(self._prefilling)

    @property
    def draining(self) -> bool:
        """Whether it takes no new request."""
        return self._closing

    @property
    def decode_text(self) -> Callable[[list[int]], str] | None:
        """Token ids -> text without special tokens; None without a tokenizer. Thread-safe."""
        return self._decode_text

    @property
    def prompt_names(self) -> list[str]:
        """The soft prompts that requests may name now."""
        return self._bank.names

    def has_prompt(self, name: str) -> bool:
        """Whether a request may name it."""
        return name in self._bank

    def bank_metrics(self) -> dict[str, int | float]:
        """The prompt bank's counters and sizes."""
        return self._bank.metrics()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new request and wait until all have ended; what has not after `timeout` seconds is cancelled.

        Returns:
            Whether all ended by themselves.
        """
        with self._changed:
            self._closing = self._news = True
            self._changed.notify()
        if threading.current_thread() is self._thread:
            raise RuntimeError("drain: called from the engine's own thread")
        self._thread.join(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        if not self._thread.is_alive():
            return True
        with self._changed:
            self._stopped = self._news = True
            self._changed.notify()
        self._thread.join()
        return False

    def close(self) -> None:
        """Cancel everything and end the thread."""
        self.drain(0)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, request: Request) -> None:
        self._new_tokens(request, 0)
        ids, sampling = request.input_ids, request.sampling
        if not len(ids) and request.prompt is None:
            raise RequestError("input_ids: expected at least one token where there is no soft prompt", "prompt")
        if request.task is not None and request.prompt is None:
            raise RequestError("task: a request without a soft prompt has none", "task")
        for name, tokens in (
            ("prompt", ids),
            ("logit_bias", sampling.logit_bias),
            ("stop_token_ids", sampling.stop_token_ids),
        ):
            if (wrong := next((t for t in tokens if not 0 <= t < self._vocab_size), None)) is not None:
                raise RequestError(f"{name}: token id {wrong} is outside the vocabulary of {self._vocab_size}", name)
        if sampling.stop and self._decode_text is None:
            raise RequestError("stop: an engine without a tokenizer knows no text", "stop")

    def _new_tokens(self, request: Request, virtual: int) -> int:
        """How many new tokens the request may have behind `virtual` ones."""
        wanted, own = request.sampling.max_tokens, len(request.input_ids)
        if self.max_model_len is None:
            if wanted is None:
                raise RequestError("max_tokens: needed for a model without a limit of positions", "max_tokens")
            return wanted
        left = self.max_model_len - virtual - own
        if left < 1 or (wanted is not None and wanted > left):
            asked = "" if wanted is None else f" and {wanted} new ones"
            behind = f" behind {virtual} virtual tokens" if virtual else ""
            raise RequestError(
                f"the model has room for {self.max_model_len} tokens; {own} tokens were given{asked}{behind}",
                "prompt" if left < 1 else "max_tokens",
            )
        return left if wanted is None else wanted

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify()

    # ---- holding prompts -----------------------------------------------------------------------------------------

    def _start_holds(self) -> None:
        """Have the prompts of the next rows held; called with the lock.

        Only as many as can run next, so that waiting requests don't take the bank from running ones. Once one finds no
        room, those behind it wait as well: else it might wait forever.
        """
        full = False
        for row in islice(self._waiting, self.max_batch):
            if row.stage == "new" and row.request.prompt is None:
                row.stage = "ready"
            elif row.stage == "new" and not full:
                row.stage = "loading"
                self._loaders.submit(self._hold, row)
            full = full or (row.refused is not None and row.stage in ("loading", "full"))

    def _hold(self, row: _Row) -> None:
        error: Exception | None = None
        rooms = self._rooms
        try:
            held = self._held(row.request)
        except Exception as failure:
            held, error = None, failure
            if not isinstance(error, (RequestError, BankFullError)):
                logger.error("prompt %r: %s: %s", row.request.prompt, type(error).__name__, error)
        with self._changed:
            if row.stream.finish_reason is not None:  # cancelled meanwhile
                if held is not None:
                    held.release()
            elif held is not None:
                row.held, row.stage = held, "ready"
            elif isinstance(error, BankFullError):
                # Once more where something was released since it looked.
                row.refused = error
                row.stage = "full" if rooms == self._rooms else "new"
            else:
                row.stream.error, row.stage = error, "failed"
            self._news = True
            self._changed.notify()

    def _held(self, request: Request) -> Held:
        name = request.prompt
        assert name is not None
        try:
            try:
                if self._bank.check_task(name, request.task) is None and request.task is not None:
                    raise RequestError(f"task: prompt {name!r} has no tasks", "task")
            except SoftPromptError:
                raise
            except (ValueError, TypeError) as error:
                raise RequestError(str(error), "task") from None
            return self._bank.hold(name, request.task)
        except KeyError as error:
            if name in self._bank:
                raise
            raise UnknownPromptError(error.args[0], "model") from None

    def _room(self) -> None:
        """The bank may have room for a prompt that found none; from any thread."""
        with self._changed:
            self._rooms += 1
            self._stuck_since = None
            for row in self._full_rows():
                row.stage, self._news = "new", True
            self._changed.notify()

    def _full_rows(self) -> list[_Row]:
        return [row for row in islice(self._waiting, self.max_batch) if row.stage == "full"]

    # ---- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    try:
                        self._sweep()
                        self._prefill()
                        self._decode()
                    except Exception as error:  # what a step itself raises is dealt with there
                        self._reset(error)
                    self._publish()
        finally:  # whatever happened: nobody may wait for a thread that has ended
            with self._changed:
                self._closing = self._stopped = True
            self._bank.listeners.discard(self._room)
            self._loaders.shutdown(wait=False)
            for row in self._take_all():
                if row.stream.finish_reason is None:
                    self._end(row, "cancelled")
            self._publish()

    def _wait(self) -> bool:
        """Until there is something to do; False at the end."""
        with self._changed:
            while True:
                if self._stopped or (self._closing and not (self._waiting or self._running or self._prefilling)):
                    return False
                if self._running or self._prefilling or self._news:
                    self._news = False
                    return True
                moments = [row.deadline for row in self._waiting if row.deadline is not None]
                if self._stuck_since is not None and self._full_rows():
                    moments.append(self._stuck_since + _GIVE_UP)
                pause = min(moments, default=math.inf) - time.monotonic()
                if not self._changed.wait(min(max(0.0, pause), threading.TIMEOUT_MAX)):
                    return True

    def _sweep(self) -> None:
        """End what is cancelled, late or failed, and have the next prompts held."""
        now = time.monotonic()
        with self._changed:
            waiting = list(self._waiting)
        gone = {row for row in waiting if (why := self._why_over(row, now)) and self._end(row, why)}
        with self._changed:
            if gone:
                self._waiting = deque(row for row in self._waiting if row not in gone)
            self._give_up(now)
            self._start_holds()
        for row in [row for row in self._running if self._why_over(row, now)]:
            self._leave(row, self._why_over(row, now))
        for row in self._prefilling:
            if why := self._why_over(row, now):
                self._end(row, why)
                self._prefilling = []

    def _give_up(self, now: float) -> None:
        """Fail the requests that find no room in the bank, once nobody here will make some; called with the lock."""
        holders = self._running or self._prefilling or any(row.held is not None for row in self._waiting)
        full = self._full_rows()
        if holders or not self._waiting:
            self._stuck_since = None
        elif full and self._stuck_since is None:
            self._stuck_since = now
        elif full and self._stuck_since is not None and now >= self._stuck_since + _GIVE_UP:
            for row in full:
                row.stream.error, row.stage, self._news = row.refused, "failed", True  # they end in the next round

    def _reset(self, error: Exception) -> None:
        """Fail everything: what the rows' state is can't be known."""
        self._fail(self._take_all(), error)

    def _take_all(self) -> list[_Row]:
        with self._changed:
            rows = [*self._running, *self._waiting, *self._prefilling]
            self._waiting.clear()
        self._running, self._prefilling = [], []
        self._cache = BatchCache(self._num_layers, self.max_batch)
        return rows

    def _why_over(self, row: _Row, now: float) -> str | None:
        if row.stage == "failed":
            return "error"
        if row.stream._cancelled or self._stopped:
            return "cancelled"
        return "timeout" if row.deadline is not None and now >= row.deadline else None

    # ---- prefill

    def _admit(self) -> None:
        """Choose the rows to prefill next: in order of arrival, those whose prompts are held, while they fit."""
        free = self.max_batch - len(self._running)
        chosen: list[_Row] = []
        width = 0
        with self._changed:
            for row in self._waiting:
                if row.stage != "ready":
                    continue
                width = max(width, len(row.request.input_ids), 1)
                if len(chosen) == free or (chosen and (len(chosen) + 1) * width > self.max_prefill_tokens):
                    break
                chosen.append(row)
            for row in chosen:
                self._waiting.remove(row)
            self._prefilling = chosen
            self._start_holds()
        self._prefilling = [row for row in chosen if self._begin(row)]

    def _begin(self, row: _Row) -> bool:
        request = row.request
        try:
            row.left = self._new_tokens(request, 0 if row.held is None else row.held.length)
            if row.held is not None and row.held.next_logits is None and not len(request.input_ids):
                raise RequestError(
                    f"input_ids: prompt {request.prompt!r} is keys and values only, so nothing predicts a first "
                    "token; give at least one, e.g. the BOS token",
                    "prompt",
                )
            row.ends = frozenset(request.sampling.stop_token_ids)
            if not request.sampling.ignore_eos:
                row.ends |= self._eos
            row.sampler = RowSampler(request.sampling, request.input_ids, self._vocab_size, self.model.device)
            if self._decode_text is not None:
                row.text = TextStream(self._decode_text, request.input_ids, request.sampling.stop)
        except Exception as error:
            self._fail([row], error)
            return False
        return True

    def _prefill(self) -> None:
        """One prefill, of at most ``max_prefill_tokens``; of a longer row a piece."""
        if not self._prefilling:
            self._admit()
            if not self._prefilling:
                return
            longest = max(len(row.request.input_ids) for row in self._prefilling)
            self._prefilled = OwnTokenCache(self._num_layers, reserve=max(1, longest))
        rows, cache = self._prefilling, self._prefilled
        assert cache is not None
        lengths = [len(row.request.input_ids) for row in rows]
        width, done = max(1, *lengths), cache.get_seq_length()
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for own, row in zip(ids, rows, strict=True):
            given = row.request.input_ids
            own[width - len(given) :] = torch.tensor(given, dtype=torch.long)
        starts = None
        if min(lengths) < width:
            starts = torch.tensor([width - length for length in lengths], dtype=torch.int32, device=self.model.device)
        try:
            # Several rows are one piece, or they would begin in different ones.
            logits = self._forward(ids[:, done : done + self.max_prefill_tokens], rows, cache, starts)
        except Exception as error:
            self._prefilling = []
            self._fail(rows, error)
            return
        if cache.get_seq_length() == width:
            # What fails from here on may leave the running rows' cache half changed, and fails them as well.
            self._join(rows, cache, logits, lengths)

    def _forward(self, ids: Tensor, rows: Sequence[_Row], cache: OwnTokenCache, starts: Tensor | None) -> Tensor:
        """Logits ``[B, V]`` of the last column."""
        packed, index = self._bank.pack_held([row.held for row in rows])
        out = self.model(
            input_ids=ids.to(self.model.device),
            past_key_values=cache,
            own_start=starts,
            prompt=packed,
            prompt_index=index,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _join(self, rows: list[_Row], cache: OwnTokenCache, logits: Tensor, lengths: Sequence[int]) -> None:
        """Rows with their first token, those that did not end with it, join the running ones."""
        alive = self._advance(rows, logits)
        going = [i for i, row in enumerate(rows) if row in alive]
        if going:
            self._cache.join(cache, going, [lengths[i] for i in going])
            self._unsettled = True
        with self._changed:  # or a row would count twice
            self._running += [rows[i] for i in going]
            self._prefilling, self._prefilled = [], None

    # ---- decode

    def _decode(self) -> None:
        """One token for every running row."""
        if not self._running:
            return
        try:
            if self._unsettled:
                self._cache.settle(*self._bank.pack_held([row.held for row in self._running]))
                self._unsettled = False
            self._cache.step()
            out = self.model(
                input_ids=torch.tensor([[row.last] for row in self._running], device=self.model.device),
                past_key_values=self._cache,
                own_start=self._cache.own_start,
                prompt=self._cache.packed,
                prompt_index=self._cache.index,
                logits_to_keep=1,
            )
            going = self._advance(self._running, out.logits[:, -1])
        except Exception as error:
            failed, self._running = self._running, []
            self._cache = BatchCache(self._num_layers, self.max_batch)
            self._fail(failed, error)
            return
        for row in [row for row in self._running if row not in going]:
            self._leave(row, None)

    def _advance(self, rows: Sequence[_Row], logits: Tensor) -> set[_Row]:
        """Give each row its next token; those that go on."""
        samplers = [row.sampler for row in rows if row.sampler is not None]
        going = set()
        for row, choice in zip(rows, choose(logits, samplers), strict=True):
            try:
                reason = self._accept(row, choice)
            except Exception as error:  # of the tokenizer, say: no matter of the other rows
                logger.exception("a token was not accepted")
                row.stream.error, reason = error, "error"
            if reason is None:
                going.add(row)
            else:
                self._end(row, reason)
        return going

    def _accept(self, row: _Row, choice: Choice) -> str | None:
        """Take a row's next token; the reason why it ends, None where it goes on."""
        stream, token = row.stream, choice.token
        if token is None:
            stream.error = FloatingPointError("the model's logits are not finite (NaN or infinite)")
            return "error"
        if stream.first_token is None:
            stream.first_token = time.monotonic()
        stream.num_tokens += 1
        row.last, row.left = token, row.left - 1
        if token in row.ends:
            stream.stopped_by = token
            self._put(row, Chunk(token, "", choice.logprobs))
            return "stop"
        text = row.text.push(token) if row.text is not None else ""
        self._put(row, Chunk(token, text, choice.logprobs))
        if row.text is not None and row.text.stopped is not None:
            stream.stopped_by = row.text.stopped
            return "stop"
        return None if row.left else "length"

    # ---- ends

    def _leave(self, row: _Row, reason: str | None) -> None:
        """Take a running row out of the batch, ended already or for `reason`."""
        place = self._running.index(row)
        self._cache.leave(place)
        self._running[place] = self._running[-1]
        self._running.pop()
        self._unsettled = True
        if reason is not None:
            self._end(row, reason)

    def _fail(self, rows: Sequence[_Row], error: Exception) -> None:
        if not isinstance(error, RequestError):
            logger.error("%d request(s) failed: %s: %s", len(rows), type(error).__name__, error, exc_info=error)
        for row in rows:
            if row.stream.finish_reason is None:
                row.stream.error = error
                self._end(row, "error")

    def _end(self, row: _Row, reason: str) -> bool:
        stream = row.stream
        try:
            if row.text is not None and reason != "error" and (rest := row.text.finish()):
                self._put(row, Chunk(None, rest))
        except Exception as error:
            stream.error, reason = error, "error"
        if row.text is not None and row.text.stopped is not None and reason == "length":
            reason, stream.stopped_by = "stop", row.text.stopped
        with self._changed:
            stream.finish_reason = reason
            held, row.held = row.held, None
            self._news = True  # who waits may have its place
        if held is not None:
            held.release()
        stream.finished = time.monotonic()
        stream._chunks.put(None)
        self._touched.append(stream)
        if self.on_finish is not None:
            try:
                self.on_finish(stream)
            except Exception:
                logger.exception("on_finish failed")
        return True

    def _put(self, row: _Row, chunk: Chunk) -> None:
        row.stream._chunks.put(chunk)
        self._touched.append(row.stream)

    def _publish(self) -> None:
        touched, self._touched = self._touched, []
        wake_listeners(touched)


def _end_tokens(model: SoftPromptModel, tokenizer: Any) -> frozenset[int]:
    found = [model.generation_config.eos_token_id, getattr(tokenizer, "eos_token_id", None)]
    tokens = [i for ids in found for i in (ids if isinstance(ids, (list, tuple)) else [ids]) if i is not None]
    return frozenset(tokens)


def _text_decoder(tokenizer: Any) -> Callable[[list[int]], str] | None:
    if tokenizer is None:
        return None
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        return fast.decode  # transformers' decode around it takes ten times as long
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
