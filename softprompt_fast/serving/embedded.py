# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast serve`` with this package's own engine: from settings to a process that listens."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from softprompt_fast.bank import BankOptions
from softprompt_fast.demo import assets
from softprompt_fast.model import SoftPromptModel
from softprompt_fast.serving.app import create_app
from softprompt_fast.serving.engine import Engine
from softprompt_fast.serving.requests import Request, Sampling
from softprompt_fast.serving.settings import TIMEOUT, ServeSettings, SettingsError

logger = logging.getLogger("softprompt_fast")

#: Seconds for answers to reach their clients once the engine has ended.
_LAST_BYTES = 5


def run(settings: ServeSettings, say: Callable[[str], None] = assets.to_stderr) -> None:
    """Serve until SIGTERM or SIGINT, then end the running requests within ``settings.grace`` seconds.

    Args:
        say: gets a line for each slow step, and one when the server listens.

    Raises:
        OSError: the address is taken, or the model or a prompt's folder is not there.
        ValueError: the model or a setting doesn't fit.
    """
    # Taken before a model is loaded for nothing.
    with _bound(settings.host, settings.port) as listener:
        engine = load_engine(settings, say)
        try:
            app = create_app(
                engine,
                base_name=settings.base_name,
                chat_template=chat_template(settings),
                api_key=settings.api_key,
                folders=(lambda: settings.adapters) if settings.admin else None,
            )
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_LAST_BYTES, lifespan="off")
            host, port = listener.getsockname()[:2]
            address = f"[{host}]" if ":" in host else host
            server = _Server(config, engine, settings.grace, f"listening on http://{address}:{port}", say)
            server.run(sockets=[listener])
        finally:
            engine.close()


def load_engine(settings: ServeSettings, say: Callable[[str], None] = assets.to_stderr) -> Engine:
    """The engine with its model and prompts, warmed up."""
    base, tokenizer = assets.load_model(settings.model, say)
    options = BankOptions(
        device_bytes=settings.device_bytes,
        host_bytes=settings.host_bytes,
        dtype=None if settings.prefix_dtype is None else getattr(torch, settings.prefix_dtype),
    )
    model = SoftPromptModel(base.to(getattr(torch, settings.dtype)), bank=options).eval()
    for name, folder in settings.adapters.items():
        if name in settings.prompts:
            model.load_prompt(name, folder)  # asked for by name: what is wrong with it shows now
        try:
            model.register_prompt(name, folder, replace=True)
        except OSError as error:  # a subfolder that is no prompt, beside others that are
            if name in settings.prompts:
                raise
            say(f"{folder} is left out: {error}")
    engine = Engine(
        model,
        tokenizer,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        max_prefill_tokens=settings.max_prefill_tokens,
        max_model_len=settings.max_model_len,
        timeout=TIMEOUT if settings.timeout is None else settings.timeout,
    )
    # The first pass packs weights, which takes seconds.
    engine.submit(Request([0], sampling=Sampling(max_tokens=2, ignore_eos=True))).result()
    return engine


def chat_template(settings: ServeSettings) -> str | None:
    """The template itself, where the setting names a file."""
    given = settings.chat_template
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--chat-template: neither a template nor a file that can be read: {error}") from None


def _bound(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"can't listen on {host}, port {port}: {error.strerror}") from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn's, which at a signal first lets the engine end its requests while new ones are told 503."""

    def __init__(
        self, config: uvicorn.Config, engine: Engine, grace: float, ready: str, say: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._engine, self._grace, self._ready, self._say = engine, grace, ready, say
        self._ending: threading.Thread | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say(self._ready)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's, which raises the signal again at its end: a server that was told to stop has not failed.
        if self._ending is not None:
            self.force_exit = self.should_exit = True
            return
        self._ending = threading.Thread(target=self._drain, name="softprompt-fast-drain", daemon=True)
        self._ending.start()

    def _drain(self) -> None:
        if not self._engine.drain(self._grace):
            self._say(f"some requests did not end within {self._grace:g} s and were cancelled")
        self.should_exit = True
