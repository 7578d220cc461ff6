# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M behind a soft prompt: this package against PEFT, against transformers with the prefix expanded, and
against vLLM with ``prompt_embeds`` and prefix caching.

    python benchmarks/bench_model.py serve --batch 32 --virtual-tokens 512 --own 16 --new 32
    python benchmarks/bench_model.py serve --batch 32 --systems ours,vllm --vllm-python vllm-env/bin/python
    python benchmarks/bench_model.py serve --batch 1 --virtual-tokens 100 --own 16 --new 32

The systems take turns (A B C, A B C, ...), one computing while the others rest, so that a machine that slows down
slows all of them; see ``_harness.py``. All get the same soft prompt, and in every round the same new own tokens, as a
server would: nothing but the soft prompt comes back. Before any ratio is printed, outputs are compared: a speed-up
over a different answer is none. vLLM lives in an environment of its own, see ``bench_vllm.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import Times, Turns, ratio, show, shown, spread, take_turns, write_json
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import softprompt_fast as spf
from softprompt_fast.demo.assets import demo_model_dir, load_demo_model

SHARED = "softprompt_fast.integrations.vllm.shared_prefix.SharedPrefixWorker"


class FirstToken(LogitsProcessor):
    """Notes when the first token's logits arrive."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return scores


class Vllm:
    """vLLM in a process of its own, which :meth:`close` ends; `shared`: with this package's attention.

    Raises:
        RuntimeError: it did not start; the message holds the end of what it printed.
    """

    def __init__(self, args: argparse.Namespace, prompt: Tensor, shared: bool = False) -> None:
        self.new = args.new
        self.folder = tempfile.TemporaryDirectory()
        file, log = Path(self.folder.name) / "prompt.safetensors", Path(self.folder.name) / "log"
        save_file({"prompt": prompt.detach().contiguous()}, file)
        script = Path(__file__).with_name("bench_vllm.py")
        command = [str(args.vllm_python), str(script), "--model", str(demo_model_dir()), "--prompt", str(file)]
        command += ["--tokens", str(args.virtual_tokens + args.own + args.new)]
        if args.vllm_block_size:
            command += ["--block-size", str(args.vllm_block_size)]
        environment = os.environ | ({"LD_PRELOAD": args.vllm_preload} if args.vllm_preload else {})
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


def make_models(base: Any, virtual_tokens: int) -> tuple[Any, spf.SoftPromptModel]:
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
    peft_model, ours = make_models(base, args.virtual_tokens)
    ours.eval()
    ones = torch.ones(args.batch, args.own, dtype=torch.long)
    prefix = ours.compile_prompt("default")

    def run(model: Any, ids: Tensor, **kwargs: Any) -> tuple[Tensor, Times]:
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

    def run_expanded(ids: Tensor) -> tuple[Tensor, Times]:
        started = time.perf_counter()
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(key.expand(args.batch, -1, -1, -1), value.expand(args.batch, -1, -1, -1), layer)
        filled = time.perf_counter() - started
        mask = torch.ones(args.batch, args.virtual_tokens + args.own, dtype=torch.long)
        out, times = run(base.generate, ids, past_key_values=cache, attention_mask=mask)
        return out, {name: seconds + filled for name, seconds in times.items()}

    systems: Turns = {
        "ours": lambda ids: run(ours.generate, ids, attention_mask=ones),
        "expanded": run_expanded,
        "peft": lambda ids: run(peft_model.generate, ids, attention_mask=ones),
    }
    systems = {name: system for name, system in systems.items() if name in args.systems}
    result: dict[str, Any] = {"prefix_bytes": prefix.nbytes}
    engines: list[Vllm] = []
    for name in ("vllm", "vllm-shared"):
        if name not in args.systems:
            continue
        if args.vllm_python is None:
            print(f"{name}: skipped, --vllm-python does not say where it is installed")
            continue
        try:
            engine = Vllm(args, peft_model.prompt_encoder["default"].embedding.weight, name == "vllm-shared")
        except (OSError, RuntimeError) as error:
            print(f"{name}: skipped, it does not start: {error}")
            continue
        engines.append(engine)
        systems[name], result[name] = engine, engine.setting
    try:
        # PEFT's first round is minutes long, and the allocator is warm by then.
        samples, outputs = take_turns(
            systems,
            lambda: torch.randint(0, base.config.vocab_size, (args.batch, args.own)),
            args.rounds,
            args.warmup,
            cold={"peft"},
        )
    finally:
        for engine in engines:
            engine.close()
    texts = {name: torch.cat(output) for name, output in outputs.items()}  # [rounds * B, new]
    same = {name: text == texts["ours"] for name, text in texts.items() if name != "ours"}
    result["agreement"] = {
        name: {"tokens": float(equal.float().mean()), "whole rows": float(equal.all(1).float().mean())}
        for name, equal in same.items()
    }
    return result | {"samples": samples}


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    table = Table(title=f"{args.workload}: batch {args.batch}, P {args.virtual_tokens}, own tokens {args.own}")
    for column in ("system", "what", "median (p20 to p80)", "ours is faster by"):
        table.add_column(column)
    ours, result["ratios"] = result["samples"]["ours"], {}
    for name, whats in result["samples"].items():
        for what, seconds in whats.items():
            compared = ""
            if name != "ours":
                result["ratios"][f"{name}, {what}"] = ratio(seconds, ours[what])
                compared = shown(result["ratios"][f"{name}, {what}"])
            table.add_row(name, what, shown(spread(seconds), " s"), compared)
    print("agreement with ours:", json.dumps(result["agreement"]))
    show(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=["serve"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--virtual-tokens", type=int, default=512)
    parser.add_argument("--own", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument(
        "--systems",
        default="ours,expanded,peft,vllm",
        help="which, with commas; ours always; there is vllm-shared, too",
    )
    parser.add_argument("--vllm-python", type=Path, help="the Python of an environment with vLLM")
    parser.add_argument("--vllm-preload", help="LD_PRELOAD for vLLM, which recommends tcmalloc and libiomp5")
    parser.add_argument("--vllm-block-size", type=int, help="tokens a block of vLLM's cache; 32 if P < 128")
    parser.add_argument("--json", type=Path, help="write samples, ratios and the setting here")
    args = parser.parse_args()
    args.systems = {"ours", *args.systems.split(",")}
    torch.manual_seed(0)
    result = serve(args)
    report(result, args)
    if args.json:
        shape = ("workload", "batch", "virtual_tokens", "own", "new", "rounds")
        write_json(args.json, {"shape": {name: getattr(args, name) for name in shape}, **result})


if __name__ == "__main__":
    main()
