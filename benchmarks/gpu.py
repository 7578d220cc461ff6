# SPDX-License-Identifier: Apache-2.0
"""``make gpu``: build, test and measure on a machine with a GPU, with the packages that are there and no network.

    python benchmarks/gpu.py                                    # all stages, the most telling first
    python benchmarks/gpu.py --stages generate whole more --seconds 230     # what there was no time for
    python benchmarks/gpu.py --only prefill decode              # these rows of the table, no tests
    python benchmarks/gpu.py --device cpu --smoke               # the same code on a CPU at tiny sizes

Every stage has a budget; one that fails or runs out of it is reported and the next one begins. What is written, to
$OUT where that is set, else to benchmarks/results: ``gpu-tests.json``, ``gpu-tests.txt`` (what tests, build and
sanitizer printed), ``gpu-benchmarks.json`` (rows with samples) and the extensions that were built: put back into
softprompt_fast/ they spare the next run the build. The end of what is printed is a summary of at most SUMMARY
characters. The exit status says whether all tests and benchmarks ran well; a bar that was missed does not change it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 510.0
"""Seconds for everything: the limit on such a machine is 600, and its start and its files take their time too."""
BUILD, SANITIZER = 100.0, 50.0
SYSTEM = 60.0
"""Seconds after which one system of one case counts as hanging."""
SUMMARY, LOG = 11_000, 12 << 20
"""Characters of the end of what is printed, and bytes of a file: more is not brought back."""

KERNEL_FILES = [f"tests/test_cuda_{name}.py" for name in ("backend", "prompt_qkv", "decode", "models")]
OP_FILES = [f"tests/ops/test_{op}.py" for op in ("prefix_attention", "merge_states", "prompt_concat", "prompt_qkv")]
OP_FILES += ["tests/test_gpu.py"]
# The most telling first, should time run out.
MODEL_STEMS = (
    *("cuda_step", "model", "generate", "cache", "nn", "losses", "training"),
    *("bank", "bank_tiers", "bank_random", "concurrency", "compile", "encoder", "autocast", "continuous_batching"),
)
MODEL_FILES = [f"tests/test_{name}.py" for name in MODEL_STEMS]
MORE_MODEL_FILES = [f"tests/test_{name}.py" for name in ("encoder_decoder", "families", "generate_families", "oracle")]


@dataclass(frozen=True)
class Tests:
    """A stage of tests: its files, seconds and environment."""

    files: list[str]
    budget: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """A stage of benchmarks, by their groups, and its environment."""

    groups: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


#: First the kernels that have never run on a GPU, then the rows of the tables, then what takes long.
STAGES: dict[str, Tests | Rows | None] = {
    "build": None,
    "CUDA-kernels": Tests(KERNEL_FILES, 60.0),
    "rows": Rows(
        ("decode", "prompts", "prompt_qkv", "first_layer", "prompt_concat", "merge_states", "prefill", "backward")
    ),
    "tiles-of-64": Rows(("settings",), {"SOFTPROMPT_FAST_CUDA_TILE": "64"}),
    "192-prefix-blocks": Rows(("settings",), {"SOFTPROMPT_FAST_CUDA_PREFIX_BLOCKS": "192"}),
    "256-prefix-blocks": Rows(("settings",), {"SOFTPROMPT_FAST_CUDA_PREFIX_BLOCKS": "256"}),
    "who-is-last-merges": Rows(("settings",), {"SOFTPROMPT_FAST_CUDA_LATE": "1048576"}),
    "never-together": Rows(("settings",), {"SOFTPROMPT_FAST_CUDA_TOGETHER": "0"}),
    "ops": Tests(OP_FILES, 70.0),
    "models": Tests(MODEL_FILES, 50.0),
    "models-on-CUDA": Tests([*MODEL_FILES, *MORE_MODEL_FILES], 50.0, {"SOFTPROMPT_FAST_BACKEND": "cuda"}),
    "sanitizer": None,
    "generate": Rows(("generate",)),
    "whole": Rows(("models", "training")),
    "more": Tests(MORE_MODEL_FILES, 80.0),
}
#: Small shapes of every CUDA kernel, under compute-sanitizer's tools, which run side by side.
SANITIZED = KERNEL_FILES[:3]
SANITIZED_TESTS = "bfloat16 and (vectors or test_forward)"
SANITIZER_TOOLS = ("memcheck", "racecheck")
#: Every other test file, and why it does not run on a GPU.
CPU_FILES = {
    "the C++ kernels, their build and their checks": (
        "bad_input", "quantized_prefix", "cpu_backend", "cpu_linear", "cpu_training", "fused_decoder",
        "fused_training", "native", "simd",
    ),
    "files, text and host code, the same on every device": (
        "backends", "cli", "demo", "layout", "peft_io", "pipeline", "prefix_kv", "probe", "project", "prompt",
        "readme", "gpu_command", "accumulation", "arena", "bench_serve", "bench_train", "train_cli", "self_study",
        "bench_command", "examples", "vllm_front", "engine", "sampler", "server", "server_cli", "server_load", "peers",
        "guard",
    ),
    "training loops of other libraries, in processes of their own": ("trainer", "distributed"),
    "Triton's interpreter and cross-compiler": ("triton",),
    "the emulator and the compiler of the CUDA kernels": ("cuda_emulator", "cuda_resources"),
}  # fmt: skip

#: Seconds for each group of rows.
GROUPS = {
    "decode": 60.0,
    "prompts": 20.0,
    "settings": 12.0,
    "prompt_qkv": 30.0,
    "first_layer": 20.0,
    "prompt_concat": 15.0,
    "merge_states": 8.0,
    "prefill": 30.0,
    "backward": 20.0,
    "generate": 150.0,
    "models": 60.0,
    "training": 30.0,
}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


STARTED = time.perf_counter()


def left(total: float) -> float:
    return total - (time.perf_counter() - STARTED)


def run(command: list[str], budget: float, log: Path | None, environment: dict[str, str]) -> int | None:
    """Exit status; None: it ran out of its budget, was interrupted (pytest then says what it knows) and ended."""
    with contextlib.ExitStack() as stack:
        out: Any = None if log is None else stack.enter_context(log.open("a", encoding="utf-8"))
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=None if out is None else subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=max(budget, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# -- tests ------------------------------------------------------------------------------------------------------------


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, and every failure with the line that says why."""
    if not path.is_file():
        return {"failures": []}
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failures, skipped = [], 0
    for case in cases:
        skipped += case.find("skipped") is not None
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                why = (found.get("message") or "").strip().splitlines()
                failures.append(
                    {"test": f"{case.get('classname')}::{case.get('name')}", "why": (why or [""])[0][:300]}
                )
    return {
        "passed": len(cases) - skipped - len({f["test"] for f in failures}),
        "skipped": skipped,
        "failed": len({f["test"] for f in failures}),
        "failures": failures,
    }


def run_tests(stage: str, tests: Tests, budget: float, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    files = [name for name in tests.files if (ROOT / name).is_file()]
    say(f"{stage}: {len(files)} files, at most {budget:.0f} s")
    environment = {**os.environ, "SOFTPROMPT_FAST_TEST_DEVICE": args.device, "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", *files, "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += [f"--junitxml={junit}", "-o", "junit_logging=no", "--durations=15"]
        if importlib.util.find_spec("pytest_timeout") is not None:  # a kernel that hangs takes one test with it
            command += [f"--timeout={SYSTEM:.0f}", "--timeout-method=thread"]
        if importlib.util.find_spec("xdist") is not None and args.workers > 1:
            command += ["-n", str(args.workers), "--dist", "worksteal"]
        if args.tests:
            command += ["-k", args.tests]
        started = time.perf_counter()
        status = run(command, budget, out / "gpu-tests.txt", environment | tests.environment)
        result = {"stage": stage, "files": files, "status": status, "seconds": time.perf_counter() - started}
        result |= read_junit(junit)
    ended = "ran out of time" if status is None else f"exit status {status}"
    counts = ", ".join(f"{result.get(name, '?')} {name}" for name in ("passed", "failed", "skipped"))
    say(f"{stage}: {counts}; {ended}, {result['seconds']:.0f} s")
    return result


def sanitize(out: Path, budget: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Our kernels under compute-sanitizer; a finding makes a tool's exit status 86."""
    binary = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if binary is None:
        say("compute-sanitizer: not on the path")
        return []
    say(f"compute-sanitizer: {', '.join(SANITIZER_TOOLS)}, at most {budget:.0f} s")
    # PyTorch's caching allocator would hide an access beyond a tensor.
    environment = {**os.environ, "SOFTPROMPT_FAST_TEST_DEVICE": args.device, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pytest = [sys.executable, "-m", "pytest", *SANITIZED, "-q", "-p", "no:cacheprovider", "-k", SANITIZED_TESTS]

    def one(tool: str) -> dict[str, Any]:
        started, log = time.perf_counter(), Path(folder) / f"{tool}.txt"
        command = [binary, "--tool", tool, "--error-exitcode", "86", "--kernel-name", "kns=softprompt_fast", *pytest]
        status = run(command, budget, log, environment)
        said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        with (out / "gpu-tests.txt").open("a", encoding="utf-8") as whole:
            whole.write(f"== {tool}\n{said[-(4 << 20) :]}")
        lines = said.splitlines()
        found = [line.strip("= ") for line in lines if line.startswith("=========") and "ERROR SUMMARY" not in line]
        failures = [{"test": tool, "why": line} for line in found[1:]] if status == 86 else []
        return {"stage": tool, "status": status, "seconds": time.perf_counter() - started, "failures": failures}

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(SANITIZER_TOOLS)) as pool:
        return list(pool.map(one, SANITIZER_TOOLS))


def not_run() -> dict[str, str]:
    """Test files that are left out, by the reason why."""
    run = {Path(name).name for stage in STAGES.values() if isinstance(stage, Tests) for name in stage.files}
    why: dict[str, str] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        stem = path.stem.removeprefix("test_")
        if path.name not in run:
            reasons = (
                reason
                for reason, stems in CPU_FILES.items()
                if any(stem == s or (s == "triton" and stem.startswith(s)) for s in stems)
            )
            why[path.name] = next(reasons, "")
    return why


# -- benchmarks -------------------------------------------------------------------------------------------------------


#: Beside the results while a process measures: what it has finished, what it is at, what took others down.
STATE = ".gpu-state.json"


def read_state(out: Path) -> dict[str, Any]:
    path = out / STATE
    fresh: dict[str, Any] = {"finished": [], "running": None, "broken": []}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else fresh


def write_state(out: Path, state: dict[str, Any]) -> None:
    (out / STATE).write_text(json.dumps(state), encoding="utf-8")


def measure(groups: list[str], out: Path, device_name: str, smoke: bool) -> int:
    """In a process of its own: the groups' rows, each written as soon as it is known. 3: the device can't be used any
    more by this process."""
    import torch
    from _gpu import measure_ceilings, works
    from _gpu import run as run_case
    from _gpu_cases import CASES
    from _harness import setting

    device = torch.device(device_name)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    path, state = out / "gpu-benchmarks.json", read_state(out)
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        known = {"setting": setting(), "ceilings": measure_ceilings(device, smoke), "rows": []}
        said = ", ".join(f"{name} {rate / 1e12:.2f} T/s" for name, rate in known["ceilings"].items())
        where = known["setting"]["gpu"]
        print(f"{where['name'] if where else known['setting']['cpu']}\nmeasured ceilings: {said}", flush=True)
    there = {(row["group"], row["case"]) for row in known["rows"]}
    for group in groups:
        started, budget = time.perf_counter(), GROUPS[group]
        with torch.no_grad():
            for case in CASES[group](device, smoke):
                broken = [system for name, system in state["broken"] if name == case.name]
                if (group, case.name) in there or None in broken:
                    continue

                share = case.seconds or max(2.0, budget - (time.perf_counter() - started))
                limit = SYSTEM + (case.seconds or 0.0)

                def begin(system: str | None, name: str = case.name, limits: Any = (limit, limit + share)) -> None:
                    state["running"] = [name, system]
                    write_state(out, state)
                    # A hang ends the process, and is seen.
                    faulthandler.dump_traceback_later(limits[system is None], exit=True)

                how: dict[str, Any] = {"budget": share, "rounds": 3 if smoke else 25}
                row = run_case(case, device, known["ceilings"], **how, begin=begin, without=broken)
                faulthandler.cancel_dump_traceback_later()
                if not works(device):
                    return 3
                backend = case.backend or serving(group, device)
                known["rows"].append({"group": group, "backend": backend, **row.as_dict()})
                path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                print(shown_row(known["rows"][-1]), flush=True)
                state["running"] = None
                write_state(out, state)
                if time.perf_counter() - started > budget:
                    break
        state["finished"].append(group)
        write_state(out, state)
    return 0


def serving(group: str, device: Any) -> str | None:
    """The backend that "auto" tries first for a group's op, and has."""
    from softprompt_fast.backends import heuristics
    from softprompt_fast.backends._registry import OPS, available_backends

    reasons = available_backends(group if group in OPS else "prefix_attention")
    return next((name for name in heuristics.backend_order(device.type) if not reasons[name]), None)


def shown_row(row: dict[str, Any]) -> str:
    """A case in a few lines: seconds of every system, then the bars."""
    lines = [f"{row['case']}{' on ' + row['backend'] if row['backend'] else ''}"]
    for name, seconds in row["seconds"].items():
        found = f"{1e6 * seconds['median']:11.1f} us ({1e6 * seconds['p20']:.1f} to {1e6 * seconds['p80']:.1f})"
        if name == "ours":
            found += f"  {row['tflops_per_second']:.1f} TFLOP/s {row['gigabytes_per_second']:.0f} GB/s"
        elif name in row.get("ratios", {}):
            found += f"  ours is {row['ratios'][name]['median']:.2f}x as fast"
        error = f"  off by {row['errors'][name]:.1e}" if name in row["errors"] else ""
        lines.append(f"  {name:32}{found}{error}")
    lines += [f"  {name:32}not timed: {why}" for name, why in row["not_timed"].items()]
    for bar in row["bars"]:
        verdict = {None: "not measured", True: "met", False: "MISSED"}[bar["met"]]
        lines.append(f"  bar: {bar['bar']}: {'-' if bar['found'] is None else format(bar['found'], '.2f')} {verdict}")
    return "\n".join(lines)


def run_benchmarks(rows: Rows, out: Path, args: argparse.Namespace) -> dict[str, str]:
    """Group -> how it ended. A process that dies or hangs takes the system with it that it was at: another one goes on
    without that."""
    ended: dict[str, str] = {}
    groups = [*rows.groups]
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **rows.environment}
    (out / STATE).unlink(missing_ok=True)
    deaths: dict[str, int] = {}
    while groups and left(args.seconds) > 20:
        command = [sys.executable, str(Path(__file__)), "--device", args.device, "--out", str(out), "--measure"]
        command += [*groups, *(["--smoke"] if args.smoke else [])]
        status = run(command, left(args.seconds) - 5, None, environment)
        state = read_state(out)
        ended |= dict.fromkeys(state["finished"], "ran")
        groups = [group for group in groups if group not in state["finished"]]
        if not groups:
            break
        group, how = groups[0], "ran out of time" if status is None else f"ended its process with status {status}"
        at = state["running"]
        say(f"benchmark {group}: {how}, at {at}")
        deaths[group] = deaths.get(group, 0) + 1
        if status is None or deaths[group] > 4 or at is None:
            ended[group], groups = how, groups[1:]
        broken = [*state["broken"], *([] if at is None else [at])]
        write_state(out, {**state, "running": None, "broken": broken})
    (out / STATE).unlink(missing_ok=True)
    return ended | dict.fromkeys(groups, "no time was left")


# -- all of it --------------------------------------------------------------------------------------------------------


def report(out: Path, tests: list[dict[str, Any]], ended: dict[str, str], build: str) -> bool:
    """The summary, and whether everything ran well."""
    path = out / "gpu-benchmarks.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    lines = ["== tests", f"extensions: {build}"]
    for stage in tests:
        counts = ", ".join(f"{stage.get(name, '?')} {name}" for name in ("passed", "failed", "skipped"))
        lines.append(f"{stage['stage']}: {counts}{'' if stage['status'] is not None else ' (OUT OF TIME)'}")
        lines += [f"  {failure['test'][-90:]}: {failure['why'][:110]}" for failure in stage["failures"][:8]]
        if len(stage["failures"]) > 8:
            lines.append(f"  ... and {len(stage['failures']) - 8} more in gpu-tests.json")
    lines += ["== benchmarks: us (TFLOP/s, GB/s); how many times as fast as; bars", *map(brief_row, rows)]
    lines += [f"{group}: {how}" for group, how in ended.items() if how != "ran"]
    untimed = [row["case"] for row in rows if "ours" in row["not_timed"]]
    lines += [f"WRONG or without a result: {case}" for case in untimed]
    well = all(stage["status"] == 0 for stage in tests) and all(how == "ran" for how in ended.values())
    well = well and not untimed
    lines.append(f"== {'all ran well' if well else 'NOT all ran well'}, {time.perf_counter() - STARTED:.0f} s")
    print()
    print(fitted(lines))
    return well


def brief_row(row: dict[str, Any]) -> str:
    """A case in one line."""
    said = [f"{row['case']} on {row['backend']}:"]
    if "ours" in row["seconds"]:
        microseconds = 1e6 * row["seconds"]["ours"]["median"]
        said[0] += f" {microseconds:.1f} us ({row['tflops_per_second']:.0f}, {row['gigabytes_per_second']:.0f})"
    said += [f"{ratio['median']:.2f} {name}" for name, ratio in row.get("ratios", {}).items()]
    said += [f"{name} NOT TIMED ({why[:40]})" for name, why in row["not_timed"].items() if name in ("ours", "Triton")]
    for bar in row["bars"]:
        found = "?" if bar["found"] is None else f"{bar['found']:.2f}"
        said.append(f"{bar['bar']} {found} {'met' if bar['met'] else '-' if bar['met'] is None else 'MISSED'}")
    return "; ".join(said)


def fitted(lines: list[str]) -> str:
    """No more than SUMMARY characters: the longest lines are cut."""
    most = max(map(len, lines))
    while sum(min(len(line), most) + 1 for line in lines) > SUMMARY and most > 40:
        most -= 10
    return "\n".join(line if len(line) <= most else f"{line[: most - 3]}..." for line in lines)


def build_extension(out: Path, budget: float) -> str:
    """Which extensions load, and how the build of those that did not before ended."""
    if not loaded()[1]:
        return f"{loaded()[0]} (as they were)"
    environment = {**os.environ, "SOFTPROMPT_FAST_BUILD": "auto"}
    # For the GPU that is here and no other: a third of the time. "a": all that its generation alone can do.
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if arch := said.stdout.strip():
        # Also where the variable is set, as images of PyTorch do: their lists take longer than there is.
        environment["TORCH_CUDA_ARCH_LIST"] = f"{arch}{'a' if arch >= '9.' or len(arch) > 3 else ''}"
    # The instances of a file side by side: the same machine code in a fraction of the time.
    environment["NVCC_APPEND_FLAGS"] = "--split-compile=0"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    started = time.perf_counter()
    status = run(command, budget, out / "gpu-tests.txt", environment)
    for path in (ROOT / "softprompt_fast").glob(f"_c*{sysconfig.get_config_var('EXT_SUFFIX')}"):
        shutil.copy(path, out)
    ended = f"build: {'out of time' if status is None else status}, {time.perf_counter() - started:.0f} s"
    return f"{loaded()[0]} ({ended})"


def loaded() -> tuple[str, bool]:
    """What loading the extensions says, and whether one is missing."""
    code = "from softprompt_fast.backends import native; print(native.status()[1], '|', native.load_cuda()[1])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return said.stdout.strip() or said.stderr.strip()[-200:], said.stdout.strip() != "loaded | loaded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="these benchmarks, and no tests")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all of it, by default {TOTAL:.0f}")
    parser.add_argument("--tests", help="pytest's -k")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    parser.add_argument("--measure", nargs="+", choices=GROUPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.measure:
        return measure(args.measure, out, args.device, args.smoke)

    # Asked in a process of its own: this one never holds the GPU that the tests need.
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if args.device.startswith("cuda") and subprocess.run([sys.executable, "-c", code], check=False).returncode:
        parser.error("PyTorch finds no GPU here; --device cpu --smoke runs the same code at tiny sizes on a CPU")
    # Each process would compile the same kernels anew.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "softprompt-fast-triton"))
    for name in ("gpu-tests.json", "gpu-tests.txt", "gpu-benchmarks.json"):
        (out / name).unlink(missing_ok=True)
    build, tests, ended = "not built", list[dict[str, Any]](), dict[str, str]()
    if args.only:
        ended = run_benchmarks(Rows(tuple(args.only)), out, args)
        return 0 if report(out, tests, ended, build) else 1
    for name, reason in not_run().items():
        print(f"not run on a GPU: {name}: {reason}")
    for name in args.stages:
        stage, enough = STAGES[name], left(args.seconds) > 20
        if not enough and not isinstance(stage, Rows):
            ended[name] = "no time was left"
        elif name == "build":
            build = build_extension(out, min(BUILD, left(args.seconds)))
            say(f"extensions: {build}")
        elif name == "sanitizer":
            tests += sanitize(out, min(SANITIZER, left(args.seconds)), args) if args.device.startswith("cuda") else []
        elif isinstance(stage, Tests):
            tests.append(run_tests(name, stage, min(stage.budget, left(args.seconds)), out, args))
        elif isinstance(stage, Rows):
            ended |= run_benchmarks(stage, out, args)
        (out / "gpu-tests.json").write_text(json.dumps({"stages": tests}, indent=1) + "\n", encoding="utf-8")
    log = out / "gpu-tests.txt"
    if log.is_file() and log.stat().st_size > LOG:
        log.write_bytes(log.read_bytes()[-LOG:])
    return 0 if report(out, tests, ended, build) else 1


if __name__ == "__main__":
    sys.exit(main())
