# SPDX-License-Identifier: Apache-2.0
"""One training step of a soft prompt over SmolLM2-135M: this package against PEFT, in seconds and in peak memory.

    python benchmarks/bench_train.py step --batch 16 --virtual-tokens 100 --own 32
    python benchmarks/bench_train.py step --method CARTRIDGE --batch 16 --virtual-tokens 512 --own 64
    python benchmarks/bench_train.py step --batch 16 --virtual-tokens 100 --own 32 --micro-batches 4
    python benchmarks/bench_train.py table               # all shapes of the table, to benchmarks/results
    softprompt-fast bench train                          # seconds alone, as rows of the suite

A step is the forward and the backward pass. The systems take turns (A B, A B, ...) in one process, with new tokens in
every round, and before any ratio is printed their losses and gradients are compared: a speed-up over another gradient
is none. All own tokens carry a label unless ``--labels`` says how many of the last ones do.

Memory is measured in a process of each system's own, after two steps: what it holds after loading, and its peak. PEFT
may need more than there is. Its need at this batch is extrapolated from an eighth and a quarter of it; where that is
too much, PEFT runs in micro-batches, as its users would have to, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _bases import DEMO, NAMES
from _harness import ROOT, markdown_setting, ratio, show, shown, spread, take_turns, write_json
from _suite import Case, Prepared
from _training import GENERIC, METHODS, OURS, PEFT, SYSTEMS, Shape, Trainee, errors, limit_memory, memory
from rich.table import Table

from softprompt_fast.integrations.fused_decoder import available_memory

RESULTS = ROOT / "benchmarks" / "results"
TABLE = {
    "b16-p100-s32": (Shape(16, 100, 32), {"speed": 4.2, "memory": 0.45, "ideal": 1.0}),
    "b8-p20-s64": (Shape(8, 20, 64), {"speed": 1.5, "ideal": 1.0}),
    "b8-p100-s128": (Shape(8, 100, 128), {"speed": 2.2, "memory": 0.6, "ideal": 1.0}),
    "b32-p512-s64": (Shape(32, 512, 64), {"speed": 6.0, "memory": 0.25, "ideal": 0.9}),
    "prefix-b16-p512-s64": (Shape(16, 512, 64, "PREFIX_TUNING"), {"speed": 2.0, "memory": 0.5}),
    "cartridge-b16-p512-s64": (Shape(16, 512, 64, "CARTRIDGE"), {"speed": 2.0, "memory": 0.5}),
    "accumulate-4xb4-p100-s32": (Shape(16, 100, 32, micro_batches=4), {}),
}
"""Shapes, and what each has to reach: seconds of PEFT's step over ours, our peak over PEFT's, speed over the ideal."""
ROUNDS = {"b32-p512-s64": 3}
"""Of shapes whose rounds last a minute."""
TOLERANCE = {torch.float32: {"loss": 1e-5, "gradient": 1e-4}, torch.bfloat16: {"loss": 1e-3, "gradient": 3e-2}}
"""Relative. In bfloat16 each gradient is off by 1e-2 from that in float32 (16 layers of width 512)."""
SHARE_OF_MEMORY = 0.7
"""Of what is available: as much as PEFT may take."""


# -- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(args: argparse.Namespace, system: str, rows: int, micro_batches: int = 1) -> dict[str, int]:
    """Bytes after loading and at most, in a process of its own that does two steps of ``rows`` rows.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    command = [sys.executable, __file__, "memory", "--system", system, *step_options(args)]
    command += ["--batch", str(rows), "--micro-batches", str(micro_batches)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-8:]))
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"memory: {system}, {rows} rows: {found}", file=sys.stderr, flush=True)
    return {**found, "rows": rows // micro_batches}


def fitting(
    batch: int, most: float, measure: Callable[[int], dict[str, int]]
) -> tuple[int, dict[str, int], dict[str, Any]]:
    """How many micro-batches of equal size, powers of two, keep a peak below ``most`` bytes.

    The peak grows linearly with the rows: a line through an eighth and a quarter of the batch says what the whole
    would take. ``measure`` takes rows; it is not called for more rows than the line allows.

    Returns:
        Micro-batches, what was measured at their size, and the extrapolation to the whole batch with its two points.
    """
    sizes = sorted({max(1, batch // 8), max(1, batch // 4)})
    points = [measure(rows) for rows in sizes]
    first = {"rows": 0, "peak": points[0]["after_loading"]} if len(points) == 1 else points[0]
    slope = (points[-1]["peak"] - first["peak"]) / (points[-1]["rows"] - first["rows"])

    def line(rows: int) -> int:
        return round(points[-1]["peak"] + slope * (rows - points[-1]["rows"]))

    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if batch % n == 0]
    count = next((n for n in counts if line(batch // n) <= most), counts[-1])
    known = {point["rows"]: point for point in points}
    found = known.get(batch // count) or measure(batch // count)
    return (
        count,
        found,
        {"peak": line(batch), "rows": batch, "from": [[p["rows"], p["peak"]] for p in (first, points[-1])]},
    )


def remember_memory(args: argparse.Namespace, shape: Shape, systems: list[str]) -> tuple[int, dict[str, Any]]:
    """PEFT's micro-batches, and by system what was measured."""
    count, found = shape.micro_batches, {}
    for system in systems:
        if system != PEFT or shape.micro_batches > 1:
            found[system] = measure_memory(args, system, shape.batch, shape.micro_batches)
            continue
        most = SHARE_OF_MEMORY * args.memory_limit
        count, at, whole = fitting(shape.batch, most, lambda rows: measure_memory(args, PEFT, rows))
        found[PEFT] = {**at, "extrapolated": whole}
    return count, found


def memory_ratios(found: dict[str, Any], batch: int) -> dict[str, dict[str, float]]:
    """Peaks of ours over PEFT's; "whole batch" over the extrapolated one where PEFT ran in micro-batches."""
    if PEFT not in found:
        return {}
    peft, ratios = found[PEFT], {}
    for system, ours in found.items():
        if system == PEFT:
            continue
        ratios[system] = {
            "peak": ours["peak"] / peft["peak"],
            "above loading": (ours["peak"] - ours["after_loading"]) / max(1, peft["peak"] - peft["after_loading"]),
        }
        if peft["rows"] < ours["rows"] and "extrapolated" in peft:
            ratios[system]["whole batch, extrapolated"] = ours["peak"] / peft["extrapolated"]["peak"]
    return ratios


def memory_of_this_process(args: argparse.Namespace) -> None:
    """In a process of its own: the JSON of :func:`measure_memory` as the last line printed."""
    device, shape = torch.device(args.device), shape_of(args)
    trainee = Trainee.make(args.system, args.base, shape, device, dtype_of(args))
    for parameter in trainee.model.parameters():
        parameter.detach().sum()  # weights are mapped from their file: none is in memory before it is read
    loaded = memory(device)["now"]
    for _ in range(2):
        trainee.step(torch.randint(0, vocabulary(trainee), (shape.batch, shape.own), device=device), shape)
    print(json.dumps({"after_loading": loaded, "peak": memory(device)["peak"]}))


# -- cases of the suite -----------------------------------------------------------------------------------------------

QUICK = ("b16-p100-s32", "b8-p20-s64")
PEFT_PARTS = {"b32-p512-s64": 4}
"""Micro-batches of PEFT where the whole batch needs more memory than such a machine has."""


def prepare(shape: Shape, base: str, parts: int, names: frozenset[str]) -> Prepared:
    """A step in float32 on the CPU, as :func:`step` times it; ``parts``: micro-batches of PEFT."""
    trainees = {
        name: Trainee.make(name, base, shape, torch.device("cpu"), torch.float32)
        for name in (OURS, PEFT)
        if name in names
    }
    limits, tokens = TOLERANCE[torch.float32], vocabulary(trainees[OURS])

    def differences(ids: Any, results: dict[str, Any]) -> dict[str, float]:
        """Of losses and of gradients, each over its tolerance: the larger; NaN for a NaN."""
        found = {name: errors(results[OURS], result) for name, result in results.items()}
        shares = {name: [e[what] / limits[what] for what in limits] for name, e in found.items()}
        return {name: max(both) if all(x == x for x in both) else float("nan") for name, both in shares.items()}

    weights = sum(p.numel() for p in trainees[OURS].model.base.parameters() if p.dim() == 2)
    once = shape.virtual_tokens if shape.method == "PROMPT_TUNING" else 0
    counts = {OURS: shape.micro_batches, PEFT: parts}
    return Prepared(
        {
            name: lambda ids, trainee=trainee, count=counts[name]: trainee.step(ids, shape, count)
            for name, trainee in trainees.items()
        },
        differences,
        f"relative error of loss and of gradient, each over its tolerance ({limits['loss']:.0e}, "
        f"{limits['gradient']:.0e})",
        1.0,
        inputs=lambda: torch.randint(0, tokens, (shape.batch, shape.own)),
        # One part takes as much memory as all of them one after another.
        warm={PEFT: lambda ids: trainees[PEFT].step(ids[: len(ids) // parts], shape, 1)},
        # Forward and the gradient of every product's input; no weight has a gradient.
        flops=4.0 * weights * (once + shape.batch * shape.own),
        moved=2 * 4.0 * weights,
    )


def cases() -> Iterator[Case]:
    for name, (shape, _) in TABLE.items():
        work = {"base": DEMO, "B": shape.batch, "P": shape.virtual_tokens, "S": shape.own, "dtype": "float32"}
        work |= {"method": shape.method, "micro-batches": shape.micro_batches}
        parts = PEFT_PARTS.get(name, shape.micro_batches)
        if parts > shape.micro_batches:
            work["micro-batches of PEFT"] = parts
        yield Case(
            "train",
            f"step-{name}",
            work,
            (OURS, PEFT),
            partial(prepare, shape, DEMO, parts),
            ("training",),
            quick=name in QUICK,
            rounds=(1, 1),
            memory=shape.batch <= 8,  # of the others, a process of its own tells: see `table`
        )


# -- one shape --------------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace) -> int:
    """Measure one shape; the exit status says whether all systems agree."""
    shape, device, dtype = shape_of(args), torch.device(args.device), dtype_of(args)
    systems = [OURS, *(s for s in (PEFT, GENERIC) if s in args.systems.split(","))]
    micro_batches, result = shape.micro_batches, {"shape": {**vars(shape), "base": args.base, "dtype": args.dtype}}
    if not args.no_memory:
        # Before this process itself holds a model.
        micro_batches, result["memory"] = remember_memory(args, shape, systems)
        result["memory_ratios"] = memory_ratios(result["memory"], shape.batch)
    result["peft_micro_batches"] = micro_batches
    trainees = {name: Trainee.make(name, args.base, shape, device, dtype) for name in systems}
    torch.manual_seed(1)
    samples, outputs = take_turns(
        {
            name: lambda ids, t=trainee: t.step(ids, shape, micro_batches if t.system == PEFT else None)
            for name, trainee in trainees.items()
        },
        lambda: torch.randint(0, vocabulary(trainees[OURS]), (shape.batch, shape.own), device=device),
        args.rounds,
        args.warmup,
    )
    result |= {"samples": samples, "agreement": {}, "ratios": {}, "share_of_ideal": {}, "ideal": shape.ideal}
    ours = samples[OURS]["total"]
    for name in trainees.keys() - {OURS}:
        rounds = [errors(a, b) for a, b in zip(outputs[OURS], outputs[name], strict=True)]
        worst = {what: max(e[what] for e in rounds) for what in ("loss", "gradient")}
        result["agreement"][name] = worst
        # All rounds and not the largest: a maximum forgets a NaN.
        if not all(e[what] <= TOLERANCE[dtype][what] for e in rounds for what in worst):
            continue
        over = ratio(samples[name]["total"], ours)
        result["ratios"][f"{name}, total"] = over
        if name == PEFT and shape.ideal:
            result["share_of_ideal"] = {key: value / shape.ideal for key, value in over.items()}
    agree = result["agreement"].keys() == {key.removesuffix(", total") for key in result["ratios"]}
    result["asked"] = (
        next((asked for known, asked in TABLE.values() if known == shape), {}) if args.base == DEMO else {}
    )
    print_step(shape, result, agree)
    if args.json:
        write_json(args.json, result)
    return 0 if agree else 1


def print_step(shape: Shape, result: dict[str, Any], agree: bool) -> None:
    table = Table(title=str(shape))
    for column in ("system", "seconds a step, median (p20 to p80)", "ours is faster by", "loaded, peak memory"):
        table.add_column(column)
    for name, times in result["samples"].items():
        over = result["ratios"].get(f"{name}, total")
        held = result.get("memory", {}).get(name)
        said = f"{gigabytes(held['after_loading'])}, {gigabytes(held['peak'])}" if held else ""
        if held and held["rows"] < shape.batch:
            said += f" at {held['rows']} rows"
        more = f", {n} micro-batches" if name == PEFT and (n := result["peft_micro_batches"]) > 1 else ""
        table.add_row(name + more, shown(spread(times["total"]), " s"), shown(over) if over else "", said)
    show(table)
    print("agreement with ours:", json.dumps(result["agreement"]))
    if not agree:
        print(f"NO RATIO where losses or gradients differ by more than {TOLERANCE}")
    if result["share_of_ideal"]:
        print(f"the tokens' ratio is {result['ideal']:.2f}x: reached {shown(result['share_of_ideal'], '%')}")
    if PEFT in result.get("memory", {}):
        print("memory, ours over PEFT's:", json.dumps(result["memory_ratios"]))
        if (whole := result["memory"][PEFT].get("extrapolated")) is not None:
            print(f"PEFT at {whole['rows']} rows, extrapolated: {gigabytes(whole['peak'])}")
    for what, (found, wanted, met) in verdicts(result).items():
        print(f"asked: {what} {wanted}: {'met' if met else 'MISSED'}, {found:.3f}")


def verdicts(result: dict[str, Any]) -> dict[str, tuple[float, float, bool]]:
    """Found, asked and whether that is met, of what :data:`TABLE` asks for and this result holds."""
    asked, found = result["asked"], {}
    if f"{PEFT}, total" in result["ratios"]:
        found["speed"] = result["ratios"][f"{PEFT}, total"]["median"]
    if result["share_of_ideal"]:
        found["ideal"] = result["share_of_ideal"]["median"]
    if OURS in (ratios := result.get("memory_ratios", {})):
        found["memory"] = ratios[OURS].get("whole batch, extrapolated", ratios[OURS]["peak"])
    return {
        what: (value, asked[what], value <= asked[what] if what == "memory" else value >= asked[what])
        for what, value in found.items()
        if what in asked
    }


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def vocabulary(trainee: Trainee) -> int:
    return trainee.model.get_input_embeddings().num_embeddings


def shape_of(args: argparse.Namespace) -> Shape:
    return Shape(args.batch, args.virtual_tokens, args.own, args.method, args.labels, args.micro_batches)


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.dtype)


def step_options(args: argparse.Namespace) -> list[str]:
    """What makes another process run the same base on the same shape, but for its rows."""
    names = ("virtual_tokens", "own", "method", "labels", "base", "device", "dtype", "memory_limit")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


# -- all shapes, and the report ---------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> int:
    """Each shape of the table in a process of its own; a result for each."""
    failed = []
    for name in args.only or TABLE:
        shape, _ = TABLE[name]
        path = args.out / f"cpu-{os.cpu_count()}core-train-{name}.json"
        rounds = min(args.rounds, ROUNDS.get(name, args.rounds))
        command = [sys.executable, __file__, "step", "--rounds", str(rounds)]
        command += ["--json", os.path.relpath(path, ROOT)]
        for option in ("batch", "virtual_tokens", "own", "method", "micro_batches"):
            command += [f"--{option.replace('_', '-')}", str(getattr(shape, option))]
        print(f"== {name}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all systems agree")
    return 1 if failed else 0


def report() -> str:
    """Markdown of the results in benchmarks/results: seconds and memory of the steps, and the accuracy of training."""
    files = sorted(RESULTS.glob("*-train-*.json"))
    return markdown([(path, json.loads(path.read_text(encoding="utf-8"))) for path in files])


def markdown(results: list[tuple[Path, dict[str, Any]]]) -> str:
    """Two tables and where they were measured: the steps, and the accuracy that training reaches."""
    steps = [result for _, result in results if "samples" in result and "memory_ratios" in result]
    qualities = [(path, result) for path, result in results if "curves" in result]
    lines = []
    if steps:
        lines += ["| a step | PEFT | ours | faster by | of the tokens' ratio | PEFT's peak | our peak | share |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        order = {shape: number for number, (shape, _) in enumerate(TABLE.values())}
        shaped = [(Shape(**{k: r["shape"][k] for k in Shape.__dataclass_fields__}), r) for r in steps]
        shaped.sort(key=lambda pair: order.get(pair[0], len(order)))
        lines += [markdown_row(shape, result) for shape, result in shaped]
        whole = [r["memory"][PEFT] for shape, r in shaped if r["memory"][PEFT]["rows"] == shape.batch]
        if known := [found["extrapolated"]["peak"] / found["peak"] for found in whole if "extrapolated" in found]:
            lines += [
                "",
                f"Where PEFT fits, extrapolated peaks are {min(known):.2f} to {max(known):.2f} of measured ones.",
            ]
    for path, result in qualities:
        lines += ["", *markdown_quality(path, result)]
    where = {markdown_setting(result["setting"]) for result in (*steps, *(result for _, result in qualities))}
    return "\n".join([*lines, "", *(f"Measured on {one}." for one in sorted(where)), ""])


def markdown_row(shape: Shape, result: dict[str, Any]) -> str:
    peft, ours = (spread(result["samples"][name]["total"])["median"] for name in (PEFT, OURS))
    held = result["memory"][PEFT]
    in_parts = f" in {n} parts" if (n := result["peft_micro_batches"]) > shape.micro_batches else ""
    peak, share = gigabytes(held["peak"]) + in_parts, result["memory_ratios"][OURS]["peak"]
    said = f"{share:.2f}"
    if "whole batch, extrapolated" in (ratios := result["memory_ratios"][OURS]):
        peak += f"; at once {gigabytes(held['extrapolated']['peak'])}, extrapolated"
        said += f"; {ratios['whole batch, extrapolated']:.2f}, extrapolated"
    over, share_of_ideal = result["ratios"].get(f"{PEFT}, total"), result["share_of_ideal"]
    cells = [str(shape), f"{peft:.2f} s{in_parts}", f"{ours:.2f} s", shown(over) if over else "no agreement"]
    cells += [
        f"{share_of_ideal['median']:.2f}" if share_of_ideal else "",
        peak,
        gigabytes(result["memory"][OURS]["peak"]),
    ]
    return f"| {' | '.join([*cells, said])} |"


def markdown_quality(path: Path, result: dict[str, Any]) -> list[str]:
    shape, found = result["shape"], result["comparison"]
    lines = [
        "| system | accuracy after the last step, by seed | mean | seconds of training, by seed |",
        "|---|---|---|---|",
    ]
    for system, runs in result["curves"].items():
        last = [run["accuracy"][-1] for run in runs]
        seconds = ", ".join(f"{run['seconds'][-1]:.0f}" for run in runs)
        lines += [f"| {system} | {', '.join(f'{a:.3f}' for a in last)} | {sum(last) / len(last):.3f} | {seconds} |"]
    said = (
        f"{METHODS[shape['method']].capitalize()}, P {shape['virtual_tokens']}, {shape['rows']} rows, "
        f"{shape['steps']} steps, accuracy on {shape['held_out']} held-out reviews. The two accuracies of a seed "
        f"differ by at most {found['largest_difference']:.3f} at any evaluation; seeds differ by up to "
        f"{found['largest_spread_of_seeds']:.3f} and a sample of this size has a standard error of "
        f"{found['standard_error']:.3f}. A step is {shown(found['speed'])} as fast as PEFT's."
    )
    image = path.with_suffix(".png").name
    return [*lines, "", said, "", f"![Accuracy against steps and against seconds](../benchmarks/results/{image})"]


# -- arguments --------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("step", help="one shape")
    own_memory = commands.add_parser("memory", help="the peak of one system, in this process")
    own_memory.add_argument("--system", choices=SYSTEMS, required=True)
    for sub in (one, own_memory):
        sub.add_argument("--method", choices=METHODS, default="PROMPT_TUNING")
        sub.add_argument("--batch", type=int, default=16, help="rows of an optimizer step")
        sub.add_argument("--virtual-tokens", type=int, default=100)
        sub.add_argument("--own", type=int, default=32, help="own tokens a row")
        sub.add_argument("--labels", type=int, default=0, help="how many last tokens a row carry a label; 0: all")
        sub.add_argument("--micro-batches", type=int, default=1, help="gradient accumulation, for every system")
        sub.add_argument("--base", choices=NAMES, default=DEMO, help="all but the demo's have random weights")
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
        sub.add_argument("--memory-limit", type=int, help="bytes that may be taken; by default what is available")
    one.add_argument("--systems", default=f"{OURS},{PEFT}", help="which, with commas, of: " + "; ".join(SYSTEMS))
    one.add_argument("--no-memory", action="store_true", help="measure no memory; PEFT then runs the batch at once")
    one.add_argument("--json", type=Path, help="write samples, ratios and the setting here")
    everything = commands.add_parser("table", help="all shapes of the table")
    everything.add_argument("--only", nargs="+", choices=TABLE)
    everything.add_argument("--out", type=Path, default=RESULTS)
    for sub in (one, everything):
        sub.add_argument("--rounds", type=int, default=5)
    one.add_argument("--warmup", type=int, default=1)
    args = parser.parse_args()
    if args.command in ("step", "memory"):
        if args.batch % args.micro_batches:
            parser.error("--batch: the micro-batches would not be of one size")
        if args.device != "cpu":
            args.memory_limit = args.memory_limit or torch.cuda.get_device_properties(args.device).total_memory
        else:
            args.memory_limit = args.memory_limit or available_memory() or sys.maxsize
            limit_memory(args.memory_limit)
    if args.command == "memory":
        memory_of_this_process(args)
        return 0
    return {"step": step, "table": table}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
