# SPDX-License-Identifier: Apache-2.0
"""The serving examples: replicas start, share the requests, and end together. Real routers run where installed."""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


def call(url: str, path: str, body: Any = None) -> tuple[int, Any]:
    host = url.removeprefix("http://")
    with closing(http.client.HTTPConnection(host, timeout=60)) as connection:
        headers = {"content-type": "application/json"}
        connection.request(
            "GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")


# -- vLLM replicas ----------------------------------------------------------------------------------------------------

STAND_IN = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.answer({"model": body["model"], "pid": os.getpid(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")})
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def stand_in(port: int) -> list[str]:
    return [sys.executable, "-c", STAND_IN, str(port)]


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example, whose replicas answer without vLLM."""
    example = load_example("vllm_replicas")
    monkeypatch.setattr(example, "replica_command", lambda args, number: stand_in(example.replica_port(args, number)))
    return example


def replica_arguments(example: ModuleType, *more: str) -> argparse.Namespace:
    given = ["--model", "M", "--prompts", "P", "--port", str(free_ports(4)), "--starts-within", "60", *more]
    return example.arguments(given)


def test_a_replica_is_this_file_again_with_its_sizes() -> None:
    example = load_example("vllm_replicas")
    args = replica_arguments(example, "--tensor-parallel-size", "2", "--replicas", "3")
    again = example.arguments(example.replica_command(args, 1)[2:])
    assert (again.replica, again.model, again.prompts, again.tensor_parallel_size) == (1, "M", Path("P"), 2)
    assert example.replica_port(again, 1) == args.port + 2
    assert [word for word in example.router_command(args) if word.startswith("http")] == [
        f"http://127.0.0.1:{args.port + n}" for n in (1, 2, 3)
    ]


def test_devices_and_cores_are_shared_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_example("vllm_replicas")
    args = replica_arguments(example, "--devices", "0,1,2,3")
    assert example.environments(args) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    args = replica_arguments(example, "--pipeline-parallel-size", "2")
    assert [found["VLLM_CPU_OMP_THREADS_BIND"] for found in example.environments(args)] == ["0,1|2,3", "4,5|6,7"]
    with pytest.raises(SystemExit, match="3 devices or cores can't be shared equally by 2 replicas"):
        example.environments(replica_arguments(example, "--devices", "0,1,2"))
    with pytest.raises(SystemExit, match="can't be shared"):
        example.environments(replica_arguments(example, "--replicas", "12"))


@pytest.mark.parametrize("router", ["stand-in", "vllm-router"])
def test_replicas_share_the_requests_and_end_together(
    router: str, replicas: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = replica_arguments(replicas, "--devices", "0,1", "--policy", "round_robin")
    if router == "stand-in":
        monkeypatch.setattr(replicas, "router_command", lambda args: stand_in(args.port))
    else:
        pytest.importorskip("vllm_router", reason="vllm-router is not installed")
    with replicas.Fleet(args) as fleet:
        answers = [call(fleet.url, "/v1/completions", {"model": "legal", "prompt": "a"})[1] for _ in range(10)]
        assert {answer["model"] for answer in answers} == {"legal"}
        if router == "vllm-router":
            assert set(Counter(answer["pid"] for answer in answers).values()) == {5}
            assert {answer["devices"] for answer in answers} == {"0", "1"}
        fleet.check()
        fleet.processes["replica 1"].kill()
        fleet.processes["replica 1"].wait()
        with pytest.raises(RuntimeError, match="replica 1 ended with status -9"):
            fleet.check()
    assert all(process.poll() is not None for process in fleet.processes.values())


def test_a_replica_that_does_not_start_ends_the_others(
    replicas: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, started = replicas.replica_command, []
    popen = subprocess.Popen

    def remember(*args: Any, **kwargs: Any) -> Any:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(replicas.subprocess, "Popen", remember)
    monkeypatch.setattr(
        replicas,
        "replica_command",
        lambda args, number: [sys.executable, "-c", "raise SystemExit(7)"] if number else real(args, number),
    )
    args = replica_arguments(replicas, "--devices", "0,1")
    given = ["--model", "M", "--prompts", "P", "--port", str(args.port), "--devices", "0,1", "--starts-within", "60"]
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert replicas.main(given) == 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert "error: replica 1 ended with status 7" in capsys.readouterr().err
    assert len(started) == 2 and all(process.poll() is not None for process in started)


# -- Ray Serve --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_replicas_serve_every_prompt(tmp_path: Path) -> None:
    for needed in ("ray.serve", "uvicorn", "prometheus_client"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from softprompt_fast import SoftPromptModel
    from tests.models import make_prompt
    from tests.test_cli import save_base

    folder, prompts = save_base(tmp_path / "base"), tmp_path / "prompts"
    model = SoftPromptModel(AutoModelForCausalLM.from_pretrained(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [[5, 3, 4], [2, 3]]
    expected: dict[str, list[str]] = {}
    for name, length in (("short", 4), ("long", 9)):
        model.add_prompt(name, make_prompt(model.base, length=length, seed=length))
        model.save_prompt(name, prompts / name)
        for row in rows:
            out = model.generate(torch.tensor([row]), prompt=name, max_new_tokens=6, do_sample=False)
            text = tokenizer.decode(out[0, len(row) :], skip_special_tokens=True)
            expected[f"{name} {row}"] = text.split()
    port = free_ports(1)
    command = [sys.executable, str(ROOT / "examples" / "ray_serve.py"), "--model", str(folder), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    log = tmp_path / "log"
    with log.open("w") as out_file:
        process = subprocess.Popen(
            [*command, "--prompts", str(prompts)], cwd=ROOT, env=environment, stdout=out_file, stderr=out_file
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: "ready: " in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-3000:]

        def ask(name: str, row: list[int]) -> None:
            body = {"model": name, "prompt": row, "max_tokens": 6, "temperature": 0}
            status, answer = call(url, "/v1/completions", body)
            assert status == 200 and answer["choices"][0]["text"].split() == expected[f"{name} {row}"]
            assert answer["usage"]["prompt_tokens"] == len(row)

        with ThreadPoolExecutor(8) as threads:
            asked = [threads.submit(ask, name, row) for _ in range(10) for name in ("short", "long") for row in rows]
        for one in asked:
            one.result()
        status, answer = call(url, "/v1/completions", {"model": "none", "prompt": [2]})
        assert status == 404 and "none" in answer["error"]["message"]
        # Each replica counts its own requests: together they have had all, and neither had them alone.
        counts: set[int] = set()
        wait_until(
            lambda: counts.add(served_by_one(url)) or (len(counts) == 2 and sum(counts) == 40) or counts == {20}
        )
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0


def served_by_one(url: str) -> int:
    """Requests that some replica has answered."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("softprompt_fast_requests_total{"))


def wait_until(done: Callable[[], Any], seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "not within three minutes"
        time.sleep(0.1)
