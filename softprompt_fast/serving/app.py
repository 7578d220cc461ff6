# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible HTTP server over the engine, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt_fast._version import __version__
from softprompt_fast.errors import BankFullError, SoftPromptError
from softprompt_fast.model import SoftPromptModel
from softprompt_fast.serving import requests
from softprompt_fast.serving.engine import Engine
from softprompt_fast.serving.metrics import Metrics
from softprompt_fast.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    PromptRequest,
    chat_logprobs,
    completion_logprobs,
    event,
    parse,
    usage,
)
from softprompt_fast.serving.requests import (
    Chunk,
    EngineClosedError,
    QueueFullError,
    RequestError,
    Stream,
    UnknownPromptError,
)
from softprompt_fast.serving.settings import why_no_name

#: Bytes of a request's body at most.
MAX_BODY = 4 << 20
#: Seconds that a client may take to send it.
BODY_TIMEOUT = 60.0
#: Longer texts are tokenized in another thread.
_LONG_TEXT = 4096

_T = TypeVar("_T")
#: A stream's place among several, and its next chunk; None: it has ended.
_Arrival = tuple[int, Chunk | None]


def create_app(
    engine: Engine,
    *,
    base_name: str = "base",
    chat_template: str | None = None,
    api_key: str | None = None,
    folders: Callable[[], Mapping[str, Path]] | None = None,
) -> FastAPI:
    """The application; any ASGI server runs it, beside the engine in one process.

    Args:
        engine: with a tokenizer. Whoever made it closes it.
        base_name: the model name of the base without a prompt; ``base_name:prompt`` also names a prompt.
        chat_template: in place of the tokenizer's.
        api_key: what clients must send as a bearer token, for all but ``/health``.
        folders: prompts that clients may load and remove over HTTP, by name; None: none.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    if engine.tokenizer is None or engine.decode_text is None:
        raise ValueError("engine: a server needs one with a tokenizer")
    app = FastAPI(title="softprompt-fast", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    server = _Server(engine, base_name, chat_template)
    metrics = Metrics(engine, base_name)

    app.add_middleware(_Gate, key=api_key, count=metrics.count_response)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _error(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _error(_as_api_error(error))

    @app.get("/health")
    async def health() -> Response:
        if engine.draining:
            return _error(ApiError(503, "the server is shutting down", "shutting_down"))
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.model(name) for name in (base_name, *engine.prompt_names)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.resolve(name)
        return server.model(name)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await server.complete(request, parse(CompletionRequest, await _body(request)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.chat(request, parse(ChatRequest, await _body(request)))

    if folders is not None:
        known = folders

        @app.post("/v1/prompts")
        async def load_prompt(request: Request) -> dict[str, Any]:
            name = parse(PromptRequest, await _body(request)).name
            if (why := why_no_name(name)) is not None:
                raise ApiError(400, f"name: {why}", "invalid_value", "name")
            if name == base_name:
                raise ApiError(400, f"name: {name!r} is what the base is called", "invalid_value", "name")
            # Looked up in the listing, never joined to a path.
            if (folder := known().get(name)) is None:
                raise ApiError(404, f"there is no prompt {name!r} in the server's folder", "prompt_not_found", "name")
            try:
                await asyncio.to_thread(_load_prompt, engine.model, name, folder)
            except Exception as error:
                raise _as_api_error(error) from error
            return server.model(name)

        @app.delete("/v1/prompts/{name:path}")
        async def remove_prompt(name: str) -> dict[str, Any]:
            if name not in known() or not engine.has_prompt(name):
                raise ApiError(404, f"there is no prompt {name!r} to remove", "prompt_not_found", "name")
            engine.model.remove_prompt(name)
            return {"id": name, "object": "model", "deleted": True}

    return app


def _load_prompt(model: SoftPromptModel, name: str, folder: Path) -> None:
    # Read and checked first, so that a broken one replaces nothing; then as one that the bank may drop and load again.
    model.load_prompt(name, folder, replace=True)
    model.register_prompt(name, folder, replace=True)


class _Gate:
    """In front of the application: asks for the key, and counts answers by status. Plain ASGI, as a middleware of
    Starlette's would stand between a stream and the news that its client has left.

    Args:
        key: what has to come as a bearer token; None: nothing.
        count: is told each answer's status.
    """

    def __init__(self, app: ASGIApp, key: str | None, count: Callable[[int], None]) -> None:
        self._app, self._count = app, count
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
            await send(message)

        app: ASGIApp = self._app
        if self._expected is not None and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                app = _error(ApiError(401, "expected the server's API key as a bearer token", "invalid_api_key"))
        await app(scope, receive, counted)


class _Server:
    """What the routes share."""

    def __init__(self, engine: Engine, base_name: str, chat_template: str | None) -> None:
        assert engine.decode_text is not None
        self._engine, self._base_name, self._chat_template = engine, base_name, chat_template
        self._decode = engine.decode_text
        self._tokenizer = engine.tokenizer
        self._created = int(time.time())
        # The first call sets up padding and truncation; later ones change nothing, so threads may share it.
        self._tokenizer("")

    # ---- models

    def model(self, name: str) -> dict[str, Any]:
        parent = {} if name == self._base_name else {"root": self._base_name, "parent": self._base_name}
        return {"id": name, "object": "model", "created": self._created, "owned_by": "softprompt-fast"} | parent

    def resolve(self, name: str) -> str | None:
        """The soft prompt that a model's name stands for, None for the base alone.

        Raises:
            ApiError: 400 for what can't be a name, 404 for an unknown one.
        """
        if (why := why_no_name(name)) is not None:
            raise ApiError(400, f"model: {why}", "invalid_value", "model")
        if self._engine.has_prompt(name):
            return name
        if name == self._base_name:
            return None
        base, colon, prompt = name.partition(":")
        if base == self._base_name and colon and self._engine.has_prompt(prompt):
            return prompt
        message = f"the model {name!r} does not exist; GET /v1/models lists those that do"
        raise ApiError(404, message, "model_not_found", "model")

    # ---- requests

    async def complete(self, http: Request, asked: CompletionRequest) -> Response:
        prompt = self.resolve(asked.model)
        rows = [
            await self._tokenize(given, asked.add_special_tokens is not False) if isinstance(given, str) else given
            for given in asked.prompts
        ]
        return await self._answer(http, asked, rows, prompt)

    async def chat(self, http: Request, asked: ChatRequest) -> Response:
        prompt = self.resolve(asked.model)
        if self._chat_template is None and getattr(self._tokenizer, "chat_template", None) is None:
            raise ApiError(
                400, "this base has no chat template; use /v1/completions, or start the server with --chat-template"
            )
        messages = [message.template_form for message in asked.messages]
        options = {} if self._chat_template is None else {"chat_template": self._chat_template}
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:  # a template refuses roles, their order, ...
            raise ApiError(400, f"messages: the chat template says: {error}", "invalid_value", "messages") from None
        return await self._answer(http, asked, [await self._tokenize(text, asked.add_special_tokens is True)], prompt)

    async def _tokenize(self, text: str, special: bool) -> list[int]:
        def run() -> list[int]:
            return self._tokenizer(text, add_special_tokens=special)["input_ids"]

        return run() if len(text) <= _LONG_TEXT else await asyncio.to_thread(run)

    async def _answer(
        self,
        http: Request,
        asked: CompletionRequest | ChatRequest,
        rows: Sequence[Sequence[int]],
        prompt: str | None,
    ) -> Response:
        count, most = asked.n or 1, self._engine.max_waiting + self._engine.max_batch
        if len(rows) * count > most:
            raise ApiError(400, f"expected at most {most} choices in all, found {len(rows) * count}", "invalid_value")
        streams: list[Stream] = []
        answer = _Answer(self, asked, rows)
        try:
            for row in rows:
                for i in range(count):
                    request = requests.Request(row, prompt, asked.task, asked.sampling(i))
                    streams.append(self._engine.submit(request))
            if not asked.stream:
                results = await _while_connected(http, asyncio.gather(*(stream.aresult() for stream in streams)))
                _check_ends(streams)
                return JSONResponse(answer.whole(streams, results))
            chunks = _merged(streams)
            # Errors of the start are answers of their own.
            first = await _while_connected(http, asyncio.ensure_future(anext(chunks)))
            if first[1] is None:
                _check_ends([streams[first[0]]])
        except BaseException as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, Exception):
                raise _as_api_error(error) from None
            raise
        return StreamingResponse(answer.events(streams, first, chunks), media_type="text/event-stream")

    def token_text(self, token: int) -> str:
        return self._tokenizer.decode([token])


class _Answer:
    """How chunks read in one of the two protocols."""

    def __init__(self, server: _Server, asked: CompletionRequest | ChatRequest, rows: Sequence[Sequence[int]]) -> None:
        self._server, self._asked, self._rows = server, asked, rows
        self._chat = isinstance(asked, ChatRequest)
        kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if self._chat and asked.stream else kind,
            "created": int(time.time()),
            "model": asked.model,
        }

    def whole(self, streams: Sequence[Stream], results: Sequence[requests.Result]) -> dict[str, Any]:
        answered = []
        for i, result in enumerate(results):
            chunks = [Chunk(t, "", p) for t, p in zip(result.tokens, result.logprobs, strict=False)]
            choice = {"index": i, "logprobs": self._logprobs(chunks, 0), "finish_reason": result.finish_reason}
            if self._chat:
                choice["message"] = {"role": "assistant", "content": result.text}
            else:
                choice["text"] = result.text
            answered.append(choice)
        return self._head | {"choices": answered, "usage": self._usage(streams)}

    async def events(
        self, streams: Sequence[Stream], first: _Arrival, chunks: AsyncIterator[_Arrival]
    ) -> AsyncIterator[str]:
        """Server-sent events: one a chunk with text or log-probabilities, one with each choice's reason to end."""
        begun: set[int] = set()
        shown = [0] * len(streams)
        wants_usage = bool(self._asked.stream_options and self._asked.stream_options.include_usage)
        extra: dict[str, Any] = {"usage": None} if wants_usage else {}
        try:
            async for i, chunk in _chained(first, chunks):
                reason = None
                if chunk is None:
                    _check_ends([streams[i]])
                    reason = streams[i].finish_reason
                elif not chunk.text and chunk.logprobs is None:
                    continue
                text = "" if chunk is None else chunk.text
                choice: dict[str, Any] = {"index": i, "finish_reason": reason}
                choice["logprobs"] = None if chunk is None else self._logprobs([chunk], shown[i])
                if chunk is not None and chunk.token is not None and chunk.logprobs is not None:
                    shown[i] += len(self._server.token_text(chunk.token))
                if self._chat:
                    choice["delta"] = ({} if i in begun else {"role": "assistant"}) | (
                        {"content": text} if text or i not in begun else {}
                    )
                    begun.add(i)
                else:
                    choice["text"] = text
                yield event(self._head | {"choices": [choice]} | extra)
            if wants_usage:
                yield event(self._head | {"choices": [], "usage": self._usage(streams)})
        except Exception as error:
            # The status is out already: what went wrong is the last event.
            yield event(_as_api_error(error).body)
        finally:
            for stream in streams:
                stream.cancel()
        yield "data: [DONE]\n\n"

    def _logprobs(self, chunks: Sequence[Chunk], offset: int) -> dict[str, Any] | None:
        text = self._server.token_text
        entries = [
            (text(chunk.token), chunk.logprobs.logprob, [(text(token), value) for token, value in chunk.logprobs.top])
            for chunk in chunks
            if chunk.token is not None and chunk.logprobs is not None
        ]
        if not entries:
            return None
        return chat_logprobs(entries) if self._chat else completion_logprobs(entries, offset)

    def _usage(self, streams: Sequence[Stream]) -> dict[str, int]:
        return usage(sum(map(len, self._rows)), sum(stream.num_tokens for stream in streams))


def _check_ends(streams: Sequence[Stream]) -> None:
    reasons = {stream.finish_reason for stream in streams}
    if "timeout" in reasons:
        raise ApiError(504, "the request took longer than the server allows", "timeout")
    if "cancelled" in reasons:
        raise ApiError(503, "the request was cancelled: the server is shutting down", "shutting_down")


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[_Arrival]:
    """Chunks of several streams as they come."""
    arrived: asyncio.Queue[tuple[int, Chunk | None, Exception | None]] = asyncio.Queue()

    async def pump(i: int, stream: Stream) -> None:
        failure = None
        try:
            async for chunk in stream:
                arrived.put_nowait((i, chunk, None))
        except Exception as error:
            failure = error
        arrived.put_nowait((i, None, failure))

    pumps = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        going = len(streams)
        while going:
            i, chunk, failure = await arrived.get()
            if failure is not None:
                raise failure
            going -= chunk is None
            yield i, chunk
    finally:
        for task in pumps:
            task.cancel()


async def _chained(first: _T, rest: AsyncIterator[_T]) -> AsyncIterator[_T]:
    yield first
    async for item in rest:
        yield item


class _ClientGoneError(ApiError):
    def __init__(self) -> None:
        super().__init__(499, "the client has left")


async def _while_connected(http: Request, work: asyncio.Future[_T]) -> _T:
    """The result of `work`, which is cancelled should the client leave first."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(left())
    both: list[asyncio.Future[Any]] = [work, gone]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _ClientGoneError
        return work.result()
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            with contextlib.suppress(BaseException):
                await work


async def _body(request: Request) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413 where it is too long, 408 where it comes too slowly.
    """

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise too_long
        return bytes(body)

    too_long = ApiError(413, f"expected a body of at most {MAX_BODY} bytes", "body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY:
        raise too_long
    try:
        return await asyncio.wait_for(read(), BODY_TIMEOUT)
    except ClientDisconnect:
        raise _ClientGoneError from None
    except (TimeoutError, asyncio.TimeoutError):
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT:.0f} seconds", "timeout") from None


def _as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, UnknownPromptError):  # removed since its name was looked up
        return ApiError(404, message, "model_not_found", "model")
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if message.startswith("the model has room") else "invalid_value"
        return ApiError(400, message, code, error.parameter)
    if isinstance(error, QueueFullError):
        return ApiError(429, message, "queue_full", retry_after=1)
    if isinstance(error, EngineClosedError):
        return ApiError(503, message, "shutting_down")
    if isinstance(error, BankFullError):
        return ApiError(503, message, "prompt_bank_full", retry_after=1)
    if isinstance(error, (SoftPromptError, OSError)):
        return ApiError(500, f"the prompt can't be used: {message}", "prompt_unavailable", "model")
    return ApiError(500, f"{type(error).__name__}: {message}", "internal_error")


def _error(error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)
