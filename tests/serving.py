# SPDX-License-Identifier: Apache-2.0
"""What tests of the engine and of its server share: a tokenizer for the tiny models, and a server in a thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from softprompt_fast import SoftPromptModel
from softprompt_fast.serving.app import create_app
from softprompt_fast.serving.engine import Engine
from tests.models import VOCAB_SIZE

#: Generous: a test that waits so long has failed.
PATIENCE = 120

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for the tiny models' vocabulary: letters, a space, and the bytes of an umlaut and a
    four-byte character, so that characters take several tokens. Token 0 pads."""
    byte = dict(zip("ä😀", ("Ã¤", "ðŁĺĢ"), strict=True))
    single = [
        "<pad>",
        "<s>",
        *"abcdefghijklmnopqrstuvwxyz",
        "Ġ",
        *byte["ä"],
        *byte["😀"],
        *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    ]
    vocab = {token: i for i, token in enumerate(single[:VOCAB_SIZE])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")
    fast.chat_template = chat_template
    return fast


def alone(model: SoftPromptModel, row: Tensor, prompt: str | None, new_tokens: int) -> list[int]:
    """Greedy new tokens of one row by itself."""
    out = model.generate(row[None], prompt=prompt, max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(row) :].tolist()


class Gate:
    """Holds the engine's thread before its next pass of the model, so that a test knows what it meets."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._open = threading.Semaphore(0), threading.Semaphore(0)
        self.passes: list[tuple[int, int]] = []  # rows and columns of each
        forward = engine.model.forward

        @functools.wraps(forward)  # `generate` looks at its signature
        def gated(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name == "softprompt-fast-engine":
                self.passes.append(tuple(kwargs["input_ids"].shape))
                self.reached.release()
                assert self._open.acquire(timeout=PATIENCE)
            return forward(*args, **kwargs)

        monkeypatch.setattr(engine.model, "forward", gated)

    def wait(self) -> None:
        assert self.reached.acquire(timeout=PATIENCE)

    def step(self, passes: int = 1) -> None:
        """Let so many passes run, and wait for the next one to begin."""
        for _ in range(passes):
            self._open.release()
            self.wait()

    def open(self) -> None:
        for _ in range(100_000):
            self._open.release()


@contextmanager
def served(engine: Engine, **options: Any) -> Iterator[str]:
    """The address of a server over `engine` in a thread of this process."""
    config = uvicorn.Config(create_app(engine, **options), port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server did not start"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.force_exit = server.should_exit = True
        thread.join(PATIENCE)
