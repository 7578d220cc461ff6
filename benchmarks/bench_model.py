# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M behind a soft prompt: this package against PEFT and against transformers with the prefix expanded.

    python benchmarks/bench_model.py serve --batch 32 --virtual-tokens 512 --own 16 --new 32
    python benchmarks/bench_model.py serve --batch 1 --virtual-tokens 100 --own 16 --new 32
    python benchmarks/bench_model.py train --batch 16 --virtual-tokens 100 --own 32

All systems run in one process, interleaved (A B C, A B C, ...); ratios are medians of per-round ratios, so that a
machine that slows down slows all of them. Before any ratio is printed, outputs are compared: a speed-up over a
different answer is none.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import softprompt_fast as spf
from softprompt_fast.demo.assets import load_demo_model


class FirstToken(LogitsProcessor):
    """Notes when the first token's logits arrive."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return scores


def make_systems(base: Any, virtual_tokens: int) -> tuple[Any, spf.SoftPromptModel]:
    """A PEFT prompt-tuning model with random virtual tokens of the vocabulary's scale, and ours over its tensors."""
    from peft import PromptTuningConfig, get_peft_model

    peft_model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual_tokens))
    weight = peft_model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        rows = torch.randint(0, base.config.vocab_size, (virtual_tokens,))
        weight.copy_(base.get_input_embeddings().weight[rows] + 0.01 * torch.randn_like(weight))
    return peft_model, spf.accelerate(peft_model)


def serve(args: argparse.Namespace) -> dict[str, Any]:
    base, _ = load_demo_model()
    base.generation_config.eos_token_id = None
    peft_model, ours = make_systems(base, args.virtual_tokens)
    ours.eval()
    ids = torch.randint(0, base.config.vocab_size, (args.batch, args.own))
    ones = torch.ones_like(ids)
    prefix = ours.compile_prompt("default")

    def run(model: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, float]]:
        first = FirstToken()
        started = time.perf_counter()
        out = model(
            input_ids=ids,
            max_new_tokens=args.new,
            do_sample=False,
            logits_processor=LogitsProcessorList([first]),
            **kwargs,
        )
        ended = time.perf_counter()
        assert first.at is not None
        return out[:, args.own :], {"first token": first.at - started, "total": ended - started}

    def run_expanded() -> tuple[torch.Tensor, dict[str, float]]:
        started = time.perf_counter()
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(key.expand(args.batch, -1, -1, -1), value.expand(args.batch, -1, -1, -1), layer)
        filled = time.perf_counter() - started
        mask = torch.ones(args.batch, args.virtual_tokens + args.own, dtype=torch.long)
        out, times = run(base.generate, past_key_values=cache, attention_mask=mask)
        return out, {name: seconds + filled for name, seconds in times.items()}

    systems: dict[str, Callable[[], Any]] = {
        "ours": lambda: run(ours.generate, attention_mask=ones),
        "expanded": run_expanded,
        "peft": lambda: run(peft_model.generate, attention_mask=ones),
    }
    systems = {name: system for name, system in systems.items() if name in args.systems}
    samples, outputs = interleave(systems, args.rounds, args.warmup)
    agreement = {name: float((outputs[name] == outputs["ours"]).float().mean()) for name in outputs if name != "ours"}
    return {"samples": samples, "agreement": agreement, "prefix_bytes": prefix.nbytes}


def train(args: argparse.Namespace) -> dict[str, Any]:
    base, _ = load_demo_model()
    peft_model, ours = make_systems(base, args.virtual_tokens)
    peft_model.train()
    ours.train()
    weight = peft_model.prompt_encoder["default"].embedding.weight
    ids = torch.randint(0, base.config.vocab_size, (args.batch, args.own))
    ones = torch.ones_like(ids)
    labels = ids.clone()
    if args.labels != "all":
        labels[:, : -int(args.labels)] = -100

    def step(model: Any) -> tuple[torch.Tensor, dict[str, float]]:
        weight.grad = None
        started = time.perf_counter()
        loss = model(input_ids=ids, attention_mask=ones, labels=labels).loss
        loss.backward()
        ended = time.perf_counter()
        return torch.cat([loss.detach()[None], weight.grad.flatten()]), {"total": ended - started}

    systems: dict[str, Callable[[], Any]] = {"ours": lambda: step(ours), "peft": lambda: step(peft_model)}
    systems = {name: system for name, system in systems.items() if name in args.systems}
    samples, outputs = interleave(systems, args.rounds, args.warmup)
    agreement = {}
    if "peft" in outputs:
        mine, theirs = outputs["ours"], outputs["peft"]
        agreement["peft"] = {
            "loss": float((mine[0] - theirs[0]).abs() / theirs[0].abs()),
            "gradient": float((mine[1:] - theirs[1:]).norm() / theirs[1:].norm()),
        }
    return {"samples": samples, "agreement": agreement}


def interleave(
    systems: dict[str, Callable[[], Any]], rounds: int, warmup: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in systems}
    outputs: dict[str, Any] = {}
    for number in range(-warmup, rounds):
        for name, system in systems.items():
            if number < 0 and name == "peft":
                continue  # its first round is minutes long; the allocator is warm by then
            outputs[name], times = system()
            if number >= 0:
                for what, seconds in times.items():
                    samples[name].setdefault(what, []).append(seconds)
            print(f"round {number}: {name} {times}", file=sys.stderr, flush=True)
    return samples, outputs


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{args.workload}: batch {args.batch}, P {args.virtual_tokens}, own tokens {args.own}")
    for column in ("system", "what", "median s", "min", "max", "ours is faster by"):
        table.add_column(column)
    result["ratios"] = {}
    for name, whats in result["samples"].items():
        for what, seconds in whats.items():
            ratios = [t / o for t, o in zip(seconds, result["samples"]["ours"][what], strict=True)]
            shown = (
                "" if name == "ours" else f"{statistics.median(ratios):.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]"
            )
            if name != "ours":
                result["ratios"][f"{name}, {what}"] = statistics.median(ratios)
            row = statistics.median(seconds), min(seconds), max(seconds)
            table.add_row(name, what, *(f"{t:.3f}" for t in row), shown)
    Console().print(table)
    print("agreement with ours:", json.dumps(result["agreement"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["serve", "train"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--virtual-tokens", type=int, default=512)
    parser.add_argument("--own", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--labels", default="all", help="train: 'all', or how many last tokens a row carry a label")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--systems", default="ours,expanded,peft", type=lambda text: text.split(","))
    parser.add_argument("--json", type=Path, help="write samples, ratios and versions here")
    args = parser.parse_args()
    torch.manual_seed(0)
    result = serve(args) if args.workload == "serve" else train(args)
    report(result, args)
    if args.json:
        import peft
        import transformers

        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        result["setting"] = {
            "workload": args.workload,
            **{name: getattr(args, name) for name in ("batch", "virtual_tokens", "own", "new", "labels", "rounds")},
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "commit": commit,
            "command": " ".join(["python", "benchmarks/bench_model.py", *sys.argv[1:]]),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
