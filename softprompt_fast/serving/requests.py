# SPDX-License-Identifier: Apache-2.0
"""What the engine is asked for, and what it hands back."""

from __future__ import annotations

import asyncio
import math
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from softprompt_fast.errors import SoftPromptError


class RequestError(SoftPromptError):
    """A request that can't be served as it is; the message names the value and what was expected.

    Attributes:
        parameter: the argument that is wrong, if it is one.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class UnknownPromptError(RequestError, KeyError):
    """A request for a prompt that there is not, or no longer."""

    __str__ = ValueError.__str__


class QueueFullError(SoftPromptError):
    """As many requests wait as may; try again later."""


class EngineClosedError(SoftPromptError):
    """The engine is draining or closed and takes no new request."""


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen and when it ends.

    Attributes:
        max_tokens: new tokens at most; None: as many as the model's positions leave.
        temperature: 0 decodes greedily.
        top_k: draw from the k most probable tokens; 0: from all.
        top_p: draw from the smallest set of most probable tokens that has this probability, after `top_k`.
        min_p: draw from tokens that are at least this probable relative to the most probable one.
        presence_penalty, frequency_penalty: subtracted from the logits of new tokens once, and at every time, that
            they came before.
        repetition_penalty: divides (multiplies) positive (negative) logits of all tokens, given and new, that came
            before: Keskar et al., "CTRL", 2019.
        logit_bias: token id -> what is added to its logit.
        stop: strings that end the text, which does not contain them.
        stop_token_ids: tokens that end it, beside the model's end-of-sequence tokens.
        ignore_eos: go on after end-of-sequence tokens.
        logprobs: give the log-probability of each token and of this many most probable ones; None: of none. They are
            the model's own, before temperature, penalties and biases.
        seed: of this request's draws, which do not depend on other requests; None: a random one.

    Raises:
        RequestError: a value out of its range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, math.inf),
            ("temperature", 0.0, 100.0),
            ("top_k", 0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.01, 100.0),
            ("logprobs", 0, MAX_LOGPROBS),
        ):
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and (value > 0 or name != "top_p")):
                expected = f"{low} to {high}" if high < math.inf else f"at least {low}"
                raise RequestError(f"{name}: expected {expected}, found {value}", name)
        if len(self.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise RequestError(
                f"stop: expected at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters", "stop"
            )
        if not all(-MAX_BIAS <= bias <= MAX_BIAS for bias in self.logit_bias.values()):
            raise RequestError(f"logit_bias: expected numbers from {-MAX_BIAS} to {MAX_BIAS}", "logit_bias")


#: Alternatives a token whose log-probabilities may be asked for.
MAX_LOGPROBS = 20
#: Stop strings, and characters of each, at most: every row's are looked for at every step, between two of the model.
MAX_STOPS, MAX_STOP_LENGTH = 64, 256
#: OpenAI's bound: enough to rule a token out, or all others.
MAX_BIAS = 100.0


@dataclass(frozen=True)
class Request:
    """One row to continue.

    Attributes:
        input_ids: own tokens; may be empty where the prompt predicts a first token (not prefix tuning or cartridges).
        prompt: name of the soft prompt, None for the bare model. task: of a multitask prompt.
        sampling: how to continue.
        timeout: seconds until the request ends with what it has, waiting included; None: the engine's.
    """

    input_ids: Sequence[int]
    prompt: str | None = None
    task: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    timeout: float | None = None


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of one token: its own, and ``(token, log-probability)`` of the most probable ones."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
    """What one step adds to a request's result.

    Attributes:
        token: the new token; None where only held-back text is released at the end.
        text: the text that is certain now: "" while a character is incomplete or may begin a stop string.
        logprobs: as asked for.
    """

    token: int | None
    text: str
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Result:
    """All of a request's chunks together; see :class:`Stream` for `finish_reason`."""

    tokens: list[int]
    text: str
    logprobs: list[Logprobs]
    finish_reason: str


class Stream:
    """A request under way: iterate over its chunks, in one thread or (``async for``) in an event loop.

    Attributes:
        finish_reason: None while it runs, then "stop" (an end-of-sequence or stop token, or a stop string), "length",
            "cancelled", "timeout" or "error".
        stopped_by: the stop string or token that ended it, if one did.
        error: what went wrong in case of "error"; iterating and :meth:`result` raise it.
        num_tokens: new tokens so far.
        submitted, first_token, finished: ``time.monotonic()`` of these moments; None until then.
    """

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        self.request = request
        self.finish_reason: str | None = None
        self.stopped_by: str | int | None = None
        self.error: Exception | None = None
        self.num_tokens = 0
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        self.finished: float | None = None
        self._cancelled = False
        self._result: Result | None = None
        self._wake = wake
        self._chunks: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """End the request at the next step; nothing happens where it has ended."""
        self._cancelled = True
        self._wake()

    def result(self) -> Result:
        """Wait for the end; what was iterated over before is left out.

        Raises:
            Exception: what the request failed with.
        """
        return self._result or self._joined(list(self))

    async def aresult(self) -> Result:
        """:meth:`result` in an event loop."""
        return self._result or self._joined([chunk async for chunk in self])

    def _joined(self, chunks: list[Chunk]) -> Result:
        assert self.finish_reason is not None
        self._result = Result(
            tokens=[chunk.token for chunk in chunks if chunk.token is not None],
            text="".join(chunk.text for chunk in chunks),
            logprobs=[chunk.logprobs for chunk in chunks if chunk.logprobs is not None],
            finish_reason=self.finish_reason,
        )
        return self._result

    def __iter__(self) -> Iterator[Chunk]:
        while (chunk := self._chunks.get()) is not None:
            yield chunk
        self._chunks.put(None)  # another iteration ends as well
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        event = asyncio.Event()
        self._listener = (asyncio.get_running_loop(), event)
        while True:
            event.clear()
            try:
                chunk = self._chunks.get_nowait()
            except queue.Empty:
                await event.wait()
                continue
            if chunk is None:
                break
            yield chunk
        self._chunks.put(None)
        if self.error is not None:
            raise self.error


def wake_listeners(streams: Sequence[Stream]) -> None:
    """Tell those who wait in event loops that there is something new: one call a loop, however many streams."""
    events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for stream in streams:
        if stream._listener is not None:
            events.setdefault(stream._listener[0], []).append(stream._listener[1])
    for loop, waiting in events.items():
        try:
            loop.call_soon_threadsafe(_set_all, waiting)
        except RuntimeError:  # the loop was closed, so nobody listens
            continue


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
