# SPDX-License-Identifier: Apache-2.0
"""What every test starts from: one device, one thread, one seed, no network."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests start Python in folders of their own, where a relative path would find another copy of the package, or none.
if path := os.environ.get("PYTHONPATH"):
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
if os.environ.get("SOFTPROMPT_FAST_TEST_DEVICE", "cpu") == "cpu":
    # Before a Triton kernel is defined: on the CPU they run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
# Before CUDA starts: without a workspace of its own cuBLAS may sum in another order from call to call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests import cuda_emulated
from tests.device import DEVICE, ON_GPU
from tests.interpreter import look_dtypes_up_once, loop_to_a_tensor, patch_once_a_launch, round_like_a_gpu

# Tests run in several processes at once; more threads than cores would only wait for one another.
torch.set_num_threads(1)
if not ON_GPU:
    # Before the ops are imported, which look for their backends.
    if (library := cuda_emulated.library()[0]) is not None:
        os.environ["SOFTPROMPT_FAST_CUDA_EMULATED"] = str(library)
    round_like_a_gpu()
    loop_to_a_tensor()
    look_dtypes_up_once()
    patch_once_a_launch()
else:
    # Before test modules are imported, which make tensors too.
    torch.set_default_device(DEVICE)
    # What is compared with is PyTorch at its most exact.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@pytest.fixture(autouse=ON_GPU)
def _steps_are_not_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU transformers compiles the decode steps of a static cache, half a minute a model: two files have it."""
    from transformers import GenerationMixin

    if request.module.__name__.rpartition(".")[2] not in ("test_gpu", "test_compile"):
        monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda *args: False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws random numbers draws the same ones alone, in a suite and in any order."""
    torch.manual_seed(0)
