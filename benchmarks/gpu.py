# SPDX-License-Identifier: Apache-2.0
"""``make gpu``: build, test and measure on a machine with a GPU, with the packages that are there and no network.

    python benchmarks/gpu.py                      # all of it, at most 9 minutes
    python benchmarks/gpu.py --only prefill decode    # these rows of the table, no tests
    python benchmarks/gpu.py --device cpu --smoke     # the same code on a CPU at tiny sizes

Every stage has a budget; one that fails or runs out of it is reported and the next one begins. What is written, to
$OUT where that is set, else to benchmarks/results: ``gpu-tests.json``, ``gpu-tests.txt`` and one ``gpu-<op>.json`` for
each op, with samples. The exit status says whether all tests and benchmarks ran well; a bar that was missed does not
change it.
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
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 520.0
"""Seconds for everything: the limit on such a machine is 600, and its files have to be copied."""
BUILD, OP_TESTS, MODEL_TESTS, SANITIZER = 90.0, 150.0, 80.0, 60.0
BENCHMARKS_AT_LEAST = 140.0
"""Seconds that the tests leave to the benchmarks."""

OP_FILES = [f"tests/ops/test_{op}.py" for op in ("prefix_attention", "merge_states", "prompt_concat", "prompt_qkv")]
OP_FILES += ["tests/test_cuda_backend.py", "tests/test_cuda_prompt_qkv.py", "tests/test_cuda_decode.py"]
# The most telling first, should time run out.
MODEL_STEMS = (
    *("gpu", "cuda_step", "model", "generate", "cache", "nn", "losses", "training"),
    *("bank", "bank_tiers", "bank_random", "concurrency", "compile", "encoder", "autocast", "continuous_batching"),
)
MODEL_FILES = [f"tests/test_{name}.py" for name in MODEL_STEMS]
MORE_MODEL_FILES = [f"tests/test_{name}.py" for name in ("encoder_decoder", "families", "generate_families", "oracle")]
#: Small shapes of every CUDA kernel, under compute-sanitizer's tools, which run side by side.
SANITIZED = ["tests/test_cuda_backend.py", "tests/test_cuda_prompt_qkv.py", "tests/test_cuda_decode.py"]
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

#: Seconds for each group of rows, and the file it goes to.
GROUPS = {
    "prefill": (40.0, "prefix_attention"),
    "decode": (35.0, "prefix_attention"),
    "backward": (25.0, "prefix_attention"),
    "prompt_concat": (15.0, "prompt_concat"),
    "prompt_qkv": (35.0, "prompt_qkv"),
    "first_layer": (25.0, "prompt_qkv"),
    "merge_states": (10.0, "merge_states"),
    "models": (80.0, "models"),
    "training": (30.0, "training"),
}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


STARTED = time.perf_counter()


def left() -> float:
    return TOTAL - (time.perf_counter() - STARTED)


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


def run_tests(stage: str, files: list[str], budget: float, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    files = [name for name in files if (ROOT / name).is_file()]
    say(f"{stage}: {len(files)} files, at most {budget:.0f} s")
    environment = {**os.environ, "SOFTPROMPT_FAST_TEST_DEVICE": args.device, "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", *files, "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += [f"--junitxml={junit}", "-o", "junit_logging=no", "--durations=15"]
        if importlib.util.find_spec("xdist") is not None and args.workers > 1:
            command += ["-n", str(args.workers), "--dist", "worksteal"]
        if args.tests:
            command += ["-k", args.tests]
        started = time.perf_counter()
        status = run(command, budget, out / "gpu-tests.txt", environment)
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
        started, log = time.perf_counter(), out / f"gpu-{tool}.txt"
        command = [binary, "--tool", tool, "--error-exitcode", "86", "--kernel-name", "kns=softprompt_fast", *pytest]
        status = run(command, budget, log, environment)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line.strip("= ") for line in lines if line.startswith("=========") and "ERROR SUMMARY" not in line]
        failures = [{"test": tool, "why": line} for line in found[1:]] if status == 86 else []
        return {"stage": tool, "status": status, "seconds": time.perf_counter() - started, "failures": failures}

    with ThreadPoolExecutor(len(SANITIZER_TOOLS)) as pool:
        return list(pool.map(one, SANITIZER_TOOLS))


def not_run() -> dict[str, str]:
    """Test files that are left out, by the reason why."""
    run = {Path(name).name for name in OP_FILES + MODEL_FILES + MORE_MODEL_FILES}
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


def measure(groups: list[str], out: Path, device_name: str, smoke: bool) -> None:
    """In a process of its own: the groups' rows, each written as soon as it is known."""
    import torch
    from _gpu import measure_ceilings
    from _gpu import run as run_case
    from _gpu_cases import CASES
    from _harness import setting

    device = torch.device(device_name)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    where, ceilings = setting(), measure_ceilings(device, smoke)
    ceilings_said = ", ".join(f"{name} {rate / 1e12:.2f} T/s" for name, rate in ceilings.items())
    print(f"{where['gpu'] or where['cpu']}\nmeasured ceilings: {ceilings_said}", flush=True)
    for group in groups:
        budget, op = GROUPS[group]
        faulthandler.dump_traceback_later(2 * budget + 60, exit=True)  # a hang ends the process, and is seen
        started = time.perf_counter()
        path = out / f"gpu-{op}.json"
        known: dict[str, Any] = {"setting": where, "ceilings": ceilings, "rows": []}
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
        backends = serving(op, device)
        try:
            with torch.no_grad():
                for case in CASES[group](device, smoke):
                    share = case.seconds or max(2.0, budget - (time.perf_counter() - started))
                    row = run_case(case, device, ceilings, budget=share, rounds=3 if smoke else 25)
                    known["rows"].append({"group": group, "backend": backends, **row.as_dict()})
                    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                    print(shown_row(known["rows"][-1]), flush=True)
                    if time.perf_counter() - started > budget:
                        break
        finally:
            faulthandler.cancel_dump_traceback_later()
        done = out / ".gpu-done"
        done.write_text(f"{done.read_text() if done.is_file() else ''}{group}\n")


def serving(op: str, device: Any) -> str | None:
    """The backend that "auto" tries first for an op, and has."""
    from softprompt_fast.backends import heuristics
    from softprompt_fast.backends._registry import OPS, available_backends

    if op not in OPS:
        return None
    reasons = available_backends(op)
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


def run_benchmarks(groups: list[str], out: Path, args: argparse.Namespace) -> dict[str, str]:
    """Group -> how it ended. A process that dies takes its group with it; another one goes on with the rest."""
    ended: dict[str, str] = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))}
    environment |= {"HF_HUB_OFFLINE": "1"}
    done = out / ".gpu-done"
    while groups and left() > 20:
        done.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__)), "--device", args.device, "--out", str(out), "--measure"]
        command += [*groups, *(["--smoke"] if args.smoke else [])]
        status = run(command, left() - 5, None, environment)
        finished = done.read_text().split() if done.is_file() else []
        ended |= dict.fromkeys(finished, "ran")
        groups = [group for group in groups if group not in finished]
        if groups:
            ended[groups[0]] = "ran out of time" if status is None else f"ended its process with status {status}"
            say(f"benchmark {groups[0]}: {ended[groups[0]]}")
            groups = groups[1:]
    done.unlink(missing_ok=True)
    return ended | dict.fromkeys(groups, "no time was left")


# -- all of it --------------------------------------------------------------------------------------------------------


def report(out: Path, tests: list[dict[str, Any]], ended: dict[str, str], build: str) -> bool:
    """The table, compact, and whether everything ran well."""
    print("\n== tests")
    print(f"extensions: {build}")
    for stage in tests:
        counts = ", ".join(f"{stage.get(name, '?')} {name}" for name in ("passed", "failed", "skipped"))
        print(f"{stage['stage']}: {counts}{'' if stage['status'] is not None else ' (OUT OF TIME)'}")
        for failure in stage["failures"][:25]:
            print(f"  {failure['test'][-110:]}: {failure['why'][:130]}")
        if len(stage["failures"]) > 25:
            print(f"  ... and {len(stage['failures']) - 25} more in gpu-tests.json")
    print("== benchmarks")
    untimed = []
    for path in sorted(out.glob("gpu-*.json")):
        if path.name != "gpu-tests.json":
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
                print(shown_row(row))
                untimed += [row["case"]] if "ours" in row["not_timed"] else []
    for group, how in ended.items():
        if how != "ran":
            print(f"{group}: {how}")
    for case in untimed:
        print(f"WRONG or without a result: {case}")
    well = all(stage["status"] == 0 for stage in tests) and all(how == "ran" for how in ended.values())
    well = well and not untimed
    print(f"== {'all ran well' if well else 'NOT all ran well'}, {time.perf_counter() - STARTED:.0f} s")
    return well


def build_extension(out: Path) -> str:
    environment = {**os.environ, "SOFTPROMPT_FAST_BUILD": "auto"}
    # For the GPU that is here and no other: a third of the time. "a": all that its generation alone can do.
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if arch := said.stdout.strip():
        # Also where the variable is set, as images of PyTorch do: their lists take longer than there is.
        environment["TORCH_CUDA_ARCH_LIST"] = f"{arch}{'a' if arch >= '9.' or len(arch) > 3 else ''}"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status = run(command, BUILD, out / "gpu-tests.txt", environment)
    code = "from softprompt_fast.backends import native; print(native.status(), native.load_cuda()[1])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return f"{said.stdout.strip() or 'not loaded'} (build: {'out of time' if status is None else status})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="these benchmarks, and no tests")
    parser.add_argument("--skip", nargs="+", choices=("build", "tests", "benchmarks"), default=[])
    parser.add_argument("--tests", help="pytest's -k")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"))
    parser.add_argument("--measure", nargs="+", choices=GROUPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.measure:
        measure(args.measure, out, args.device, args.smoke)
        return 0

    # Asked in a process of its own: this one never holds the GPU that the tests need.
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if args.device.startswith("cuda") and subprocess.run([sys.executable, "-c", code], check=False).returncode:
        parser.error("PyTorch finds no GPU here; --device cpu --smoke runs the same code at tiny sizes on a CPU")
    # Each process would compile the same kernels anew.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "softprompt-fast-triton"))
    for path in (*out.glob("gpu-*.json"), out / "gpu-tests.txt"):
        path.unlink(missing_ok=True)
    build, tests = "not built", []
    if not args.only and "build" not in args.skip:
        build = build_extension(out)
        say(f"extensions: {build}")
    if not args.only and "tests" not in args.skip:
        for name, reason in not_run().items():
            print(f"not run on a GPU: {name}: {reason}")
        reserve = 0.0 if "benchmarks" in args.skip else BENCHMARKS_AT_LEAST
        for stage, files, most in (
            ("op tests", OP_FILES, OP_TESTS),
            ("model tests", MODEL_FILES, MODEL_TESTS),
            ("more model tests", MORE_MODEL_FILES, MODEL_TESTS),
        ):
            # What comes after the essential two gets what they and the benchmarks leave.
            budget = min(most, left() - reserve - (MODEL_TESTS + SANITIZER if stage == "op tests" else 0.0))
            if stage == "more model tests":
                budget = min(most, left() - sum(seconds for seconds, _ in GROUPS.values()))
            if budget > 20:
                tests.append(run_tests(stage, files, budget, out, args))
                (out / "gpu-tests.json").write_text(json.dumps({"stages": tests}, indent=1) + "\n", encoding="utf-8")
            else:
                say(f"{stage}: no time is left")
            if stage == "op tests" and args.device.startswith("cuda"):
                budget = min(SANITIZER, left() - reserve - MODEL_TESTS)
                tests += sanitize(out, budget, args) if budget > 20 else []
    ended: dict[str, str] = {}
    if "benchmarks" not in args.skip:
        ended = run_benchmarks(args.only or list(GROUPS), out, args)
    return 0 if report(out, tests, ended, build) else 1


if __name__ == "__main__":
    sys.exit(main())
