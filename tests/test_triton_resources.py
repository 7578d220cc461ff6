# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel variant in use compiles for sm_80, sm_90 and sm_100 without a spill and fits the chip, and takes
no more than tests/triton_resources.json says. The compiler needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

triton = pytest.importorskip("triton")

from tests import triton_resources, triton_variants  # noqa: E402
from tests.triton_resources import REWRITE, Rows  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> Any:
    """In a process of its own: kernels that are interpreted here cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_resources", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Any]:
    """Minutes of both cores, so once for all workers of a run."""
    if worker_id == "master":
        return run()
    shared = tmp_path_factory.getbasetemp().parent / "triton_resources.json"
    with FileLock(shared.with_suffix(".lock")):
        if not shared.is_file():
            shared.write_text(json.dumps(run()), encoding="utf-8")
        return json.loads(shared.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_variant_compiles(compiled: dict[str, Any]) -> None:
    assert not compiled["failed"]


@pytest.mark.slow
def test_none_spills_or_outgrows_a_chip(compiled: dict[str, Any]) -> None:
    """Which blocks just fit the registers differs between compilers: spills are held to the table's version."""
    version, _ = triton_resources.read()
    wrong = triton_resources.beyond_limits(compiled["rows"])
    assert not [text for text in wrong if version == triton.__version__ or "spill" not in text]


@pytest.mark.slow
def test_16_bit_products_run_on_tensor_cores(compiled: dict[str, Any]) -> None:
    assert not triton_resources.without_tensor_cores(compiled["rows"])


@pytest.mark.slow
def test_none_takes_more_than_the_table_says(compiled: dict[str, Any]) -> None:
    version, table = triton_resources.read()
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, here is {triton.__version__}: another compiler, other numbers")
    changes = triton_resources.differences(compiled["rows"], table)
    assert not changes, "\n".join([*changes, f"if that is meant: {REWRITE}"])


def test_the_table_has_a_row_for_every_variant_and_no_other() -> None:
    """Without compiling anything; which kernels a variant launches is seen above."""
    _, table = triton_resources.read()
    assert {tuple(name.split(" | ")[:2]) for name in table} == set(triton_resources.tasks(entries=False))


def test_the_document_shows_the_table() -> None:
    text = triton_resources.DOCUMENT.read_text(encoding="utf-8")
    _, table = triton_resources.read()
    assert text == triton_resources.documented(text, triton_resources.in_brief(table)), REWRITE


def test_every_op_has_variants() -> None:
    ops = {v.op for v in triton_variants.variants()}
    assert ops == {op for op in triton_variants.OPS if triton_variants.present(op)}
    titles = [v.title for v in triton_variants.variants()]
    assert len(titles) == len(set(titles))


ROW = "op forward | sm_80 | _forward"


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        ({ROW: [64, 0, 1024, 4, "mma"]}, []),
        ({ROW: [65, 0, 1024, 4, "mma"]}, [f"{ROW}: registers grew, 64 -> 65"]),
        ({ROW: [64, 0, 2048, 4, "mma"]}, [f"{ROW}: shared grew, 1024 -> 2048"]),
        ({ROW: [60, 0, 1024, 4, ""]}, [f"{ROW}: registers changed, 64 -> 60", "tensor_cores changed, 'mma' -> ''"]),
        ({}, [f"{ROW}: in the table, but nothing launches it"]),
        ({ROW: [64, 0, 1024, 4, "mma"], "other": [1, 0, 0, 4, ""]}, ["other: not in the table"]),
    ],
)
def test_what_counts_as_a_difference(found: Rows, parts: list[str]) -> None:
    changes = triton_resources.differences(found, {ROW: [64, 0, 1024, 4, "mma"]})
    assert len(changes) == len(parts)
    assert all(part in change for part, change in zip(parts, changes, strict=True))


def test_the_limits() -> None:
    small = "op | sm_86 | _forward"
    assert not triton_resources.beyond_limits({ROW: [255, 0, 163 * 1024, 4, ""]})
    assert "spill" in triton_resources.beyond_limits({ROW: [255, 3, 0, 4, ""]})[0]
    assert "sm_86 has 101376" in triton_resources.beyond_limits({small: [255, 0, 100 * 1024, 4, ""]})[0]
