# SPDX-License-Identifier: Apache-2.0
"""``generate`` behind a soft prompt: this package against PEFT, against transformers with the prefix expanded, and
against vLLM with ``prompt_embeds`` and prefix caching.

    softprompt-fast bench model
    softprompt-fast bench --only model/generate-demo-b32-p512 --full

All get the same soft prompt, and in every round the same new own tokens, as a server would: only the soft prompt
comes back. vLLM lives in an environment of its own, see ``bench_vllm.py``; ``SOFTPROMPT_FAST_VLLM_PYTHON`` says where
(default: ``.venv-vllm`` of the checkout, which ``make test-vllm`` makes), and ``SOFTPROMPT_FAST_VLLM_PRELOAD`` is its
LD_PRELOAD, for which it recommends tcmalloc and libiomp5.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from _bases import DEMO, make_base
from _harness import ROOT, Times
from _peers import generation_peers, greedy
from _prompts import make_peft, make_prompt, prompt_values
from _suite import OURS, Case, Prepared, Turn, reason
from safetensors.torch import save_file
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.demo.assets import demo_model_dir

SHARED = "softprompt_fast.integrations.vllm.shared_prefix.SharedPrefixWorker"
DIFFERING = 0.02
"""Share of greedy tokens that may differ: where two logits are as good as equal, rounding decides."""


@dataclass(frozen=True)
class Shape:
    """Of a call: rows, virtual tokens, own and new tokens a row."""

    batch: int
    virtual_tokens: int
    own: int = 16
    new: int = 32

    @property
    def work(self) -> dict[str, Any]:
        return {"B": self.batch, "P": self.virtual_tokens, "S": self.own, "new": self.new, "dtype": "float32"}


class Vllm:
    """vLLM in a process of its own, which :meth:`close` ends; `shared`: with this package's attention.

    Raises:
        RuntimeError: it did not start; the message holds the end of what it printed.
    """

    def __init__(self, python: str, shape: Shape, prompt: Tensor, shared: bool = False) -> None:
        self.new = shape.new
        self.folder = tempfile.TemporaryDirectory()
        file, log = Path(self.folder.name) / "prompt.safetensors", Path(self.folder.name) / "log"
        save_file({"prompt": prompt.detach().contiguous()}, file)
        script = Path(__file__).with_name("bench_vllm.py")
        command = [python, str(script), "--model", str(demo_model_dir()), "--prompt", str(file)]
        command += ["--tokens", str(shape.virtual_tokens + shape.own + shape.new)]
        if shape.virtual_tokens < 128:  # its prefix cache holds whole blocks, of 128 tokens by default
            command += ["--block-size", "32"]
        environment = dict(os.environ)
        if preload := os.environ.get("SOFTPROMPT_FAST_VLLM_PRELOAD"):
            environment["LD_PRELOAD"] = preload
        if shared:
            command += ["--worker-extension", SHARED]
            environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment,
            text=True,
        )
        self.log = log
        self.setting = self._read()

    def __call__(self, ids: Tensor) -> tuple[Tensor, Times]:
        assert self.process.stdin is not None
        print(json.dumps({"ids": ids.tolist(), "new": self.new}), file=self.process.stdin, flush=True)
        answer = self._read()
        self.setting["cached"] = answer["cached"]
        return torch.tensor(answer["ids"]), answer["times"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("\n".join(self.log.read_text().splitlines()[-20:]))
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()  # closes its input, which is its sign to end
        self.folder.cleanup()


def a_token(times: Times, new: int) -> Times:
    """With the seconds a token after the first."""
    return times | ({"token": (times["total"] - times["first token"]) / (new - 1)} if new > 1 else {})


@lru_cache(maxsize=1)
def _loaded(base_name: str) -> tuple[Any, spf.SoftPromptModel]:
    """A base for the peers, and this package's model over one of its own; kept for the cases that follow."""
    bases = []
    for _ in range(2):
        torch.manual_seed(0)
        bases.append(make_base(base_name, torch.device("cpu"), torch.float32))
        bases[-1].generation_config.eos_token_id = None
        bases[-1].generation_config.pad_token_id = 0
    return bases[0], spf.SoftPromptModel(bases[1]).eval()


def differing(found: Tensor, expected: Tensor) -> float:
    """Share of greedy tokens ``[B, new]`` that differ, up to a row's first difference: what follows one continues
    another text."""
    unequal = found != expected
    seen = unequal.cumsum(1) <= unequal  # up to the first difference and with it
    return float((unequal & seen).sum() / seen.sum())


def prepare(base_name: str, shape: Shape, names: frozenset[str]) -> Prepared:
    base, model = _loaded(base_name)
    name, values = f"p{shape.virtual_tokens}", prompt_values(base, shape.virtual_tokens, 0)
    if name not in model.prompt_names:
        model.add_prompt(name, make_prompt(model.base, values))
    prefix = model.compile_prompt(name)
    ones = torch.ones(shape.batch, shape.own, dtype=torch.long)
    peft = make_peft(base, {name: values}) if "peft" in names else None

    def of(new: int) -> dict[str, Turn]:
        """Turns that end after so many tokens."""
        return {
            OURS: lambda ids: greedy(model, ids, new, attention_mask=ones, prompt=name),
            **generation_peers(base, prefix, new),
            **({"peft": lambda ids: greedy(peft, ids, new, attention_mask=ones)} if peft else {}),
        }

    turns, short = of(shape.new), of(min(2, shape.new))
    engines, skipped = [], {}
    for engine in names & VLLM:
        try:
            engines.append(Vllm(vllm_python(), shape, values, shared=engine == "vllm-shared"))
            turns[engine] = engines[-1]
        except (OSError, RuntimeError) as error:
            skipped[engine] = reason(error)

    def with_tokens(turn: Turn, ids: Tensor) -> tuple[Tensor, Times]:
        out, times = turn(ids)
        return out, a_token(times, shape.new)

    def close() -> None:
        for engine in engines:
            engine.close()

    flops, moved = needed(base, shape, prefix.nbytes)
    vocabulary = base.get_input_embeddings().num_embeddings
    return Prepared(
        {one: partial(with_tokens, turns[one]) for one in turns if one in names},
        lambda ids, out: {one: differing(tokens, out[OURS]) for one, tokens in out.items()},
        "share of greedy tokens that differ from ours, up to a row's first difference",
        DIFFERING,
        inputs=lambda: torch.randint(0, vocabulary, (shape.batch, shape.own)),
        flops=flops,
        moved=moved,
        # The first token takes the most memory, the second a step. What is compiled for a length has no short turn.
        warm={one: short[one] for one in short if one != "static-compiled"},
        skipped=skipped,
        elsewhere=dict.fromkeys(VLLM, "vLLM runs in processes of its own"),
        close=close,
    )


def vllm_python() -> str:
    """Raises: FileNotFoundError: there is none."""
    python = os.environ.get("SOFTPROMPT_FAST_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    if not Path(python).is_file():
        raise FileNotFoundError("vLLM: SOFTPROMPT_FAST_VLLM_PYTHON does not say where it is installed")
    return python


def needed(base: Any, shape: Shape, prefix_bytes: int) -> tuple[float, float]:
    """Floating-point operations of the products with weights, and bytes: weights, and the prefix, read once a pass."""
    embeddings = {id(base.get_input_embeddings().weight), id(base.get_output_embeddings().weight)}
    layers = sum(p.numel() for p in base.parameters() if p.dim() == 2 and id(p) not in embeddings)
    head = base.get_output_embeddings().weight.numel()
    flops = 2.0 * shape.batch * (layers * (shape.own + shape.new - 1) + head * shape.new)
    return flops, shape.new * (4.0 * (layers + head) + prefix_bytes)


VLLM = {"vllm", "vllm-shared"}
SYSTEMS = ("ours", "expanded", "static-compiled", "peft", "vllm", "vllm-shared")
LONGEST = Shape(32, 512)
SHAPES = {
    # Base, shape, what is left out of the quick run (None: the case is).
    "demo-b1-p100": (DEMO, Shape(1, 100), {"static-compiled", *VLLM}),
    "demo-b8-p128": (DEMO, Shape(8, 128), {"static-compiled", *VLLM}),
    "demo-b16-p20": (DEMO, Shape(16, 20), None),
    "demo-b32-p512": (DEMO, LONGEST, {"static-compiled", "peft", *VLLM}),
    "360m-b8-p128": ("SmolLM2-360M", Shape(8, 128, new=16), {"static-compiled", "peft"}),
}


def cases() -> Iterator[Case]:
    for name, (base, shape, slow) in SHAPES.items():
        # vLLM's package reads a model from its folder, which one with random weights has not; starting takes a minute.
        without = VLLM if base != DEMO else set() if shape == LONGEST else {"vllm-shared"}
        systems = tuple(one for one in SYSTEMS if one not in without)
        work = {"base": base, **shape.work}
        yield Case(
            "model",
            f"generate-{name}",
            work,
            systems,
            partial(prepare, base, shape),
            ("generate",),
            quick=slow is not None,
            slow=frozenset(systems) & (slow or frozenset()),
            rounds=(1, 1 if shape == LONGEST else 2),
            memory=True,
        )
