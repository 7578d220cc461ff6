# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of serving: what they compare, what they count against a small fake server, and what they write."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _serve_load as load_client  # noqa: E402
import bench_serve  # noqa: E402
from _serve_load import Request  # noqa: E402

import softprompt_fast as spf  # noqa: E402
from tests.models import make_base  # noqa: E402

# -- one batch of many prompts ----------------------------------------------------------------------------------------


def mixed_arguments(**changes: Any) -> argparse.Namespace:
    defaults = {"base": "tiny", "batch": 6, "virtual_tokens": [4, 9, 7], "own": 3, "new": 5, "rounds": 2, "warmup": 0}
    return argparse.Namespace(**(defaults | {"systems": set(bench_serve.SYSTEMS), "json": None} | changes))


def test_every_system_gives_each_row_its_own_text(tmp_path: Path) -> None:
    args = mixed_arguments(json=tmp_path / "result.json")
    assert bench_serve.mixed(args) == 0
    result = json.loads(args.json.read_text())
    assert result["samples"].keys() == bench_serve.SYSTEMS.keys()
    assert result["ratios"].keys() == bench_serve.SYSTEMS.keys() - {bench_serve.OURS}
    assert all(same == {"tokens": 1.0, "whole rows": 1.0} for same in result["agreement"].values())
    assert all(len(times["total"]) == 2 for times in result["samples"].values())
    assert not result["asked"]  # of the demo's base only


def test_no_ratio_over_another_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = bench_serve.Mixed.one_by_one

    def one_token_off(self: Any, ids: torch.Tensor) -> torch.Tensor:
        out = real(self, ids)
        out[2, 1] += 1
        return out

    monkeypatch.setattr(bench_serve.Mixed, "one_by_one", one_token_off)
    systems = {bench_serve.OURS, bench_serve.ONE_BY_ONE}
    args = mixed_arguments(systems=systems, rounds=1, json=tmp_path / "result.json")
    assert bench_serve.mixed(args) == 1
    result = json.loads(args.json.read_text())
    assert not result["ratios"] and "NO RATIO: ours, one prompt after another" in capsys.readouterr().out
    same = {"tokens": pytest.approx(1 - 1 / 30), "whole rows": pytest.approx(5 / 6)}
    assert result["agreement"][bench_serve.ONE_BY_ONE] == same


def test_peft_is_asked_on_each_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own rows are what the first round is compared with: were they others, nothing would agree."""
    real = bench_serve.Mixed.alone_with_peft
    monkeypatch.setattr(bench_serve.Mixed, "alone_with_peft", lambda self, ids: (real(self, ids) + 1) % 61)
    assert bench_serve.mixed(mixed_arguments(rounds=1)) == 1


# -- a fake server ----------------------------------------------------------------------------------------------------


class Fake:
    """An OpenAI-compatible server of completions that knows the text of each request, word by word."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.texts = {(request.model, tuple(request.ids)): request.text for request in requests}
        self.models = {request.model for request in requests}
        self.edit: Any = lambda ids, text, usage: (text, usage)
        self.fail: set[tuple[int, ...]] = set()
        self.running, self.most, self.cut = 0, 0, threading.Event()
        self.lock = threading.Lock()

    @contextmanager
    def served(self) -> Iterator[str]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                with fake.lock:
                    fake.running += 1
                    fake.most = max(fake.most, fake.running)
                try:
                    self.complete(body)
                except (BrokenPipeError, ConnectionResetError):
                    fake.cut.set()
                finally:
                    with fake.lock:
                        fake.running -= 1

            def complete(self, body: bytes) -> None:
                if len(body) > 1_000_000:
                    return self.refuse(413, "the body is too long")
                try:
                    asked = json.loads(body)
                    model, ids, new = asked["model"], asked["prompt"], asked["max_tokens"]
                    assert isinstance(model, str) and isinstance(asked["temperature"], int) and new > 0
                    assert isinstance(ids, list) and all(0 <= token < 1000 for token in ids)
                except (ValueError, KeyError, TypeError, AssertionError) as error:
                    return self.refuse(400, f"bad request: {error!r}")
                if model not in fake.models:
                    return self.refuse(404, f"no model {model!r}")
                if tuple(ids) in fake.fail:
                    return self.refuse(500, "oops")
                if not asked["stream"]:
                    return self.answer(200, {"choices": [{"text": ""}]})
                text = fake.texts.get((model, tuple(ids)), "")
                text, usage = fake.edit(ids, text, {"prompt_tokens": len(ids), "completion_tokens": new})
                self.send_response(200)
                self.end_headers()
                # Without an end where the client is going to leave: only its going ends this.
                words = text.split(" ") * (100_000 if new == 512 else 1)
                for number, word in enumerate(words):
                    self.event({"choices": [{"text": " " * (number > 0) + word}]})
                self.event({"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")
                return None

            def event(self, value: Any) -> None:
                self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

            def refuse(self, status: int, message: str) -> None:
                self.answer(status, {"error": {"message": message}})

            def answer(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        with Server(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_address[1]}"
            finally:
                server.shutdown()
                thread.join()


REQUESTS = [Request(f"p{n % 3}", [n, n + 1, 5], 4, f"one two {n} four�") for n in range(20)]


def run(fake: Fake, faults: float = 0.0, concurrent: int = 4) -> dict[str, Any]:
    with fake.served() as url:
        return asyncio.run(load_client.run(url, REQUESTS, concurrent, faults))


def test_right_answers_are_counted_and_timed() -> None:
    fake = Fake(REQUESTS)
    found = run(fake)
    assert (found["wrong"], found["lost"], found["problems"], found["faults"]) == (0, 0, [], {})
    assert len(found["total"]) == found["requests"] == 20 and found["tokens"] == 80 and 1 <= fake.most <= 4
    assert all(
        0 < first <= total <= found["seconds"] for first, total in zip(found["first"], found["total"], strict=True)
    )
    summary = load_client.summary(found)
    assert summary["requests/s"] == 20 / found["seconds"] and summary["request p99"] == max(found["total"])
    assert load_client.healthy(found)


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda text, usage: (text + " more", usage), "wrong text: 'one two 7 four� more'"),
        (lambda text, usage: ("", usage), "wrong text: ''"),
        (lambda text, usage: (text, usage | {"prompt_tokens": 35}), r"wrong usage: \(35, 4\), expected \(3, 4\)"),
        (lambda text, usage: (text, {}), r"wrong usage: \(None, None\)"),
    ],
)
def test_a_wrong_answer_is_seen_and_not_timed(edit: Any, said: str) -> None:
    fake = Fake(REQUESTS)
    fake.edit = lambda ids, text, usage: edit(text, usage) if ids[0] == 7 else (text, usage)
    found = run(fake)
    assert (found["wrong"], found["lost"], len(found["total"])) == (1, 0, 19) and not load_client.healthy(found)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found["problems"][0])


def test_half_a_character_at_the_end_is_no_wrong_text() -> None:
    fake = Fake(REQUESTS)
    fake.edit = lambda ids, text, usage: (text.rstrip("�"), usage)
    assert load_client.healthy(run(fake))


def test_lost_requests_are_seen() -> None:
    fake = Fake(REQUESTS)
    fake.fail = {tuple(REQUESTS[3].ids)}
    found = run(fake)
    assert (found["wrong"], found["lost"]) == (0, 1) and "500" in found["problems"][0]
    found = asyncio.run(load_client.run("http://127.0.0.1:9", REQUESTS[:2], 2))  # nobody listens there
    assert found["lost"] == 2 and not load_client.healthy(found) and load_client.summary(found)["requests/s"] == 0


def test_faults_are_mixed_in_and_must_be_refused() -> None:
    fake = Fake(REQUESTS)
    found = run(fake, faults=1.5)
    assert found["faults"].keys() == load_client.FAULTS.keys()
    assert sum(sum(counts.values()) for counts in found["faults"].values()) == 30
    assert found["faults"]["a prompt of 1 MB"] == {"413, with a reason": 6}
    assert found["faults"]["leaves in the middle of a stream"] == {load_client.CUT: 6}
    assert (found["wrong"], found["lost"]) == (0, 0) and load_client.healthy(found)
    assert fake.cut.wait(60)
    fake.models.add("no-such-prompt")  # now a fault is served
    assert not load_client.healthy(run(fake, faults=0.5))


@pytest.mark.parametrize(
    "answer, fine",
    [
        ("400, with a reason", True),
        ("404, without a reason", False),
        ("500, with a reason", False),
        ("200, with a reason", False),
        ("ReadError", False),
    ],
)
def test_what_a_fault_should_get(answer: str, fine: bool) -> None:
    assert load_client.well_met(answer) == fine


@pytest.mark.parametrize(
    "body, reason",
    [
        ('{"error": {"message": "no"}}', True),
        ('{"message": "no"}', True),
        ('{"error": "no"}', True),
        ('{"detail": "no"}', True),
        ('{"error": {"message": ""}}', False),
        ("{}", False),
        ("[]", False),
        ("no", False),
    ],
)
def test_what_counts_as_a_reason(body: str, reason: bool) -> None:
    expected = "400, with a reason" if reason else "400, without a reason"
    assert load_client.refusal(httpx.Response(400, text=body)) == expected


def test_percentiles_are_of_the_sample() -> None:
    assert [load_client.percentile([3, 1, 2, 4], share) for share in (1, 50, 75, 99)] == [1, 2, 3, 4]


# -- the servers, and the whole command -------------------------------------------------------------------------------

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_started_and_ended(tmp_path: Path) -> None:
    server = load_client.Started("embedded", Path(sys.executable), tmp_path, ["--max-batch", "8"])
    assert server.command[3:8] == ["serve", "--model", "demo", "--engine", "embedded"]
    assert server.command[-2:] == ["--max-batch", "8"] and str(tmp_path) in server.command
    server.command = [sys.executable, "-c", SERVER, server.url.rpartition(":")[2]]
    with server:
        assert server.process.poll() is None
    assert server.process.poll() is not None


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    server = load_client.Started("embedded", Path(sys.executable), tmp_path)
    server.command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(RuntimeError, match=r"ended with 1:\nno such model"), server:
        raise AssertionError("not reached")


WORDS = [f"w{number}" for number in range(61)]


def load_arguments(**changes: Any) -> argparse.Namespace:
    defaults = {"requests": 7, "concurrent": 3, "num_prompts": 3, "shortest": 4, "longest": 9, "own_least": 2}
    defaults |= {"own_most": 5, "new": 4, "margin": 1e-4, "rounds": 2, "faults": 1.0, "engines": ["embedded", "vllm"]}
    defaults |= {"vllm_python": None, "base_url": None, "api_key": None, "prompts": None, "server_options": []}
    return argparse.Namespace(**(defaults | {"json": None} | changes))


@pytest.fixture
def tiny_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)

    def ids(count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(0, 61, (count,), generator=generator).tolist()

    monkeypatch.setattr(bench_serve, "load_model", lambda args: (make_base(), tokenizer, ids))


def test_requests_hold_the_text_of_their_row_alone(tiny_load: None, tmp_path: Path) -> None:
    requests = bench_serve.make_load(load_arguments(), tmp_path)
    assert [request.model for request in requests] == [f"prompt-{n % 3:02d}" for n in range(7)]
    assert {len(request.ids) for request in requests} <= {2, 3, 4, 5}
    model = spf.SoftPromptModel(make_base())
    for name, length in zip(("prompt-00", "prompt-01", "prompt-02"), (4, 6, 9), strict=True):
        model.load_prompt(name, tmp_path / name)
        assert model.compile_prompt(name).num_virtual_tokens == length
    for request in requests:
        out = model.generate(torch.tensor([request.ids]), prompt=request.model, max_new_tokens=4, do_sample=False)
        assert request.text == " ".join(WORDS[token] for token in out[0, len(request.ids) :])


def test_a_text_that_rounding_could_change_is_passed_over(
    tiny_load: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = bench_serve.make_load(load_arguments(margin=0.0), tmp_path / "all")
    assert "; 0 passed over" in capsys.readouterr().out
    clear = bench_serve.make_load(load_arguments(margin=0.5), tmp_path / "clear")
    assert "; 0 passed over" not in capsys.readouterr().out and len(clear) == len(every)
    assert [request.ids for request in clear] != [request.ids for request in every]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_whole_command(
    wrong: bool, tiny_load: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[str] = []

    class Server(load_client.Running):
        def __init__(self, name: str, fake: Fake) -> None:
            self.name, self.context = name, fake.served()

        def __enter__(self) -> Server:
            turns.append(self.name)
            super().__init__(self.context.__enter__())
            self.wait_until_healthy()
            return self

        def __exit__(self, *_: object) -> None:
            self.context.__exit__(None, None, None)

    real, fakes = bench_serve.make_load, []

    def make_load(*args: Any) -> list[Request]:
        fakes.append(Fake(requests := real(*args)))
        if wrong:
            fakes[0].edit = lambda ids, text, usage: (text + "!", usage)
        return requests

    monkeypatch.setattr(bench_serve, "make_load", make_load)
    names = ("embedded", "vllm")
    monkeypatch.setattr(
        bench_serve, "make_servers", lambda *_: {name: lambda name=name: Server(name, fakes[0]) for name in names}
    )
    args = load_arguments(json=tmp_path / "load.json")
    assert bench_serve.load(args) == int(wrong)
    assert turns == ["embedded", "vllm"] * 2  # A B A B; the last ones also meet the faults
    result = json.loads(args.json.read_text())
    for runs in result["runs"].values():
        assert [bool(found["faults"]) for found in runs] == [False, False, True]
        assert [found["wrong"] for found in runs] == ([7] * 3 if wrong else [0] * 3)
    printed = capsys.readouterr().out
    assert ("wrong text" in printed) == wrong and "| embedded | an unknown name | 404, with a reason: " in printed


def test_without_vllm_its_turns_are_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert list(bench_serve.make_servers(load_arguments(), tmp_path)) == ["embedded"]
    assert "vllm: skipped" in capsys.readouterr().out
    both = bench_serve.make_servers(load_arguments(vllm_python=Path("other/python")), tmp_path)
    assert [both[name]().command[0] for name in both] == [sys.executable, "other/python"]
    (given,) = bench_serve.make_servers(load_arguments(base_url="http://here:1/v1/"), tmp_path).values()
    assert given().url == "http://here:1"


# -- the report -------------------------------------------------------------------------------------------------------

SETTING = {
    "cpu": "a CPU", "threads": 2, "isa": "avx512", "commit": "0123456789abcdef",
    "packages": {"torch": "1", "transformers": "2", "peft": "3"},
}  # fmt: skip


def load_result() -> dict[str, Any]:
    run = {
        "requests": 2, "seconds": 2.0, "first": [0.5, 0.25], "total": [1.0, 1.5], "tokens": 64, "lost": 0, "wrong": 0,
        "problems": [], "faults": {},
    }  # fmt: skip
    bad = {**run, "seconds": 100.0, "lost": 1, "faults": {"an unknown name": {"404, with a reason": 3}}}
    shape = {"requests": 2, "concurrent": 16, "num_prompts": 20, "shortest": 32, "longest": 512, "own_least": 8}
    return {"setting": SETTING, "shape": shape | {"own_most": 48, "new": 32}, "runs": {"embedded": [run, bad]}}


def mixed_result() -> dict[str, Any]:
    names = (bench_serve.OURS, bench_serve.PEFT)
    return {
        "setting": SETTING,
        "shape": {"base": "demo", "batch": 32, "virtual_tokens": [64, 96], "own": 16, "new": 32, "rounds": 3},
        "samples": {name: {"total": [seconds] * 3} for name, seconds in zip(names, (2.0, 20.0), strict=True)},
        "throughput": {name: {"median": 10.0, "p20": 9.0, "p80": 11.0} for name in names},
        "ratios": {bench_serve.PEFT: {"median": 10.0, "p20": 9.5, "p80": 10.5}},
        "agreement": {name: {"tokens": 1.0, "whole rows": 1.0} for name in names},
        "asked": bench_serve.ASKED,
    }


def test_the_report_tells_runs_with_faults_from_others() -> None:
    text = bench_serve.markdown([mixed_result(), load_result()])
    assert "| PEFT, a loop over `set_adapter` | 20.00 | 10 | 10.00x (9.50 to 10.50) | 6x | 100% |" in text
    # Times are of the run without faults, problems of all.
    assert "| embedded | 1.00 | 32 | 0.25, 0.50, 0.50 s | 1.00, 1.50, 1.50 s | 0 | 1 |" in text
    assert "| embedded | an unknown name | 404, with a reason: 3 |" in text and text.count("Measured on a CPU") == 1
