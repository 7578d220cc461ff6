# SPDX-License-Identifier: Apache-2.0
"""Serving many soft prompts at once over SmolLM2-135M: one batch of many prompts, and two servers under load.

    python benchmarks/bench_serve.py mixed --json benchmarks/results/cpu-2core-mixed.json
    python benchmarks/bench_serve.py load --vllm-python vllm-env/bin/python --faults 0.2 \\
        --json benchmarks/results/cpu-2core-load.json
    python benchmarks/bench_serve.py load --base-url http://127.0.0.1:8000 --prompts FOLDER   # a server of one's own
    softprompt-fast bench serve                                 # ``mixed``, as rows of the suite

``mixed``: rows of many prompts, of different lengths, in one ``generate`` call, against the same rows one prompt after
another, against PEFT with every adapter loaded and a loop over ``set_adapter``, and against transformers with the
prefixes expanded into one left-padded cache. The systems take turns (A B C, A B C, ...) in one process, with new own
tokens in every round. Every row's greedy text is compared with that of the row alone, by this package in every round
and by PEFT in one: no ratio is given over another text.

``load``: requests over HTTP, some at a time and streamed, each for one of many prompts. The servers, this package's
own and vLLM behind the same command, are started in turn (A B A B), and one that is not measured does not run. Every
text is compared with the greedy text of its row alone. ``--faults`` has the servers of the last round answer once
more, with clients that misbehave mixed in; see ``_serve_load.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _serve_load as load_client
import torch
from _bases import DEMO, make_base
from _harness import ROOT, Times, Turns, markdown_setting, ratio, show, shown, spread, take_turns, write_json
from _prompts import make_peft, make_prompt, prompt_values
from _suite import Case, Prepared
from bench_model import DIFFERING, differing
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

import softprompt_fast as spf

RESULTS = ROOT / "benchmarks" / "results"
OURS, ONE_BY_ONE, PEFT, EXPANDED = "ours", "ours, one prompt after another", "peft", "expanded"
SYSTEMS = {
    OURS: "ours, one batch",
    ONE_BY_ONE: "ours, one prompt after another",
    PEFT: "PEFT, a loop over `set_adapter`",
    EXPANDED: "transformers, prefixes expanded into one left-padded cache",
}
LENGTHS = (64, 96, 128, 160, 256, 320, 384, 512)
LOAD_SHAPE = ("requests", "concurrent", "num_prompts", "shortest", "longest", "own_least", "own_most", "new")
ASKED = {ONE_BY_ONE: 3.0, PEFT: 6.0}
"""Of the speed-up at the shape above."""


# -- one batch of many prompts ----------------------------------------------------------------------------------------


class Mixed:
    """The systems of ``mixed`` over one base: row ``i`` has prompt ``i % N``."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.base = make_base(args.base, torch.device("cpu"), torch.float32)
        self.base.generation_config.eos_token_id = None
        self.base.generation_config.pad_token_id = 0
        self.rows, self.own, self.new = args.batch, args.own, args.new
        lengths = args.virtual_tokens
        values = {f"p{i}-{length}": prompt_values(self.base, length, i) for i, length in enumerate(lengths)}
        self.names = list(values)
        self.lengths = dict(zip(self.names, lengths, strict=True))
        self.row_names = [self.names[i % len(self.names)] for i in range(self.rows)]
        self.peft = make_peft(self.base, values) if PEFT in args.systems else None
        self.model = spf.SoftPromptModel(self.base).eval()
        for name, prompt in values.items():
            self.model.add_prompt(name, make_prompt(self.base, prompt))
        self.prefixes = {name: self.model.compile_prompt(name) for name in self.names}
        self.options = {"max_new_tokens": self.new, "do_sample": False}

    def runs(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {
            OURS: self.one_batch,
            ONE_BY_ONE: self.one_by_one,
            PEFT: self.with_peft,
            EXPANDED: self.with_expanded,
        }

    def inputs(self) -> Tensor:
        """int64 ``[rows, own]``."""
        return torch.randint(0, self.base.get_input_embeddings().num_embeddings, (self.rows, self.own))

    def one_batch(self, ids: Tensor) -> Tensor:
        return self.model.generate(ids, prompt=self.row_names, **self.options)[:, self.own :]

    def by_prompt(self, run: Callable[[str, Tensor], Tensor], ids: Tensor) -> Tensor:
        """`run` for the rows of one prompt after another; int64 ``[rows, new]``."""
        out = torch.empty(self.rows, self.new, dtype=torch.long)
        for number, name in enumerate(self.names):
            rows = slice(number, None, len(self.names))
            out[rows] = run(name, ids[rows])[:, self.own :]
        return out

    def one_by_one(self, ids: Tensor) -> Tensor:
        return self.by_prompt(lambda name, rows: self.model.generate(rows, prompt=name, **self.options), ids)

    def with_peft(self, ids: Tensor) -> Tensor:
        return self.by_prompt(self._peft_rows, ids)

    def _peft_rows(self, name: str, ids: Tensor) -> Tensor:
        assert self.peft is not None
        self.peft.set_adapter(name)
        return self.peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **self.options)

    def with_expanded(self, ids: Tensor) -> Tensor:
        """Every row's prefix at the right edge of a cache as long as the longest, the rest masked: what plain
        transformers can do in one call, at a copy a row. Positions come from the mask, so they are each row's own."""
        longest = max(self.lengths.values())
        cache, mask = DynamicCache(), torch.zeros(self.rows, longest + self.own, dtype=torch.long)
        for row, name in enumerate(self.row_names):
            mask[row, longest - self.lengths[name] :] = 1
        for layer in range(self.base.config.num_hidden_layers):
            padded = []
            for tensors in ("keys", "values"):
                first = getattr(self.prefixes[self.names[0]], tensors)[layer]  # [Hkv, P, D]
                whole = first.new_zeros(self.rows, first.shape[0], longest, first.shape[2])
                for row, name in enumerate(self.row_names):
                    whole[row, :, longest - self.lengths[name] :] = getattr(self.prefixes[name], tensors)[layer]
                padded.append(whole)
            cache.update(*padded, layer)
        out = self.base.generate(ids, past_key_values=cache, attention_mask=mask, **self.options)
        return out[:, self.own :]

    def alone(self, ids: Tensor) -> Tensor:
        """Each row by itself; int64 ``[rows, new]``."""
        found = [
            self.model.generate(row[None], prompt=name, **self.options)[0, self.own :]
            for row, name in zip(ids, self.row_names, strict=True)
        ]
        return torch.stack(found)

    def alone_with_peft(self, ids: Tensor) -> Tensor:
        return torch.stack(
            [self._peft_rows(name, row[None])[0, self.own :] for row, name in zip(ids, self.row_names, strict=True)]
        )


# What the suite calls the systems, and its cases: the lengths of the prompts, and a row's own and new tokens.
SUITE = {OURS: "ours", ONE_BY_ONE: "one-by-one", PEFT: "peft-loop", EXPANDED: "expanded"}
CASES = {
    "mixed-b8-n4": (8, (32, 64, 96, 128), 16, 16),
    "mixed-b32-n8": (32, LENGTHS, 16, 32),
}


def prepare(base: str, batch: int, lengths: Sequence[int], own: int, new: int, names: frozenset[str]) -> Prepared:
    """One batch of many prompts, as :func:`mixed` times it; every text is compared with that of its row alone."""
    systems = {name for name, short in SUITE.items() if short in names}
    bench = Mixed(
        argparse.Namespace(base=base, batch=batch, virtual_tokens=lengths, own=own, new=new, systems=systems)
    )
    runs = bench.runs()
    short = copy.copy(bench)
    short.new, short.options = min(2, new), bench.options | {"max_new_tokens": min(2, new)}

    def differences(ids: Tensor, results: dict[str, Tensor]) -> dict[str, float]:
        alone = bench.alone(ids)
        return {name: differing(found, alone) for name, found in results.items()}

    return Prepared(
        {SUITE[name]: timed(runs[name]) for name in runs if name in systems},
        differences,
        "share of greedy tokens that differ from those of the row alone, up to a row's first difference",
        DIFFERING,
        inputs=bench.inputs,
        warm={SUITE[name]: timed(run) for name, run in short.runs().items()},
    )


def cases() -> Iterator[Case]:
    for name, (batch, lengths, own, new) in CASES.items():
        work = {"base": DEMO, "B": batch, "P": list(lengths), "S": own, "new": new, "dtype": "float32"}
        yield Case(
            "serve",
            name,
            work,
            tuple(SUITE.values()),
            partial(prepare, DEMO, batch, lengths, own, new),
            ("bank",),
            quick=name == "mixed-b8-n4",
            rounds=(1, 1),
        )


def timed(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Times]]:
    def turn(ids: Tensor) -> tuple[Tensor, Times]:
        started = time.perf_counter()
        out = run(ids)
        return out, {"total": time.perf_counter() - started}

    return turn


def mixed(args: argparse.Namespace) -> int:
    """Measure; the exit status says whether every text was that of its row alone."""
    bench = Mixed(args)
    systems: Turns = {name: timed(run) for name, run in bench.runs().items() if name in args.systems}
    given: list[Tensor] = []

    def inputs() -> Tensor:
        given.append(bench.inputs())
        return given[-1]

    samples, outputs = take_turns(systems, inputs, args.rounds, args.warmup, cold={PEFT})
    given = given[args.warmup :]
    alone = [bench.alone(ids) for ids in given]
    texts = {name: torch.cat(found) for name, found in outputs.items()} | {"each row alone": torch.cat(alone)}
    if bench.peft is not None:
        # A minute: PEFT computes the prompt again for every row.
        expected = bench.alone_with_peft(given[0])
        texts["each row alone"] = torch.cat([expected, *alone[1:]])
        texts["ours, each row alone"] = torch.cat(alone)
    result: dict[str, Any] = {
        "shape": {
            "base": args.base, "batch": args.batch, "virtual_tokens": list(args.virtual_tokens), "own": args.own,
            "new": args.new, "rounds": args.rounds,
        },
        "agreement": agreement(texts),
        "samples": samples,
        "ratios": {},
        "throughput": {
            name: spread([args.batch * args.new / seconds for seconds in times["total"]])
            for name, times in samples.items()
        },
    }  # fmt: skip
    wrong = [name for name, same in result["agreement"].items() if same["whole rows"] < 1]
    for name in samples.keys() - {OURS, *wrong}:
        if OURS not in wrong:
            result["ratios"][name] = ratio(samples[name]["total"], samples[OURS]["total"])
    at_the_shape = args.base == DEMO and tuple(args.virtual_tokens) == LENGTHS
    result["asked"] = ASKED if at_the_shape and (args.batch, args.own, args.new) == (32, 16, 32) else {}
    print_mixed(result)
    if args.json:
        write_json(args.json, result)
    return 1 if wrong else 0


def agreement(texts: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of ``[rows, new]`` tokens, the shares of equal tokens and of equal rows with those of each row alone."""
    expected = texts["each row alone"]
    same = {name: found == expected for name, found in texts.items() if name != "each row alone"}
    return {
        name: {"tokens": float(equal.float().mean()), "whole rows": float(equal.all(1).float().mean())}
        for name, equal in same.items()
    }


def print_mixed(result: dict[str, Any]) -> None:
    shape = result["shape"]
    title = f"{shape['batch']} rows, P {shape['virtual_tokens']}, own {shape['own']}, new {shape['new']}"
    table = Table(title=title)
    for column in ("system", "seconds, median (p20 to p80)", "new tokens a second", "one batch is faster by"):
        table.add_column(column)
    for name, times in result["samples"].items():
        over = result["ratios"].get(name)
        tokens = f"{result['throughput'][name]['median']:.0f}"
        table.add_row(SYSTEMS[name], shown(spread(times["total"]), " s"), tokens, shown(over) if over else "")
    show(table)
    print("agreement with each row alone:", json.dumps(result["agreement"]))
    for name, same in result["agreement"].items():
        if same["whole rows"] < 1:
            print(f"NO RATIO: {name} does not give every row's own text")
    for name, wanted in result["asked"].items():
        if name in result["ratios"]:
            found = result["ratios"][name]["median"]
            print(f"asked: {wanted}x over {name}: {'met' if found >= wanted else 'MISSED'}, {found:.2f}x")


# -- load -------------------------------------------------------------------------------------------------------------


def prompt_lengths(count: int, least: int, most: int) -> list[int]:
    """`count` lengths from `least` to `most`, evenly spaced."""
    steps = max(1, count - 1)
    return [round(least + (most - least) * i / steps) for i in range(count)]


@torch.no_grad()
def make_load(args: argparse.Namespace, folder: Path) -> list[load_client.Request]:
    """Prompts saved under `folder`, one subfolder each, and requests with the greedy text of each row alone.

    A request is kept where at every step the best logit leads the second best by ``--margin``: a text that rounding
    can change says nothing about whether it is wrong. How many were passed over is printed.
    """
    base, tokenizer, texts = load_model(args)
    model = spf.SoftPromptModel(base).eval()
    lengths = prompt_lengths(args.num_prompts, args.shortest, args.longest)
    names = [f"prompt-{number:02d}" for number in range(args.num_prompts)]
    for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
        model.add_prompt(name, make_prompt(base, prompt_values(base, length, number)))
        model.compile_prompt(name).save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(7)
    requests: list[load_client.Request] = []
    passed_over = 0
    while len(requests) < args.requests:
        own = int(torch.randint(args.own_least, args.own_most + 1, (), generator=generator))
        ids = texts(own, generator)
        name = names[len(requests) % len(names)]
        out = model.generate(
            torch.tensor([ids]),
            prompt=name,
            max_new_tokens=args.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(out.logits)[:, 0].topk(2).values  # [new, 2]
        new = out.sequences[0, own:].tolist()
        text = tokenizer.decode(new, skip_special_tokens=True)
        if float((best[:, 0] - best[:, 1]).min()) < args.margin:
            passed_over += 1
            continue
        requests.append(load_client.Request(name, ids, args.new, text))
    print(f"{len(requests)} requests; {passed_over} passed over, whose text rounding could change", flush=True)
    return requests


def load_model(args: argparse.Namespace) -> tuple[Any, Any, Callable[[int, torch.Generator], list[int]]]:
    """The base that is served, its tokenizer, and a maker of `count` own tokens from real reviews."""
    from softprompt_fast.demo.assets import load_demo_model, load_reviews

    base, tokenizer = load_demo_model()
    ids = tokenizer(" ".join(review.text for review in load_reviews()))["input_ids"]

    def take(count: int, generator: torch.Generator) -> list[int]:
        start = int(torch.randint(0, len(ids) - count, (), generator=generator))
        return ids[start : start + count]

    return base, tokenizer, take


def load(args: argparse.Namespace) -> int:
    """Measure; the exit status says whether no request was lost or wrong, of any server."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.prompts or Path(temporary) / "prompts"
        requests = make_load(args, folder)
        servers = make_servers(args, folder)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        for number in range(args.rounds):
            last = [args.faults] if args.faults and number == args.rounds - 1 else []
            for name, start in servers.items():
                with start() as server:
                    server.warm_up(requests)
                    for faults in [0.0, *last]:
                        run = asyncio.run(load_client.run(server.url, requests, args.concurrent, faults, args.api_key))
                        print(f"round {number}: {name}: {json.dumps(load_client.summary(run))}", flush=True)
                        runs[name].append(run)
    result = {
        "shape": {name: getattr(args, name) for name in LOAD_SHAPE},
        "faults": args.faults,
        "runs": runs,
    }
    print_load(result)
    if args.json:
        write_json(args.json, result)
    return 0 if all(load_client.healthy(run) for found in runs.values() for run in found) else 1


def make_servers(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Any]]:
    if args.base_url:
        return {"given": lambda: load_client.Running(args.base_url, args.api_key)}
    pythons = {"embedded": Path(sys.executable), "vllm": args.vllm_python}
    servers: dict[str, Callable[[], Any]] = {}
    for engine in args.engines:
        if (python := pythons[engine]) is None:
            print("vllm: skipped, --vllm-python does not say where it is installed")
            continue
        servers[engine] = lambda engine=engine, python=python: load_client.Started(
            engine, python, folder, args.server_options
        )
    return servers


def print_load(result: dict[str, Any]) -> None:
    print(markdown_load(result))
    for name, runs in result["runs"].items():
        for run in runs:
            for problem in run["problems"][:5]:
                print(f"{name}: {problem}")


# -- report -----------------------------------------------------------------------------------------------------------


def report() -> str:
    """Markdown of the results in benchmarks/results."""
    files = [*sorted(RESULTS.glob("*-mixed.json")), *sorted(RESULTS.glob("*-load.json"))]
    return markdown([json.loads(path.read_text(encoding="utf-8")) for path in files])


def markdown(results: Sequence[dict[str, Any]]) -> str:
    parts = [markdown_mixed(result) if "samples" in result else markdown_load(result) for result in results]
    where = sorted({markdown_setting(result["setting"]) for result in results})
    return "\n\n".join([*parts, *(f"Measured on {one}." for one in where)]) + "\n"


def markdown_mixed(result: dict[str, Any]) -> str:
    shape = result["shape"]
    lines = [
        f"{shape['batch']} rows over {len(shape['virtual_tokens'])} prompts (P "
        f"{', '.join(map(str, shape['virtual_tokens']))}), {shape['own']} own and {shape['new']} new tokens a row, "
        f"{shape['rounds']} rounds:",
        "",
        "| system | seconds | new tokens/s | one batch is faster by | asked | rows with the text of the row alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in result["samples"].items():
        over, wanted = result["ratios"].get(name), result["asked"].get(name)
        seconds, tokens = spread(times["total"])["median"], result["throughput"][name]["median"]
        cells = [SYSTEMS[name], f"{seconds:.2f}", f"{tokens:.0f}"]
        cells += [shown(over) if over else "" if name == OURS else "no agreement"]
        cells += [f"{wanted:.0f}x" if wanted else "", f"{result['agreement'][name]['whole rows']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_load(result: dict[str, Any]) -> str:
    shape = result["shape"]
    lines = [
        f"{shape['requests']} requests, {shape['concurrent']} at a time, over {shape['num_prompts']} prompts (P "
        f"{shape['shortest']} to {shape['longest']}), {shape['own_least']} to {shape['own_most']} own and "
        f"{shape['new']} new tokens, streamed:",
        "",
        "| server | requests/s | new tokens/s | first token p50, p95, p99 | request p50, p95, p99 | wrong | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    faults = []
    for name, runs in result["runs"].items():
        every = [load_client.summary(run) for run in runs]
        timed_runs = [run for run in every if not run["faults"]]

        def median(key: str, timed_runs: list[dict[str, Any]] = timed_runs) -> float:
            return statistics.median(run[key] for run in timed_runs)

        first = ", ".join(f"{median(f'first token p{p}'):.2f}" for p in (50, 95, 99))
        whole = ", ".join(f"{median(f'request p{p}'):.2f}" for p in (50, 95, 99))
        cells = [name, f"{median('requests/s'):.2f}", f"{median('tokens/s'):.0f}", f"{first} s", f"{whole} s"]
        cells += [str(sum(run["wrong"] for run in every)), str(sum(run["lost"] for run in every))]
        lines.append(f"| {' | '.join(cells)} |")
        for run in every:
            for kind, counts in run["faults"].items():
                said = ", ".join(f"{answer}: {count}" for answer, count in sorted(counts.items()))
                faults.append(f"| {name} | {kind} | {said} |")
    if faults:
        lines += ["", "Clients that misbehave, among the others in a run of its own, and what they got:", ""]
        lines += ["| server | client | answers |", "|---|---|---|", *faults]
    return "\n".join(lines)


# -- arguments --------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("mixed", help="one batch of many prompts")
    one.add_argument("--base", choices=[DEMO, "tiny"], default=DEMO, help="tiny: random weights, to try the script")
    one.add_argument("--batch", type=int, default=32)
    one.add_argument("--virtual-tokens", type=int, nargs="+", default=LENGTHS, help="one for each prompt")
    one.add_argument("--own", type=int, default=16)
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--warmup", type=int, default=1)
    one.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="ours always")
    many = commands.add_parser("load", help="servers under load")
    many.add_argument("--engines", nargs="+", choices=["embedded", "vllm"], default=["embedded", "vllm"])
    many.add_argument("--vllm-python", type=Path, help="the Python of an environment with vLLM and this package")
    many.add_argument(
        "--base-url",
        help="measure the server at this address, once it is healthy, and start none",
    )
    many.add_argument("--prompts", type=Path, help="folder to save the prompts to; default: a temporary one")
    many.add_argument("--api-key", help="what a server of one's own asks for")
    many.add_argument("--server-options", nargs=argparse.REMAINDER, default=[], help="passed on to both; last")
    many.add_argument("--requests", type=int, default=200)
    many.add_argument("--concurrent", type=int, default=16)
    many.add_argument("--num-prompts", type=int, default=20)
    many.add_argument("--shortest", type=int, default=32, help="virtual tokens of the shortest prompt")
    many.add_argument("--longest", type=int, default=512)
    many.add_argument("--own-least", type=int, default=8)
    many.add_argument("--own-most", type=int, default=48)
    many.add_argument("--margin", type=float, default=1e-3, help="of the best logit over the second best")
    many.add_argument("--rounds", type=int, default=1, help="starts of each server; vLLM's takes a minute")
    many.add_argument(
        "--faults", type=float, default=0.0, help="so many misbehaving clients a request, in one run more"
    )
    for sub in (one, many):
        sub.add_argument("--new", type=int, default=32)
        sub.add_argument("--json", type=Path, help="write samples, ratios and the setting here")
    args = parser.parse_args()
    if args.command == "mixed":
        args.systems = {OURS, *args.systems}
        if args.batch % len(args.virtual_tokens):
            parser.error("--batch: the prompts would not have the same number of rows")
    return {"mixed": mixed, "load": load}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
