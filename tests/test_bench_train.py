# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of training, on tiny bases: what they compare, what they refuse to report, and what they write."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _training  # noqa: E402
import bench_train  # noqa: E402
import bench_train_quality as quality  # noqa: E402
from _training import OURS, PEFT, Shape, Trainee  # noqa: E402

from softprompt_fast.demo import sentiment  # noqa: E402
from softprompt_fast.demo.assets import Review  # noqa: E402

CPU = torch.device("cpu")


def arguments(**changes: Any) -> argparse.Namespace:
    defaults = {"batch": 4, "virtual_tokens": 6, "own": 5, "method": "PROMPT_TUNING", "labels": 0, "micro_batches": 1}
    defaults |= {"base": "tiny", "device": "cpu", "dtype": "float32", "systems": "ours,peft", "rounds": 2, "warmup": 0}
    defaults |= {"no_memory": True, "memory_limit": 8 << 30, "json": None}
    return argparse.Namespace(**(defaults | changes))


# -- a step -----------------------------------------------------------------------------------------------------------


def test_the_ideal_counts_tokens() -> None:
    assert Shape(16, 100, 32).ideal == 16 * 132 / (100 + 16 * 32)
    assert Shape(16, 512, 64, "CARTRIDGE").ideal is None


@pytest.mark.parametrize(
    "changes",
    [
        {"systems": "ours,peft,ours-generic"},
        {"labels": 2},
        {"micro_batches": 2},
        {"method": "PREFIX_TUNING"},
        {"method": "CARTRIDGE", "micro_batches": 4},
    ],
    ids=str,
)
def test_systems_agree_and_are_compared(changes: dict[str, Any], tmp_path: Path) -> None:
    args = arguments(json=tmp_path / "result.json", **changes)
    assert bench_train.step(args) == 0
    result = json.loads(args.json.read_text())
    others = set(args.systems.split(",")) - {OURS}
    assert result["agreement"].keys() == others and result["ratios"].keys() == {f"{name}, total" for name in others}
    for worst in result["agreement"].values():
        assert worst["loss"] <= 1e-5 and worst["gradient"] <= 1e-4
    assert all(len(times["total"]) == args.rounds for times in result["samples"].values())
    assert bool(result["share_of_ideal"]) == (args.method == "PROMPT_TUNING")
    assert result["shape"]["micro_batches"] == args.micro_batches and result["setting"]["packages"]["peft"]


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_no_ratio_over_another_gradient(
    wrong: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = Trainee.step, []

    def step(self: Trainee, *args: Any) -> tuple[Tensor, dict[str, float]]:
        result, times = real(self, *args)
        calls.append(self.system)
        if self.system == OURS and calls.count(OURS) == 1:  # one round of two
            result[1:] *= wrong
        return result, times

    monkeypatch.setattr(Trainee, "step", step)
    args = arguments(json=tmp_path / "result.json")
    assert bench_train.step(args) == 1
    result = json.loads(args.json.read_text())
    assert not result["ratios"] and not result["share_of_ideal"] and "NO RATIO" in capsys.readouterr().out


def test_micro_batches_give_the_gradient_of_the_whole() -> None:
    shape = Shape(8, 4, 3)
    trainee = Trainee.make(PEFT, "tiny", shape, CPU, torch.float32)
    ids = torch.randint(0, 61, (8, 3), generator=torch.Generator().manual_seed(0))
    whole, parts = trainee.step(ids, shape)[0], trainee.step(ids, shape, 4)[0]
    assert max(_training.errors(parts, whole).values()) < 1e-5
    assert whole[1:].norm() > 0


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most, count", [(8e9, 1), (7.0e9, 2), (2.5e9, 8), (1.1e9, 32)])
def test_peft_runs_no_more_rows_than_fit(most: float, count: int) -> None:
    asked: list[int] = []

    def measure(rows: int) -> dict[str, int]:
        asked.append(rows)
        return {"rows": rows, "after_loading": 10**9, "peak": 10**9 + 2 * 10**8 * rows}

    found, at, whole = bench_train.fitting(32, most, measure)
    assert found == count and at["rows"] == 32 // count
    assert asked[:2] == [4, 8] and len(asked) <= 3 and (max(asked[2:], default=0) * 2e8 + 1e9 <= max(most, 1.2e9))
    assert whole == {"peak": 74 * 10**8, "rows": 32, "from": [[4, 18 * 10**8], [8, 26 * 10**8]]}


def test_memory_is_measured_in_a_process_of_each_system(tmp_path: Path) -> None:
    args = arguments(no_memory=False, batch=1, json=tmp_path / "result.json")
    assert bench_train.step(args) == 0
    result = json.loads(args.json.read_text())
    for found in result["memory"].values():
        assert 50 << 20 < found["after_loading"] <= found["peak"] and found["rows"] == 1
    ours, peft = (result["memory"][name]["peak"] for name in (OURS, PEFT))
    assert result["memory_ratios"][OURS]["peak"] == ours / peft
    text = bench_train.markdown([(args.json, result)])
    assert "| prompt tuning, B 1, P 6, S 5 |" in text and result["setting"]["cpu"] in text


def test_the_peak_is_this_process_own_and_the_limit_holds() -> None:
    code = (
        "import sys, torch; sys.path.insert(0, 'benchmarks'); from _training import limit_memory, memory\n"
        "before = memory(torch.device('cpu'))['peak']; torch.ones(50 << 20); limit_memory(2 << 30)\n"
        "print(before, memory(torch.device('cpu'))['peak'])\n"
        "try: torch.ones(1 << 30)\n"
        "except RuntimeError: print('refused')\n"
    )
    held = torch.ones(250 << 20)  # 1 GB, which a child's ru_maxrss would start from
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, peak, refused = done.stdout.split()
    assert held.nbytes > int(peak) >= int(before) + (190 << 20) and refused == "refused"


# -- all shapes, and the report ---------------------------------------------------------------------------------------


def test_every_shape_of_the_table_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def run(command: list[str], **unused: Any) -> subprocess.CompletedProcess[str]:
        commands.append(dict(zip(command[3::2], command[4::2], strict=True)))
        return subprocess.CompletedProcess(command, int("CARTRIDGE" in command))

    monkeypatch.setattr(bench_train.subprocess, "run", run)
    assert bench_train.table(argparse.Namespace(only=None, out=tmp_path, rounds=3)) == 1
    for given, (shape, _) in zip(commands, bench_train.TABLE.values(), strict=True):
        assert (given["--method"], given["--batch"], given["--own"]) == (
            shape.method,
            str(shape.batch),
            str(shape.own),
        )
        assert given["--virtual-tokens"] == str(shape.virtual_tokens)
        assert given["--micro-batches"] == str(shape.micro_batches)
    assert len({given["--json"] for given in commands}) == len(commands)


def result_of(shape: Shape, **changes: Any) -> dict[str, Any]:
    peft = {"rows": 8, "after_loading": 10**9, "peak": 9 * 10**9, "extrapolated": {"rows": 32, "peak": 33 * 10**9}}
    ours = {"rows": 32, "after_loading": 10**9, "peak": 3 * 10**9}
    result: dict[str, Any] = {
        "setting": {"cpu": "a CPU", "threads": 2, "isa": "avx512", "commit": "0123456789abcdef", "packages": {
            "torch": "1", "transformers": "2", "peft": "3"}},
        "shape": {**vars(shape), "base": "demo", "dtype": "float32"},
        "memory": {OURS: ours, PEFT: peft},
        "peft_micro_batches": 4,
        "samples": {OURS: {"total": [2.0, 2.0]}, PEFT: {"total": [14.0, 15.0]}},
        "ratios": {"peft, total": {"median": 7.25, "p20": 7.1, "p80": 7.4}},
        "share_of_ideal": {"median": 0.97, "p20": 0.96, "p80": 0.98},
        "asked": {"speed": 6.0, "memory": 0.05, "ideal": 0.9},
    }  # fmt: skip
    result["memory_ratios"] = bench_train.memory_ratios(result["memory"], shape.batch)
    return result | changes


def test_the_report_says_what_is_extrapolated(tmp_path: Path) -> None:
    result = result_of(Shape(32, 512, 64))
    verdicts = bench_train.verdicts(result)
    assert {what: met for what, (_, _, met) in verdicts.items()} == {"speed": True, "memory": False, "ideal": True}
    text = bench_train.markdown([(tmp_path / "r.json", result)])
    (row,) = (line for line in text.splitlines() if line.startswith("| prompt tuning"))
    assert row.split(" | ")[1:3] == ["14.50 s in 4 parts", "2.00 s"] and "7.25x (7.10 to 7.40)" in row
    assert "9.00 GB in 4 parts; at once 33.00 GB, extrapolated" in row and "0.33; 0.09, extrapolated" in row
    fits = result_of(Shape(8, 100, 128), peft_micro_batches=1)
    fits["memory"][PEFT] |= {"extrapolated": {"rows": 8, "peak": 81 * 10**8}}
    text = bench_train.markdown([(tmp_path / "r.json", fits)])
    assert "0.90 to 0.90 of measured" in text and "in 4 parts" not in text


# -- quality ----------------------------------------------------------------------------------------------------------


def test_padding_moves_behind_each_row() -> None:
    ids, mask = torch.tensor([[0, 0, 5, 0, 6], [1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, -100, 6], [-100, -100, -100, -100, 5]])
    ids, mask, labels = quality.pad_right(ids, mask, labels)
    assert ids.tolist() == [[5, 0, 6, 0, 0], [1, 2, 3, 4, 5]] and mask[0].tolist() == [1, 1, 1, 0, 0]
    assert labels[0].tolist() == [-100, -100, 6, -100, -100]


WORDS = ["[PAD]", "Review", ":", "Sentiment", "positive", "negative", "good", "fine", "bad", "poor", "film", "plot"]
SETTINGS = quality.Settings(
    virtual_tokens=3, rows=4, steps=3, seeds=2, eval_every=2, held_out=12, checked=6, learning_rate=0.05
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


@pytest.fixture(scope="module")
def reviews() -> list[Review]:
    found = []
    for number in range(48):
        positive = number % 2 == 0
        word = WORDS[6 + number % 4 // 2] if positive else WORDS[8 + number % 4 // 2]
        text = " ".join([word, *WORDS[10:][: 1 + number % 3 % 2], word][: 2 + number % 2])
        found.append(Review(text, 2.0 if positive else -2.0, held_out=number % 3 == 0))
    return found


def two_bases() -> tuple[Any, Any]:
    torch.manual_seed(0)
    base = quality.make_base("tiny", CPU, torch.float32)
    return base, copy.deepcopy(base)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_both_systems_learn_the_same(method: str, tokenizer: Any, reviews: list[Review], tmp_path: Path) -> None:
    settings = quality.Settings(**{**vars(SETTINGS), "method": method})
    found = quality.measure(two_bases(), tokenizer, reviews, settings)
    assert [len(runs) for runs in found["curves"].values()] == [2, 2]
    for peft, ours in zip(found["curves"][PEFT], found["curves"][OURS], strict=True):
        assert ours["step"] == peft["step"] == [0, 2, 3] and ours["seconds"] == sorted(ours["seconds"])
        assert ours["losses"] == pytest.approx(peft["losses"], rel=1e-3) and len(set(ours["losses"])) == 3
    first, second = (run["losses"][0] for run in found["curves"][OURS])
    assert first != second  # each seed starts elsewhere
    assert found["comparison"]["loss_differences"][0] < 1e-5 and max(found["logits"]) <= quality.TOLERANCE
    result = {"shape": vars(settings), "setting": result_of(Shape(1, 1, 1))["setting"], **found}
    quality.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    text = bench_train.markdown([(tmp_path / "plot.json", result)])
    assert "| ours |" in text and "plot.png" in text


def test_another_model_is_no_result(tokenizer: Any, reviews: list[Review], monkeypatch: pytest.MonkeyPatch) -> None:
    real = sentiment.label_logits
    monkeypatch.setattr(sentiment, "label_logits", lambda *args: real(*args) * 1.01)
    with pytest.raises(RuntimeError, match="PEFT's own logits differ"):
        quality.measure(two_bases(), tokenizer, reviews, SETTINGS)


def test_the_comparison_names_the_largest_differences() -> None:
    def run(accuracy: list[float], losses: list[float], seconds: float) -> dict[str, Any]:
        return {"accuracy": accuracy, "losses": losses, "step_seconds": [seconds, seconds]}

    curves = {
        PEFT: [run([0.5, 0.75], [1.0, 0.5], 2.0), run([0.5, 0.65], [2.0, 0.4], 2.0)],
        OURS: [run([0.5, 0.7], [1.0, 0.5], 1.0), run([0.5, 0.7], [2.0, 0.5], 1.0)],
    }
    found = quality.compare(curves, held_out=100)
    assert found["largest_difference"] == pytest.approx(0.05) and found["largest_difference_of_means"] < 1e-9
    assert found["largest_spread_of_seeds"] == pytest.approx(0.1)
    assert found["standard_error"] == pytest.approx((0.7 * 0.3 / 100) ** 0.5)
    assert found["loss_differences"] == pytest.approx([0.0, 0.25]) and found["speed"]["median"] == 2.0
