# SPDX-License-Identifier: Apache-2.0
"""Rows of the result files: those that ``softprompt-fast bench`` writes, and those of older scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _harness import ROOT, compared, spread
from _suite import OURS, SYSTEMS, Row, read_rows

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
    timed = {row.parts[:3] for row in known.values() if row.seconds}
    return [row for row in known.values() if row.seconds or row.what or row.parts[:3] not in timed]


def is_suite(result: dict[str, Any]) -> bool:
    rows = result.get("rows", ())
    return bool(rows) and "id" in rows[0]


def older_rows(result: dict[str, Any]) -> Iterator[Row]:
    """Of ``make gpu``, bench_train.py step, bench_serve.py mixed, and of scripts that are cases now; all kept their
    samples. Ratios are withheld where those scripts withheld them."""
    shape = result.get("shape", {})
    if "ceilings" in result:
        for row in result["rows"]:
            yield from _gpu_case(row, result)
    elif "rows" in result and "rates" in result["rows"][0]:
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
                row.ratio = compared([seconds], [result["samples"][OURS][what]])
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
            row.ratio = compared([seconds], [samples[OURS]])
        yield row


def _gpu_case(found: dict[str, Any], result: dict[str, Any]) -> Iterator[Row]:
    """Of ``make gpu``, whose systems are compared with a float32 reference, and not timed where they are off."""
    kind = {"models": "model", "training": "train"}.get(found["group"], "op")
    case = f"{kind}/gpu-{slug(found['case'])}"
    setting, rates = result["setting"], result["ceilings"]
    place = _place(setting) | {"device": (setting["gpu"] or {"name": setting["cpu"]})["name"]}
    work = {"base": found["case"].split(":")[0], "dtype": "bfloat16", "case": found["case"]}
    floor = max(found["flops"] / rates["bf16 GEMM"], found["bytes"] / rates["copy"])
    for name, seconds in found["samples"].items():
        row = _row(case, slug(name), "call" if kind == "op" else "total", work, place, seconds)
        row.flops, row.bytes, row.rates = found["flops"], found["bytes"], None
        row.roofline = spread([floor / s for s in seconds]) if floor else None
        if name in found["errors"]:
            row.agreement = {"compared": "relative error against float32", "error": found["errors"][name]}
        if name != OURS and OURS in found["samples"]:
            row.ratio = compared([seconds], [found["samples"][OURS]])
        yield row
    for name, why in found["not_timed"].items():
        row = _row(case, slug(name), "", work, place, ())
        row.skipped = why
        yield row


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


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
    identity = "/".join(filter(None, (case, system, what.replace(" ", "-"))))
    peer = SYSTEMS.get(system, system)
    return Row(identity, work, peer, **place, seconds=spread(seconds) if seconds else None, samples=[list(seconds)])
