# SPDX-License-Identifier: Apache-2.0
"""The tuned tables that ship, how one is picked, and the loop of ``softprompt-fast tune`` over interpreted kernels and
a clock that is made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from softprompt_fast import ops, tune
from softprompt_fast.backends._registry import OPS, available_backends
from softprompt_fast.backends.triton import _runtime, _tuning, merge_states
from softprompt_fast.backends.triton._tunables import TUNABLES
from tests import triton_offline

SERVED = [op for op in OPS if not available_backends(op)["triton"]]
EVERY = [pytest.param(op, t, id=f"{op}-{t.kernel}") for op in SERVED for t in TUNABLES[op].values()]
FILES = sorted(_tuning.SHIPPED.rglob("*.json"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own, empty."""
    monkeypatch.setenv(_tuning.ENVIRONMENT_VARIABLE, str(tmp_path))
    _tuning._chosen.cache_clear()
    yield tmp_path
    _tuning._chosen.cache_clear()


def save(folder: Path, place: str, op: str, content: Any) -> None:
    (folder / place).mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / place / f"{op}.json").write_text(text)


# ---- what ships -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_table_is_sorted_and_serves_a_known_kernel(path: Path) -> None:
    table = _tuning.table(_tuning.SHIPPED, path.parent.name, path.stem)
    assert path.read_text() == _tuning.dump(table), "python -m tests.triton_resources --format sorts the tables"
    for kernel, keys in table.items():
        assert set(keys) <= set(TUNABLES[path.stem][kernel].keys), kernel


@pytest.mark.parametrize(("op", "tunable"), EVERY)
@pytest.mark.parametrize("place", ["default", "interpreter"])
def test_two_places_are_complete(op: str, tunable: _tuning.Tunable, place: str) -> None:
    """The default, which every other falls back on, and the interpreter's, whose blocks are small."""
    table = _tuning.table(_tuning.SHIPPED, place, op)
    assert not set(tunable.keys) - set(table.get(tunable.kernel, {}))


@pytest.mark.parametrize(("op", "tunable"), EVERY)
def test_all_configurations_of_a_key_say_the_same_things(op: str, tunable: _tuning.Tunable) -> None:
    """No place leaves out what a kernel needs, or names what it does not know; nor does a candidate."""
    for key in tunable.keys:
        shipped = _tuning.table(_tuning.SHIPPED, "default", op)[tunable.kernel][key]
        candidates = tunable.candidates(key)
        assert candidates and "num_warps" in shipped
        for place in (p.parent.name for p in FILES if p.stem == op):
            config = _tuning.table(_tuning.SHIPPED, place, op).get(tunable.kernel, {}).get(key, shipped)
            assert _tuning.sizes(config) == _tuning.sizes(shipped), (place, key)
        assert all(_tuning.sizes(c) == _tuning.sizes(shipped) for c in candidates), key


@pytest.mark.parametrize(("op", "tunable"), EVERY)
def test_a_problem_is_one_of_its_key(op: str, tunable: _tuning.Tunable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call asks for that key of that kernel, so what is measured is what the key stands for."""
    asked: list[tuple[str, str]] = []
    choose = _tuning.configuration

    def spy(op: str, kernel: str, key: str, places: tuple[str, ...]) -> dict[str, Any]:
        asked.append((kernel, key))
        return choose(op, kernel, key, places)

    monkeypatch.setattr(_tuning, "configuration", spy)
    for key in tunable.keys:
        asked.clear()
        launches = triton_offline.record(lambda key=key: tunable.problem(key, torch.device("meta"))(), "sm_90")
        assert launches and (tunable.kernel, key) in asked, key


# ---- which one is picked ----------------------------------------------------------------------------------------


def test_the_first_table_that_has_the_key() -> None:
    special, general = {"k": {"a": {"X": 1}}}, {"k": {"a": {"X": 2}, "b": {"X": 3}}}
    assert _tuning.choose([special, general], "k", "a") == {"X": 1}
    assert _tuning.choose([special, general], "k", "b") == {"X": 3}
    with pytest.raises(KeyError, match="no tuned table has 'k' for 'c'"):
        _tuning.choose([special, general], "k", "c")


def test_the_users_table_wins_at_its_place_and_no_other(own: Path) -> None:
    key, places = "d64-16bit", ("sm_90", "default")
    config = {"BLOCK_ROWS": 2, "num_warps": 1}
    save(own, "sm_100", "merge_states", {"forward": {key: config}})
    shipped = _tuning.shipped("merge_states", "forward", key, places)
    assert _tuning.configuration("merge_states", "forward", key, places) == shipped != config
    save(own, "default", "merge_states", {"forward": {key: config}})
    _tuning._chosen.cache_clear()
    assert _tuning.configuration("merge_states", "forward", key, places) == config
    assert _tuning.configuration("merge_states", "forward", "d32-16bit", places) != config
    assert _tuning.served_by("merge_states", places) == str(own / "default" / "merge_states.json")
    with _tuning.overridden("merge_states", "forward", {"BLOCK_ROWS": 4}):
        assert _tuning.configuration("merge_states", "forward", key, places) == {"BLOCK_ROWS": 4}


def test_without_the_variable_the_users_configuration_folder(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_tuning.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(own))
    assert _tuning.folders() == [own / "softprompt_fast" / "tuned", _tuning.SHIPPED]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "expected {kernel"),
        ({"forward": 3}, "expected {kernel"),
        ({"forward": {"d64-16bit": {"BLOCK_ROWS": [1]}}}, "expected {kernel"),
    ],
)
def test_a_broken_table_is_named(own: Path, content: Any, message: str) -> None:
    save(own, "interpreter", "merge_states", content)
    out, lse = torch.randn(3, 64), torch.randn(3)
    with pytest.raises(ValueError, match=message) as raised:
        ops.merge_states(out, lse, out, lse, backend="triton")
    assert str(own / "interpreter" / "merge_states.json") in str(raised.value)


def test_a_configuration_of_another_version_is_named(own: Path) -> None:
    save(own, "sm_90", "merge_states", {"forward": {"d64-16bit": {"BLOCK": 4, "num_warps": 4}}})
    with pytest.raises(ValueError, match=r"merge_states.json: 'forward', 'd64-16bit': expected BLOCK_ROWS, num_w"):
        _tuning.configuration("merge_states", "forward", "d64-16bit", ("sm_90", "default"))


def test_a_place_is_a_device_then_its_architecture() -> None:
    with _runtime.recorded("sm_90", lambda *_: None):
        assert _runtime.places(CPU) == ("sm_90", "default")
    assert _runtime.places(CPU) == ("interpreter", "default")


# ---- tuning -----------------------------------------------------------------------------------------------------

KEY = "d16-32bit"
FAST, SLOW, SAME = ({"BLOCK_ROWS": rows, "num_warps": 4} for rows in (2, 8, 32))


def problem(key: str, device: torch.device) -> Callable[[], Sequence[Tensor]]:
    states = torch.randn(5, 16), torch.randn(5), torch.randn(5, 16), torch.randn(5)
    states[1][2] = float("-inf")
    return lambda: merge_states.forward(*states)


def clock(speed: dict[int, float]) -> tune.Timer:
    """A timer that says what ``speed`` has for the BLOCK_ROWS in force; the first call of all takes longer."""

    def timer(call: Callable[[], object]) -> Callable[[], float]:
        asked: list[dict[str, Any]] = []

        def measure() -> float:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_runtime, "launch", lambda *_, **meta: asked.append(meta))
                call()
            return speed[asked[-1]["BLOCK_ROWS"]] * (3.0 if len(asked) == 1 else 1.0)

        return measure

    return timer


def tunable(*candidates: dict[str, Any]) -> _tuning.Tunable:
    return _tuning.Tunable("forward", [KEY], lambda key: list(candidates), problem)


def shipped_rows() -> int:
    return _tuning.shipped("merge_states", "forward", KEY, _runtime.places(CPU))["BLOCK_ROWS"]


def test_the_fastest_is_kept() -> None:
    timer = clock({shipped_rows(): 1.0, 2: 0.5, 8: 5.0, 32: 0.9})
    found = tune.tune("merge_states", tunable(FAST, SLOW, SAME), KEY, CPU, timer, rounds=7)
    assert found.improved and found.config == FAST and found.timed == 4
    assert (found.milliseconds, found.shipped_milliseconds) == (0.5, 1.0)


@pytest.mark.parametrize("speed", [0.99, 1.0, 2.0])
def test_what_ships_stays_unless_beaten_clearly(speed: float) -> None:
    timer = clock({shipped_rows(): 1.0, 2: speed})
    found = tune.tune("merge_states", tunable(FAST), KEY, CPU, timer, rounds=7)
    assert not found.improved and found.milliseconds == 1.0


def test_what_fails_or_differs_is_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = merge_states.forward

    def wrong(*states: Tensor) -> tuple[Tensor, Tensor]:
        rows = _tuning.configuration("merge_states", "forward", KEY, ("interpreter",))["BLOCK_ROWS"]
        if rows == 8:
            raise MemoryError("out of shared memory")
        out, lse = forward(*states)
        return (out * 1.01 if rows == 2 else out, lse)

    monkeypatch.setattr(merge_states, "forward", wrong)
    timer = clock({shipped_rows(): 1.0, 2: 0.1, 8: 0.1, 32: 0.5})
    found = tune.tune("merge_states", tunable(FAST, SLOW, SAME), KEY, CPU, timer, rounds=4)
    assert found.config == SAME and found.skipped == {"other results": 1, "MemoryError": 1}
    assert "1 other results" in tune.describe(found)


def test_a_result_that_was_never_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = _runtime.launch
    monkeypatch.setattr(_runtime, "launch", lambda *a, **meta: None if meta["BLOCK_ROWS"] == 2 else launch(*a, **meta))
    timer = clock({shipped_rows(): 1.0, 2: 0.1})
    found = tune.tune("merge_states", tunable(FAST), KEY, CPU, timer, rounds=4)
    assert not found.improved and found.skipped == {"other results": 1}


def result(key: str, config: dict[str, Any]) -> tune.Result:
    shipped = _tuning.shipped("merge_states", "forward", KEY, ("interpreter",))
    return tune.Result("merge_states", "forward", key, config, 1.0, shipped, 1.0, 2, {})


def test_only_what_is_better_is_written(own: Path) -> None:
    shipped = _tuning.shipped("merge_states", "forward", KEY, ("interpreter",))
    tune.write(own, "a-gpu", "merge_states", [result(KEY, shipped)])
    assert not list(own.iterdir())
    tune.write(own, "a-gpu", "merge_states", [result(KEY, FAST), result("d64-16bit", SLOW)])
    assert _tuning.table(own, "a-gpu", "merge_states") == {"forward": {KEY: FAST, "d64-16bit": SLOW}}
    tune.write(own, "a-gpu", "merge_states", [result(KEY, shipped)])  # measured again: what ships was better
    assert _tuning.table(own, "a-gpu", "merge_states") == {"forward": {"d64-16bit": SLOW}}
    assert _tuning.configuration("merge_states", "forward", "d64-16bit", ("a-gpu", "default")) == SLOW


def test_which_kernels_are_asked_for() -> None:
    everything = [(op, t.kernel) for op, t in tune.tunables([], [])]
    assert everything == [(p.values[0], p.values[1].kernel) for p in EVERY]
    assert [(op, t.kernel) for op, t in tune.tunables(["merge_states"], ["backward"])] == [
        ("merge_states", "backward")
    ]
    kernels = {t.kernel for _, t in tune.tunables(["prefix_attention"], [], ["d128-16bit"])}
    assert "prefill" in kernels and "decode" not in kernels  # its keys say how many queries are stacked, too
    assert [(op, t.kernel) for op, t in tune.tunables([], ["prefill"], ["d128-16bit"])] == [
        ("prefix_attention", "prefill")
    ]
    with pytest.raises(ValueError, match=r"key: expected .*d128-16bit.*, found d999"):
        tune.tunables([], ["prefill"], ["d999"])


def test_only_the_keys_asked_for_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    monkeypatch.setattr(_runtime, "refusals", lambda *tensors: [])
    monkeypatch.setattr(_runtime, "places", lambda device: ("a-gpu", "default"))
    monkeypatch.setattr(tune, "cuda_timer", lambda: None)
    measured = []
    monkeypatch.setattr(tune, "tune", lambda op, t, key, *rest: measured.append((t.kernel, key)) or result(key, FAST))
    tune.run(["merge_states"], ["forward"], [KEY], tmp_path, lambda text: None)
    assert measured == [("forward", KEY)]
