# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel compiles without a spill, has the instructions that are meant to be in it, and takes what
tests/cuda_resources.json says. The compiler needs no GPU. Here for one architecture and, of the decode kernel, whose
instances take a minute each, one head dimension; ``make resources`` takes all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import cuda_resources
from tests.cuda_resources import REWRITE, Rows

WHY_NOT = cuda_resources.missing()
needs_compiler = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
ARCH = "sm_90a"
FILES = r"^(?!prefix_attention_d)|_d128"


@pytest.fixture(scope="module")
def compiled() -> Rows:
    return cuda_resources.compile_all((ARCH,), FILES, 2)


@pytest.mark.slow
@needs_compiler
def test_none_spills_and_all_have_their_instructions(compiled: Rows) -> None:
    assert compiled
    assert not cuda_resources.faults(compiled)


@pytest.mark.slow
@needs_compiler
def test_none_takes_other_than_the_table_says(compiled: Rows) -> None:
    version, table = cuda_resources.read()
    if version != cuda_resources.compiler():
        pytest.skip(f"the table is of nvcc {version}, here is {cuda_resources.compiler()}: other numbers")
    here = {name: row for name, row in table.items() if name.endswith(f"| {ARCH}") and re.search(FILES, name)}
    changes = cuda_resources.differences(compiled, here)
    assert not changes, "\n".join([*changes, f"if that is meant: {REWRITE}"])


def test_the_table_has_every_kernel_for_every_architecture() -> None:
    """Without compiling: the kernels by name, as the sources have them."""
    _, table = cuda_resources.read()
    rows = {tuple(name.split(" | ")) for name in table}
    for file, kernel, _ in rows:
        meant = {arch for arch in cuda_resources.ARCHITECTURES if cuda_resources.suits(Path(file), arch)}
        assert {arch for *which, arch in rows if which == [file, kernel]} == meant, (file, kernel)
    assert {arch for file, _, arch in rows if file.endswith("_sm90a.cu")} == {"sm_90a"}
    sources = "".join(p.read_text(encoding="utf-8") for p in cuda_resources.SOURCES.glob("*.cu*"))
    kernels = set(re.findall(r"__global__ void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(", sources))
    assert kernels == {re.split(r"[<(]", kernel)[0] for _, kernel, _ in rows}


def test_no_row_of_the_table_is_at_fault() -> None:
    assert not cuda_resources.faults(cuda_resources.read()[1])


ROW = "x.cu | merge_states<Half, 8> | sm_90a"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([40, 0, 0, "ld.128 st.128"], None),
        ([255, 8, 8, "ld.128 st.128"], "8 bytes are spilled"),
        ([40, 0, 0, "ld.128"], "it should have st.128, found ld.128"),
        ([40, 0, 0, "ld.128 serialized st.128"], "its wgmma are serialized"),
    ],
)
def test_what_counts_as_a_fault(row: list, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_resources, "disassembler", lambda: cuda_resources.ROOT)
    found = cuda_resources.faults({ROW: row})
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_what_ptxas_says_of_serialized_products() -> None:
    said = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to {} in "
    )
    said += "the function '_Z1k'\nptxas info    : Used 255 registers, used 1 barriers\n"
    assert cuda_resources.serialized(said.format("wgmma pipeline crossing function boundary at a function call")) == [
        "_Z1k"
    ]
    assert cuda_resources.serialized("ptxas info    : Used 255 registers, used 1 barriers") == []


def test_what_counts_as_a_difference() -> None:
    table: Rows = {ROW: [40, 0, 0, "ld.128"]}
    assert not cuda_resources.differences(table, table)
    assert cuda_resources.differences({ROW: [41, 0, 0, "ld.128"]}, table) == [f"{ROW}: registers changed, 40 -> 41"]
    assert cuda_resources.differences({}, table) == [f"{ROW}: in the table, but no kernel's"]
    assert cuda_resources.differences(table, {}) == [f"{ROW}: not in the table"]
