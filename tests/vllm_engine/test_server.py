# SPDX-License-Identifier: Apache-2.0
"""vLLM's own OpenAI server with prompts as models, asked by the official client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from softprompt_fast import PrefixKV
from tests.vllm_engine.tiny import LENGTHS, SPECIAL, WORDS, Base, make_rows

ROOT = Path(__file__).resolve().parents[2]
NEW = 8
KEY = "a-key"
#: What `serve.run` takes, as the command line makes it.
START = """
import sys
from pathlib import Path
from softprompt_fast.integrations.vllm import serve
from softprompt_fast.serving.settings import ServeSettings

if __name__ == "__main__":
    model, folder, port = sys.argv[1:]
    settings = ServeSettings(
        model,
        prompts_folder=Path(folder),
        port=int(port),
        api_key="a-key",
        engine="vllm",
        served_model_name="tiny",
        max_waiting=64,
        max_prefill_tokens=2048,
        max_model_len=768,
        grace=5,
    )
    serve.run(settings, extra_args=["--enforce-eager"])
"""


@dataclass
class Server:
    url: str
    client: openai.OpenAI
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def server(base: Base, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path_factory.mktemp("start") / "start.py"
    script.write_text(START)
    log = (script.parent / "log").open("w+")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    process = subprocess.Popen(
        [sys.executable, str(script), str(base.folder), str(folder), str(port)],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                pytest.fail(f"the server did not start:\n{log.read()[-8000:]}")
            time.sleep(0.2)
        yield Server(url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0), process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            log.close()


def words(ids: list[int]) -> str:
    """As the tokenizer decodes them: special tokens are skipped, and ids that it does not know."""
    return " ".join(f"w{i}" for i in ids if len(SPECIAL) <= i < WORDS)


def expected(base: Base, ids: list[int], prefix: PrefixKV | None) -> str:
    return words(base.greedy(ids, prefix, NEW))


def complete(server: Server, model: str, prompt: Any, **options: Any) -> Any:
    extra = {"ignore_eos": True, **options.pop("extra_body", {})}
    return server.client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW, temperature=0, extra_body=extra, **options
    )


def test_prompts_are_models(server: Server, folder: Path) -> None:
    names = [f"p{length}" for length in LENGTHS]
    assert {model.id for model in server.client.models.list().data} >= {"tiny", "int8", *names}
    response = httpx.get(f"{server.url}/v1/models")
    assert response.status_code == 401  # the key is asked for first


def test_completions(server: Server, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    rows = make_rows(12, seed=1, longest=20)
    names = [None, *prefixes]
    for i, ids in enumerate(rows):
        name = names[i % len(names)]
        model = ("tiny", "tiny") if name is None else (name, f"tiny:{name}")
        prefix = None if name is None else prefixes[name].dequantize()
        answer = complete(server, model[i % 2], ids if i % 3 else words(ids))
        assert answer.choices[0].text.strip() == expected(base, ids, prefix)
        assert answer.model == model[i % 2]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), NEW)


def test_several_prompts_in_one_request(server: Server, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    answer = complete(server, "p100", ["w5 w6", "w7"])
    found = [choice.text.strip() for choice in answer.choices]
    assert found == [expected(base, ids, prefixes["p100"]) for ids in ([5, 6], [7])]
    assert answer.usage.prompt_tokens == 3


def test_a_prompt_as_a_parameter_of_the_request(server: Server, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    answer = complete(server, "tiny", "w5", extra_body={"kv_transfer_params": {"soft_prompt": "p20"}})
    assert answer.choices[0].text.strip() == expected(base, [5], prefixes["p20"])


def test_echo_shows_own_text_only(server: Server, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    answer = complete(server, "p20", "w5 w6", echo=True)
    assert answer.choices[0].text == "w5 w6 " + expected(base, [5, 6], prefixes["p20"])


def test_chat(server: Server, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    messages = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    ids = [3, 5, 6, 3, 7, 4]
    for model, prefix in (("p128", prefixes["p128"]), ("tiny", None)):
        options = {"max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
        answer = server.client.chat.completions.create(model=model, messages=messages, **options)
        assert answer.choices[0].message.content.strip() == expected(base, ids, prefix)
        assert answer.model == model and answer.usage.prompt_tokens == len(ids)
        stream = server.client.chat.completions.create(
            model=model, messages=messages, stream=True, stream_options={"include_usage": True}, **options
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text.strip() == expected(base, ids, prefix)
        assert chunks[-1].usage.prompt_tokens == len(ids) and {chunk.model for chunk in chunks} == {model}


def test_streams(server: Server, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    chunks = list(complete(server, "p512", "w5 w6", stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text.strip() == expected(base, [5, 6], prefixes["p512"])
    assert chunks[-1].usage.prompt_tokens == 2 and {chunk.model for chunk in chunks} == {"p512"}


def test_a_fresh_prompt_while_serving(server: Server, base: Base, folder: Path) -> None:
    with pytest.raises(openai.NotFoundError, match="`fresh` does not exist"):
        complete(server, "fresh", "w5")
    for seed in (1, 2):
        prefix = base.prefix(50, seed)
        prefix.save_pretrained(folder / "fresh")
        assert complete(server, "fresh", "w5").choices[0].text.strip() == expected(base, [5], prefix)


@pytest.mark.parametrize("name", ["nobody", "tiny:nobody", "other:p16", "../p16", "tiny:../p16", "p16/.", "tiny:"])
def test_unknown_models_are_404(server: Server, name: str) -> None:
    with pytest.raises(openai.NotFoundError):
        complete(server, name, "w5")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "prompt_logprobs"),
        ({"extra_body": {"kv_transfer_params": {"soft_prompt": "nobody"}}}, "no prompt named 'nobody'"),
    ],
    ids=["prompt_logprobs", "echo", "unknown parameter"],
)
def test_what_a_prompt_cannot_serve_is_400(server: Server, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        complete(server, "tiny" if "unknown" in reason or "no prompt" in reason else "p16", "w5", **options)


def test_no_room_is_400(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="leave no room for a new one"):
        server.client.completions.create(model="p512", prompt=[5] * 300, max_tokens=1)


def test_a_corrupt_prompt_fails_alone(server: Server, base: Base, folder: Path, prefixes: dict[str, PrefixKV]) -> None:
    base.prefix(64, seed=5).save_pretrained(folder / "broken")
    file = folder / "broken" / "prefix_kv.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(openai.InternalServerError, match="does not have the digest"):
        complete(server, "broken", "w5")
    file.write_bytes(content[:1000])
    with pytest.raises(openai.InternalServerError, match="truncated or damaged"):
        complete(server, "broken", "w5")
    assert complete(server, "p16", "w5").choices[0].text.strip() == expected(base, [5], prefixes["p16"])


def test_garbage_and_clients_that_leave(server: Server, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    garbage = httpx.post(f"{server.url}/v1/completions", content=b'{"model": "p16", ', headers=headers)
    assert garbage.status_code == 400
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={"model": "p16", "prompt": "w5", "max_tokens": 600, "ignore_eos": True, "stream": True},
        headers=headers,
    ) as response:
        next(response.iter_lines())
    assert complete(server, "p16", "w5").choices[0].text.strip() == expected(base, [5], prefixes["p16"])


def test_it_stops_when_told(server: Server) -> None:
    """Last in this file."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) in (0, -signal.SIGTERM)
