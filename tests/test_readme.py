# SPDX-License-Identifier: Apache-2.0
"""Every code block of the README and of two guides runs; the table of backends says what the registry says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from softprompt_fast.backends._registry import BACKENDS, OPS, available_backends
from tests import warm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
PROMPT_BANK = (ROOT / "docs" / "prompt-bank.md").read_text()


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


BLOCKS = blocks(README)
EXAMPLES = [
    code for text in (README, TRAINING, PROMPT_BANK) for language, code in blocks(text) if language == "python"
]


def test_every_block_has_a_language_that_this_file_runs():
    assert len(BLOCKS) == README.count("```") // 2 >= 4
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_block(number: int, tmp_path: Path):
    done = warm.run(EXAMPLES[number], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(EXAMPLES[number].strip().splitlines()) <= 15, "an example is ten lines and its imports"


def test_commands_of_bash_blocks_exist():
    if shutil.which("make") is None:
        pytest.skip("make is not installed, and the README's commands are make targets")
    for block in (text for language, text in BLOCKS if language == "bash"):
        for line in block.splitlines():
            command = line.split("#")[0].split()
            assert command[0] == "make", f"only make targets are checked here, found {line!r}"
            # -n: they would run this very test again.
            subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, check=True, capture_output=True)


def test_table_of_backends_is_true():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", README, flags=re.MULTILINE)
    assert [op for op, _ in rows] == list(OPS)
    for op, cells in rows:
        said = dict(zip(BACKENDS, (cell.strip() for cell in cells.split("|")), strict=True))
        here = available_backends(op)
        for backend, cell in said.items():
            exists = not any("not part of this version" in reason for reason in here[backend])
            assert cell == ("yes" if exists else "not yet"), (op, backend)
