# SPDX-License-Identifier: Apache-2.0
"""Clients of an OpenAI-compatible server, well-behaved and not, and the servers that ``bench_serve.py`` starts.

A well-behaved client streams ``POST /v1/completions`` for one prompt (the model's name) with own tokens as ids, greedy
and past any end of text (``ignore_eos``, as vLLM calls it), and compares text and usage with what is right.

Those that misbehave (:data:`FAULTS`) must be refused with a status of 4xx and a reason in the body, or, for the one
who leaves in the middle of a stream, cost nothing: that the others' texts stay right says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import socket
import subprocess
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
STARTS_WITHIN = 600.0
"""Seconds; vLLM compiles at its first start."""
ENDS_WITHIN = 60.0
ANSWERS_WITHIN = 600.0
CUT = "cut by the client"


@dataclass(frozen=True)
class Request:
    """One row: its prompt's name, its own tokens, how many new ones it wants, and their greedy text."""

    model: str
    ids: Sequence[int]
    new: int
    text: str

    @property
    def payload(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(self.ids),
            "max_tokens": self.new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


# -- clients that behave ----------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came back for one request; times in seconds after it was sent."""

    first: float = math.nan
    total: float = math.nan
    text: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    def problem(self, request: Request) -> str | None:
        """What is not as it should be. The last character may be half of one: servers show that differently."""
        if self.error is not None:
            return f"{request.model}: lost: {self.error}"
        if self.text.rstrip("�") != request.text.rstrip("�"):
            return f"{request.model}: wrong text: {self.text!r}, expected {request.text!r}"
        counted = (self.usage.get("prompt_tokens"), self.usage.get("completion_tokens"))
        if counted != (len(request.ids), request.new):
            return f"{request.model}: wrong usage: {counted}, expected {(len(request.ids), request.new)}"
        return None


async def events(response: httpx.Response) -> Any:
    """The JSON of each server-sent event, up to ``[DONE]``.

    Raises:
        ValueError: the stream ends without it.
    """
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)
    raise ValueError("the stream ended without [DONE]")


async def complete(client: httpx.AsyncClient, request: Request) -> Answer:
    answer, started = Answer(), time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=request.payload) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code} {(await response.aread())[:300]!r}"
                return answer
            async for event in events(response):
                if "error" in event:
                    answer.error = str(event["error"])[:300]
                    return answer
                text = "".join(choice["text"] for choice in event.get("choices", ()))
                if text and math.isnan(answer.first):
                    answer.first = time.perf_counter() - started
                answer.text += text
                answer.usage = event.get("usage") or answer.usage
        answer.total = time.perf_counter() - started
    except (httpx.HTTPError, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


# -- clients that don't -----------------------------------------------------------------------------------------------

Fault = Callable[[httpx.AsyncClient, Request, int], Awaitable[str]]


def refusal(response: httpx.Response) -> str:
    """Status, and whether the body says why: as OpenAI's errors do (``error.message``), as vLLM's (``message``), or as
    FastAPI's, which vLLM passes on for a body that is no text (``detail``)."""
    try:
        body = response.json()
        error = body.get("error", body)
        reason = error if isinstance(error, str) else error.get("message") or error.get("detail")
    except (ValueError, AttributeError):
        reason = None
    return f"{response.status_code}{', with a reason' if reason else ', without a reason'}"


async def garbage(client: httpx.AsyncClient, request: Request, number: int) -> str:
    bodies = (b'{"model": "', b"\xff\xfe\x00", b"[1, 2", b"null", b"")
    headers = {"content-type": "application/json"}
    return refusal(await client.post("/v1/completions", content=bodies[number % len(bodies)], headers=headers))


async def too_long(client: httpx.AsyncClient, request: Request, number: int) -> str:
    payload = request.payload | {"prompt": "long " * 210_000, "stream": False}  # 1.05 MB
    return refusal(await client.post("/v1/completions", json=payload))


async def unknown_name(client: httpx.AsyncClient, request: Request, number: int) -> str:
    names = ("no-such-prompt", "../../etc/passwd", request.model + "\x00", "", request.model.upper() + "?")
    return refusal(await client.post("/v1/completions", json=request.payload | {"model": names[number % len(names)]}))


async def wrong_types(client: httpx.AsyncClient, request: Request, number: int) -> str:
    wrong: tuple[dict[str, Any], ...] = (
        {"prompt": {"a": 1}},
        {"max_tokens": "many"},
        {"temperature": [1]},
        {"model": 3},
        {"max_tokens": -1},
        {"prompt": [1 << 40]},
    )
    return refusal(await client.post("/v1/completions", json=request.payload | wrong[number % len(wrong)]))


async def gone(client: httpx.AsyncClient, request: Request, number: int) -> str:
    async with client.stream("POST", "/v1/completions", json=request.payload | {"max_tokens": 512}) as response:
        if response.status_code != 200:
            await response.aread()
            return refusal(response)
        async for _ in response.aiter_lines():
            break  # leaving the block closes the connection
    return CUT


FAULTS: dict[str, Fault] = {
    "garbage instead of JSON": garbage,
    "a prompt of 1 MB": too_long,
    "an unknown name": unknown_name,
    "wrong types and values": wrong_types,
    "leaves in the middle of a stream": gone,
}


def well_met(answer: str) -> bool:
    """Whether a fault was dealt with as it should be."""
    return answer == CUT or (answer.startswith("4") and answer.endswith(", with a reason"))


# -- a run ------------------------------------------------------------------------------------------------------------


async def run(
    url: str, requests: Sequence[Request], concurrent: int, faults: float = 0.0, api_key: str | None = None
) -> dict[str, Any]:
    """Send all of `requests`, `concurrent` at a time and in their order, and `faults` times as many misbehaving ones
    among them, at places drawn with a seed.

    Returns:
        ``seconds`` from the first request to the last answer, ``first`` and ``total`` seconds and new ``tokens`` of
        those that came back right, counts of ``wrong`` (text or usage) and ``lost``, ``problems`` in words, and
        ``faults``: kind -> answer -> count.
    """
    jobs: list[Request | tuple[str, int]] = list(requests)
    places = random.Random(11)
    for number in range(round(faults * len(requests))):
        kinds = list(FAULTS)
        jobs.insert(places.randrange(len(jobs) + 1), (kinds[number % len(kinds)], number // len(kinds)))
    waiting = deque(jobs)
    answers: list[tuple[Request, Answer]] = []
    met: dict[str, Counter[str]] = {}

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            job = waiting.popleft()
            if isinstance(job, Request):
                answers.append((job, await complete(client, job)))
                continue
            kind, number = job
            try:
                answer = await FAULTS[kind](client, requests[number % len(requests)], number)
            except httpx.HTTPError as error:
                answer = type(error).__name__
            met.setdefault(kind, Counter())[answer] += 1

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=concurrent)
    timeout = httpx.Timeout(ANSWERS_WITHIN)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(concurrent)))
        seconds = time.perf_counter() - started
    problems = [answer.problem(request) for request, answer in answers]
    right = [answer for (_, answer), problem in zip(answers, problems, strict=True) if problem is None]
    lost = sum(answer.error is not None for _, answer in answers)
    return {
        "requests": len(requests),
        "seconds": seconds,
        "first": [answer.first for answer in right],
        "total": [answer.total for answer in right],
        "tokens": sum(answer.usage["completion_tokens"] for answer in right),
        "lost": lost,
        "wrong": len(requests) - len(right) - lost,
        "problems": [problem for problem in problems if problem is not None],
        "faults": {kind: dict(counts) for kind, counts in met.items()},
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` percent of `values` do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else math.nan


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Rates and percentiles of what :func:`run` returns."""
    counted: dict[str, Any] = {
        "requests/s": len(found["total"]) / found["seconds"],
        "tokens/s": found["tokens"] / found["seconds"],
    }
    for name, values in (("first token", found["first"]), ("request", found["total"])):
        counted |= {f"{name} p{share}": percentile(values, share) for share in (50, 95, 99)}
    return counted | {name: found[name] for name in ("wrong", "lost", "faults")}


def healthy(found: dict[str, Any]) -> bool:
    """Whether every request got its text, and every fault what it should."""
    answers = [answer for counts in found["faults"].values() for answer in counts]
    return not found["wrong"] and not found["lost"] and all(map(well_met, answers))


# -- servers ----------------------------------------------------------------------------------------------------------


class Running:
    """A server that someone else started, or will: entering waits until it is healthy."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def __enter__(self) -> Running:
        print(f"waiting for {self.url}", flush=True)
        self.wait_until_healthy()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check_alive(self) -> None:
        """Raise where there is nothing left to wait for."""

    def wait_until_healthy(self) -> None:
        """Return once ``GET /health`` is answered with 200.

        Raises:
            RuntimeError: it isn't, within :data:`STARTS_WITHIN` seconds.
        """
        until = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < until:
            self.check_alive()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"{self.url}: not healthy within {STARTS_WITHIN:.0f} s")

    def warm_up(self, requests: Sequence[Request]) -> None:
        """One request for each prompt, so that all are loaded; of other own tokens than those that are measured."""
        for request in {request.model: request for request in requests}.values():
            payload = request.payload | {"prompt": list(request.ids)[::-1], "max_tokens": 2, "stream": False}
            del payload["stream_options"]
            answer = httpx.post(
                f"{self.url}/v1/completions", json=payload, headers=self.headers, timeout=ANSWERS_WITHIN
            )
            if answer.status_code != 200:
                raise RuntimeError(f"{self.url}: {answer.status_code} {answer.text[:300]}")


class Started(Running):
    """``softprompt-fast serve`` in a process of its own, ended with the block.

    Args:
        engine: "embedded" or "vllm". python: of the environment that has it. prompts: folder of saved prompts.
        options: passed on.

    Raises:
        RuntimeError: it did not start; the message holds the end of what it printed.
    """

    def __init__(self, engine: str, python: Path, prompts: Path, options: Sequence[str] = ()) -> None:
        port, self.name = free_port(), engine
        super().__init__(f"http://127.0.0.1:{port}")
        self.command = [str(python), "-m", "softprompt_fast.cli", "serve", "--model", "demo", "--engine", engine]
        self.command += ["--prompts", str(prompts), "--port", str(port), *options]
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "log"

    def __enter__(self) -> Started:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        started = time.monotonic()
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "4", **os.environ, "PYTHONPATH": path}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            self.wait_until_healthy()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        print(f"{self.name}: started in {time.monotonic() - started:.0f} s", flush=True)
        return self

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            said = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{' '.join(self.command[1:])} ended with {self.process.returncode}:\n{said}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
