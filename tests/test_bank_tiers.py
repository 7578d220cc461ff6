# SPDX-License-Identifier: Apache-2.0
"""PromptBank's tiers: budgets, holds, directories, faults, and who waits for whom."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Oracle, make_base, make_model, make_prompt, make_rows, pad_rows

from softprompt_fast import BankOptions, PrefixKV, SoftPromptModel
from softprompt_fast.bank import PromptBank
from softprompt_fast.errors import AdapterError, BankFullError, PrefixError
from softprompt_fast.integrations import peft as peft_io
from softprompt_fast.integrations import transformers as hooks
from softprompt_fast.prompt import SoftPrompt
from tests.device import cpu_only, float64

WAIT = 60  # seconds, for what takes milliseconds
ROWS = make_rows([4, 7, 3, 6])
LAYERS, HEADS, DIM = 2, 2, 4
ENTRY = LAYERS * 2 * HEADS * DIM * 4  # bytes of one token in float32


def prefix(value: float, length: int = 3) -> PrefixKV:
    tensors = [torch.full((HEADS, length, DIM), value) for _ in range(LAYERS)]
    return PrefixKV(tensors, tensors, method="TEST", fingerprint="none")


class Source:
    """Stands in for a directory: what `load` does is the test's."""

    def __init__(self, load: Callable[[], SoftPrompt | PrefixKV]) -> None:
        self.load, self.state = load, 0

    def num_tasks(self) -> int | None:
        return None

    def identity(self) -> int:
        return self.state


def make_bank(**options: Any) -> PromptBank:
    def never(*_: Any) -> PrefixKV:
        raise AssertionError("nothing to compile here")

    return PromptBank(never, BankOptions(**options))


def first_values(bank: PromptBank, names: list[str | None]) -> list[float | None]:
    """The first value of each row's prefix, as packed."""
    held = bank.hold_all([None if name is None else (name, None) for name in names])
    packed, index = bank.pack_held(held)
    found: list[float | None] = []
    for place in index.tolist():
        found.append(None if place < 0 else next(packed.floating(place, torch.float32))[0][0, 0, 0].item())
    for each in held:
        if each is not None:
            each.release()
    return found


# ---- budgets --------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_makes_room() -> None:
    bank = make_bank(device_bytes=10 * ENTRY)
    for i in range(4):
        bank.add(f"p{i}", prefix(float(i), 4))
    for name in ("p0", "p1", "p0", "p2"):
        bank.hold(name).release()
    metrics = bank.metrics()
    assert metrics["evictions_total"] == 1 and metrics["hits_total"] == 1 and metrics["placements_total"] == 3
    assert metrics["device_bytes"] == 8 * ENTRY and metrics["device_capacity_bytes"] == 10 * ENTRY
    bank.hold("p0").release()  # p1 went
    assert bank.metrics()["hits_total"] == 2
    assert first_values(bank, ["p3", None, "p1", "p3"]) == [3.0, None, 1.0, 3.0]


def test_what_is_held_stays_and_the_rest_has_to_wait() -> None:
    bank = make_bank(device_bytes=10 * ENTRY)
    for i in range(3):
        bank.add(f"p{i}", prefix(float(i), 4))
    bank.add("long", prefix(9.0, 11))
    one, two = bank.hold("p0"), bank.hold("p1")
    with pytest.raises(BankFullError, match=r"prompt 'p2'.*needs 4 entries.*of the 10 .*8 are held"):
        bank.hold("p2")
    with pytest.raises(BankFullError, match=r"prompt 'long'.*11 entries"):
        bank.hold("long")
    packed, index = bank.pack_held([one, None, two])
    assert [packed.prompts[place] for place in index.tolist() if place >= 0] == [("p0", None), ("p1", None)]
    one.release()
    one.release()
    with bank.hold("p2") as three:
        packed, index = bank.pack_held([three, two])
        assert {packed.keys[0][0, packed.starts[i], 0].item() for i in index.tolist()} == {2.0, 1.0}
    two.release()
    assert bank.metrics()["held_prefixes"] == 0 and bank.metrics()["failures_total"] == 2


def test_pinned_prefixes_stay() -> None:
    bank = make_bank(device_bytes=8 * ENTRY)
    for i in range(4):
        bank.add(f"p{i}", prefix(float(i), 4))
    bank.pin("p0")
    for name in ("p1", "p2", "p3"):
        bank.hold(name).release()
    hits = bank.metrics()["hits_total"]
    bank.hold("p0").release()
    assert bank.metrics()["hits_total"] == hits + 1 and bank.metrics()["pinned_prefixes"] == 1
    bank.pin("p1")
    with pytest.raises(BankFullError):
        bank.hold("p2")
    bank.unpin("p0", 3)  # a task that is ignored, as everywhere
    bank.hold("p2").release()
    bank.remove("p1")
    assert bank.metrics()["pinned_prefixes"] == 0
    with pytest.raises(KeyError):
        bank.pin("p1")


def test_a_replaced_version_lives_until_its_last_hold(tmp_path: Path) -> None:
    bank = make_bank(device_bytes=16 * ENTRY)
    bank.add("p", prefix(1.0, 4))
    old = bank.hold("p")
    bank.add("p", prefix(2.0, 6), replace=True)
    new = bank.hold("p")
    assert new.version != old.version and (old.length, new.length) == (4, 6)
    packed, index = bank.pack_held([old, new, old])
    values = [packed.keys[0][0, packed.starts[i], 0].item() for i in index.tolist()]
    assert values == [1.0, 2.0, 1.0] and bank.metrics()["device_bytes"] == 10 * ENTRY
    bank.remove("p")
    assert bank.metrics()["device_bytes"] == 10 * ENTRY and bank.metrics()["held_prefixes"] == 2
    old.release()
    assert bank.metrics()["device_bytes"] == 6 * ENTRY
    new.release()
    assert bank.metrics()["device_bytes"] == bank.metrics()["host_bytes"] == 0


def test_listeners_are_told_of_room_and_of_nothing_else():
    bank, told = make_bank(device_bytes=10 * ENTRY), []

    def listener() -> None:
        # In another thread, which a listener may be waiting for: it is not called under the bank's lock.
        told.append(pool.submit(bank.metrics).result(WAIT)["held_prefixes"])

    pool = ThreadPoolExecutor(1)
    bank.listeners.add(listener)
    for name in "ab":
        bank.add(name, prefix(1.0, 8))
    first, second = bank.hold("a"), bank.hold("a")
    first.release()
    with pytest.raises(BankFullError):
        bank.hold("b")  # lets go of what it never got
    assert told == []
    second.release()
    second.release()
    assert told == [0]
    bank.pin("a")
    del told[:]
    bank.unpin("a")
    bank.remove("a")
    assert told == [0, 0]


def test_given_prefixes_fill_the_hosts_budget(tmp_path: Path) -> None:
    bank = make_bank(host_bytes=10 * ENTRY)
    bank.add("a", prefix(1.0, 6))
    with pytest.raises(BankFullError, match=f"host_bytes={10 * ENTRY} {6 * ENTRY} are taken"):
        bank.add("b", prefix(2.0, 6))
    assert bank.names == ["a"]
    bank.add("a", prefix(3.0, 9), replace=True)
    assert bank.metrics()["host_bytes"] == 9 * ENTRY

    spilling = make_bank(host_bytes=10 * ENTRY, directory=tmp_path)
    for i in range(5):
        spilling.add(f"p{i}", prefix(float(i), 4))
    assert spilling.metrics()["host_bytes"] == 8 * ENTRY and spilling.metrics()["spills_total"] == 3
    assert first_values(spilling, [f"p{i}" for i in range(5)]) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert first_values(spilling, ["p4"]) == [4.0]
    (folder,) = tmp_path.iterdir()
    assert len([*folder.iterdir()]) == 3
    spilling.remove("p3")
    assert len([*folder.iterdir()]) == 2
    del spilling
    assert not folder.exists()


@cpu_only  # elsewhere the arena has them all
@pytest.mark.parametrize("spills", [False, True])
def test_compiled_prefixes_leave_the_host_and_come_back(tmp_path: Path, spills: bool) -> None:
    model = make_model(prompts={})
    one = model.base.config.num_hidden_layers * 2 * 2 * 8 * 4 * 5 + 61 * 4  # P 5 and its next_logits
    options = BankOptions(host_bytes=2 * one, directory=tmp_path if spills else None)
    model, oracle = SoftPromptModel(model.base, bank=options).eval(), Oracle()
    for i in range(4):
        model.add_prompt(f"p{i}", make_prompt(model.base, seed=i).requires_grad_(False))
    for i in (0, 1, 2, 3, 0, 3):
        found = model.generate(ROWS[0][None], prompt=f"p{i}", max_new_tokens=4)[0, 4:].tolist()
        assert found == oracle.greedy(ROWS[0], model.get_prompt(f"p{i}"), 4)
    metrics = model.bank.metrics()
    assert metrics["host_bytes"] <= 2 * one
    assert metrics["compilations_total"] == (4 if spills else 5)
    assert (metrics["spills_total"], metrics["drops_total"]) == ((2, 0) if spills else (0, 3))


def test_options_are_checked() -> None:
    for options in ({"device_bytes": -1}, {"host_bytes": 1.5}, {"dtype": torch.float16}, {"block": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            BankOptions(**options)


# ---- one flight -----------------------------------------------------------------------------------------------------


def run_threads(work: Callable[[int], Any], count: int) -> list[Any]:
    results: dict[int, Any] = {}
    start = threading.Barrier(count)

    def run(i: int) -> None:
        start.wait(WAIT)
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    return [results[i] for i in range(count)]


@pytest.mark.parametrize("budget", [None, 50 * ENTRY])
def test_a_hundred_first_requests_load_once(budget: int | None) -> None:
    bank, loads = make_bank(device_bytes=budget), []
    all_asked = threading.Event()

    def load() -> PrefixKV:
        loads.append(1)
        all_asked.wait(WAIT)
        return prefix(5.0)

    bank.register("p", Source(load))

    def work(i: int) -> int:
        if i == 0:
            # The slot's count of holds says how many have asked.
            while (slot := bank._catalogue.entries["p"].slots.get(None)) is None or slot.refs < 99:
                time.sleep(0.001)
            all_asked.set()
        with bank.hold("p") as held:
            return held.version

    assert len(set(run_threads(work, 100))) == 1
    metrics = bank.metrics()
    assert len(loads) == metrics["loads_total"] == 1 and metrics["placements_total"] == (budget is not None)


def test_a_load_blocks_nobody_else_and_its_failure_is_everybodys_who_waits() -> None:
    bank = make_bank(device_bytes=50 * ENTRY)
    begun, go, outcomes = threading.Event(), threading.Event(), [OSError("disk gone"), prefix(7.0)]

    def load() -> PrefixKV:
        begun.set()
        go.wait(WAIT)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    bank.register("slow", Source(load))
    bank.add("fast", prefix(1.0))

    def work(i: int) -> Any:
        if i < 5:
            with bank.hold("slow"):
                return None
        begun.wait(WAIT)
        while bank._catalogue.entries["slow"].slots[None].refs < 5:
            time.sleep(0.001)
        try:
            return first_values(bank, ["fast", None])
        finally:
            bank.add("other", prefix(2.0))
            go.set()

    *failed, served = run_threads(work, 6)
    assert served == [1.0, None] and all(str(each) == "disk gone" for each in failed)
    assert bank.metrics()["failures_total"] == 1 and bank.metrics()["held_prefixes"] == 0
    assert first_values(bank, ["slow", "other"]) == [7.0, 2.0]


def test_replaced_while_it_loads() -> None:
    """Who asked before gets the old one, whole; who asks after the new one, at once."""
    bank = make_bank(device_bytes=50 * ENTRY)
    begun, go = threading.Event(), threading.Event()

    def load() -> PrefixKV:
        begun.set()
        go.wait(WAIT)
        return prefix(1.0, 4)

    bank.register("p", Source(load))

    def work(i: int) -> Any:
        if i == 0:
            return first_values(bank, ["p"])
        begun.wait(WAIT)
        bank.add("p", prefix(2.0, 5), replace=True)
        found = first_values(bank, ["p"])
        go.set()
        return found

    assert run_threads(work, 2) == [[1.0], [2.0]]
    bank.hold("p").release()
    assert bank.metrics()["device_bytes"] == 5 * ENTRY


def test_other_content_behind_a_directory_is_another_version() -> None:
    contents = [prefix(1.0, 4), prefix(2.0, 4)]
    source = Source(lambda: contents[source.state])
    bank = make_bank(device_bytes=4 * ENTRY, host_bytes=0)
    bank.register("p", source)
    bank.register("q", Source(lambda: prefix(3.0, 4)))
    versions = []
    for state in (0, 0, 1):
        source.state = state
        with bank.hold("p") as held:
            versions.append(held.version)
        bank.hold("q").release()  # evicts it
    assert versions[0] == versions[1] != versions[2]


def test_unknown_names_are_told_briefly() -> None:
    bank = make_bank()
    for i in range(5000):
        bank.register(f"p{i}", Source(lambda: prefix(1.0)))
    with pytest.raises(KeyError, match=r"unknown prompt 'x'; known prompts: 'p0', .*'p7' and 4992 more"):
        bank.hold("x")


# ---- directories ----------------------------------------------------------------------------------------------------


def saved(model: SoftPromptModel, prompt: SoftPrompt, directory: Path, *, compiled: bool) -> Path:
    """`prompt` as an adapter, or as the prefix that another model makes of it."""
    if compiled:
        maker = SoftPromptModel(make_base())
        maker.add_prompt("p", prompt.requires_grad_(False))
        maker.compile_prompt("p").save_pretrained(directory)
    else:
        peft_io.save_adapter(prompt, directory)
    return directory


@pytest.mark.parametrize("options", [{}, {"device_bytes": 20_000}, {"device_bytes": 20_000, "host_bytes": 0}], ids=str)
def test_registered_prompts_are_read_when_they_are_used(tmp_path: Path, options: dict[str, int]) -> None:
    model, oracle = SoftPromptModel(make_base(), bank=BankOptions(**options)).eval(), Oracle()
    methods = ("PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING")
    prompts = [make_prompt(model.base, m, length=3 + i, seed=i) for i, m in enumerate(methods)]
    for i, prompt in enumerate(prompts):
        model.register_prompt(f"p{i}", saved(model, prompt, tmp_path / str(i), compiled=i == 3))
    assert model.bank.metrics()["loads_total"] == 0 and not model.prompts and model.active_prompt == "p0"
    ids, mask = pad_rows(ROWS, "left")
    for _ in range(2):
        found = model.generate(
            ids, attention_mask=mask, prompt=["p0", "p1", "p2", "p3"], task_ids=[None, None, 1, None], max_new_tokens=5
        )[:, ids.shape[1] :]
        tasks = (None, None, 1, None)
        for row, prompt, task, tokens in zip(ROWS, prompts, tasks, found.tolist(), strict=True):
            assert tokens == oracle.greedy(row, prompt, 5, task)
    assert model.bank.metrics()["loads_total"] == 4
    with pytest.raises(ValueError, match="multitask prompt"):
        model.bank.hold("p2")
    out = model(ROWS[0][None], labels=ROWS[0][None], prompt="p0")
    plain = make_model(prompts={"p0": prompts[0]})
    assert torch.equal(out.loss, plain(ROWS[0][None], labels=ROWS[0][None], prompt="p0").loss)
    assert torch.equal(model.get_prompt("p0").embedding.weight, prompts[0].embedding.weight)


def test_thousands_register_at_once_and_hurt_nobody(tmp_path: Path) -> None:
    model = make_model()
    saved(model, make_prompt(model.base), tmp_path / "p", compiled=False)
    with pytest.raises(FileNotFoundError, match="prompt 'x': expected an adapter or a saved prefix in"):
        model.register_prompt("x", tmp_path / "nowhere")
    for i in range(10_000):
        model.register_prompt(f"p{i}", tmp_path / "p")
    with pytest.raises(ValueError, match="already loaded"):
        model.register_prompt("p7", tmp_path / "p")
    model.register_prompt("a", tmp_path / "p", replace=True)
    assert list(model._keys) == ["b"] and model.bank.metrics()["loads_total"] == 0
    assert len(model.prompt_names) == 10_002


def break_tensors(directory: Path) -> None:
    path = next(directory.glob("*.safetensors"))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def write_nan(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(path).items()}
    save_file(tensors, path)


def other_base(directory: Path) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    prompt = SoftPrompt.from_config({**config, "token_dim": 16})
    peft_io.save_adapter(prompt, directory)


@pytest.mark.parametrize(
    ("harm", "compiled", "error"),
    [
        (break_tensors, False, AdapterError),
        (break_tensors, True, PrefixError),
        (write_nan, False, PrefixError),
        (other_base, False, AdapterError),
        (shutil.rmtree, False, FileNotFoundError),
        (shutil.rmtree, True, OSError),
    ],
)
def test_a_broken_one_fails_alone_and_is_tried_again(
    tmp_path: Path, harm: Callable[[Path], None], compiled: bool, error: type[Exception]
) -> None:
    model, oracle = make_model(), Oracle()
    prompt = make_prompt(model.base, seed=5)
    directory = saved(model, prompt, tmp_path / "p", compiled=compiled)
    model.register_prompt("p", directory)
    harm(directory)
    for _ in range(2):
        with pytest.raises(error):
            model.bank.hold("p")
        with pytest.raises(error):
            model.generate(ROWS[0].expand(2, -1), prompt=["a", "p"], max_new_tokens=2)
    assert model.bank.metrics()["held_prefixes"] == 0
    found = model.generate(ROWS[0].expand(2, -1), prompt=["a", "b"], max_new_tokens=5)[:, 4:].tolist()
    assert found == [oracle.greedy(ROWS[0], model.get_prompt(name), 5) for name in ("a", "b")]
    shutil.rmtree(directory, ignore_errors=True)
    saved(model, prompt, directory, compiled=compiled)
    found = model.generate(ROWS[0].expand(2, -1), prompt=["a", "p"], max_new_tokens=5)[:, 4:].tolist()
    assert found[1] == oracle.greedy(ROWS[0], prompt, 5)


def test_a_mapped_prefix_takes_no_host_memory(tmp_path: Path) -> None:
    model, oracle = SoftPromptModel(make_base(), bank=BankOptions(host_bytes=0)).eval(), Oracle()
    prompt = make_prompt(model.base)
    model.register_prompt("p", saved(model, prompt, tmp_path / "p", compiled=True))
    for _ in range(2):
        found = model.generate(ROWS[1][None], prompt="p", max_new_tokens=4)[0, 7:].tolist()
        assert found == oracle.greedy(ROWS[1], prompt, 4)
    metrics = model.bank.metrics()
    assert metrics["host_bytes"] == 0 and metrics["loads_total"] == 1 and model.compile_prompt("p").is_mapped
    shutil.rmtree(tmp_path / "p")
    assert model.generate(ROWS[1][None], prompt="p", max_new_tokens=4)[0, 7:].tolist() == found


# ---- storage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("budget", [None, 100_000])
def test_8_bit_storage(kind: torch.dtype, budget: int | None) -> None:
    """Whatever the batch, a row attends to what the 8 bits stand for."""
    model = SoftPromptModel(make_base(), bank=BankOptions(dtype=kind, block=4, device_bytes=budget)).eval()
    floats = make_model(prompts={})
    names: list[str | None] = []
    for i in range(3):
        prompt = make_prompt(model.base, length=4 + 3 * i, seed=i).requires_grad_(False)
        model.add_prompt(f"p{i}", prompt)
        floats.add_prompt(f"p{i}", model.compile_prompt(f"p{i}").dequantize())
        assert model.compile_prompt(f"p{i}").dtype == kind
        names.append(f"p{i}")
    ids, mask = pad_rows(ROWS, "left")
    for batch in ([*names, None], ["p2", "p0", "p2", "p0"], "p1"):
        found = model.generate(ids, attention_mask=mask, prompt=batch, max_new_tokens=5)
        assert torch.equal(found, floats.generate(ids, attention_mask=mask, prompt=batch, max_new_tokens=5))
    given = floats.get_prompt("p1")
    model.add_prompt("given", given)
    model.add_prompt("other block", given.quantize(3, kind))
    model.add_prompt("wide block", given.quantize(8, kind))
    assert model.get_prompt("given").scales.block == model.get_prompt("other block").scales.block == 4
    assert model.get_prompt("wide block").scales.block == 8
    ids = ROWS[1].expand(3, -1)
    found = model.generate(ids, prompt=["given", "other block", "wide block"], max_new_tokens=4)
    for row, name in enumerate(("given", "other block", "wide block")):
        floats.add_prompt(name, model.get_prompt(name).dequantize())
        assert torch.equal(found[row], floats.generate(ids[:1], prompt=name, max_new_tokens=4)[0])


def test_a_batch_copies_no_prefix() -> None:
    model = make_model()
    with torch.no_grad():
        model.generate(ROWS[0].expand(2, -1), prompt=["a", "b"], max_new_tokens=1)
        arena = model.bank._tiers.arena
        held = model.bank.hold_all([("a", None), ("b", None)])
        packed, index = model.bank.pack_held(held)
        assert all(x is y for x, y in zip(packed.keys, arena.entries.keys, strict=True))
        logits = model(ROWS[0].expand(2, -1), prompt=packed, prompt_index=index).logits
        assert torch.equal(logits, model(ROWS[0].expand(2, -1), prompt=["a", "b"]).logits)
    assert model.bank.metrics()["placements_total"] == 2


@torch.no_grad()
def test_attention_knows_the_longest_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batch, however large the storage is: kernels can't read it without waiting for the device."""
    model = make_model("gemma2", bank=BankOptions(device_bytes=100_000))
    asked, attend = [], hooks.prefix_attention
    monkeypatch.setattr(
        hooks, "prefix_attention", lambda *x, **options: asked.append(options) or attend(*x, **options)
    )
    model(ROWS[0].expand(2, -1), prompt=["a", "b"])
    model(ROWS[0].expand(2, -1), prompt=["a", None])
    assert [each["max_prefix_length"] for each in asked[::2]] == [9, 5]


@torch.no_grad()
def test_attention_weights_are_of_the_batchs_prefixes_alone() -> None:
    model = make_model("gemma2", bank=BankOptions(device_bytes=100_000))
    ids, asked = ROWS[0].expand(2, -1), {"output_attentions": True}
    held = model.bank.hold_all([("a", None), ("b", None)])
    packed, index = model.bank.pack_held(held)
    assert packed.is_sparse
    for found in (
        model(ids, prompt=packed, prompt_index=index, **asked),
        model(ids, prompt=["a", "b"], **asked),
    ):
        assert found.attentions[0].shape[-1] == 5 + 9 + 4
        torch.testing.assert_close(found.logits, model(ids, prompt=["a", "b"]).logits)


def test_nothing_is_copied_for_one_prompt() -> None:
    model = make_model()
    with torch.no_grad():
        model.generate(ROWS[0].expand(2, -1), prompt="a", max_new_tokens=2)
        model(ROWS[0][None], prompt="b")
        held = model.bank.hold("a")
        packed, index = model.bank.pack_held([held, None, held])
    assert packed.keys[0] is model.compile_prompt("a").keys[0] and index.tolist() == [0, -1, 0]
    assert model.bank._tiers.arena is None
    held.release()


def test_a_call_that_fails_lets_go() -> None:
    model = make_model(bank=BankOptions(device_bytes=100_000))
    with pytest.raises(ValueError, match="positions"):
        model.generate(ROWS[0].repeat(30)[None].expand(2, -1), prompt=["a", "b"])
    with torch.no_grad(), pytest.raises(ValueError):
        model(ROWS[0].expand(2, -1), prompt=["a", "b"], attention_mask=torch.ones(3, 3))
    assert model.bank.metrics()["held_prefixes"] == 0


def test_a_cache_outlives_the_storage_and_knows_its_versions() -> None:
    model = make_model(bank=BankOptions(device_bytes=100_000))
    ids = ROWS[0].expand(2, -1)
    with torch.no_grad():
        cache = model(ids, prompt=["a", "b"]).past_key_values
        new = torch.tensor([[3], [4]])
        want = model(torch.cat([ids, new], 1), prompt=["a", "b"]).logits[:, -1:]
        model.bank.hold_all([("b", None), ("a", None)])
        found = model(new, prompt=["a", "b"], past_key_values=cache).logits
        torch.testing.assert_close(found, want)
        model.add_prompt("b", make_prompt(model.base, seed=9).requires_grad_(False), replace=True)
        with pytest.raises(ValueError, match="an earlier version of prompt 'b'"):
            model(new, prompt=["a", "b"], past_key_values=cache)
    claim = cache.soft_prompt_claim
    assert not any(isinstance(x, torch.Tensor) and x.dim() > 1 for x in vars(claim).values())


@float64
def test_moving_the_model_moves_the_bank() -> None:
    model = make_model(bank=BankOptions(device_bytes=200_000))
    ids = ROWS[0].expand(2, -1)
    with torch.no_grad():
        model(ids, prompt=["a", "b"])
        early = model.bank.hold("a")
        model.to(torch.float64)
        found = model(ids, prompt=["a", "b"]).logits
        assert model.bank._tiers.arena.dtype == found.dtype == torch.float64
        late = model.bank.hold("b")
        with pytest.raises(RuntimeError, match="before and after the model was moved"):
            model.bank.pack_held([early, late])
    early.release()
    late.release()


def test_changed_weights_of_the_base() -> None:
    model, oracle = make_model(), Oracle()
    ids = ROWS[1].expand(2, -1)
    model.generate(ids, prompt=["a", "b"], max_new_tokens=2)
    for base in (model.base, oracle.base):
        with torch.no_grad():
            base.get_input_embeddings().weight.mul_(-0.5)
            base.model.layers[0].self_attn.k_proj.weight.mul_(-1.5)
    model.invalidate()
    found = model.generate(ids, prompt=["a", "b"], max_new_tokens=5)[:, 7:].tolist()
    assert found == [oracle.greedy(ROWS[1], model.get_prompt(name), 5) for name in ("a", "b")]
