# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast serve``: what it refuses to start with, and a real process from its start to SIGTERM."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from typer.testing import CliRunner

from softprompt_fast import SoftPromptModel
from softprompt_fast.cli._session import Exit
from softprompt_fast.cli.app import app
from softprompt_fast.demo import assets
from softprompt_fast.integrations.peft import save_adapter
from softprompt_fast.integrations.vllm import serve as vllm_serve
from softprompt_fast.serving.settings import ServeSettings, SettingsError, is_loopback
from tests.models import make_base, make_prompt
from tests.serving import PATIENCE, alone, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
KEY = "a-key"
#: Tokens of the longest row: what takes seconds.
POSITIONS = 2048

# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"engine": "other"}, "--engine"),
        ({"dtype": "int8"}, "--dtype"),
        ({"prefix_dtype": "float16"}, "--prefix-dtype"),
        ({"max_batch": 0}, "--max-batch"),
        ({"max_waiting": -1}, "--max-waiting"),
        ({"max_prefill_tokens": 0}, "--max-prefill-tokens"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"device_bytes": 0}, "--device-bytes"),
        ({"host_bytes": -1}, "--host-bytes"),
        ({"port": 65536}, "--port"),
        *(({"timeout": value}, "--timeout") for value in (0.0, -1.0, math.nan, math.inf)),
        *(({"grace": value}, "--grace") for value in (-1.0, math.nan, math.inf)),
        ({"api_key": ""}, "--api-key"),
        ({"api_key": "a\nb"}, "--api-key"),
        ({"api_key": "ä"}, "--api-key"),
        *(({"host": host}, "--api-key") for host in ("0.0.0.0", "::", "10.0.0.1", "my-machine", "")),
        ({"admin": True}, "--admin"),
        ({"admin": True, "api_key": KEY}, "--admin"),
        ({"prompts": {"a\n": Path("a")}}, "--prompt"),
        ({"prompts": {"base": Path("a")}}, "--served-model-name"),
        ({"served_model_name": "x" * 300}, "--model"),
    ],
    ids=str,
)
def test_settings_that_no_server_can_have(given: dict[str, Any], option: str) -> None:
    with pytest.raises(SettingsError, match=option):
        ServeSettings("some/base", **given)


def test_settings() -> None:
    found = ServeSettings("some/base", host="0.0.0.0", api_key=KEY, grace=0)
    assert found.base_name == "base" and KEY not in repr(found)
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "127.0.0.1.example.org", "::ffff:10.0.0.1", "localhost.example.org")))


def test_adapters_are_what_lies_there_now(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden", " odd"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    settings = ServeSettings("base", prompts={"a": Path("elsewhere")}, prompts_folder=tmp_path)
    assert settings.adapters == {"a": Path("elsewhere"), "b": tmp_path / "b"}
    (tmp_path / "c").mkdir()
    assert list(settings.adapters) == ["a", "b", "c"]


# ---- the command ----------------------------------------------------------------------------------------------------


def refused(code: Exit, *arguments: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.replace("│", " ").split())  # typer wraps usage errors to the terminal's width


def test_wrong_command_lines(tmp_path: Path) -> None:
    assert "needs --api-key" in refused(Exit.USAGE, "--model", "demo", "--host", "0.0.0.0")
    assert "seconds from 0, found nan" in refused(Exit.USAGE, "--model", "demo", "--grace", "nan")
    assert "expected NAME=DIR" in refused(Exit.USAGE, "--model", "demo", "--prompt", "a")
    assert "each NAME once" in refused(Exit.USAGE, "--model", "demo", "--prompt", "a=x", "--prompt", "a=y")
    assert "does not exist" in refused(Exit.USAGE, "--model", "demo", "--prompts", tmp_path / "nothing")


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        # The model is not there either: the address comes first.
        assert f"port {port}" in refused(Exit.IO, "--model", tmp_path / "none", "--port", port)


def test_vllm_is_told_where_the_demo_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[ServeSettings] = []
    monkeypatch.setattr(vllm_serve, "run", started.append)
    monkeypatch.setattr(assets, "demo_model_dir", lambda say: tmp_path)
    for model in ("demo", "other"):
        assert CliRunner().invoke(app, ["serve", "--engine", "vllm", "--model", model]).exit_code == 0
    assert [(settings.model, settings.base_name) for settings in started] == [(str(tmp_path), "demo"), ("other",) * 2]


def test_vllm_has_no_time_limit() -> None:
    assert "--timeout: not with" in refused(Exit.INPUT, "--engine", "vllm", "--model", "demo", "--timeout", "5")


# ---- a process ------------------------------------------------------------------------------------------------------


@dataclass
class Process:
    """A server in a process of its own, and what it was given."""

    url: str
    process: subprocess.Popen[str]
    model: SoftPromptModel

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)

    def metric(self, name: str) -> float:
        page = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        return next(
            float(line.split()[1]) for line in page.splitlines() if line.startswith(f"softprompt_fast_{name} ")
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of many positions with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    base = make_base()
    base.config.max_position_embeddings = POSITIONS
    base.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_prompt_that_is_named_has_to_be_there_at_the_start(tiny: Path, tmp_path: Path) -> None:
    line = ("--model", tiny, "--port", 0, "--prompt")
    save_adapter(make_prompt(make_base("gpt2")), tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"")
    assert "damaged" in refused(Exit.INPUT, *line, f"a={tmp_path / 'other'}")
    assert "nothing" in refused(Exit.IO, *line, f"a={tmp_path / 'nothing'}")
    assert "neither a template nor a file" in refused(Exit.INPUT, *line[:-1], "--chat-template", tmp_path / "none")


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Prompts: "named", "first" and "second" in a folder, and beside them one that is damaged and one that is none."""
    folder = tmp_path_factory.mktemp("served")
    model = SoftPromptModel.from_pretrained(tiny).eval()
    places = {"named": folder / "named", "first": folder / "all" / "first", "second": folder / "all" / "second"}
    for seed, (name, place) in enumerate(places.items()):
        save_adapter(make_prompt(model.base, seed=seed), place)
        model.load_prompt(name, place)
    save_adapter(make_prompt(model.base), folder / "all" / "damaged")
    (folder / "all" / "damaged" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "all" / "none").mkdir()
    command = [sys.executable, "-m", "softprompt_fast.cli", "serve", "--model", tiny, "--port", "0"]
    command += ["--prompt", f"named={places['named']}", "--prompts", folder / "all", "--grace", str(PATIENCE)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SOFTPROMPT_FAST_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    ) as process:
        killer = threading.Timer(PATIENCE, process.kill)
        killer.start()
        said = ""
        try:
            assert process.stderr is not None
            for line in process.stderr:
                said += line
                if line.startswith("listening on "):
                    break
            killer.cancel()
            assert "listening on " in said, said
            assert "none is left out" in said.replace("\n", " "), said
            yield Process(line.split()[-1], process, model)
        finally:
            killer.cancel()
            process.kill()


def test_one_completion(server: Process) -> None:
    with server.client() as client:
        names = {entry.id for entry in client.models.list()}
        assert names == {"tiny", "named", "first", "second", "damaged"}
        tokenizer = make_tokenizer()
        for name, prompt in (("named", "named"), ("tiny:first", "first"), ("tiny", None)):
            answer = client.completions.create(model=name, prompt="one", max_tokens=12, temperature=0)
            row = torch.tensor(tokenizer("one")["input_ids"])
            assert answer.choices[0].text == tokenizer.decode(alone(server.model, row, prompt, 12))
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(model="named", messages=messages, max_tokens=3)
        assert chat.usage is not None and chat.usage.completion_tokens == 3


def test_the_folders_prompts_are_read_when_they_are_asked_for(server: Process) -> None:
    before = server.metric("bank_loads_total")
    with server.client() as client:
        for _ in range(2):
            client.completions.create(model="second", prompt="one", max_tokens=2)
            assert server.metric("bank_loads_total") == before + 1
        with pytest.raises(openai.InternalServerError, match="damaged"):
            client.completions.create(model="damaged", prompt="one", max_tokens=2)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="none", prompt="one", max_tokens=2)


def test_the_key_is_asked_for(server: Process) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_at_sigterm_a_stream_runs_to_its_end(server: Process) -> None:
    """The last of this server."""
    new = POSITIONS - 100
    body = {"model": "named", "prompt": "one", "max_tokens": new, "temperature": 0, "stream": True, "ignore_eos": True}
    body |= {"stream_options": {"include_usage": True}}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        while (health := httpx.get(f"{server.url}/health")).status_code == 200:
            pass
        assert health.json()["error"]["code"] == "shutting_down"
        refused = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        *events, usage, done = lines
    assert done == "[DONE]" and json.loads(usage)["usage"]["completion_tokens"] == new
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(PATIENCE) == 0
