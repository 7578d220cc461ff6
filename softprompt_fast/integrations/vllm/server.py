# SPDX-License-Identifier: Apache-2.0
"""Prompts as models of vLLM's OpenAI server: ``vllm serve MODEL --kv-transfer-config ... --middleware
softprompt_fast.integrations.vllm.server.SoftPromptMiddleware``.

``model`` is a prompt's name, ``BASE:name``, or the base alone for no prompt, in ``/v1/completions`` and
``/v1/chat/completions``; ``/v1/models`` lists them. The middleware looks at no request. When the server starts it
gives those two handlers an engine and a list of models that know prompts: the handler asks the list whether it serves
the request's model, and hands the engine the ids that it made of text or chat, where placeholders are added. So chat
templates, tools, streams and usage are vLLM's own, and usage counts no virtual token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from vllm import SamplingParams
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.outputs import RequestOutput

from softprompt_fast.integrations.vllm import _internals
from softprompt_fast.integrations.vllm.front import PromptFront, strip
from softprompt_fast.integrations.vllm.registry import UnknownPromptError

#: The model that this context's request asked for, if it is a prompt: (as the client wrote it, the prompt's name).
_requested: ContextVar[tuple[str, str] | None] = ContextVar("softprompt_fast_requested", default=None)


class SoftPromptMiddleware:
    """ASGI middleware that hands everything on; see the module."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._installed = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._installed and "app" in scope:
            self._installed = True
            install(scope["app"].state)
        await self._app(scope, receive, send)


def install(state: Any) -> None:
    """Teach the handlers of a server about prompts.

    Raises:
        ValueError: its engine was started without the connector.
    """
    engine = _internals.engine_of(state)
    front = PromptFront(engine.vllm_config, engine.renderer.tokenizer)
    _internals.install(state, PromptEngine(engine, front), PromptModels(state.openai_serving_models, front))


class PromptModels:
    """The server's list of models, and each prompt is one."""

    def __init__(self, models: Any, front: PromptFront) -> None:
        self._models = models
        self._front = front

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models, name)

    def is_base_model(self, name: str) -> bool:
        """Whether `name` is served. Handlers ask before anything else, and a prompt's name is remembered for what else
        they do in this request."""
        if self._models.is_base_model(name):
            _requested.set(None)
            return True
        prompt = self._prompt(name)
        _requested.set(None if prompt is None else (name, prompt))
        return prompt is not None

    def model_name(self, lora_request: Any = None) -> str:
        requested = _requested.get()
        return self._models.model_name(lora_request) if requested is None else requested[0]

    async def show_available_models(self) -> ModelList:
        listed = await self._models.show_available_models()
        base = listed.data[0]
        names = await asyncio.to_thread(self._front.registry.names)
        listed.data += [
            ModelCard(
                id=name,
                root=base.root,
                parent=base.id,
                max_model_len=base.max_model_len,
                permission=[ModelPermission()],
            )
            for name in names
        ]
        return listed

    def _prompt(self, name: str) -> str | None:
        if name in self._front.registry:
            return name
        for base in self._models.base_model_paths:
            prompt = name.removeprefix(f"{base.name}:")
            if prompt != name and prompt in self._front.registry:
                return prompt
        return None


class PromptEngine:
    """The server's engine client, whose `generate` puts a requested prompt in front of the ids it is given."""

    def __init__(self, engine: Any, front: PromptFront) -> None:
        self._engine = engine
        self._front = front

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """As ``EngineClient.generate``.

        Raises:
            VLLMValidationError: a request that can't be served behind a prompt (400); when the answer is iterated.
            PromptUnavailableError: the prompt is damaged or can't be read (500); other requests are unharmed.
        """
        # Now, in the handler's own context: a stream is iterated in another one.
        requested = _requested.get()
        named = ((sampling_params.extra_args or {}).get("kv_transfer_params") or {}).get("soft_prompt")
        name = named if requested is None else requested[1]
        if name is None:
            return self._engine.generate(prompt, sampling_params, request_id, **options)
        return self._behind(name, prompt, sampling_params, request_id, options)

    async def _behind(
        self, name: str, prompt: Any, sampling_params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> AsyncIterator[RequestOutput]:
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            raise VLLMValidationError("a soft prompt can only be put before text, not before images or embeddings")
        try:
            entry = await asyncio.to_thread(self._front.find, name)
        except UnknownPromptError as error:
            raise VLLMValidationError(str(error)) from error
        except (OSError, ValueError) as error:
            raise PromptUnavailableError(str(error)) from error
        try:
            ids, salt, params = self._front.prepare(
                entry, prompt["prompt_token_ids"], sampling_params, prompt.get("cache_salt")
            )
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        whole = {**prompt, "prompt_token_ids": ids, "cache_salt": salt}
        whole.pop("prompt_token_offsets", None)  # they are those of the own ids
        async with aclosing(self._engine.generate(whole, params, request_id, **options)) as outputs:
            async for output in outputs:
                yield strip(output, entry)


class PromptUnavailableError(VLLMServerError):
    """A prompt that is known and can't be served."""
