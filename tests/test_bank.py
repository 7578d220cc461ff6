# SPDX-License-Identifier: Apache-2.0
"""PromptBank: what is compiled when, what is packed, and which version is which."""

from __future__ import annotations

import threading

import pytest
import torch
from models import make_base, make_prompt

from softprompt_fast import PrefixKV, SoftPrompt
from softprompt_fast.bank import PromptBank


def prefix(value: float, length: int = 3, layers: int = 2) -> PrefixKV:
    """Keys and values that are `value` everywhere."""
    tensors = [torch.full((2, length, 4), value) for _ in range(layers)]
    return PrefixKV(tensors, tensors, next_logits=torch.full((5,), value), method="TEST", fingerprint="none")


class Compiler:
    """Stands in for the model: a prompt's prefix is its first weight."""

    def __init__(self) -> None:
        self.calls: list[tuple[SoftPrompt, int | None]] = []

    def __call__(self, prompt: SoftPrompt, task: int | None) -> PrefixKV:
        self.calls.append((prompt, task))
        return prefix(next(prompt.parameters()).flatten()[0].item() + 100 * (task or 0), prompt.num_virtual_tokens)


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def bank(compiler: Compiler) -> PromptBank:
    return PromptBank(compiler)


@pytest.fixture(scope="module")
def base():
    return make_base()


def test_names_lookup_and_errors(bank: PromptBank) -> None:
    with pytest.raises(KeyError, match="unknown prompt 'x'; known prompts: none is loaded"):
        bank["x"]
    one, two = prefix(1.0), prefix(2.0)
    bank.add("one", one)
    bank.add("two", two)
    assert bank.names == ["one", "two"] and len(bank) == 2 and "one" in bank and "x" not in bank
    assert bank["two"] is two
    with pytest.raises(KeyError, match="unknown prompt 'x'; known prompts: 'one', 'two'"):
        bank.remove("x")
    with pytest.raises(ValueError, match="name: a prompt called 'one' is already loaded; pass replace=True"):
        bank.add("one", two)
    assert bank["one"] is one
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="name: expected a non-empty string"):
            bank.add(name, one)
    bank.remove("one")
    assert bank.names == ["two"]


def test_prefixes_are_packed_end_to_end(bank: PromptBank) -> None:
    bank.add("short", prefix(1.0, 2))
    bank.add("long", prefix(2.0, 5))
    packed = bank.packed([("long", None), ("short", None)])
    assert packed.prompts == (("long", None), ("short", None)) and packed.lengths == (5, 2)
    assert packed.offsets.tolist() == [0, 5, 7] and packed.offsets.dtype == torch.int32
    assert packed.lengths_tensor[[0, 1, -1]].tolist() == [5, 2, 0]
    for tensors in (packed.keys, packed.values):
        assert len(tensors) == 2
        for tensor in tensors:
            assert tensor.shape == (2, 7, 4) and tensor[0, :, 0].tolist() == [2.0] * 5 + [1.0] * 2
    assert [logits[0].item() for logits in packed.next_logits] == [2.0, 1.0]


def test_a_single_prefix_is_not_copied(bank: PromptBank) -> None:
    bank.add("only", prefix(1.0))
    packed = bank.packed([("only", None)])
    assert packed.offsets is None
    assert [key.data_ptr() for key in packed.keys] == [key.data_ptr() for key in bank["only"].keys]


def test_packs_are_reused_and_few_are_kept(bank: PromptBank) -> None:
    for i in range(12):
        bank.add(str(i), prefix(float(i)))
    pair = bank.packed([("0", None), ("1", None)])
    assert bank.packed([("0", None), ("1", None)]) is pair
    assert bank.packed([("1", None), ("0", None)]) is not pair
    for i in range(1, 12):
        bank.packed([(str(i), None), (str(i - 1), None)])
    again = bank.packed([("0", None), ("1", None)])
    assert again is not pair and torch.equal(again.keys[0], pair.keys[0])
    assert len(bank._packs) <= 8


def test_a_prompt_is_compiled_when_it_changes_and_only_then(bank: PromptBank, compiler: Compiler, base) -> None:
    prompt = make_prompt(base).requires_grad_(False)
    bank.add("p", prompt)
    assert not compiler.calls
    first = bank.prefix("p")
    assert bank.prefix("p") is first and bank.packed([("p", None)]).keys[0] is first.keys[0]
    assert len(compiler.calls) == 1
    with torch.no_grad():
        prompt.embedding.weight.fill_(7.0)
    assert bank.prefix("p").keys[0][0, 0, 0] == 7.0 and len(compiler.calls) == 2
    bank.invalidate()
    bank.prefix("p")
    assert len(compiler.calls) == 3


def test_tasks_are_compiled_apart(bank: PromptBank, compiler: Compiler, base) -> None:
    prompt = make_prompt(base, "MULTITASK_PROMPT_TUNING").requires_grad_(False)
    bank.add("t", prompt)
    packed = bank.packed([("t", 0), ("t", 2)])
    assert (packed.keys[0][0, 5, 0] - packed.keys[0][0, 0, 0]).item() == pytest.approx(200.0)
    bank.packed([("t", 2), ("t", 0)])
    assert [task for _, task in compiler.calls] == [0, 2]


def test_an_optimizer_step_counts_for_prompts_that_train(bank: PromptBank, compiler: Compiler, base) -> None:
    training, frozen = make_prompt(base), make_prompt(base, seed=2).requires_grad_(False)
    bank.add("training", training)
    bank.add("frozen", frozen)
    versions = [bank.version(name) for name in bank.names]
    assert versions == [bank.version(name) for name in bank.names]
    other = torch.nn.Parameter(torch.zeros(1))
    torch.optim.SGD([other], lr=0.1).step()
    assert bank.version("training") > versions[0] and bank.version("frozen") == versions[1]


def test_versions_tell_banks_apart(bank: PromptBank, compiler: Compiler) -> None:
    other = PromptBank(compiler)
    for each in (bank, other):
        each.add("p", prefix(1.0))
    assert bank.version("p") != other.version("p")


def test_replacing_while_it_is_compiled_leaves_nothing_stale(base) -> None:
    """The compiler's call is the moment in which another thread may replace the prompt."""
    old, new = (make_prompt(base, seed=seed).requires_grad_(False) for seed in (1, 2))
    compiler = Compiler()

    def compile_prompt(prompt: SoftPrompt, task: int | None) -> PrefixKV:
        found = compiler(prompt, task)
        if prompt is old:
            bank.add("p", new, replace=True)
        return found

    bank = PromptBank(compile_prompt)
    bank.add("p", old)
    bank.packed([("p", None)])
    expected = new.embedding.weight[0, 0].item()
    assert bank.packed([("p", None)]).keys[0][0, 0, 0] == expected
    assert bank.prefix("p").keys[0][0, 0, 0] == expected


def test_threads_that_want_one_prompt_compile_it_once(bank: PromptBank, compiler: Compiler, base) -> None:
    bank.add("p", make_prompt(base).requires_grad_(False))
    start, found = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        found.append(bank.prefix("p"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler.calls) == 1 and len({id(each) for each in found}) == 1


def test_replaced_under_load_no_pack_mixes_versions(bank: PromptBank) -> None:
    """One thread replaces a prompt (of another length each time), others read packs: each is of one moment."""
    bank.add("fixed", prefix(-1.0, 4))
    bank.add("p", prefix(1.0, 1))
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            packed = bank.packed([("fixed", None), ("p", None)])
            values = packed.keys[0][0, 4:, 0].tolist()
            if packed.lengths != (4, len(values)) or values != [float(len(values))] * len(values):
                wrong.append(packed)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(300):
        length = i % 7 + 1
        bank.add("p", prefix(float(length), length), replace=True)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert bank.packed([("fixed", None), ("p", None)]).lengths == (4, 300 % 7 or 7)


def test_prefixes_follow_the_model(bank: PromptBank, base) -> None:
    bank.add("frozen", prefix(1.0))
    bank.add("soft", make_prompt(base).requires_grad_(False))
    before = bank.packed([("frozen", None), ("soft", None)])
    bank.move(torch.device("cpu"), torch.float64)
    assert bank["frozen"].dtype == torch.float64
    assert bank.packed([("frozen", None)]).keys[0].dtype == torch.float64
    assert bank.version("frozen") not in before.versions
