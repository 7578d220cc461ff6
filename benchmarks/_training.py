# SPDX-License-Identifier: Apache-2.0
"""Training steps of PEFT and of this package: the same soft prompt and the same data, each over a base of its own."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import _memory
import torch
from _bases import make_base
from _harness import Times
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.integrations.fused_decoder import PACK_VARIABLE

PEFT, OURS, GENERIC = "peft", "ours", "ours-generic"  # the last: over the base's own modules
SYSTEMS = (OURS, PEFT, GENERIC)
METHODS = {"PROMPT_TUNING": "prompt tuning", "PREFIX_TUNING": "prefix tuning", "CARTRIDGE": "cartridge"}
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """Of one optimizer step.

    Attributes:
        batch: rows, over all micro-batches.
        own: own tokens a row.
        labels: how many of a row's last tokens carry a label; 0: all.
        micro_batches: forward and backward passes whose gradients are summed.
    """

    batch: int
    virtual_tokens: int
    own: int
    method: str = "PROMPT_TUNING"
    labels: int = 0
    micro_batches: int = 1

    @property
    def ideal(self) -> float | None:
        """Tokens that PEFT runs through the model over those that are needed, ``B (P + S) / (P + B S)``. None for
        prefixes: neither runs them through the model."""
        if self.method != "PROMPT_TUNING":
            return None
        own = self.batch * self.own
        return (self.batch * self.virtual_tokens + own) / (self.virtual_tokens + own)

    def __str__(self) -> str:
        said = f"{METHODS[self.method]}, B {self.batch}, P {self.virtual_tokens}, S {self.own}"
        said += f", labels at the last {self.labels}" if self.labels else ""
        return said + (f", {self.micro_batches} micro-batches" if self.micro_batches > 1 else "")


def make_peft(base: Any, method: str, virtual_tokens: int, seed: int = 0) -> Any:
    """PEFT's model with seeded values: virtual tokens near the embeddings of random words, or the base's own keys and
    values of such words. Behind random keys and values a deep base is so far from any text that rounding alone moves
    the gradient: 30 layers, N(0, 1), float32 against float64, PEFT by 2e-3 and this package by 1e-3; here by 3e-6."""
    from peft import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    configs = {"PROMPT_TUNING": PromptTuningConfig, "PREFIX_TUNING": PrefixTuningConfig, "CARTRIDGE": CartridgeConfig}
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, base.config.vocab_size, (virtual_tokens,), generator=generator)
    if method == "PROMPT_TUNING":
        values = base.get_input_embeddings().weight.detach()[words].float().cpu()
        values += 0.01 * torch.randn(values.shape, generator=generator)
    else:
        with torch.no_grad():
            cache = base(words[None].to(base.device), use_cache=True).past_key_values
        pairs = [x[0].transpose(0, 1).flatten(1) for layer in cache.layers for x in (layer.keys, layer.values)]
        values = torch.cat(pairs, dim=1).float().cpu()
    model = get_peft_model(base, configs[method](task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens))
    parameters = list(model.prompt_encoder["default"].parameters())  # a cartridge's frozen tokens, then the others
    with torch.no_grad():
        for parameter, rows in zip(parameters, values.split([len(p) for p in parameters]), strict=True):
            parameter.copy_(rows)
    return model


@dataclass
class Trainee:
    """One of `SYSTEMS` in training mode, and the parameters of its soft prompt that learn."""

    system: str
    model: Any
    parameters: list[torch.nn.Parameter]

    @classmethod
    def make(cls, system: str, base_name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Trainee:
        """Over a base of its own; the same weights and the same soft prompt for every system."""
        torch.manual_seed(0)
        return cls.over(system, make_base(base_name, device, dtype), shape.method, shape.virtual_tokens)

    @classmethod
    def over(cls, system: str, base: Any, method: str, virtual_tokens: int) -> Trainee:
        """Over ``base``. Both are used as their users would: PEFT over a base that this package has not touched, ours
        by ``accelerate``."""
        peft_model = make_peft(base, method, virtual_tokens).to(base.device).train()
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        if system == PEFT:
            return cls(system, peft_model, parameters)
        made = cls(system, spf.accelerate(peft_model), parameters)
        if system == GENERIC:
            with _environment({PACK_VARIABLE: "0"}):  # the first pass decides how the base is run
                made.step(torch.zeros(1, 2, dtype=torch.long, device=base.device), Shape(1, virtual_tokens, 2, method))
        return made

    def step(self, ids: Tensor, shape: Shape, micro_batches: int | None = None) -> tuple[Tensor, Times]:
        """Loss and gradients, ``[1 + number of trained values]`` in float32 on the CPU, of rows ``[B, S]`` without
        padding, and the seconds of forward and backward.

        Args:
            micro_batches: other than the shape's, such as where the memory asks for them.
        """
        labels = ids.clone()
        if shape.labels:
            labels[:, : -shape.labels] = IGNORED
        mask = torch.ones_like(ids)
        for parameter in self.parameters:
            parameter.grad = None
        parts = [t.chunk(min(micro_batches or shape.micro_batches, len(ids))) for t in (ids, mask, labels)]
        losses = []
        _wait(ids.device)
        started = time.perf_counter()
        with self._accumulating(len(parts[0]) > 1):
            for part, part_mask, part_labels in zip(*parts, strict=True):
                loss = self.model(input_ids=part, attention_mask=part_mask, labels=part_labels).loss
                # Each row has as many labels as any other.
                loss = loss * (len(part) / len(ids))
                loss.backward()
                losses.append(loss.detach())
        _wait(ids.device)
        seconds = time.perf_counter() - started
        gradients = [p.grad.flatten().float().cpu() for p in self.parameters if p.grad is not None]
        return torch.cat([torch.stack(losses).sum().float().cpu()[None], *gradients]), {"total": seconds}

    def _accumulating(self, several: bool) -> contextlib.AbstractContextManager[None]:
        """Ours computes the prompt once for all micro-batches of an optimizer step."""
        if several and self.system != PEFT:
            return self.model.accumulate_gradients()
        return contextlib.nullcontext()


def errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    """How far two results of :meth:`Trainee.step` differ: relative, gradients in the Euclidean norm; NaN for a NaN."""
    return {
        "loss": float((found[0] - expected[0]).abs() / expected[0].abs()),
        "gradient": float((found[1:] - expected[1:]).norm() / expected[1:].norm()),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process holds ("now") and held at most ("peak"): resident, or allocated on the GPU.

    The peak is the kernel's ``VmHWM`` where there is one. ``getrusage`` would not do: its ``ru_maxrss`` starts from
    that of the process which started this one.
    """
    if device.type == "cuda":
        return {"now": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
    try:
        return _memory.resident()
    except _memory.Unavailable:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"now": peak, "peak": peak}


def limit_memory(most: int) -> None:
    """From here on, asking for more than `most` bytes raises in this process, before another one is ended for it."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
