# SPDX-License-Identifier: Apache-2.0
"""Two processes on the CPU (gloo): the gradient of one process over the whole batch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from softprompt_fast import SoftPromptModel
from tests.models import assert_same_logits, make_base, make_prompt, make_rows, pad_rows, relative_error

WORLD = 2
SECONDS = 150
LENGTHS = [[4, 7, 3, 6], [5, 2, 8, 1]]


def make_model(method: str = "PROMPT_TUNING") -> SoftPromptModel:
    model = SoftPromptModel(make_base())
    model.add_prompt("t", make_prompt(model.base, method))
    return model.train()


def batch(step: int, rank: int | None, prefix_only: bool = False) -> dict[str, Any]:
    """A rank's rows of a batch, or all of them (None); the loss's divisor is such that the ranks' mean is the whole.

    `prefix_only`: no label is predicted by the prompt itself, so gradients reach it through keys and values alone.
    """
    ids, mask = pad_rows(make_rows(LENGTHS[step], step), "right" if prefix_only else "left")
    labels = ids.masked_fill(mask == 0, -100)
    if prefix_only:
        labels[:, 0] = -100
    items = int((labels != -100).sum())
    rows = slice(None) if rank is None else slice(rank, None, WORLD)
    share = items if rank is None else items / WORLD
    return {
        "input_ids": ids[rows],
        "attention_mask": mask[rows],
        "labels": labels[rows],
        "num_items_in_batch": torch.tensor(share),
    }


def gradient(model: SoftPromptModel) -> Tensor:
    (parameter,) = (p for p in model.prompts.parameters() if p.requires_grad)
    assert parameter.grad is not None
    return parameter.grad.clone()


def ddp(rank: int) -> Tensor:
    model = make_model()
    wrapped = DistributedDataParallel(model)  # which reduces while it lives
    wrapped(**batch(0, rank)).loss.backward()
    assert all(p.grad is None for p in model.base.parameters())
    return gradient(model)


def ddp_accumulation(rank: int) -> tuple[Tensor, int]:
    model = make_model()
    wrapped = DistributedDataParallel(model)
    runs, compile_prompt = [], model._compiler.run
    model._compiler.run = lambda *args, **kwargs: runs.append(1) or compile_prompt(*args, **kwargs)  # type: ignore
    with wrapped.no_sync():
        wrapped(**batch(0, rank)).loss.backward()
    wrapped(**batch(1, rank)).loss.backward()
    return gradient(model), len(runs)


def ddp_refuses_the_context_manager(rank: int) -> list[str]:
    model = make_model()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel") as error, model.accumulate_gradients():
        wrapped(**batch(0, rank))
    return [str(error.value)]


def shard(model: SoftPromptModel, root: bool = False) -> SoftPromptModel:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model if root else model.base, mesh=mesh)
    return model


def fsdp(rank: int, *, root: bool = False, checkpointing: bool = False, prefix_only: bool = False) -> list[Tensor]:
    """Two steps' gradients; `root`: the prompts are sharded along, and gradients averaged; else each rank runs all."""
    model = make_model()
    if checkpointing:
        model.base.activation_checkpointing_enable()
    shard(model, root)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients = []
    for step in range(2):
        model(**batch(step, rank if root else None, prefix_only)).loss.backward()
        gradients.append(gradient(model))
        optimizer.step()
        optimizer.zero_grad()
    return [g.full_tensor() if root else g for g in gradients]


def fsdp_evaluation(rank: int) -> Tensor:
    model = shard(make_model().eval())
    with torch.no_grad():
        return model(batch(0, None)["input_ids"]).logits


def fsdp_accumulation(rank: int, *, root: bool = False) -> Tensor:
    model = shard(make_model(), root)
    with model.accumulate_gradients():
        for step in range(2):
            model(**batch(step, rank if root else None)).loss.backward()
    return gradient(model).full_tensor() if root else gradient(model)


def run_trainer(rank: int | None) -> Tensor:
    from tests.test_trainer import make_trainer, trained

    model = make_model()
    steps = {"gradient_accumulation_steps": 4 if rank is None else 2, "max_steps": 3}
    make_trainer(model, Path(os.environ["TRAINER_OUTPUT"]), **steps).train()
    return trained(model)


CHECKS: dict[str, Callable[[int], Any]] = {
    "ddp": ddp,
    "ddp_accumulation": ddp_accumulation,
    "ddp_refuses_the_context_manager": ddp_refuses_the_context_manager,
    "fsdp": fsdp,
    "fsdp_checkpointing": lambda rank: fsdp(rank, checkpointing=True),
    "fsdp_root": lambda rank: fsdp(rank, root=True),
    "fsdp_prefix_only": lambda rank: fsdp(rank, prefix_only=True),
    "fsdp_evaluation": fsdp_evaluation,
    "fsdp_accumulation": fsdp_accumulation,
    "fsdp_root_accumulation": lambda rank: fsdp_accumulation(rank, root=True),
    "trainer": run_trainer,
}


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "TRAINER_OUTPUT": folder,
    }
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check(rank)
        except Exception as error:
            import traceback

            results[name] = "".join(traceback.format_exception(error))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """What every check gave in each of two processes, which are started once and killed if they hang."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(work, (str(folder), port), nprocs=WORLD, join=False)
    try:
        end = time.monotonic() + SECONDS
        while not context.join(timeout=max(end - time.monotonic(), 0)):
            if time.monotonic() >= end:
                pytest.fail(f"two processes had not finished after {SECONDS} s")
    finally:
        for process in context.processes:
            process.kill()
    yield [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def whole_gradients(prefix_only: bool = False, steps: bool = False) -> list[Tensor]:
    """One process over the whole batches: with a step of the optimizer in between, or without."""
    model = make_model()
    optimizer = torch.optim.SGD(model.prompts.parameters(), lr=0.1)
    found = []
    for step in range(2):
        model(**batch(step, None, prefix_only)).loss.backward()
        found.append(gradient(model))
        if steps:
            optimizer.step()
            optimizer.zero_grad()
    return found


def found(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    for results in ranks:
        assert not isinstance(results[name], str), results[name]
    return [results[name] for results in ranks]


def test_ddp(ranks: list[dict[str, Any]]) -> None:
    for reduced in found(ranks, "ddp"):
        assert relative_error(reduced, whole_gradients()[0]) <= 1e-5


def test_ddp_accumulation(ranks: list[dict[str, Any]]) -> None:
    """Under ``no_sync`` a micro-batch leaves its gradients with the prompt's one run, which the last one reduces."""
    for reduced, runs in found(ranks, "ddp_accumulation"):
        assert relative_error(reduced, whole_gradients()[1]) <= 1e-5
        assert runs == 1


def test_ddp_refuses_the_context_manager(ranks: list[dict[str, Any]]) -> None:
    for (message,) in found(ranks, "ddp_refuses_the_context_manager"):
        assert "no_sync" in message


@pytest.mark.parametrize("name", ["fsdp", "fsdp_checkpointing", "fsdp_root", "fsdp_prefix_only"])
def test_fsdp(name: str, ranks: list[dict[str, Any]]) -> None:
    for gradients in found(ranks, name):
        for gradient, expected in zip(gradients, whole_gradients(name == "fsdp_prefix_only", steps=True), strict=True):
            assert relative_error(gradient, expected) <= 1e-5


@pytest.mark.parametrize("name", ["fsdp_accumulation", "fsdp_root_accumulation"])
def test_fsdp_accumulation(name: str, ranks: list[dict[str, Any]]) -> None:
    for gradient in found(ranks, name):
        assert relative_error(gradient, whole_gradients()[1]) <= 1e-5


def test_fsdp_evaluation(ranks: list[dict[str, Any]]) -> None:
    with torch.no_grad():
        expected = make_model().eval()(batch(0, None)["input_ids"]).logits
    for logits in found(ranks, "fsdp_evaluation"):
        assert_same_logits(logits, expected)


def test_trainer(ranks: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Trainer in two processes, two micro-batches each: the steps of one process with four."""
    monkeypatch.setenv("TRAINER_OUTPUT", str(tmp_path))
    expected = run_trainer(None)
    for prompt in found(ranks, "trainer"):
        assert relative_error(prompt, expected) <= 1e-5
