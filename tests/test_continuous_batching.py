# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching behind soft prompts: each row's text is that of the row alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")

from softprompt_fast import SoftPrompt, SoftPromptModel
from softprompt_fast.integrations import continuous_batching as batching
from tests.models import VOCAB_SIZE, Oracle, make_base, make_model, make_prompt, make_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NEW = 8


def config(**changes: Any) -> ContinuousBatchingConfig:
    """A small cache, of which a prompt of 5 or 9 tokens fills no whole number of pages."""
    return ContinuousBatchingConfig(**({"page_size": 4, "num_blocks": 60, "max_batch_tokens": 64} | changes))


def texts(model: SoftPromptModel, rows: Sequence[Any], **kwargs: Any) -> list[list[int]]:
    kwargs = {"continuous_batching_config": config(), "max_new_tokens": NEW} | kwargs
    found = model.generate_batch([row.tolist() for row in rows], **kwargs)
    for row, output in zip(rows, found.values(), strict=True):
        assert output.error is None and output.prompt_ids == row.tolist()
    return [output.generated_tokens for output in found.values()]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The placeholder of every prefix that is written into a cache."""
    real, found = batching._PrefixPages._write, []

    def write(self: Any, placeholder: int, prefix: Any) -> Any:
        resident = real(self, placeholder, prefix)
        if resident is not None:
            found.append(placeholder)
        return resident

    monkeypatch.setattr(batching._PrefixPages, "_write", write)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"page_size": 16},  # longer than any prompt
        {"page_size": 5},  # exactly prompt "a"
        {"max_batch_tokens": 7},  # rows are prefilled in parts
        {"scheduler_type": "prefill_first"},
    ],
    ids=str,
)
def test_rows_of_many_prompts_give_the_text_of_each_row_alone(
    changes: dict[str, Any], family: str, written: list[int]
) -> None:
    base = make_base(family)
    prompts: dict[Any, SoftPrompt] = {
        "a": make_prompt(base, length=5, seed=1),
        "b": make_prompt(base, length=9, seed=2),
        "prefix": make_prompt(base, "PREFIX_TUNING", length=6, seed=3),
    }
    model, oracle = make_model(family, prompts), Oracle(family)
    rows = make_rows([3, 7, 2, 5, 9, 1, 12, 4])
    names = ["a", "b", None, "prefix", "a", "b", "prefix", "b"]
    found = texts(model, rows, prompt=names, continuous_batching_config=config(**changes))
    assert found == [oracle.greedy(row, prompts.get(name), NEW) for row, name in zip(rows, names, strict=True)]
    assert len(written) == 3  # each prompt once, however many rows


def test_tasks_of_a_multitask_prompt_are_prompts_of_their_own() -> None:
    base = make_base()
    prompt = make_prompt(base, "MULTITASK_PROMPT_TUNING")
    model, oracle = make_model(prompts={"many": prompt}), Oracle()
    rows = make_rows([3, 3, 4, 2])
    tasks = [0, 2, 1, 0]
    found = texts(model, rows, prompt="many", task_ids=tasks)
    assert found == [oracle.greedy(row, prompt, NEW, task) for row, task in zip(rows, tasks, strict=True)]


def test_an_eight_bit_prefix_is_what_it_stands_for() -> None:
    model = make_model()
    rough = model.compile_prompt("b").quantize(block=4)
    model.add_prompt("rough", rough)
    model.add_prompt("same", rough.dequantize())
    (row,) = make_rows([6])
    first, second = texts(model, [row, row], prompt=["rough", "same"])
    assert first == second


def test_a_small_cache_makes_requests_and_prompts_take_turns(written: list[int]) -> None:
    """15 pages of 4: two prompts of 9 and 13 tokens at most, with a row of up to 20 tokens; 5 prompts and 20 rows."""
    base = make_base()
    prompts = {f"p{n}": make_prompt(base, length=5 + 2 * n, seed=n + 1) for n in range(5)}
    model, oracle = make_model(prompts=prompts), Oracle()
    rows = make_rows([1 + 5 * n % 12 for n in range(20)])
    names = [f"p{n % 5}" for n in range(20)]
    small = config(num_blocks=15, max_batch_tokens=16)
    found = texts(model, rows, prompt=names, continuous_batching_config=small)
    assert found == [oracle.greedy(row, prompts[name], NEW) for row, name in zip(rows, names, strict=True)]
    assert len(written) > 5 and set(written) == {-1, -2, -3, -4, -5}  # some left and came back


def test_own_tokens_are_shared_behind_the_same_prompt_only() -> None:
    model, oracle = make_model(), Oracle()
    (row,) = make_rows([14])
    names = ["a", "b", None, "a", "b", None]
    serial = config(max_batch_tokens=24)  # later rows find what earlier ones left
    found = texts(model, [row] * 6, prompt=names, continuous_batching_config=serial)
    prompts: dict[Any, Any] = {name: model.get_prompt(name) for name in ("a", "b")}
    assert found == [oracle.greedy(row, prompts.get(name), NEW) for name in names]
    assert len({str(text) for text in found}) == 3


@pytest.fixture
def manager() -> Iterator[batching.PromptBatchingManager]:
    model = make_model()
    with model.continuous_batching_context_manager(continuous_batching_config=config()) as found:
        yield found


def result(manager: batching.PromptBatchingManager, request_id: str | None) -> list[int]:
    for _ in range(120):
        output = manager.get_result(request_id, timeout=1)
        if output is not None:
            assert output.error is None and min(output.prompt_ids) >= 0
            return output.generated_tokens
    raise AssertionError("no result within two minutes")


def test_a_prompt_is_replaced_while_requests_come(manager: batching.PromptBatchingManager, written: list[int]) -> None:
    model, oracle = manager._prompts, Oracle()
    (row,) = make_rows([4])
    old, new = model.get_prompt("a"), make_prompt(model.base, length=7, seed=9).requires_grad_(False)
    with manager.pause():  # both are in the queue before either is scheduled
        before = manager.add_request(row.tolist(), max_new_tokens=NEW, prompt="a")
        model.add_prompt("a", new, replace=True)
        after = manager.add_request(row.tolist(), max_new_tokens=NEW, prompt="a")
    outputs = {}
    while len(outputs) < 2:
        if (output := manager.get_result(timeout=60)) is not None:
            outputs[output.request_id] = output.generated_tokens
    assert outputs == {before: oracle.greedy(row, old, NEW), after: oracle.greedy(row, new, NEW)}
    assert written == [-1, -2]
    assert result(manager, manager.add_request(row.tolist(), max_new_tokens=NEW, prompt="b")) == oracle.greedy(
        row, model.get_prompt("b"), NEW
    )
    assert set(manager._prefixes) == {-2, -3}  # nobody can ask for the old version any more


def test_the_model_serves_other_calls_meanwhile(manager: batching.PromptBatchingManager) -> None:
    model, oracle = manager._prompts, Oracle()
    (row,) = make_rows([4])
    request_id = manager.add_request(row.tolist(), max_new_tokens=NEW, prompt="a")
    expected = {name: oracle.greedy(row, model.get_prompt(name), NEW) for name in ("a", "b")}
    out = model.generate(row[None], prompt="b", max_new_tokens=NEW, do_sample=False)
    assert out[0, 4:].tolist() == expected["b"] and result(manager, request_id) == expected["a"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_threads_use_the_base_in_the_middle_of_a_pass(family: str) -> None:
    """Its thread is held inside a prefill, then inside a step; each time a prompt is compiled here."""
    base = make_base(family)
    prompts = {name: make_prompt(base, length=5 + i, seed=i) for i, name in enumerate("abc")}
    model, oracle, (row,) = make_model(family, prompts, backend="torch"), Oracle(family), make_rows([4])
    here, inside, leave = threading.current_thread(), threading.Semaphore(0), threading.Semaphore(0)

    def hold(*_: Any) -> None:
        if threading.current_thread() is not here:
            inside.release()
            assert leave.acquire(timeout=60)

    model.base.get_input_embeddings().register_forward_hook(hold)
    known, seen, compiled = vars(model.base.config).copy(), [], {}
    with model.continuous_batching_context_manager(continuous_batching_config=config()) as manager:
        request_id = manager.add_request(row.tolist(), max_new_tokens=2, prompt="a")
        for name in ("b", "c"):
            assert inside.acquire(timeout=60)
            seen.append(vars(model.base.config).copy())
            compiled[name] = model.compile_prompt(name)
            leave.release()
        assert result(manager, request_id) == oracle.greedy(row, prompts["a"], 2)
    for name, prefix in compiled.items():
        alone = make_model(family, {name: prompts[name]}, backend="torch").compile_prompt(name)
        assert all(map(torch.equal, prefix.keys, alone.keys)) and all(map(torch.equal, prefix.values, alone.values))
    assert seen == [known, known] and vars(model.base.config) == known


def test_the_active_prompt_and_streaming(manager: batching.PromptBatchingManager) -> None:
    (row,) = make_rows([4])
    manager._prompts.set_prompt("b")
    request_id = manager.add_request(row.tolist(), max_new_tokens=NEW, streaming=True)
    parts = [result(manager, request_id) for _ in range(NEW)]
    expected = Oracle().greedy(row, manager._prompts.get_prompt("b"), NEW)
    assert parts == [expected[: i + 1] for i in range(NEW)]


def test_several_sequences_of_one_request() -> None:
    model, (row,) = make_model(), make_rows([6])
    generation = model.generation_config
    generation.num_return_sequences = 3
    found = model.generate_batch([row.tolist()], prompt="b", max_new_tokens=NEW, continuous_batching_config=config())
    expected = Oracle().greedy(row, model.get_prompt("b"), NEW)
    assert [output.generated_tokens for output in found.values()] == [expected] * 3
    assert all(output.prompt_ids == row.tolist() for output in found.values())
    assert generation.eos_token_id is None  # what is the caller's stays as it was


@pytest.mark.parametrize(
    "request_, error, said",
    [
        ({"input_ids": [], "prompt": "a"}, ValueError, "at least one own token"),
        ({"input_ids": [1, VOCAB_SIZE], "prompt": "a"}, IndexError, "outside the vocabulary of 61"),
        ({"input_ids": [-1, 3]}, IndexError, "outside the vocabulary"),  # no client asks by placeholder
        ({"input_ids": [1], "prompt": "none"}, KeyError, "none"),
        ({"input_ids": [1] * 80, "prompt": "b"}, ValueError, "9 virtual and 88 own tokens need 97 positions"),
    ],
)
def test_bad_requests_are_refused_before_they_are_added(
    request_: dict[str, Any], error: type[Exception], said: str, manager: batching.PromptBatchingManager
) -> None:
    with pytest.raises(error, match=said):
        manager.add_request(**request_, max_new_tokens=NEW)
    (row,) = make_rows([4])  # and the others go on
    expected = Oracle().greedy(row, manager._prompts.get_prompt("a"), NEW)
    assert result(manager, manager.add_request(row.tolist(), max_new_tokens=NEW, prompt="a")) == expected


def eager() -> SoftPromptModel:
    base = make_base()
    base.set_attn_implementation("eager")
    return SoftPromptModel(base)


def with_windows() -> SoftPromptModel:
    base = make_base()
    base.config.layer_types = ["full_attention", "sliding_attention"]
    return SoftPromptModel(base)


@pytest.mark.parametrize(
    "make, changes, said",
    [
        (eager, {}, "computes attention by 'eager'; load it with attn_implementation='sdpa'"),
        (with_windows, {}, "sliding windows"),
        (lambda: make_model("bloom"), {}, "can't be given a prefix"),
        (make_model, {"allow_block_sharing": False}, "allow_block_sharing=True"),
    ],
)
def test_what_cannot_be_served_is_refused(make: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"continuous batching: .*{said}"):
        make().generate_batch([[1]], prompt=None, continuous_batching_config=config(**changes))


@pytest.mark.parametrize(
    "changes, own, pages",
    [
        # 9 virtual, 21 own and 2 of 3 new tokens are 8 pages of 4, and the prompt's own third page is another.
        ({"page_size": 4, "num_blocks": 9}, 21, 10),
        ({"page_size": 9, "num_blocks": 3}, 16, 4),  # which prompt "b" fills
    ],
    ids=str,
)
def test_the_largest_request_that_fits_is_served_and_one_more_token_refused(
    changes: dict[str, int], own: int, pages: int
) -> None:
    model, (row,) = make_model(), make_rows([own + 1])
    small = {"prompt": "b", "max_new_tokens": 3, "continuous_batching_config": config(**changes)}
    expected = Oracle().greedy(row[:own], model.get_prompt("b"), 3)
    assert texts(model, [row[:own]], **small) == [expected]
    said = "9 virtual, {} own and 3 new tokens need {} pages of {}, and the cache has {}"
    with pytest.raises(ValueError, match=said.format(own + 1, pages, *changes.values())):
        texts(model, [row], **small)


def test_a_step_prepared_ahead_has_room_for_the_last_token() -> None:
    manager = make_model().init_continuous_batching(continuous_batching_config=config(num_blocks=9))
    manager._processor().use_async_batching = True  # which takes a GPU
    manager.add_request([1] * 20, max_new_tokens=3, prompt="b")
    with pytest.raises(ValueError, match="9 virtual, 21 own and 3 new tokens need 10 pages of 4"):
        manager.add_request([1] * 21, max_new_tokens=3, prompt="b")


@pytest.mark.parametrize("started", [False, True])
def test_what_fits_does_not_depend_on_how_far_the_thread_is(started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching.PromptBatchingManager, "_run_generation_loop", lambda self: None)  # not far
    manager = make_model().init_continuous_batching(continuous_batching_config=config(num_blocks=9))
    if started:
        manager.start()
    with pytest.raises(ValueError, match="22 own and 3 new tokens need 10 pages of 4, and the cache has 9"):
        manager.add_request([1] * 22, max_new_tokens=3, prompt="b")


def test_no_placeholder_is_a_token() -> None:
    """What keeps a prompt's ids from being computed as tokens, should a scheduler ever try: no embedding has them."""
    with pytest.raises(IndexError):
        make_base()(torch.tensor([[-1]]))
