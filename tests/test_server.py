# SPDX-License-Identifier: Apache-2.0
"""The HTTP server, over real sockets and with OpenAI's own client: texts, errors, and clients that leave."""

from __future__ import annotations

import functools
import itertools
import json
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
import torch

from softprompt_fast import BankOptions, SoftPromptModel
from softprompt_fast.integrations.peft import save_adapter
from softprompt_fast.serving import app as app_module
from softprompt_fast.serving.app import create_app
from softprompt_fast.serving.engine import Engine
from softprompt_fast.serving.requests import Request, Sampling
from tests.models import MAX_POSITIONS, make_model, make_prompt
from tests.serving import PATIENCE, Gate, alone, make_tokenizer, served

TOKENIZER = make_tokenizer()
KEY = "a-key"
#: Loading the system's certificates takes longer than a request.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture(scope="module")
def model() -> SoftPromptModel:
    """Prompts "a" and "b", and "prefix" (keys and values alone)."""
    found = make_model()
    found.add_prompt("prefix", make_prompt(found.base, "PREFIX_TUNING").requires_grad_(False))
    return found


@pytest.fixture(scope="module")
def url(model: SoftPromptModel) -> Iterator[str]:
    with Engine(model, TOKENIZER, max_batch=8, max_waiting=4) as engine, served(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as found:
        yield found


def expected(model: SoftPromptModel, text: str, prompt: str | None, new: int) -> str:
    """The greedy text of one row by itself."""
    row = torch.tensor(TOKENIZER(text)["input_ids"])
    return TOKENIZER.backend_tokenizer.decode(alone(model, row, prompt, new))


def greedy(model: str, prompt: Any = "one", new: int = 8, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0} | fields


def post(url: str, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    content = {"content": body} if isinstance(body, (bytes, str)) else {"json": body}
    return httpx.post(url + path, timeout=PATIENCE, verify=NO_TLS, **content, **options)


def refusal(answer: httpx.Response, status: int, code: str | None = None) -> str:
    """The message of an error, which has to be in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code
    return error["message"]


# ---- what is answered -----------------------------------------------------------------------------------------------


def test_each_prompt_is_a_model(client, model):
    assert [entry.id for entry in client.models.list()] == ["base", "a", "b", "prefix"]
    assert client.models.retrieve("base:b").id == "base:b"
    for name, prompt in (("base", None), ("a", "a"), ("base:b", "b"), ("prefix", "prefix")):
        answer = client.completions.create(**greedy(name))
        assert answer.choices[0].text == expected(model, "one", prompt, 8)
        assert (answer.model, answer.choices[0].finish_reason) == (name, "length")
        # Virtual tokens are not counted.
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 8, 11)


def test_every_form_of_a_completions_prompt(client, model):
    texts = ["one", "two three"]
    rows = [TOKENIZER(text)["input_ids"] for text in texts]
    for given in (texts, rows):
        answer = client.completions.create(**greedy("a", given))
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == [expected(model, text, "a", 8) for text in texts]
        assert answer.usage.prompt_tokens == sum(map(len, rows))
    assert client.completions.create(**greedy("a", rows[0])).choices[0].text == expected(model, "one", "a", 8)
    # The prompt's virtual tokens predict the first one.
    assert client.completions.create(**greedy("a", "")).usage.prompt_tokens == 0


def test_a_completion_has_16_tokens_where_nothing_is_said(client):
    assert client.completions.create(model="a", prompt="one").usage.completion_tokens == 16


def test_streams_give_the_same_text(client, model):
    for fields in ({"prompt": "one"}, {"prompt": ["one", "two"], "n": 2}):
        events = list(
            client.completions.create(
                model="b", max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}, **fields
            )
        )
        assert events[-1].choices == [] and all(event.usage is None for event in events[:-1])
        texts: dict[int, str] = {}
        reasons = {}
        for event in events[:-1]:
            (choice,) = event.choices
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
        prompts = [fields["prompt"]] if isinstance(fields["prompt"], str) else fields["prompt"]
        rows = [text for text in prompts for _ in range(fields.get("n", 1))]
        assert texts == {i: expected(model, text, "b", 12) for i, text in enumerate(rows)}
        assert reasons == dict.fromkeys(range(len(rows)), "length")
        assert events[-1].usage.completion_tokens == 12 * len(rows)
        assert len({event.id for event in events}) == 1


@pytest.mark.parametrize("seed", range(4))
def test_characters_of_several_tokens_are_streamed_whole(url, seed):
    """Only "a" and the two bytes of "ä", drawn at random."""
    bias = {str(token): 90 for token in TOKENIZER("aä")["input_ids"]}
    fields = greedy("a", new=40, temperature=1, seed=seed, logit_bias=bias, logprobs=1)
    whole = post(url, fields).json()["choices"][0]
    lines = [line for line in post(url, fields | {"stream": True}).text.split("\n\n") if "{" in line]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert "ä" in whole["text"] and "\ufffd" in whole["text"]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    streamed = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    for field, values in whole["logprobs"].items():
        assert [value for part in streamed for value in part[field]] == values


def test_server_sent_events_as_they_are_written(url):
    with httpx.stream("POST", f"{url}/v1/completions", json=greedy("a", stream=True)) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    assert "usage" not in json.loads(lines[0].removeprefix("data: "))


def test_chat(client, model):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    text = "system be user hi a"  # as the template writes it
    answer = client.chat.completions.create(model="a", messages=messages, max_completion_tokens=8, temperature=0)
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected(model, text, "a", 8)
    assert answer.usage.prompt_tokens == len(text)
    events = list(
        client.chat.completions.create(model="a", messages=messages, max_tokens=8, temperature=0, stream=True)
    )
    assert events[0].object == "chat.completion.chunk" and events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == answer.choices[0].message.content
    assert [event.choices[0].finish_reason for event in events][-1] == "length"
    # Without a limit it fills the model's positions.
    whole = client.chat.completions.create(model="base", messages=messages, temperature=0)
    assert whole.usage.total_tokens == MAX_POSITIONS


def test_a_base_without_a_chat_template(model):
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    with Engine(model, make_tokenizer(chat_template=None)) as engine:
        with served(engine) as url:
            assert "--chat-template" in refusal(post(url, body, "/v1/chat/completions"), 400)
        with served(engine, chat_template="{{ messages[0].content }}") as url:
            assert post(url, body, "/v1/chat/completions").json()["usage"]["prompt_tokens"] == 2
        with served(engine, chat_template="{{ raise_exception('no ' + messages[0].role) }}") as url:
            assert "no user" in refusal(post(url, body, "/v1/chat/completions"), 400, "invalid_value")


def test_a_seed_decides_what_is_drawn(client):
    def draw(**fields: Any) -> list[str]:
        answer = client.completions.create(model="a", prompt="one", max_tokens=20, **fields)
        return [choice.text for choice in answer.choices]

    first = draw(seed=5, n=2)
    assert first == draw(seed=5, n=2) and first[0] != first[1]
    assert draw(seed=6) == first[1:]  # the second choice's seed is the next one


def test_stop_strings_and_tokens(client, model):
    text = expected(model, "one", "a", 16)
    stop = text[5:7]
    answer = client.completions.create(**greedy("a", new=16, stop=["\n", stop])).choices[0]
    assert (answer.text, answer.finish_reason) == (text[: text.index(stop)], "stop")
    tokens = alone(model, torch.tensor(TOKENIZER("one")["input_ids"]), "a", 16)
    answer = client.completions.create(**greedy("a", new=16), extra_body={"stop_token_ids": [tokens[3]]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens.index(tokens[3]) + 1


def test_logprobs(client):
    found = client.completions.create(**greedy("a", new=4, logprobs=2)).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 4
    for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob == max(top.values()) <= 0  # greedy
    message = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(
        model="a", messages=message, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 3 and all(len(token.top_logprobs) == 2 for token in content)
    part = str(TOKENIZER("😀")["input_ids"][0])  # a byte that is no text by itself
    chat = client.chat.completions.create(
        model="a", messages=message, max_tokens=1, temperature=0, logprobs=True, logit_bias={part: 100}
    )
    assert (chat.choices[0].logprobs.content[0].token, chat.choices[0].logprobs.content[0].bytes) == ("\ufffd", None)
    events = client.completions.create(**greedy("a", new=4, logprobs=0, stream=True))
    streamed = [event.choices[0].logprobs for event in events if event.choices[0].logprobs]
    assert [p for logprobs in streamed for p in logprobs.token_logprobs] == found.token_logprobs


def test_fields_that_ask_for_nothing_are_taken(url):
    fields = {
        "no_stop_trim": False, "skip_special_tokens": True, "return_hidden_states": False, "echo": False,
        "ignore_eos": False, "min_tokens": 0, "top_k": -1, "suffix": None, "user": "someone", "n": 1,
    }  # fmt: skip
    assert post(url, greedy("a", **fields)).json()["choices"] == post(url, greedy("a")).json()["choices"]


def test_many_clients_at_once(url, model):
    asked = [(f"{'abcdefgh'[i % 8]} row", ("base", "a", "b", "prefix")[i % 4]) for i in range(24)]

    def ask(text: str, name: str) -> str:
        while (answer := post(url, greedy(name, text, 6))).status_code == 429:
            pass
        return answer.json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda pair: ask(*pair), asked))
    assert texts == [expected(model, text, None if name == "base" else name, 6) for text, name in asked]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody", "base:nobody", "../a", "a/../b", "A"])
def test_unknown_models(url, name):
    refusal(post(url, greedy(name)), 404, "model_not_found")
    refusal(httpx.get(f"{url}/v1/models/{quote(name, safe='')}"), 404)


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\0", "a\u202e", "x" * 300])
def test_what_can_not_be_a_name(url, name):
    assert refusal(post(url, greedy(name)), 400, "invalid_value").startswith("model: ")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [70]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"model": None}, "model"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**30}, "room for 96 tokens"),
        ({"task": 1}, "'a' has no tasks"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "choices"),
        ({"stop": [""]}, "stop"),
        ({"stop": [f"stop {i}" for i in range(1000)]}, "stop"),
        ({"stop_token_ids": [70]}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"no_stop_trim": 0}, "no_stop_trim"),
        ({"guided_json": {}}, "guided_json"),
        ({"stream_options": {"every": 1}}, "stream_options"),
    ],
)
def test_wrong_values(url, fields, named):
    assert named in refusal(post(url, greedy("a") | fields), 400)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' is not supported"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls: not supported"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_wrong_values_of_chat(url, fields, named):
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}]} | fields
    assert named in refusal(post(url, body, "/v1/chat/completions"), 400)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_numbers_that_are_none(url, field, value):
    body = json.dumps(greedy("a")).replace('"temperature": 0', f'"{field}": {value}')
    assert field in refusal(post(url, body), 400)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 10**5])
def test_garbage(url, body):
    refusal(post(url, body), 400)


def test_requests_that_are_too_long(url):
    longest = MAX_POSITIONS - 5 - 1  # behind the five virtual tokens, before one new one
    assert post(url, greedy("a", [2] * longest, 1)).status_code == 200
    for prompt, new in (([2] * longest, 2), ([2] * (longest + 1), 1), ("word " * 200_000, 1)):
        message = refusal(post(url, greedy("a", prompt, new)), 400, "context_length_exceeded")
        assert f"room for {MAX_POSITIONS} tokens" in message
    refusal(post(url, b" " * (app_module.MAX_BODY + 1)), 413, "body_too_large")


def test_a_body_without_a_length_is_bounded_too(url):
    parts = (b" " * (1 << 20) for _ in range(1 + (app_module.MAX_BODY >> 20)))
    refusal(httpx.post(f"{url}/v1/completions", content=parts, timeout=PATIENCE), 413, "body_too_large")


def test_a_body_that_does_not_come(url, monkeypatch):
    monkeypatch.setattr(app_module, "BODY_TIMEOUT", 0.05)
    never = threading.Event()

    def parts() -> Iterator[bytes]:
        yield b"{"
        never.wait(1)

    refusal(httpx.post(f"{url}/v1/completions", content=parts(), timeout=PATIENCE), 408, "timeout")


def test_rows_that_nothing_predicts(url):
    for name in ("base", "prefix"):
        assert "at least one" in refusal(post(url, greedy(name, "")), 400)


def test_other_paths_and_methods(url):
    refusal(httpx.get(f"{url}/v1/nothing"), 404)
    refusal(httpx.get(f"{url}/v1/completions"), 405)
    for method in ("POST", "DELETE"):  # only with folders
        assert httpx.request(method, f"{url}/v1/prompts/a").status_code == 404


def test_a_prompt_that_can_not_be_read_fails_alone(tmp_path):
    model = make_model()
    save_adapter(make_prompt(model.base), tmp_path / "broken")
    model.register_prompt("broken", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"")
    with Engine(model, TOKENIZER) as engine, served(engine) as url:
        for stream in (False, True):
            refusal(post(url, greedy("broken", stream=stream)), 500, "prompt_unavailable")
        assert post(url, greedy("a")).status_code == 200
        save_adapter(make_prompt(model.base), tmp_path / "broken")
        assert post(url, greedy("broken")).status_code == 200  # tried again


# ---- load, ends and clients that leave ------------------------------------------------------------------------------


@pytest.fixture
def gated(model: SoftPromptModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Engine, Gate]]:
    """A server whose engine runs one row, and no pass before the test says so."""
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(model, TOKENIZER, max_batch=1, max_waiting=1))
        url = stack.enter_context(served(engine))
        gate = Gate(engine, monkeypatch)
        stack.callback(gate.open)
        yield url, engine, gate


def finishes(engine: Engine) -> queue.SimpleQueue[str]:
    """The reasons why requests end from now on."""
    reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
    before = engine.on_finish

    def on_finish(stream: Any) -> None:
        before(stream)
        reasons.put(stream.finish_reason)

    engine.on_finish = on_finish
    return reasons


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_full_queue_is_told_to_try_again(gated):
    url, engine, gate = gated
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(post, url, greedy("a"))
        gate.wait()  # in its prefill
        waiting = pool.submit(post, url, greedy("a"))
        until(lambda: engine.num_waiting == 1)
        for stream in (False, True):
            answer = post(url, greedy("a", stream=stream))
            refusal(answer, 429, "queue_full")
            assert int(answer.headers["Retry-After"]) >= 1
        gate.open()
        assert running.result().status_code == waiting.result().status_code == 200


def test_a_choice_that_finds_no_place_takes_the_others_back(gated):
    url, engine, gate = gated
    reasons = finishes(engine)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, url, greedy("a"))
        gate.wait()
        refusal(post(url, greedy("a", ["one", "two"])), 429, "queue_full")
        gate.open()
        assert running.result().status_code == 200
    assert sorted(reasons.get(timeout=PATIENCE) for _ in range(2)) == ["cancelled", "length"]


def test_a_client_that_leaves_a_stream_frees_its_row(gated):
    url, engine, gate = gated
    reasons = finishes(engine)
    body = greedy("a", new=80, stream=True)
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(gate.step, 2)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as answer:
            next(answer.iter_lines())
        begun.result(PATIENCE)
    # The connection is closed, and the row's next pass is held, if there is one, until the server has seen that.
    until(lambda: all(row.stream._cancelled for row in engine._running))
    gate.open()
    assert reasons.get(timeout=PATIENCE) == "cancelled"
    assert post(url, greedy("a")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_answer_frees_its_row(gated, stream):
    url, engine, gate = gated
    reasons = finishes(engine)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=greedy("a", new=80, stream=stream), timeout=0.3)
    gate.wait()
    (row,) = engine._prefilling
    until(lambda: row.stream._cancelled)
    gate.open()
    assert reasons.get(timeout=PATIENCE) == "cancelled"
    assert post(url, greedy("a")).status_code == 200


def test_a_client_that_leaves_while_it_sends_costs_nothing(url, caplog):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    until(lambda: 'http_responses_total{status="499"} 1.0' in httpx.get(f"{url}/metrics").text)
    assert not caplog.records
    assert post(url, greedy("a")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_timeouts(model, monkeypatch, stream):
    with Engine(model, TOKENIZER, max_batch=1, timeout=0.2) as engine, served(engine) as url:
        gate = Gate(engine, monkeypatch)
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(post, url, greedy("a", stream=stream))
            gate.wait()
            waiting = pool.submit(post, url, greedy("b", stream=stream))
            until(lambda: engine.num_waiting == 1)
            late = time.monotonic() + 0.25
            until(lambda: time.monotonic() > late)
            gate.open()
            # The one that waits has not begun, so it is answered with the status in any case.
            refusal(waiting.result(), 504, "timeout")
            if stream:
                assert '"code":"timeout"' in running.result().text
            else:
                refusal(running.result(), 504, "timeout")


@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_while_the_prompt_finds_no_room(stream):
    small = make_model(bank=BankOptions(device_bytes=10 * 2 * 2 * 2 * 8 * 4))  # either prompt alone
    with Engine(small, TOKENIZER, timeout=1.0) as engine, served(engine) as url, small.bank.hold("b"):
        refusal(post(url, greedy("a", stream=stream)), 504, "timeout")


def test_a_server_that_drains_ends_what_runs(gated):
    url, engine, gate = gated
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(post, url, greedy("a"))
        gate.wait()
        drained = pool.submit(engine.drain, PATIENCE)
        until(lambda: engine.draining)
        refusal(post(url, greedy("a")), 503, "shutting_down")
        refusal(httpx.get(f"{url}/health"), 503, "shutting_down")
        gate.open()
        assert running.result().status_code == 200 and drained.result()


def test_a_stream_that_is_cut_off_says_so(gated):
    url, engine, gate = gated
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(post, url, greedy("a", new=80, stream=True))
        gate.wait()
        gate.step(3)
        closing = pool.submit(engine.close)
        until(lambda: engine._stopped)
        gate.open()
        closing.result(PATIENCE)
        answer = running.result()
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if "{" in line]
    assert answer.status_code == 200 and events[-1]["error"]["code"] == "shutting_down"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_what_breaks_inside_is_no_fault_of_the_client(model, monkeypatch):
    forward = model.forward

    @functools.wraps(forward)
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("expected shapes that fit")

    with Engine(model, TOKENIZER) as engine, served(engine) as url:
        monkeypatch.setattr(model, "forward", broken)
        for stream in (False, True):
            assert "shapes" in refusal(post(url, greedy("a", stream=stream)), 500, "internal_error")
        monkeypatch.setattr(model, "forward", forward)
        assert post(url, greedy("a")).status_code == 200


def test_a_thread_that_has_died_takes_no_requests(model, monkeypatch):
    """Whatever it was: requests that nobody will ever serve would wait for ever."""
    with Engine(model, TOKENIZER, timeout=PATIENCE) as engine, served(engine) as url:
        monkeypatch.setattr(engine, "_publish", lambda: 1 / 0)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        engine.submit(Request([3], sampling=Sampling(max_tokens=2)))
        engine._thread.join(PATIENCE)
        refusal(httpx.get(f"{url}/health"), 503)
        refusal(post(url, greedy("a")), 503)


# ---- prompts under load ---------------------------------------------------------------------------------------------


class Clients:
    """Threads that keep asking for the texts of `names`, and what they were told."""

    def __init__(self, url: str, names: Sequence[str], new: int = 6) -> None:
        self._url, self._names, self._new = url, names, new
        self._stop = threading.Event()
        self.answers: list[tuple[str, httpx.Response]] = []

    def _ask(self, number: int) -> None:
        for i in itertools.count(number):
            if self._stop.is_set():
                return
            name = self._names[i % len(self._names)]
            self.answers.append((name, post(self._url, greedy(name, new=self._new))))

    def __enter__(self) -> Clients:
        self._pool = ThreadPoolExecutor(4)
        self._asking = [self._pool.submit(self._ask, number) for number in range(4)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for asking in self._asking:
            asking.result(PATIENCE)
        self._pool.shutdown()

    def wait_for(self, more: int) -> None:
        """Until so many more were answered."""
        goal = len(self.answers) + more
        until(lambda: len(self.answers) >= goal)


def test_disk_gone_under_load(tmp_path):
    """A prompt whose folder goes while it is wanted again and again fails; the others never notice."""
    # Room for two of the three, and no host memory: they are read again and again.
    model = make_model(bank=BankOptions(device_bytes=2 * 5 * 2 * 2 * 2 * 8 * 4, host_bytes=0))
    for i, name in enumerate(("lost", "kept")):
        save_adapter(make_prompt(model.base, length=5, seed=20 + i), tmp_path / name)
        model.register_prompt(name, tmp_path / name)
    texts = {name: expected(model, "one", name, 6) for name in ("lost", "kept", "a")}
    with Engine(model, TOKENIZER, max_batch=8, max_waiting=8) as engine, served(engine) as url:
        with Clients(url, list(texts)) as clients:
            clients.wait_for(20)
            (tmp_path / "lost").rename(tmp_path / "elsewhere")
            clients.wait_for(20)
            until(lambda: any(answer.status_code == 500 for _, answer in clients.answers))
            (tmp_path / "elsewhere").rename(tmp_path / "lost")
            clients.wait_for(12)
        assert post(url, greedy("lost", new=6)).json()["choices"][0]["text"] == texts["lost"]
    for name, answer in clients.answers:
        if answer.status_code != 200:
            assert name == "lost"
            refusal(answer, 500, "prompt_unavailable")
        else:
            assert answer.json()["choices"][0]["text"] == texts[name]
    assert model.bank.metrics()["held_prefixes"] == 0


def test_replace_and_remove_under_load():
    """Each answer is a whole text of one version that there was; a prompt that is not there is a 404."""
    model = make_model()
    prompts = [make_prompt(model.base, length=length, seed=30 + length).requires_grad_(False) for length in (4, 7, 12)]
    versions = []
    for prompt in prompts:
        model.add_prompt("changing", prompt, replace=True)
        versions.append(expected(model, "one", "changing", 6))
    texts = {"changing": set(versions), "b": {expected(model, "one", "b", 6)}}
    assert len(texts["changing"]) == 3
    with Engine(model, TOKENIZER, max_batch=8, max_waiting=8) as engine, served(engine) as url:
        with Clients(url, ["changing", "b", "changing"]) as clients:
            for i in range(12):
                if i % 4 == 3:
                    model.remove_prompt("changing")
                else:
                    model.add_prompt("changing", prompts[i % 3], replace=True)
                clients.wait_for(4)
        model.add_prompt("changing", prompts[0], replace=True)
        assert post(url, greedy("changing", new=6)).json()["choices"][0]["text"] == versions[0]
    found = {answer.json()["choices"][0]["text"] for name, answer in clients.answers if answer.status_code == 200}
    assert len(found & texts["changing"]) > 1
    for name, answer in clients.answers:
        if answer.status_code != 200:
            assert name == "changing"
            refusal(answer, 404, "model_not_found")
        else:
            assert answer.json()["choices"][0]["text"] in texts[name]
    assert model.bank.metrics()["held_prefixes"] == 0


def test_a_prompt_that_goes_while_its_name_is_looked_up(gated, model):
    """It was there when the request came, and is not when its turn comes."""
    url, engine, gate = gated
    model.add_prompt("brief", make_prompt(model.base).requires_grad_(False))
    hold = engine._bank.hold

    def gone(name: str, task: int | None = None) -> Any:
        if name == "brief" and name in model.bank:
            model.remove_prompt("brief")
        return hold(name, task)

    engine._bank.hold = gone
    gate.open()
    try:
        for stream in (False, True):
            refusal(post(url, greedy("brief", stream=stream)), 404, "model_not_found")
            model.add_prompt("brief", make_prompt(model.base).requires_grad_(False))
    finally:
        del engine._bank.hold
        model.remove_prompt("brief")


# ---- keys, metrics and prompts that come and go ---------------------------------------------------------------------


def test_a_key_is_asked_for(model):
    with Engine(model, TOKENIZER) as engine, served(engine, api_key=KEY) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": b"\xff"}):
            answer = post(url, greedy("a"), headers=headers)
            refusal(answer, 401, "invalid_api_key")
            assert answer.headers["WWW-Authenticate"] == "Bearer" and KEY not in answer.text
        for path in ("/metrics", "/v1/models", "/version"):
            assert httpx.get(url + path).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            assert client.completions.create(**greedy("a")).usage.completion_tokens == 8


def test_metrics(model):
    with Engine(model, TOKENIZER) as engine, served(engine) as url:
        post(url, greedy("a", "one", 4))
        post(url, greedy("base", "four", 2))
        post(url, greedy("nobody"))
        page = httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/version").json()["version"] in httpx.get(f"{url}/version").text
    for line in (
        'softprompt_fast_requests_total{model="a",outcome="length"} 1.0',
        'softprompt_fast_prompt_tokens_total{model="base"} 4.0',
        'softprompt_fast_generation_tokens_total{model="a"} 4.0',
        "softprompt_fast_time_to_first_token_seconds_count 2.0",
        'softprompt_fast_http_responses_total{status="404"} 1.0',
        "softprompt_fast_requests_running 0.0",
        "softprompt_fast_requests_waiting 0.0",
    ):
        assert line in page.splitlines()
    assert "softprompt_fast_bank_hits_total" in page and "nobody" not in page


def test_prompts_are_loaded_and_removed_over_http(tmp_path):
    model = make_model()
    outside, inside = tmp_path / "outside", tmp_path / "all"
    for folder in (outside, inside / "c"):
        save_adapter(make_prompt(model.base, seed=7), folder)

    def folders() -> dict[str, Path]:
        return {folder.name: folder for folder in inside.iterdir()}

    with Engine(model, TOKENIZER) as engine, served(engine, api_key=KEY, folders=folders) as url:
        headers = {"Authorization": f"Bearer {KEY}"}

        def load(name: Any, **options: Any) -> httpx.Response:
            return post(url, {"name": name}, "/v1/prompts", **({"headers": headers} | options))

        assert load("c", headers={}).status_code == 401
        for name in ("../outside", str(outside), "nobody", "c/", "."):
            refusal(load(name), 404, "prompt_not_found")
        (inside / "base").symlink_to(inside / "c")
        assert "what the base is called" in refusal(load("base"), 400)
        for name in ("", "c\0", 3):
            refusal(load(name), 400)
        assert load("c").json()["id"] == "c"
        first = post(url, greedy("c"), headers=headers).json()["choices"][0]["text"]
        assert first == expected(model, "one", "c", 8)

        save_adapter(make_prompt(model.base, seed=8), inside / "c")
        assert load("c").status_code == 200
        second = post(url, greedy("c"), headers=headers).json()["choices"][0]["text"]
        assert second == expected(model, "one", "c", 8) != first

        (inside / "c" / "adapter_model.safetensors").write_bytes(b"broken")
        refusal(load("c"), 500, "prompt_unavailable")
        assert post(url, greedy("c"), headers=headers).json()["choices"][0]["text"] == second  # goes on as it was

        def remove(name: str) -> httpx.Response:
            return httpx.delete(f"{url}/v1/prompts/{name}", headers=headers)

        assert remove("c").json()["deleted"] is True
        for name in ("c", "a", "nobody"):  # "a" is none of the folder's
            refusal(remove(name), 404, "prompt_not_found")
        refusal(post(url, greedy("c"), headers=headers), 404, "model_not_found")


def test_an_engine_without_a_tokenizer_has_no_server(model):
    with Engine(model) as engine, pytest.raises(ValueError, match="tokenizer"):
        create_app(engine)
