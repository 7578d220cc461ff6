# SPDX-License-Identifier: Apache-2.0
"""What a server is started with, whichever engine runs behind it. Imports nothing heavy."""

from __future__ import annotations

import ipaddress
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ENGINES = ("embedded", "vllm")
PREFIX_DTYPES = ("int8", "float8_e4m3fn")
DTYPES = ("float32", "bfloat16", "float16")
#: Characters of a prompt's name at most.
NAME_LENGTH = 256
#: Seconds that a request may take where nothing is said.
TIMEOUT = 600.0


class SettingsError(ValueError):
    """Settings that no server can be started with."""


@dataclass(frozen=True)
class ServeSettings:
    """Settings of ``softprompt-fast serve``, checked when they are made.

    Attributes:
        model: the base: a folder, a hub name, or "demo" for the bundled one.
        prompts: name -> folder of a PEFT adapter or of a saved ``PrefixKV``.
        prompts_folder: each subfolder is a prompt of that name, read at its first use.
        host: address to listen on. Anything but a loopback address needs an `api_key`.
        port: TCP port; 0 lets the system choose one.
        api_key: what clients must send as ``Authorization: Bearer``; None for no check. Never shown by ``repr``.
        engine: "embedded" (this package's) or "vllm".
        dtype: of the base: "float32", "bfloat16" or "float16".
        served_model_name: the name of the base without a prompt; None: the last part of `model`.
        chat_template: a Jinja template or a file with one, in place of the tokenizer's; None for the tokenizer's.
        max_batch: rows that run together at most.
        max_waiting: requests that wait for a place at most; one more is refused with 429.
        max_prefill_tokens: own tokens of new requests a step at most, so that running rows are not held up.
        max_model_len: virtual, own and new tokens of a row at most; None: the base's positions.
        timeout: seconds that a request may take, waiting included; None: :data:`TIMEOUT`, and with vLLM, which has
            no limit of that kind, as long as it takes.
        grace: seconds that running requests get to end once the server is told to stop.
        device_bytes, host_bytes: budgets of the prompt bank; None for no bound.
        prefix_dtype: "int8" or "float8_e4m3fn" to keep prefixes in 8 bits; None for the base's dtype.
        admin: let clients load and remove prompts of `prompts_folder` over HTTP. Needs an `api_key`.

    Raises:
        SettingsError: a value that cannot be; the message names the option.
    """

    model: str
    prompts: Mapping[str, Path] = field(default_factory=dict)
    prompts_folder: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    engine: str = "embedded"
    dtype: str = "float32"
    served_model_name: str | None = None
    chat_template: str | None = None
    max_batch: int = 32
    max_waiting: int = 256
    max_prefill_tokens: int = 512
    max_model_len: int | None = None
    timeout: float | None = None
    grace: float = 30.0
    device_bytes: int | None = None
    host_bytes: int | None = None
    prefix_dtype: str | None = None
    admin: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--engine", self.engine, ENGINES),
            ("--dtype", self.dtype, DTYPES),
            ("--prefix-dtype", self.prefix_dtype, (None, *PREFIX_DTYPES)),
        ):
            if value not in known:
                expected = ", ".join(name for name in known if name is not None)
                raise SettingsError(f"{option}: expected {expected}, found {value!r}")
        for option, number, least in (
            ("--max-batch", self.max_batch, 1),
            ("--max-waiting", self.max_waiting, 0),
            ("--max-prefill-tokens", self.max_prefill_tokens, 1),
            ("--max-model-len", self.max_model_len, 1),
            ("--device-bytes", self.device_bytes, 1),
            ("--host-bytes", self.host_bytes, 1),
        ):
            if number is not None and number < least:
                raise SettingsError(f"{option}: expected at least {least}, found {number}")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"--port: expected 0 to 65535, found {self.port}")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise SettingsError(f"--timeout: expected more than 0 seconds, found {self.timeout}")
        if not 0 <= self.grace < math.inf:
            raise SettingsError(f"--grace: expected a number of seconds from 0, found {self.grace}")
        key = self.api_key
        if key is not None and not (key and key.isascii() and _printable(key)):
            raise SettingsError("--api-key: expected printable ASCII characters, and at least one")
        if self.api_key is None and not is_loopback(self.host):
            raise SettingsError(
                f"--host: {self.host!r} can be reached from other machines, which needs --api-key "
                "(or SOFTPROMPT_FAST_API_KEY)"
            )
        if self.admin and (self.api_key is None or self.prompts_folder is None):
            raise SettingsError("--admin: needs --api-key and --prompts, the folder that prompts may come from")
        for option, name in (("--model", self.base_name), *(("--prompt", name) for name in self.adapters)):
            if (why := why_no_name(name)) is not None:
                raise SettingsError(f"{option}: {why}")
        if self.base_name in self.adapters:
            raise SettingsError(
                f"--prompt: {self.base_name!r} is what the base is called; give it another --served-model-name"
            )

    @property
    def base_name(self) -> str:
        """What the base without a prompt is called as a model."""
        return self.served_model_name or Path(self.model).name or self.model

    @property
    def adapters(self) -> dict[str, Path]:
        """Every prompt's folder now: `prompts`, and the subfolders of `prompts_folder` that are not hidden and can be
        a name. Clients' names are only ever looked up here, so no name becomes a path."""
        found = {}
        if self.prompts_folder is not None:
            for entry in sorted(self.prompts_folder.iterdir()):
                if entry.is_dir() and not entry.name.startswith(".") and why_no_name(entry.name) is None:
                    found[entry.name] = entry
        return {**found, **self.prompts}


def why_no_name(name: str) -> str | None:
    """Why `name` can't be a prompt's; None where it can."""
    if not name or len(name) > NAME_LENGTH:
        return f"expected a name of 1 to {NAME_LENGTH} characters, found {len(name)}"
    if not _printable(name) or name != name.strip():
        return f"expected a name without control characters or spaces around it, found {name!r}"
    return None


def _printable(text: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach a server on `host`: an address of ``127.0.0.0/8``, ``::1`` or
    ``localhost``. Other names are not looked up: what they resolve to may change."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
