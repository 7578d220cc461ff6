# SPDX-License-Identifier: Apache-2.0
"""What every test starts from: one thread, one seed, no network."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before a Triton kernel is defined: on the CPU they run in its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from tests.interpreter import loop_to_a_tensor, round_like_a_gpu

round_like_a_gpu()
loop_to_a_tensor()
# Tests run in several processes at once; more threads than cores would only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws random numbers draws the same ones alone, in a suite and in any order."""
    torch.manual_seed(0)
