# SPDX-License-Identifier: Apache-2.0
"""The part of OpenAI's completions and chat protocol that is served, as it is checked and as it is answered.

Types are strict, as a wrong one is a client's mistake. Fields that are not served are refused unless they are null or
ask for what happens anyway, so that nothing a client relies on is ignored in silence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from softprompt_fast.serving.requests import Sampling


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form.

    Attributes:
        status: of HTTP. code: the machine-readable reason. parameter: the field that is wrong, if one is.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        parameter: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.parameter, self.retry_after = status, code, parameter, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


#: Values that mean what is served anyway: some clients (vLLM's router) send every field of theirs.
_DEFAULTS: dict[str, Any] = {
    "continue_final_message": False,
    "echo": False,
    "include_stop_str_in_output": False,
    "min_tokens": 0,
    "no_stop_trim": False,
    "response_format": {"type": "text"},
    "return_hidden_states": False,
    "separate_reasoning": True,
    "skip_special_tokens": True,
    "stream_reasoning": True,
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "use_beam_search": False,
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="after")
    def _refuse_what_is_not_served(self) -> _Strict:
        for name, value in (self.model_extra or {}).items():
            served = _DEFAULTS.get(name)
            # Compared with its type: 0 and 1 are no booleans.
            if value is not None and not (type(value) is type(served) and value == served):
                raise ValueError(f"{name}: not supported by this server")
        return self


class StreamOptions(_Strict):
    include_usage: bool | None = None


class _Generation(_Strict):
    """What both kinds of requests have."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    # Beyond OpenAI's, under the names that vLLM gives them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = None
    # The task of a multitask prompt.
    task: int | None = None

    def sampling(self, choice: int) -> Sampling:
        """The rules of one of a prompt's ``n`` choices, which differ in their seeds.

        Raises:
            RequestError: a value out of its range.
        """
        given: dict[str, Any] = {
            "max_tokens": self._max_tokens(),
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self._bias(),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": bool(self.ignore_eos),
            "logprobs": self._logprobs(),
            "seed": None if self.seed is None else self.seed + choice,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def _bias(self) -> dict[int, float]:
        biases = self.logit_bias or {}
        if not all(token.isascii() and token.isdecimal() for token in biases):
            raise ApiError(400, "logit_bias: expected token ids as keys", "invalid_value", "logit_bias")
        return {int(token): bias for token, bias in biases.items()}

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    def _logprobs(self) -> int | None:
        raise NotImplementedError


class CompletionRequest(_Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _refuse_the_rest(self) -> CompletionRequest:
        if self.echo:
            raise ValueError("echo: not supported; the prompt is not scored")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: not supported; ask for n and choose")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "prompt: expected at least one", "invalid_value", "prompt")
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    def _max_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    def _logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: str
    text: str = ""

    @model_validator(mode="after")
    def _is_text(self) -> TextPart:
        if self.type != "text":
            raise ValueError(f"content of type {self.type!r} is not supported; only text is")
        return self


class Message(_Strict):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    @property
    def template_form(self) -> dict[str, Any]:
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name is not None else {})


class ChatRequest(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    def _max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class PromptRequest(_Strict):
    """Load a prompt of the server's folder, or load it again."""

    name: str


_Body = TypeVar("_Body", bound=_Strict)


def parse(kind: type[_Body], body: bytes) -> _Body:
    """The request in a body of JSON.

    Raises:
        ApiError: 400, with the first thing that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # Each kind of a union has errors of its own: those of the kind that was meant lie deepest.
        first = max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=lambda e: len(e["loc"]))
        where = str(first["loc"][0]) if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        code = "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
        raise ApiError(400, f"{where}: {message}" if where else message, code, where or None) from None


def event(document: dict[str, Any]) -> str:
    """One server-sent event. In ASCII: a line or paragraph separator of Unicode in a text ends a line for some
    clients."""
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Own tokens only: virtual ones are the server's matter."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


#: JSON has no -inf, which is a token's log-probability where its probability is 0.
LEAST_LOGPROB = -9999.0


def completion_logprobs(
    entries: Sequence[tuple[str, float, Sequence[tuple[str, float]]]], offset: int
) -> dict[str, list[Any]]:
    """``(token, log-probability, most probable ones)`` of each token as completions have it.

    Args:
        offset: characters of the text before the first token.
    """
    offsets: list[int] = []
    likeliest: list[dict[str, float]] = []
    for token, _, top in entries:
        likeliest.append({})
        for text, value in top:  # the first of several that read alike, as parts of characters do
            likeliest[-1].setdefault(text, max(value, LEAST_LOGPROB))
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "tokens": [token for token, _, _ in entries],
        "token_logprobs": [max(logprob, LEAST_LOGPROB) for _, logprob, _ in entries],
        "top_logprobs": likeliest,
    }


def chat_logprobs(entries: Sequence[tuple[str, float, Sequence[tuple[str, float]]]]) -> dict[str, list[Any]]:
    """The same as chat has it."""

    def entry(token: str, logprob: float) -> dict[str, Any]:
        # A part of a character has bytes that its text no longer shows.
        known = None if "\ufffd" in token else list(token.encode())
        return {"token": token, "logprob": max(logprob, LEAST_LOGPROB), "bytes": known}

    content = [entry(token, value) | {"top_logprobs": [entry(*pair) for pair in top]} for token, value, top in entries]
    return {"content": content}
