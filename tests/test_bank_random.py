# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to a bank, a row never attends to a wrong prefix: random operations, every answer checked against
the row alone on transformers' own base."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NUM_TASKS, Oracle, make_base, make_prompt, make_rows, pad_rows

from softprompt_fast import BankOptions, SoftPromptModel
from softprompt_fast.bank import Held
from softprompt_fast.errors import AdapterError, BankFullError, PrefixError
from softprompt_fast.integrations import peft as peft_io

NEW = 3
ROWS = make_rows([1, 3, 5, 8])
METHODS = ("PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE", "P_TUNING", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING")
REFUSED = (AdapterError, PrefixError, OSError)


class Contents:
    """A few prompts in every form, and what each row alone gives behind them. A multitask prompt is asked for task
    1."""

    def __init__(self, folder: Path) -> None:
        self.oracle, self._lock = Oracle(), threading.Lock()
        self.prompts = [
            make_prompt(self.oracle.base, method, length=2 + 2 * i, seed=i).requires_grad_(False)
            for i, method in enumerate(METHODS)
        ]
        maker = SoftPromptModel(make_base())
        self.prefixes, self.adapters, self.saved = [], [], []
        for i, prompt in enumerate(self.prompts):
            maker.add_prompt(str(i), prompt)
            task = self.task(i)
            self.prefixes.append(maker.compile_prompt(str(i), task=task))
            self.adapters.append(folder / f"adapter {i}")
            self.saved.append(folder / f"prefix {i}")
            peft_io.save_adapter(prompt, self.adapters[i])
            self.prefixes[i].save_pretrained(self.saved[i])
        self._known: dict[tuple[int | None, int], list[int]] = {}

    def task(self, content: int) -> int | None:
        return 1 if METHODS[content] == "MULTITASK_PROMPT_TUNING" else None

    def expected(self, content: int | None, row: int) -> list[int]:
        with self._lock:
            if (content, row) not in self._known:
                prompt, task = (None, None) if content is None else (self.prompts[content], self.task(content))
                self._known[content, row] = self.oracle.greedy(ROWS[row], prompt, NEW, task)
            return self._known[content, row]


class World:
    """A model, and what ought to be under each of its names."""

    def __init__(self, model: SoftPromptModel, contents: Contents, folder: Path, seed: int) -> None:
        self.model, self.contents, self.folder = model, contents, folder
        self.draw = random.Random(seed)
        self.now: dict[str, int] = {}
        self.broken: set[str] = set()  # those whose directory may no longer serve
        self.held: list[tuple[Held, int]] = []
        self.numbers = iter(range(10**6))
        self.answers = self.refusals = 0

    def step(self) -> None:
        kinds = {
            self.generate: 40, self.use_held: 12, self.add: 8, self.register: 10, self.remove: 4, self.hold: 8,
            self.release: 8, self.pin: 2, self.harm: 4, self.change: 3, self.invalidate: 1,
        }  # fmt: skip
        (kind,) = self.draw.choices([*kinds], [*kinds.values()])
        kind()

    def any_name(self) -> str:
        return f"p{self.draw.randrange(12)}"

    def add(self) -> None:
        name, content = self.any_name(), self.draw.randrange(len(METHODS))
        prompt = self.draw.choice([self.contents.prompts, self.contents.prefixes])[content]
        if name in self.now:
            with pytest.raises(ValueError, match="already loaded"):
                self.model.add_prompt(name, prompt)
        try:
            self.model.add_prompt(name, prompt, replace=True)
        except BankFullError:
            self.refusals += 1
            return
        self.now[name] = content
        self.broken.discard(name)

    def register(self) -> None:
        name, content = self.any_name(), self.draw.randrange(len(METHODS))
        source = self.draw.choice([self.contents.adapters, self.contents.saved])[content]
        directory = self.folder / str(next(self.numbers))
        shutil.copytree(source, directory)
        self.model.register_prompt(name, directory, replace=True)
        self.now[name] = content
        self.broken.discard(name)

    def directory(self) -> tuple[str, Path] | None:
        """Of a registered prompt."""
        entries = self.model.bank._catalogue.entries
        names = [name for name in self.now if entries[name].source is not None]
        if not names:
            return None
        name = self.draw.choice(names)
        return name, entries[name].source.directory

    def harm(self) -> None:
        """Files go, or become half of themselves. A copy that is mapped or kept may serve on."""
        if (found := self.directory()) is None:
            return
        name, directory = found
        self.broken.add(name)
        if self.draw.random() < 0.5:
            shutil.rmtree(directory, ignore_errors=True)
            return
        for path in directory.glob("*.safetensors"):
            half = path.with_suffix(".half")
            half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.replace(half, path)

    def change(self) -> None:
        """Other content in a prompt's own directory, and then said so."""
        if (found := self.directory()) is None:
            return
        name, directory = found
        content = self.draw.randrange(len(METHODS))
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.contents.adapters[content], directory)
        self.model.register_prompt(name, directory, replace=True)
        self.now[name] = content
        self.broken.discard(name)

    def remove(self) -> None:
        name = self.any_name()
        if name not in self.now:
            with pytest.raises(KeyError):
                self.model.remove_prompt(name)
            return
        self.model.remove_prompt(name)
        del self.now[name]
        self.broken.discard(name)

    def hold(self) -> None:
        if len(self.held) > 5:
            self.release()
        name = self.any_name()
        if name not in self.now:
            with pytest.raises(KeyError, match="unknown prompt"):
                self.model.bank.hold(name)
            return
        task = self.contents.task(self.now[name])
        # Only the soft prompt itself has tasks: of its prefix they are ignored.
        try:
            self.held.append((self.model.bank.hold(name, task), self.now[name]))
        except BankFullError:
            self.refusals += 1
        except REFUSED:
            assert name in self.broken
            self.refusals += 1

    def release(self) -> None:
        if self.held:
            held, _ = self.held.pop(self.draw.randrange(len(self.held)))
            held.release()
            if self.draw.random() < 0.2:
                held.release()

    def pin(self) -> None:
        pinned = self.model.bank._tiers.pinned
        if len(pinned) > 1:
            name, task = self.draw.choice(sorted(pinned, key=str))
            self.model.bank.unpin(name, task)
        elif self.now:
            name = self.draw.choice([*self.now])
            try:
                self.model.bank.pin(name, self.contents.task(self.now[name]))
            except BankFullError:
                self.refusals += 1
            except REFUSED:
                assert name in self.broken

    def invalidate(self) -> None:
        self.model.invalidate()

    def generate(self) -> None:
        count = self.draw.choice([1, 2, 3, 4])
        names: list[str | None] = [
            self.draw.choice([*self.now]) if self.now and self.draw.random() < 0.85 else None for _ in range(count)
        ]
        rows = [self.draw.randrange(len(ROWS)) for _ in range(count)]
        contents = [None if name is None else self.now[name] for name in names]
        ids, mask = pad_rows([ROWS[row] for row in rows], self.draw.choice(["left", "right"]))
        tasks = [None if content is None else self.contents.task(content) for content in contents]
        try:
            found = self.model.generate(
                ids, attention_mask=mask, prompt=names, task_ids=tasks, max_new_tokens=NEW, do_sample=False
            )
        except BankFullError:
            self.refusals += 1
            return
        except REFUSED:
            assert self.broken & set(names)
            self.refusals += 1
            return
        self.check(found[:, ids.shape[1] :].tolist(), contents, rows)

    def use_held(self) -> None:
        """As a server does: packed once, whatever became of the names since."""
        if not self.held:
            return
        chosen = [self.draw.choice([*self.held, None]) for _ in range(3)]
        rows = [self.draw.randrange(len(ROWS)) for _ in chosen]
        ids, mask = pad_rows([ROWS[row] for row in rows], "left")
        packed, index = self.model.bank.pack_held([None if each is None else each[0] for each in chosen])
        new: list[torch.Tensor] = []
        with torch.no_grad():
            for _ in range(NEW):
                behind = {} if packed is None else {"prompt": packed, "prompt_index": index}
                logits = self.model(ids, attention_mask=mask, **({"prompt": None} | behind)).logits
                new.append(logits[:, -1].argmax(-1))
                ids, mask = torch.cat([ids, new[-1][:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        self.check(torch.stack(new, 1).tolist(), [None if each is None else each[1] for each in chosen], rows)

    def check(self, found: list[list[int]], contents: list[int | None], rows: list[int]) -> None:
        for tokens, content, row in zip(found, contents, rows, strict=True):
            assert tokens == self.contents.expected(content, row)
            self.answers += 1


def bank_options(folder: Path, kind: str) -> BankOptions:
    entry = 2 * 2 * 2 * 8 * 4  # bytes: layers, keys and values, heads, D
    return {
        "none": BankOptions(),
        "device": BankOptions(device_bytes=32 * entry),
        "both": BankOptions(device_bytes=40 * entry, host_bytes=60 * entry),
        "spilling": BankOptions(device_bytes=32 * entry, host_bytes=30 * entry, directory=folder / "spilled"),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "device", "both", "spilling"])
def test_every_answer_is_the_rows_own(tmp_path: Path, kind: str) -> None:
    contents = Contents(tmp_path)
    assert NUM_TASKS > 1
    options = bank_options(tmp_path, kind)
    model = SoftPromptModel(make_base(), bank=options).eval()
    world = World(model, contents, tmp_path, seed=len(kind))
    for _ in range(1000):
        world.step()
        metrics = model.bank.metrics()
        if options.device_bytes is not None:
            assert metrics["device_bytes"] <= metrics["device_capacity_bytes"] <= options.device_bytes
    assert world.answers > 700
    metrics = model.bank.metrics()
    if kind != "none":
        assert metrics["evictions_total"] > 20 and world.refusals > 0
    for held, _ in world.held:
        held.release()
    for name in [*world.now]:
        model.remove_prompt(name)
    metrics = model.bank.metrics()
    assert [metrics[name] for name in ("held_prefixes", "pinned_prefixes", "device_bytes", "host_bytes")] == [0] * 4


@pytest.mark.parametrize("kind", ["none", "spilling"])
def test_threads_generate_while_prompts_change(tmp_path: Path, kind: str) -> None:
    """Names that change give what they were at some moment of the call; the others what they are, whatever moves."""
    contents = Contents(tmp_path)
    model = SoftPromptModel(make_base(), bank=bank_options(tmp_path, kind)).eval()
    fixed = {"f0": 0, "f1": 1, "f2": 2}
    for name, content in fixed.items():
        model.register_prompt(name, contents.saved[content])
    changing, history = ["c0", "c1"], {"c0": [3], "c1": [5]}
    for name in changing:
        model.add_prompt(name, contents.prefixes[history[name][0]])
    in_place = dict.fromkeys(changing, 0)  # which of its contents a name surely has
    done, wrong, served = threading.Event(), [], []

    def generate(seed: int) -> None:
        draw = random.Random(seed)
        while not done.is_set():
            names = [draw.choice([*fixed, *changing, None]) for _ in range(3)]
            rows = [draw.randrange(len(ROWS)) for _ in names]
            ids, mask = pad_rows([ROWS[row] for row in rows], "left")
            begun = dict(in_place)
            try:
                found: Any = model.generate(ids, attention_mask=mask, prompt=names, max_new_tokens=NEW)
            except BankFullError:
                continue
            except Exception as error:
                wrong.append(error)
                return
            for tokens, name, row in zip(found[:, ids.shape[1] :].tolist(), names, rows, strict=True):
                possible = [fixed.get(name)] if name not in changing else history[name][begun[name] :]
                if tokens not in [contents.expected(content, row) for content in possible]:
                    wrong.append((name, row, possible, tokens))
            served.append(1)

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    draw = random.Random(7)
    while len(served) < 150 and not wrong:
        name, content = draw.choice(changing), draw.randrange(len(METHODS))
        history[name].append(content)  # before: an answer may come between
        if draw.random() < 0.5:
            model.register_prompt(name, contents.saved[content], replace=True)
        else:
            model.add_prompt(name, contents.prefixes[content], replace=True)
        in_place[name] = len(history[name]) - 1
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.bank.metrics()["held_prefixes"] == 0
