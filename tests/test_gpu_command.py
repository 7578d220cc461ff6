# SPDX-License-Identifier: Apache-2.0
"""``make gpu`` without a GPU: the same code at tiny sizes on a CPU, so that no typo ends its first real run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

import _gpu  # noqa: E402
import gpu  # noqa: E402


def command(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(SCRIPT), "--device", "cpu", "--smoke", "--out", str(out), *options]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)


def rows_in(out: Path, op: str) -> list[dict[str, Any]]:
    return json.loads((out / f"gpu-{op}.json").read_text())["rows"]


def test_every_test_file_runs_there_or_has_a_reason() -> None:
    assert all(gpu.not_run().values()), gpu.not_run()
    named = [*gpu.OP_FILES, *gpu.MODEL_FILES, *gpu.MORE_MODEL_FILES]
    assert all((ROOT / name).is_file() for name in named)


def test_budgets_fit() -> None:
    assert sum(seconds for seconds, _ in gpu.GROUPS.values()) + gpu.OP_TESTS + gpu.MODEL_TESTS <= 540
    assert gpu.TOTAL <= 540
    assert gpu.TOTAL >= gpu.BUILD + gpu.OP_TESTS + gpu.SANITIZER + gpu.BENCHMARKS_AT_LEAST + gpu.MODEL_TESTS


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    call = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "PyTorch finds no GPU here" in done.stderr and not list(tmp_path.iterdir())


def test_rows_are_checked_timed_and_written(tmp_path: Path) -> None:
    done = command(tmp_path, "--only", "decode", "backward", "prompt_concat", "first_layer", "merge_states")
    assert done.returncode == 0, done.stdout + done.stderr
    (first, *_, last) = rows_in(tmp_path, "prefix_attention")
    assert first["group"] == "decode" and last["group"] == "backward"
    others = [row for op in ("prompt_concat", "prompt_qkv", "merge_states") for row in rows_in(tmp_path, op)]
    for row in (first, last, *others):
        assert len(row["samples"]["ours"]) == 3 and row["seconds"]["ours"]["median"] > 0
        assert row["errors"]["ours"] < 1e-2 and "ours" not in row["not_timed"]
    assert [bar["met"] for bar in first["bars"]] != [None, None]
    setting = json.loads((tmp_path / "gpu-prefix_attention.json").read_text())["setting"]
    assert setting["packages"]["torch"] and "commit" in setting
    assert "== all ran well" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_models(tmp_path: Path) -> None:
    done = command(tmp_path, "--only", "models")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path, "models")
    assert len(rows) == 12 and all(row["samples"]["ours"] and not row["not_timed"] for row in rows)


def test_training(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done = command(tmp_path, "--only", "training")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path, "training")
    assert [len(row["samples"]) for row in rows] == [4, 4] and not any(row["not_timed"] for row in rows)
    assert all(bar["found"] > 0 for row in rows for bar in row["bars"])


def arguments(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "workers": 1, "tests": None, "smoke": True, **changes})


def test_failures_are_kept_and_a_stage_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "test_one.py").write_text(
        "import pytest, time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'no'\n"
        "@pytest.mark.skip('why')\ndef test_skipped(): pass\n"
        "def test_long(): time.sleep(100)\n"
    )
    files = ["test_one.py", "test_missing.py"]
    result = gpu.run_tests("some", files, 60, tmp_path, arguments(tests="not long"))
    assert [result[name] for name in ("status", "passed", "failed", "skipped")] == [1, 1, 1, 1]
    assert result["failures"][0]["test"].endswith("::test_bad") and "no" in result["failures"][0]["why"]
    result = gpu.run_tests("some", files, 5, tmp_path, arguments())
    assert result["status"] is None and result["seconds"] < 25
    assert [failure["test"].rpartition("::")[2] for failure in result["failures"]] == ["test_bad"]


def test_a_process_that_dies_takes_one_group_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *unused: Any) -> int:
        group = command[command.index("--measure") + 1]
        if group == "decode":
            return -11
        (tmp_path / ".gpu-done").write_text("prefill\n" if group == "prefill" else "backward\n")
        return -6 if group == "prefill" else 0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "STARTED", gpu.time.perf_counter())
    ended = gpu.run_benchmarks(["prefill", "decode", "backward"], tmp_path, arguments())
    assert ended["prefill"] == ended["backward"] == "ran" and "status" in ended["decode"]


def test_findings_of_the_sanitizer_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: list[str], budget: float, log: Path, environment: dict[str, str]) -> int:
        seen.append(command[2])
        wrong = command[2] == "racecheck"
        found = "========= Error: Race reported between Write access\n" if wrong else ""
        log.write_text(f"========= COMPUTE-SANITIZER\n{found}========= ERROR SUMMARY: {int(wrong)} errors\n")
        return 86 if wrong else 0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "compute-sanitizer")
    good, bad = gpu.sanitize(tmp_path, 30, arguments(device="cuda"))
    assert sorted(seen) == ["memcheck", "racecheck"] and good["status"] == 0 and not good["failures"]
    assert bad["failures"] == [{"test": "racecheck", "why": "Error: Race reported between Write access"}]
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.sanitize(tmp_path, 30, arguments(device="cuda")) == []


def test_a_wrong_system_is_not_timed() -> None:
    import torch

    case = _gpu.Case(
        "case",
        lambda: torch.randn(4),
        {
            "ours": _gpu.System(lambda x: x * 2),
            "wrong": _gpu.System(lambda x: x * 2.1),
            "nan": _gpu.System(lambda x: x * float("nan")),
            "absent": _gpu.System(lambda x: x.no_such_method()),
        },
        reference=lambda x: x * 2,
        bars=[_gpu.Bar("x of wrong", lambda row: row.speedup("wrong"), at_least=1.0)],
    )
    row = _gpu.run(case, torch.device("cpu"), {}, budget=5, rounds=3)
    assert list(row.samples) == ["ours"] and set(row.missing) == {"wrong", "nan", "absent"}
    found = row.as_dict()
    assert found["bars"] == [{"bar": "x of wrong", "found": None, "met": None}]
    assert "MISSED" not in gpu.shown_row({"backend": None, **found})
