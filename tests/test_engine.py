# SPDX-License-Identifier: Apache-2.0
"""The engine: whatever joins, leaves or fails, every row's text is the row's alone."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from softprompt_fast import BankOptions, PrefixKV, SoftPromptModel
from softprompt_fast.errors import BankFullError, PrefixError
from softprompt_fast.serving import batch as batch_module
from softprompt_fast.serving import engine as engine_module
from softprompt_fast.serving.engine import Engine
from softprompt_fast.serving.requests import (
    EngineClosedError,
    QueueFullError,
    Request,
    RequestError,
    Sampling,
    UnknownPromptError,
)
from tests.models import MAX_POSITIONS, NUM_TASKS, VOCAB_SIZE, Oracle, make_base, make_model, make_prompt, make_rows
from tests.serving import PATIENCE, Gate, alone, make_tokenizer


@pytest.fixture
def model() -> SoftPromptModel:
    return make_model()


#: Bytes of one virtual token's keys and values in the tiny model.
PREFIX_ENTRY = 2 * 2 * 2 * 8 * 4


def greedy(row: torch.Tensor, prompt: str | None, new: int, **options: Any) -> Request:
    return Request(row.tolist(), prompt, sampling=Sampling(max_tokens=new, **options))


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("max_prefill_tokens", [7, 64])
def test_random_traffic_gives_each_row_its_own_text(family, max_prefill_tokens):
    """Rows of all lengths join and leave, some are cancelled, and a prompt is replaced while rows run that use it."""
    model = make_model(family)
    replaced = [make_prompt(model.base, length=4 + i, seed=10 + i).requires_grad_(False) for i in range(3)]
    rng = random.Random(7)
    expected: list[tuple[Any, list[int]]] = []
    cancelled = []
    with Engine(model, max_batch=5, max_prefill_tokens=max_prefill_tokens) as engine:
        for i in range(75):
            if i % 25 == 24:
                # Its rows under way go on with what they hold; the wait makes sure that the queued ones have held it.
                for stream, _ in expected:
                    stream.result()
                running = [engine.submit(greedy(make_rows([6], seed=i)[0], "a", 40)) for _ in range(3)]
                texts = [alone(model, make_rows([6], seed=i)[0], "a", 40)] * 3
                for stream in running:
                    next(iter(stream))  # it has begun
                model.add_prompt("a", replaced[i // 25], replace=True)
                for stream, text in zip(running, texts, strict=True):
                    assert [text[0], *stream.result().tokens] == text
            row = make_rows([rng.randint(1, 30)], seed=i)[0]
            prompt, new = rng.choice(["a", "b", None]), rng.randint(1, 25)
            stream = engine.submit(greedy(row, prompt, new))
            if rng.random() < 0.15:
                stream.cancel()
                cancelled.append(stream)
            else:
                expected.append((stream, alone(model, row, prompt, new)))
        for stream, text in expected:
            assert stream.result().tokens == text
        assert {stream.result().finish_reason for stream in cancelled} <= {"cancelled", "length"}
        assert engine.num_running == engine.num_waiting == 0


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_text_equals_transformers_on_the_row_alone(method):
    base = make_base()
    prompts = {"x": make_prompt(base, method, length=6, seed=1), "y": make_prompt(base, method, length=11, seed=2)}
    model, oracle = make_model(prompts=prompts), Oracle()
    rows = make_rows([3, 9, 1, 5])
    asked = [("x", 0), ("y", 2), (None, None), ("x", 1)]
    tasks = [task if method == "MULTITASK_PROMPT_TUNING" else None for _, task in asked]
    with Engine(model) as engine:
        streams = [
            engine.submit(Request(row.tolist(), name, task, Sampling(max_tokens=12)))
            for row, (name, _), task in zip(rows, asked, tasks, strict=True)
        ]
        for stream, row, (name, _), task in zip(streams, rows, asked, tasks, strict=True):
            prompt = None if name is None else prompts[name]
            assert stream.result().tokens == oracle.greedy(row, prompt, 12, task)


def test_rows_without_own_tokens_are_predicted_by_their_prompt(model):
    with Engine(model) as engine:
        streams = [engine.submit(Request([], name, sampling=Sampling(max_tokens=9))) for name in ("a", "b")]
        streams.append(engine.submit(greedy(make_rows([4])[0], "a", 9)))
        for stream, name in zip(streams, ("a", "b"), strict=False):
            assert stream.result().tokens == model.generate(prompt=name, max_new_tokens=9, do_sample=False)[0].tolist()
        assert streams[2].result().tokens == alone(model, make_rows([4])[0], "a", 9)


def test_a_row_runs_long_beside_ones_that_come_and_go(model):
    """The buffers are full many times over, and columns that nobody uses are dropped."""
    row = make_rows([3])[0]
    with Engine(model, max_batch=3) as engine:
        long = engine.submit(greedy(row, "b", 80))
        short = make_rows([2], seed=8)[0]
        for _ in range(12):
            assert engine.submit(greedy(short, "a", 5)).result().tokens == alone(model, short, "a", 5)
        assert long.result().tokens == alone(model, row, "b", 80)


def test_a_sampled_text_depends_on_its_seed_alone(model):
    row = make_rows([5])[0]
    rules = {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5, "seed": 3}
    with Engine(model) as engine:
        first = engine.submit(greedy(row, "a", 20, **rules)).result().tokens
        others = [engine.submit(greedy(r, "b", 15, temperature=1.0)) for r in make_rows([2, 7, 4])]
        beside = engine.submit(greedy(row, "a", 20, **rules)).result().tokens
        other = engine.submit(greedy(row, "a", 20, **rules | {"seed": 4})).result().tokens
        for stream in others:
            stream.result()
    assert first == beside != other


def test_the_fused_decoder_serves_it(model, caplog):
    with caplog.at_level("INFO", logger="softprompt_fast"), Engine(model) as engine:
        for stream in [engine.submit(greedy(row, "a", 4)) for row in make_rows([3, 5])]:
            stream.result()
    assert "fused decoder" in model.explain().layers[0].path
    assert "not fused" not in caplog.text


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_how_requests_end(model):
    tokenizer = make_tokenizer()
    row = make_rows([5])[0]
    text = alone(model, row, "a", 12)
    with Engine(model, tokenizer) as engine:
        for rules, reason, by, tokens in (
            ({}, "length", None, text),
            ({"stop_token_ids": (text[4],)}, "stop", text[4], text[: text.index(text[4]) + 1]),
            ({"stop": (decoded(tokenizer, text[:6])[-2:],)}, "stop", decoded(tokenizer, text[:6])[-2:], None),
        ):
            stream = engine.submit(greedy(row, "a", 12, **rules))
            result = stream.result()
            assert (result.finish_reason, stream.stopped_by) == (reason, by)
            assert tokens is None or result.tokens == tokens
            if rules.get("stop"):
                assert decoded(tokenizer, text).startswith(result.text) and by not in result.text


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.backend_tokenizer.decode(tokens)


def test_end_of_sequence_tokens(model):
    row = make_rows([5])[0]
    text = alone(model, row, "a", 12)
    model.generation_config.eos_token_id = [text[3], 60]
    end = text.index(text[3])
    with Engine(model) as engine:
        assert engine.submit(greedy(row, "a", 12)).result().tokens == text[: end + 1]
        assert engine.submit(greedy(row, "a", 12, ignore_eos=True)).result().tokens == text


def test_cancelled_and_late_requests_free_their_rows(model, monkeypatch):
    rows = make_rows([4, 4, 4])
    with Engine(model, max_batch=2) as engine:
        gate = Gate(engine, monkeypatch)
        late = engine.submit(Request(rows[0].tolist(), "a", sampling=Sampling(max_tokens=60), timeout=0.2))
        gate.wait()
        cancelled = engine.submit(greedy(rows[1], "b", 60))
        waits = engine.submit(greedy(rows[2], "b", 6))
        gate.step(3)
        cancelled.cancel()
        gate.open()
        assert cancelled.result().finish_reason == "cancelled"
        assert late.result().finish_reason in ("timeout", "length")
        assert waits.result().tokens == alone(model, rows[2], "b", 6)


def test_a_request_that_waits_too_long_ends(model, monkeypatch):
    with Engine(model, max_batch=1, timeout=0.05) as engine:
        gate = Gate(engine, monkeypatch)
        row = make_rows([3])[0].tolist()
        first = engine.submit(Request(row, "a", sampling=Sampling(max_tokens=5), timeout=PATIENCE))
        gate.wait()
        waits = engine.submit(Request(row, "a", sampling=Sampling(max_tokens=5)))
        assert threading.Event().wait(0.1) is False  # until its time is over
        gate.open()
        result = waits.result()
        assert (result.finish_reason, result.tokens) == ("timeout", [])
        assert first.result().finish_reason == "length"


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_prefill_is_bounded_and_does_not_hold_up_running_rows(model, monkeypatch):
    rows = make_rows([3, 40, 10, 10, 10])
    with Engine(model, max_prefill_tokens=16) as engine:
        gate = Gate(engine, monkeypatch)
        streams = [engine.submit(greedy(rows[0], "a", 30))]
        gate.wait()
        streams += [engine.submit(greedy(row, "b", 10)) for row in rows[1:]]
        gate.open()
        for stream, row, prompt, new in zip(streams, rows, "abbbb", (30, 10, 10, 10, 10), strict=True):
            assert stream.result().tokens == alone(model, row, prompt, new)
        assert all(batch * width <= 16 for batch, width in gate.passes if width > 1)
        prefills = [i for i, (_, width) in enumerate(gate.passes) if width > 1]
        assert len(prefills) > 5
        # Between two prefills there is a step of the running rows.
        assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(prefills[1:]))


def test_what_does_not_fit_is_refused(model):
    ids = [1] * 50
    with Engine(model, max_batch=1, max_waiting=0) as engine:
        for request, reason in (
            (Request([61]), "token id 61 is outside the vocabulary of 61"),
            (Request([-1]), "token id -1"),
            (Request([]), "at least one token"),
            (Request([1], sampling=Sampling(max_tokens=4, stop=("x",))), "without a tokenizer"),
            (Request([1], sampling=Sampling(max_tokens=4, logit_bias={61: 1.0})), "logit_bias"),
            (Request([1] * 96), "room for 96 tokens"),
            (Request(ids, "a", sampling=Sampling(max_tokens=MAX_POSITIONS - 49)), "room for 96 tokens"),
        ):
            with pytest.raises(RequestError, match=reason):
                engine.submit(request)
        # How long the prompt is shows only once it is held.
        with pytest.raises(RequestError, match="behind 9 virtual tokens"):
            engine.submit(Request(ids, "b", sampling=Sampling(max_tokens=38))).result()
        whole = engine.submit(Request(ids, "b", sampling=Sampling(max_tokens=37))).result().tokens
        assert whole == alone(model, torch.tensor(ids), "b", 37)
        assert engine.submit(Request(ids, "b")).result().tokens == whole


def test_keys_and_values_alone_predict_no_first_token():
    base = make_base()
    model = make_model(prompts={"kv": make_prompt(base, "PREFIX_TUNING")})
    with Engine(model) as engine, pytest.raises(RequestError, match="nothing predicts a first token"):
        engine.submit(Request([], "kv", sampling=Sampling(max_tokens=3))).result()


def test_a_row_that_was_ready_begins_when_the_last_running_one_ends(model, monkeypatch):
    row = make_rows([4])[0]
    text = alone(model, row, "a", 6)
    with Engine(model, max_batch=1) as engine:
        gate = Gate(engine, monkeypatch)
        streams = [engine.submit(greedy(row, "a", 6))]
        gate.step()
        streams.append(engine.submit(greedy(row, "a", 6, ignore_eos=True)))
        gate.step(3)  # it is ready long before there is a place
        gate.open()
        deadline = time.monotonic() + 30
        while any(stream.finish_reason is None for stream in streams):
            assert time.monotonic() < deadline, "the second row never began"
            time.sleep(0.01)
        assert [stream.result().tokens for stream in streams] == [text, text]


def test_rows_that_are_prefilled_count(model, monkeypatch):
    row = make_rows([3])[0]
    with Engine(model, max_batch=2, max_waiting=1) as engine:
        gate = Gate(engine, monkeypatch)
        streams = [engine.submit(greedy(row, "a", 3))]
        gate.wait()  # in the model, and in no batch yet
        assert (engine.num_running, engine.num_waiting) == (1, 0)
        streams += [engine.submit(greedy(row, "a", 3)) for _ in range(2)]
        with pytest.raises(QueueFullError):
            engine.submit(greedy(row, "a", 3))
        gate.open()
        assert {tuple(stream.result().tokens) for stream in streams} == {tuple(alone(model, row, "a", 3))}


def test_a_full_queue_refuses(model, monkeypatch):
    row = make_rows([3])[0]
    with Engine(model, max_batch=1, max_waiting=2) as engine:
        gate = Gate(engine, monkeypatch)
        streams = [engine.submit(greedy(row, "a", 3))]
        gate.wait()
        gate.step()  # it runs, and holds the only place
        streams += [engine.submit(greedy(row, "a", 3)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            engine.submit(greedy(row, "a", 3))
        gate.open()
        assert {tuple(stream.result().tokens) for stream in streams} == {tuple(alone(model, row, "a", 3))}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_model("bloom"), "expanded into an ordinary cache"),
        (lambda: make_model().train(), "eval mode"),
    ],
)
def test_models_that_it_can_not_serve(make, reason):
    with pytest.raises(ValueError, match=reason):
        Engine(make())


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_unknown_and_broken_prompts_fail_alone(model, tmp_path, caplog):
    model.compile_prompt("a").save_pretrained(tmp_path)
    model.register_prompt("broken", tmp_path)
    (tmp_path / "prefix_kv.safetensors").write_bytes(b"")
    row = make_rows([4])[0]
    with Engine(model) as engine:
        good = [engine.submit(greedy(row, name, 20)) for name in ("a", "b", None)]
        with pytest.raises(KeyError, match="unknown prompt 'nix'"):
            engine.submit(greedy(row, "nix", 5)).result()
        with pytest.raises(PrefixError, match="damaged"):
            engine.submit(greedy(row, "broken", 5)).result()
        for stream, name in zip(good, ("a", "b", None), strict=True):
            assert stream.result().tokens == alone(model, row, name, 20)
    (record,) = caplog.records  # a client's mistake is not told
    assert "'broken'" in record.message and "damaged" in record.message


def test_a_task_that_there_is_not_is_the_requests_fault():
    prompt = make_prompt(make_base(), "MULTITASK_PROMPT_TUNING")
    model, row = make_model(prompts={"many": prompt}), make_rows([4])[0]
    with Engine(model) as engine:
        for task in (None, NUM_TASKS, -1, "0"):
            with pytest.raises(RequestError, match="task_ids") as found:
                engine.submit(Request(row.tolist(), "many", task, Sampling(max_tokens=3))).result()
            assert found.value.parameter == "task"
        assert len(engine.submit(Request(row.tolist(), "many", 0, Sampling(max_tokens=3))).result().tokens) == 3


def test_a_prompt_that_loads_holds_up_nobody(model, monkeypatch):
    hold, release = model.bank.hold, threading.Event()

    def slow(name: str, task: int | None = None) -> Any:
        if name == "b":
            assert release.wait(PATIENCE)
        return hold(name, task)

    monkeypatch.setattr(model.bank, "hold", slow)
    row = make_rows([4])[0]
    with Engine(model) as engine:
        loading = engine.submit(greedy(row, "b", 5))
        assert engine.submit(greedy(row, "a", 20)).result().tokens == alone(model, row, "a", 20)
        assert loading.num_tokens == 0
        release.set()
        assert loading.result().tokens == alone(model, row, "b", 5)


@pytest.fixture
def one_place() -> SoftPromptModel:
    """A model whose bank has room for one of its prompts at a time."""
    return make_model(bank=BankOptions(device_bytes=10 * PREFIX_ENTRY))


def until_refused(engine: Engine) -> None:
    """Until a request has found no room."""
    deadline = time.monotonic() + PATIENCE
    refused: list[Any] = []
    while not refused:
        assert time.monotonic() < deadline
        with engine._changed:
            refused = engine._full_rows()
        time.sleep(0.001)


def test_a_full_bank_makes_requests_wait(one_place):
    """One prompt at a time: each waits until the one before has ended, in the order in which they came."""
    rows = make_rows([4, 2, 6, 3, 5, 1])
    names = ["a", "b", "a", None, "b", "a"]
    with Engine(one_place) as engine:
        streams = [engine.submit(greedy(row, name, 8)) for row, name in zip(rows, names, strict=True)]
        for stream, row, name in zip(streams, rows, names, strict=True):
            assert stream.result().tokens == alone(make_model(), row, name, 8)
    assert one_place.bank.metrics()["held_prefixes"] == 0
    assert not one_place.bank.listeners


@pytest.mark.parametrize("by", ["release", "unpin", "remove"])
def test_room_in_the_bank_wakes_who_waits(one_place, monkeypatch, by):
    """Nothing else does: the engine would wait for ever."""
    monkeypatch.setattr(engine_module, "_GIVE_UP", math.inf)
    bank, row = one_place.bank, make_rows([4])[0]
    held = bank.hold("b")
    if by != "release":
        bank.pin("b")
        held.release()
    with Engine(one_place, timeout=PATIENCE) as engine:
        stream = engine.submit(greedy(row, "a", 5))
        until_refused(engine)
        {"release": held.release, "unpin": lambda: bank.unpin("b"), "remove": lambda: bank.remove("b")}[by]()
        assert stream.result().tokens == alone(make_model(), row, "a", 5)


def test_who_found_no_room_is_next(one_place, monkeypatch):
    """A prompt that would fit beside what is held does not pass by one that does not, or that might wait for ever."""
    monkeypatch.setattr(engine_module, "_GIVE_UP", math.inf)
    bank, row = one_place.bank, make_rows([4])[0]
    bank.add("c", make_prompt(one_place.base, length=5, seed=4).requires_grad_(False))
    held = bank.hold("c")
    with Engine(one_place, timeout=PATIENCE) as engine:
        large = engine.submit(greedy(row, "b", 5))
        until_refused(engine)
        small, none = engine.submit(greedy(row, "a", 5)), engine.submit(greedy(row, None, 5))
        assert none.result().tokens == alone(make_model(), row, None, 5)
        assert large.num_tokens == small.num_tokens == 0
        held.release()
        assert small.result().tokens == alone(make_model(), row, "a", 5)
        assert large.finished is not None and small.first_token is not None and large.finished <= small.first_token


def test_who_found_no_room_and_leaves_holds_up_nobody(one_place, monkeypatch):
    monkeypatch.setattr(engine_module, "_GIVE_UP", math.inf)
    bank, row = one_place.bank, make_rows([4])[0]
    bank.add("c", make_prompt(one_place.base, length=5, seed=4).requires_grad_(False))
    with bank.hold("c"), Engine(one_place, timeout=PATIENCE) as engine:
        large = engine.submit(greedy(row, "b", 5))
        until_refused(engine)
        small = engine.submit(greedy(row, "a", 5))
        large.cancel()
        assert small.result().tokens == alone(make_model(), row, "a", 5)


def test_room_that_comes_while_nobody_waits_yet_is_not_missed(one_place, monkeypatch):
    """The bank refuses, has room again, and only then does the engine hear that it refused."""
    monkeypatch.setattr(engine_module, "_GIVE_UP", math.inf)
    bank, row = one_place.bank, make_rows([4])[0]
    held, hold = bank.hold("b"), bank.hold

    def late(name: str, task: int | None = None) -> Any:
        try:
            return hold(name, task)
        except BankFullError:
            held.release()
            raise

    monkeypatch.setattr(bank, "hold", late)
    with Engine(one_place, timeout=PATIENCE) as engine:
        assert engine.submit(greedy(row, "a", 5)).result().tokens == alone(make_model(), row, "a", 5)


def test_a_bank_that_stays_full_fails_the_request(one_place, monkeypatch):
    monkeypatch.setattr(engine_module, "_GIVE_UP", 0.1)
    row = make_rows([4])[0]
    with Engine(one_place) as engine:
        with one_place.bank.hold("b"), pytest.raises(BankFullError, match="held by running calls or pinned"):
            engine.submit(greedy(row, "a", 5)).result()
        assert engine.submit(greedy(row, "a", 5)).result().tokens == alone(make_model(), row, "a", 5)


def test_why_a_request_ends_that_waits_for_room(one_place, monkeypatch):
    """Not that it waited, but that its time was over, or its client gone."""
    monkeypatch.setattr(engine_module, "_GIVE_UP", PATIENCE)
    row = make_rows([4])[0]
    with Engine(one_place) as engine, one_place.bank.hold("b"):
        late = engine.submit(Request(row.tolist(), "a", timeout=1.0))
        until_refused(engine)
        assert late.result().finish_reason == "timeout"
        gone = engine.submit(greedy(row, "a", 5))
        until_refused(engine)
        gone.cancel()
        assert gone.result().finish_reason == "cancelled"


@pytest.mark.parametrize("seed", range(2))
def test_random_requests_while_prompts_come_and_go_in_a_small_bank(seed):
    """Room for two or three of five prompts that are replaced and removed, requests that leave or are late: whatever
    is answered is the text of one version that there was, nobody waits for ever, and nothing stays held."""
    rng = random.Random(seed)
    base = make_base()
    versions = {f"v{n}": make_prompt(base, length=n, seed=100 + n).requires_grad_(False) for n in (2, 4, 6, 9)}
    apart = make_model(prompts=versions)
    model = make_model(prompts={}, bank=BankOptions(device_bytes=14 * PREFIX_ENTRY, host_bytes=0))
    names = [f"p{i}" for i in range(5)]
    streams = []
    with Engine(model, max_batch=4, max_prefill_tokens=7, timeout=PATIENCE) as engine:
        for _ in range(80):
            for name in rng.sample(names, 2):
                if rng.random() < 0.3 and name in model.bank:
                    model.remove_prompt(name)
                elif name not in model.bank or rng.random() < 0.2:
                    model.add_prompt(name, rng.choice([*versions.values()]), replace=True)
            row = torch.tensor(rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 20)))
            request = greedy(row, rng.choice([*names, None]), rng.randint(1, 8))
            streams.append(engine.submit(replace(request, timeout=rng.choice([None, None, None, 0.01]))))
            if rng.random() < 0.1:
                streams[-1].cancel()
            if rng.random() < 0.3:
                with contextlib.suppress(BankFullError, UnknownPromptError):
                    rng.choice(streams).result()
        reasons = Counter()
        for stream in streams:
            try:
                result = stream.result()
            except (BankFullError, UnknownPromptError) as error:
                reasons[type(error)] += 1
                continue
            reasons[result.finish_reason] += 1
            given, new = torch.tensor(stream.request.input_ids), len(result.tokens)
            known = [None] if stream.request.prompt is None else list(versions)
            assert not new or any(alone(apart, given, version, new) == result.tokens for version in known)
            assert result.finish_reason != "length" or new == stream.request.sampling.max_tokens
    engine._loaders.shutdown()  # one may still let go of what a request that has left waited for
    assert reasons["length"] > 30 and reasons[UnknownPromptError] and not reasons["error"]
    assert engine.num_running == engine.num_waiting == model.bank.metrics()["held_prefixes"] == 0


@pytest.mark.parametrize("width", ["prefill", "step"])
def test_a_step_that_fails_fails_its_rows_and_no_other(model, monkeypatch, width):
    forward, row = model.forward, make_rows([4])[0]
    broken = threading.Event()

    @functools.wraps(forward)
    def failing(*args: Any, **kwargs: Any) -> Any:
        wide = kwargs["input_ids"].shape[1] > 1
        if broken.is_set() and wide == (width == "prefill"):
            broken.clear()
            raise RuntimeError("out of memory, say")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    expected = alone(model, row, "a", 10)
    with Engine(model) as engine:
        broken.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.submit(greedy(row, "a", 10)).result()
        assert engine.submit(greedy(row, "a", 10)).result().tokens == expected
        assert engine.drain(PATIENCE)  # a result is given just before its row leaves
        assert engine.num_running == engine.num_waiting == 0


def test_a_join_that_fails_fails_all(model, monkeypatch):
    """Of the running rows' cache one layer may have been moved, and the next one not."""
    rows = make_rows([4, 30])
    with Engine(model, timeout=PATIENCE) as engine:
        gate = Gate(engine, monkeypatch)
        first = engine.submit(greedy(rows[0], "a", 40))
        gate.wait()
        gate.step()
        second = engine.submit(greedy(rows[1], "b", 5))
        with monkeypatch.context() as patch:
            patch.setattr(batch_module, "_buffer", lambda *_: (_ for _ in ()).throw(MemoryError("no room to grow")))
            gate.open()
            for stream in (first, second):
                with pytest.raises(MemoryError):
                    stream.result()
        assert engine.submit(greedy(rows[0], "a", 40)).result().tokens == alone(model, rows[0], "a", 40)


def test_text_that_can_not_be_made_fails_its_row(model):
    tokenizer, rows = make_tokenizer(), make_rows([4, 5])
    with Engine(model, tokenizer, timeout=PATIENCE) as engine:
        decode = engine.decode_text
        broken = rows[0][-3:].tolist()

        def failing(tokens: list[int]) -> str:
            if tokens[:3] == broken and len(tokens) > 3:
                raise ValueError("no such token")
            return decode(tokens)

        engine._decode_text = failing
        rows[0] = rows[0][-3:]
        streams = [engine.submit(greedy(row, "a", 10)) for row in rows]
        with pytest.raises(ValueError, match="no such token"):
            streams[0].result()
        assert streams[1].result().tokens == alone(model, rows[1], "a", 10)


def test_times_that_no_lock_can_wait(model):
    row = make_rows([4])[0]
    with Engine(model, timeout=1e300) as engine:
        assert engine.submit(greedy(row, "a", 3)).result().tokens == alone(model, row, "a", 3)
        assert engine.drain(1e300)


def test_logits_that_are_not_finite_fail_their_row(model):
    prefix = model.compile_prompt("a")
    keys = tuple(key.clone() for key in prefix.keys)
    model.add_prompt("nan", PrefixKV(keys, prefix.values, method="CARTRIDGE", fingerprint=prefix.fingerprint))
    keys[0].fill_(float("nan"))  # behind the bank's checks
    row = make_rows([4])[0]
    with Engine(model) as engine:
        good, bad = engine.submit(greedy(row, "b", 10)), engine.submit(greedy(row, "nan", 10))
        with pytest.raises(FloatingPointError, match="not finite"):
            bad.result()
        assert good.result().tokens == alone(model, row, "b", 10)


# ---- threads and loops ----------------------------------------------------------------------------------------------


def test_many_threads(model):
    rows = make_rows([random.Random(i).randint(1, 20) for i in range(40)])
    names = [("a", "b", None)[i % 3] for i in range(40)]
    expected = [alone(model, row, name, 10) for row, name in zip(rows, names, strict=True)]
    with Engine(model, max_batch=6) as engine, ThreadPoolExecutor(8) as pool:
        asked = [greedy(row, name, 10) for row, name in zip(rows, names, strict=True)]
        found = pool.map(lambda request: engine.submit(request).result().tokens, asked)
        assert list(found) == expected


def test_an_event_loop(model):
    tokenizer = make_tokenizer()
    rows = make_rows([3, 5, 8])

    async def run(engine: Engine) -> list[tuple[list[int], str]]:
        async def one(row: torch.Tensor) -> tuple[list[int], str]:
            chunks = [chunk async for chunk in engine.submit(greedy(row, "a", 12))]
            return [c.token for c in chunks if c.token is not None], "".join(c.text for c in chunks)

        return await asyncio.wait_for(asyncio.gather(*map(one, rows)), PATIENCE)

    with Engine(model, tokenizer) as engine:
        found = asyncio.run(run(engine))
    for (tokens, text), row in zip(found, rows, strict=True):
        assert tokens == alone(model, row, "a", 12)
        assert text == decoded(tokenizer, tokens)


def test_drain_ends_what_runs_and_takes_nothing_new(model, monkeypatch):
    row = make_rows([3])[0]
    engine = Engine(model)
    gate = Gate(engine, monkeypatch)
    stream = engine.submit(greedy(row, "a", 20))
    gate.wait()
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(engine.drain, PATIENCE)
        while not engine.draining:
            threading.Event().wait(0.001)
        with pytest.raises(EngineClosedError, match="shutting down"):
            engine.submit(greedy(row, "a", 5))
        gate.open()
        assert drained.result(PATIENCE) is True
    assert stream.result().tokens == alone(model, row, "a", 20)


def test_drain_cancels_what_takes_too_long(model, monkeypatch):
    engine = Engine(model, max_batch=2)
    gate = Gate(engine, monkeypatch)
    streams = [engine.submit(greedy(make_rows([3])[0], "a", 60)) for _ in range(3)]
    gate.wait()
    gate.step(2)  # both run
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(engine.drain, 0)
        while not engine._stopped:
            threading.Event().wait(0.001)
        gate.open()
        assert drained.result(PATIENCE) is False
    assert [stream.result().finish_reason for stream in streams] == ["cancelled"] * 3
    assert model.bank.metrics()["held_prefixes"] == 0
    engine.close()  # once more is no harm
