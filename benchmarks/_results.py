# SPDX-License-Identifier: Apache-2.0
"""Rows of the result files: those that ``softprompt-fast bench`` writes, and those of older scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _harness import ROOT
from _suite import OURS, SYSTEMS, Row, compared, read_rows, spread

RESULTS = ROOT / "benchmarks" / "results"
OLDER_NAMES = {
    "SDPA": "sdpa",
    "SDPA, heads repeated": "sdpa-repeated",
    "FlexAttention": "flex",
    "torch": "autograd",
    "ours, one prompt after another": "one-by-one",
}


def load(paths: Iterable[Path] | None = None) -> list[Row]:
    """Of all files that hold some, the suite's own first: a row that an older script has as well is that of the suite.

    Args:
        paths: default: those of benchmarks/results.
    """
    files = sorted(RESULTS.glob("*.json")) if paths is None else list(paths)
    known: dict[str, Row] = {}
    older = []
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        if is_suite(result):
            known |= {row.id: row for row in read_rows(path)}
        else:
            older.append(result)
    for result in older:
        for row in older_rows(result):
            known.setdefault(row.id, row)
    return list(known.values())


def is_suite(result: dict[str, Any]) -> bool:
    rows = result.get("rows", ())
    return bool(rows) and "id" in rows[0]


def older_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Of bench_model.py serve, bench_train.py step, bench_serve.py mixed and bench_prefix_attention.py, whose samples
    were kept. Ratios are withheld where those scripts withheld them."""
    shape = result.get("shape", {})
    if "rows" in result and "rates" in result["rows"][0]:
        for row in result["rows"]:
            yield from _older_attention(row, result["setting"])
    elif "samples" in result and shape.get("workload") == "serve":
        work = {"base": "demo", **_work(shape)}
        case = f"model/generate-demo-b{shape['batch']}-p{shape['virtual_tokens']}"
        worst = {name: 1 - same["tokens"] for name, same in result["agreement"].items()}
        yield from _older(case, work, result, worst, "share of greedy tokens that differ from ours")
    elif "samples" in result and "micro_batches" in shape:
        from bench_train import TABLE

        name = next(name for name, (one, _) in TABLE.items() if all(shape[k] == v for k, v in vars(one).items()))
        worst = {name: max(e["loss"] / 1e-5, e["gradient"] / 1e-4) for name, e in result["agreement"].items()}
        parts = result["peft_micro_batches"]
        more = {"micro-batches of PEFT": parts} if parts > shape["micro_batches"] else {}
        more |= {"base": "demo", "method": shape["method"], "micro-batches": shape["micro_batches"]}
        said = "relative error of loss and of gradient, each over its tolerance (1e-05, 1e-04)"
        yield from _older(f"train/step-{name}", {**more, **_work(shape)}, result, worst, said)
    elif "samples" in result and "throughput" in result:
        worst = {name: 1 - same["tokens"] for name, same in result["agreement"].items()}
        count = len(shape["virtual_tokens"])
        said = "share of greedy tokens that differ from those of the row alone"
        yield from _older(f"serve/mixed-b{shape['batch']}-n{count}", _work(shape), result, worst, said)


def _work(shape: dict[str, Any]) -> dict[str, Any]:
    names = {"batch": "B", "virtual_tokens": "P", "own": "S", "new": "new"}
    return {short: shape[name] for name, short in names.items() if name in shape} | {"dtype": "float32"}


def _older(
    case: str, work: dict[str, Any], result: dict[str, Any], worst: dict[str, float], compared_: str
) -> Iterator[Row]:
    place = _place(result["setting"])
    for name, times in result["samples"].items():
        system = "peft-loop" if case.startswith("serve/") and name == "peft" else OLDER_NAMES.get(name, name)
        for what, seconds in times.items():
            row = _row(case, system, what, work, place, seconds)
            row.agreement = {"compared": compared_, "error": worst.get(name, 0.0)}
            ratios = result["ratios"]
            if name != OURS and (name in ratios or f"{name}, {what}" in ratios):
                row.ratio = compared(seconds, result["samples"][OURS][what])
            yield row


def _older_attention(found: dict[str, Any], setting: dict[str, Any]) -> Iterator[Row]:
    shape = found["shape"]
    backward = "torch" in found["samples"]
    what = (
        "backward"
        if backward
        else "prefill"
        if shape["queries"] > 1
        else "decode1"
        if shape["batch"] == 1
        else "decode"
    )
    case = f"op/prefix_attention-{what}-b{shape['batch']}-p{shape['prefix']}"
    case += "-cold" if found["inputs"] == "cold" else ""
    names = ("batch", "queries", "own", "prefix", "q_heads", "kv_heads", "head_dim")
    work = {short: shape[n] for short, n in zip(("B", "S", "T", "P", "Hq", "Hkv", "D"), names, strict=True)}
    samples, place = found["samples"], _place(setting)
    rates = {
        "flops": 1e9 * max(rate["median"] for name, rate in found["rates"].items() if name != "copy"),
        "bytes": 1e9 * found["rates"]["copy"]["median"],
    }
    for name, seconds in samples.items():
        if name in found["rates"] or name == "FlexAttention, heads repeated":
            continue
        row = _row(case, OLDER_NAMES.get(name, name), "call", {**work, "dtype": "float32"}, place, seconds)
        row.flops, row.bytes, row.rates = found["flops"], found["bytes"], rates
        if name == OURS:
            row.roofline = min(found["share_of_roofline"].values(), key=lambda share: share["median"])
        else:
            row.ratio = compared(seconds, samples[OURS])
        yield row


def _place(setting: dict[str, Any]) -> dict[str, Any]:
    device = f"{setting['cpu']}, {setting['threads']} threads, {setting['isa']}"
    return {
        "device": device,
        "versions": setting["packages"],
        "commit": setting["commit"],
        "command": setting["command"],
    }


def _row(
    case: str, system: str, what: str, work: dict[str, Any], place: dict[str, Any], seconds: Sequence[float]
) -> Row:
    identity = f"{case}/{system}/{what.replace(' ', '-')}"
    peer = SYSTEMS.get(system, system)
    return Row(identity, work, peer, **place, seconds=spread(seconds), samples=list(seconds))
