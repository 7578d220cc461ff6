# SPDX-License-Identifier: Apache-2.0
"""The connector in one engine in this process: what it serves, and the ways in which it could go wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

import softprompt_fast as spf
from softprompt_fast import PrefixKV
from softprompt_fast.errors import PrefixError, PrefixFingerprintError
from softprompt_fast.integrations.vllm.connector import LoadMetadata, salt_of
from tests.vllm_engine.tiny import Base, make_rows

NEW = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
BUDGET = 1_000_000


@pytest.fixture(scope="module")
def llm(base: Base, folder: Path, make_llm: Callable[..., Any]) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's parts are looked at
    settings = {"prompts_folder": str(folder), "resident_bytes": BUDGET, "pinned": ["pinned"]}
    return make_llm(base, kv_transfer_config=spf.vllm.kv_transfer_config(**settings))


@pytest.fixture
def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@pytest.fixture
def steps(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[LoadMetadata, int]]]:
    """What each step loaded, and how many blocks were taken then; nothing is cached before."""
    assert scheduler.reset_prefix_cache()
    found: list[tuple[LoadMetadata, int]] = []
    take, pool = scheduler.connector._scheduler.take, scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()

    def recorded() -> LoadMetadata:
        metadata = take()
        found.append((metadata, free - pool.get_num_free_blocks()))
        return metadata

    monkeypatch.setattr(scheduler.connector._scheduler, "take", recorded)
    yield found


def texts(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def raw(llm: Any, prompts: list[dict[str, Any]], params: list[dict[str, Any] | None], **options: Any) -> list[Any]:
    """Past the helper, as a client that writes the requests itself would: ``kv_transfer_params`` of each."""
    many = []
    for one in params:
        own = GREEDY.clone()
        for name, value in options.items():
            setattr(own, name, value)
        own.extra_args = None if one is None else {"kv_transfer_params": one}
        many.append(own)
    return llm.generate(prompts, many, use_tqdm=False)


def params_of(prefix: PrefixKV, name: str) -> dict[str, Any]:
    return {"soft_prompt": name, "digest": prefix.digest, "num_virtual_tokens": prefix.num_virtual_tokens}


def placed(prefix: PrefixKV, ids: list[int]) -> list[int]:
    return [501] * prefix.num_virtual_tokens + ids


def test_a_mixed_batch_equals_each_row_alone(llm: Any, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    names = [None, *prefixes]
    rows = make_rows(35)
    asked = [names[i % len(names)] for i in range(len(rows))]
    outputs = spf.vllm.generate(llm, rows, asked, GREEDY, use_tqdm=False)
    exact = {name: prefix.dequantize() for name, prefix in prefixes.items()}
    expected = [base.greedy(row, exact.get(name), NEW) for row, name in zip(rows, asked, strict=True)]
    assert texts(outputs) == expected
    assert [list(output.prompt_token_ids) for output in outputs] == rows
    # A prompt changes the answer: otherwise this would test nothing.
    assert all(
        base.greedy(row, None, NEW) != one for row, name, one in zip(rows, asked, expected, strict=True) if name
    )


def test_text_and_one_name_for_all(llm: Any, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    outputs = spf.vllm.generate(llm, ["w5 w6 w7", "w9"], "p20", GREEDY, use_tqdm=False)
    assert texts(outputs) == [base.greedy(ids, prefixes["p20"], NEW) for ids in ([5, 6, 7], [9])]
    (plain,) = spf.vllm.generate(llm, ["w5 w6 w7"], sampling_params=GREEDY, use_tqdm=False)
    assert texts([plain]) == [base.greedy([5, 6, 7], None, NEW)]


def test_32_rows_load_once_and_share_blocks(
    llm: Any, base: Base, prefixes: dict[str, PrefixKV], steps: list[tuple[LoadMetadata, int]]
) -> None:
    """16 blocks of the prefix and two a row; without sharing it were 18 a row."""
    rows = [row[:1] * 16 for row in make_rows(32)]
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    outputs = spf.vllm.generate(llm, rows, "p512", params, use_tqdm=False)
    assert sum(len(metadata.loads) for metadata, _ in steps) == 1
    assert max(taken for _, taken in steps) == 80
    for i in (0, 31):
        assert texts(outputs)[i] == base.greedy(rows[i], prefixes["p512"], 48)


def test_only_what_is_not_cached_is_loaded(llm: Any, steps: list[tuple[LoadMetadata, int]]) -> None:
    """100 virtual tokens: 3 full blocks are shared, the last 4 tokens go to a block of the row's own."""
    for _ in range(2):
        spf.vllm.generate(llm, [[5, 6]], "p100", GREEDY, use_tqdm=False)
    assert [load.start for metadata, _ in steps for load in metadata.loads] == [0, 96]


def test_a_fresh_prompt_and_a_new_version_while_serving(
    llm: Any, base: Base, folder: Path, prefixes: dict[str, PrefixKV]
) -> None:
    with pytest.raises(spf.vllm.UnknownPromptError, match="no prompt named 'fresh'; there are: int8, p100"):
        spf.vllm.generate(llm, [[5]], "fresh", GREEDY)
    for seed, length in ((1, 40), (2, 40), (3, 33)):
        prefix = base.prefix(length, seed)
        prefix.save_pretrained(folder / "fresh")
        found = texts(spf.vllm.generate(llm, [[5, 6], [7]], "fresh", GREEDY, use_tqdm=False))
        assert found == [base.greedy(row, prefix, NEW) for row in ([5, 6], [7])]


def test_a_corrupt_prompt_fails_alone(llm: Any, base: Base, folder: Path, prefixes: dict[str, PrefixKV]) -> None:
    """The helper sees it before anything runs; in the engine its requests fail, and the others' texts are right."""
    broken = base.prefix(64, seed=5)
    broken.save_pretrained(folder / "broken")
    file = folder / "broken" / "prefix_kv.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(PrefixError, match="does not have the digest"):
        spf.vllm.generate(llm, [[5], [5]], ["broken", None], GREEDY)
    outputs = raw(
        llm,
        [
            {"prompt_token_ids": placed(broken, [5]), "cache_salt": salt_of(broken.digest)},
            {"prompt_token_ids": placed(prefixes["p16"], [5])},
            {"prompt_token_ids": placed(broken, [6]), "cache_salt": salt_of(broken.digest)},
            {"prompt_token_ids": [5, 6]},
        ],
        [params_of(broken, "broken"), params_of(prefixes["p16"], "p16"), params_of(broken, "broken"), None],
    )
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "error", "length"]
    assert texts(outputs)[1::2] == [base.greedy([5], prefixes["p16"], NEW), base.greedy([5, 6], None, NEW)]
    # Repaired, it serves: nothing of the failure stays.
    broken.save_pretrained(folder / "broken")
    repaired = spf.vllm.generate(llm, [[5]], "broken", GREEDY, use_tqdm=False)
    assert texts(repaired) == [base.greedy([5], broken, NEW)]


def test_another_bases_prompt_and_an_adapter_are_refused(llm: Any, base: Base, folder: Path) -> None:
    prefix = base.prefix(16, seed=1)
    prefix.fingerprint = "0-1"
    prefix.save_pretrained(folder / "stranger")
    with pytest.raises(PrefixFingerprintError, match="another base model: fingerprint 0-1"):
        spf.vllm.generate(llm, [[5]], "stranger", GREEDY)
    fat = PrefixKV([torch.zeros(3, 4, 32)] * 2, [torch.zeros(3, 4, 32)] * 2, method="X", fingerprint=base.fingerprint)
    fat.save_pretrained(folder / "fat")
    with pytest.raises(PrefixFingerprintError, match=r"num_kv_heads \(base: 2, prefix: 3\)"):
        spf.vllm.generate(llm, [[5]], "fat", GREEDY)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(PrefixError, match="softprompt-fast compile"):
        spf.vllm.generate(llm, [[5]], "adapter", GREEDY)
    for name in ("..", "p16/../p20", str(folder / "p16"), ".", ""):
        with pytest.raises(spf.vllm.UnknownPromptError):
            spf.vllm.generate(llm, [[5]], [name], GREEDY)


def test_trap_prompt_logprobs(llm: Any, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    """They make the scheduler ignore what is cached: the placeholders would be computed as if they were text."""
    asking = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    with pytest.raises(ValueError, match="prompt_logprobs"):
        spf.vllm.generate(llm, [[5]], "p16", asking)
    one = params_of(prefixes["p16"], "p16")
    prompt = {"prompt_token_ids": placed(prefixes["p16"], [5])}
    (output,) = raw(llm, [prompt], [one], skip_reading_prefix_cache=True)
    assert output.outputs[0].finish_reason == "error"


@pytest.mark.parametrize("ids", [[5], [5, 6, 7]], ids=["one token", "three tokens"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"soft_prompt": "nobody"},
        {"soft_prompt": None},
        {"soft_prompt": ["p16"]},
        {"soft_prompt": "p16"},
        {"soft_prompt": "p16", "digest": "0", "num_virtual_tokens": 16},
    ],
    ids=str,
)
def test_traps_exceptions_and_bad_requests(
    llm: Any, base: Base, prefixes: dict[str, PrefixKV], wrong: dict[str, Any], ids: list[int]
) -> None:
    """A bad request fails alone: the engine lives, and good requests of the very same text and salt are right."""
    outputs = raw(llm, [{"prompt_token_ids": ids}] * 3, [None, wrong, None])
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert texts(outputs)[::2] == [base.greedy(ids, None, NEW)] * 2


def test_trap_nothing_but_placeholders(llm: Any, prefixes: dict[str, PrefixKV]) -> None:
    with pytest.raises(ValueError, match="at least one token of the request's own"):
        spf.vllm.generate(llm, [[]], "p16", GREEDY)
    (output,) = raw(llm, [{"prompt_token_ids": placed(prefixes["p16"], [])}], [params_of(prefixes["p16"], "p16")])
    assert output.outputs[0].finish_reason == "error"


@pytest.mark.parametrize("salt", [None, "mine", "soft-prompt:0"])
def test_trap_salts(llm: Any, base: Base, prefixes: dict[str, PrefixKV], salt: str | None) -> None:
    """Requests whose ids are equal and prompts are not, with whatever salt a client gave."""
    first, second = base.prefix(64, seed=21), prefixes["p128"]
    outputs = raw(
        llm,
        [
            {"prompt_token_ids": placed(second, [5, 6]), "cache_salt": salt_of(second.digest)},
            {"prompt_token_ids": placed(second, [5, 6]), **({} if salt is None else {"cache_salt": salt})},
        ]
        * 2,
        [None, params_of(second, "p128")] * 2,
    )
    assert (
        texts(outputs)
        == [
            base.greedy(placed(second, [5, 6]), None, NEW),
            base.greedy([5, 6], second, NEW),
        ]
        * 2
    )
    assert first.digest != second.digest


def test_trap_repetition_penalty(llm: Any, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    """The penalty sees every id of the request; placeholders are ids that no text has, so it is that of own tokens."""
    rows = make_rows(6, seed=4)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, repetition_penalty=1.5)
    found = texts(spf.vllm.generate(llm, rows, "p100", params, use_tqdm=False))
    assert found == [base.greedy(row, prefixes["p100"], 24, penalty=1.5) for row in rows]
    assert found != [base.greedy(row, prefixes["p100"], 24) for row in rows]


def test_too_long_a_row_is_refused(llm: Any) -> None:
    with pytest.raises(ValueError, match="leave no room for a new one in the model's 768"):
        spf.vllm.generate(llm, [[5] * 256], "p512", GREEDY)
    (output,) = spf.vllm.generate(llm, [[5] * 255], "p512", GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1


def test_rows_and_names_must_match(llm: Any) -> None:
    with pytest.raises(ValueError, match="found 1 and 2 for 2"):
        spf.vllm.generate(llm, [[5], [6]], ["p16"], GREEDY)


def test_workers_keep_to_their_budget(llm: Any, base: Base, folder: Path) -> None:
    worker = get_kv_transfer_group()._worker
    for i in range(6):
        base.prefix(512, seed=100 + i).save_pretrained(folder / f"large{i}")
        spf.vllm.generate(llm, [[5]], f"large{i}", GREEDY, use_tqdm=False)
        assert 0 < worker.resident_bytes <= BUDGET
    # The scheduler says in the next step which prompts nobody uses any longer.
    spf.vllm.generate(llm, [[5]], None, GREEDY, use_tqdm=False)
    assert not worker._files


def test_several_answers_to_a_request(llm: Any, base: Base, prefixes: dict[str, PrefixKV]) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=NEW, ignore_eos=True)
    (output,) = spf.vllm.generate(llm, [[5, 6]], "p20", params, use_tqdm=False)
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3 and output.prompt_token_ids == [5, 6]


def test_a_pinned_prompt_stays(llm: Any, base: Base, folder: Path, scheduler: Any) -> None:
    """Last in this file: its blocks stay taken. A new version takes the old one's place."""
    pool = scheduler.kv_cache_manager.block_pool
    before = pool.get_num_free_blocks()
    for seed in (1, 2):
        prefix = base.prefix(70, seed)
        prefix.save_pretrained(folder / "pinned")
        found = texts(spf.vllm.generate(llm, [[5]], "pinned", GREEDY, use_tqdm=False))
        assert found == [base.greedy([5], prefix, NEW)]
        assert before - pool.get_num_free_blocks() == 2
        assert not scheduler.reset_prefix_cache()
