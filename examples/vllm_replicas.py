# SPDX-License-Identifier: Apache-2.0
"""vLLM with soft prompts on several devices: tensor and pipeline parallel inside a replica, vLLM's router across them.

    pip install 'softprompt-fast[vllm]' vllm-router
    python examples/vllm_replicas.py --model meta-llama/Llama-3.1-8B --prompts PROMPTS --replicas 2 \\
        --tensor-parallel-size 2 --devices 0,1,2,3
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "legal", "prompt": "Clause 4 says", "max_tokens": 16}'

Every replica is ``softprompt-fast serve --engine vllm`` in a process of its own, which passes the parallel sizes on to
vLLM; each rank of a replica loads its own slice of a prefix's heads. Every subfolder of PROMPTS is a prompt, and every
replica serves all of them: a prefix is small beside a base, so that requests go to any replica, and a prompt that is
saved there later is served by all. The router (https://github.com/vllm-project/router) spreads requests, takes
replicas that fail out of turn, and starts when all are healthy.

That is for one machine. Across machines start ``softprompt-fast serve --engine vllm`` on each (PROMPTS on a file
system that all of them see) and ``vllm-router --worker-urls`` with their addresses; a replica that spans machines is
vLLM's own business (its docs: "Parallelism and Scaling").
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ENDS_WITHIN = 60.0


def shares(whole: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """`whole` in equal parts.

    Raises:
        SystemExit: it can't be divided so.
    """
    size, left = divmod(len(whole), parts)
    if left or not size:
        raise SystemExit(f"{len(whole)} devices or cores can't be shared equally by {parts} replicas")
    return [whole[i * size : (i + 1) * size] for i in range(parts)]


def environments(args: argparse.Namespace) -> list[dict[str, str]]:
    """What tells each replica its devices: its GPUs, or its share of this machine's cores."""
    if args.devices:
        split = shares(args.devices.split(","), args.replicas)
        return [{"CUDA_VISIBLE_DEVICES": ",".join(devices)} for devices in split]
    ranks = args.tensor_parallel_size * args.pipeline_parallel_size
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[: len(cores) // (args.replicas * ranks) * args.replicas * ranks]
    bound = []
    for of_replica in shares(cores, args.replicas):
        of_ranks = [",".join(map(str, of_rank)) for of_rank in shares(of_replica, ranks)]
        bound.append({"VLLM_CPU_OMP_THREADS_BIND": "|".join(of_ranks)})
    return bound


def replica_command(args: argparse.Namespace, number: int) -> list[str]:
    """This file again, as one replica."""
    command = [sys.executable, __file__, "--replica", str(number)]
    for name in ("model", "prompts", "port", "tensor_parallel_size", "pipeline_parallel_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return command


def replica_port(args: argparse.Namespace, number: int) -> int:
    return args.port + 1 + number


def router_command(args: argparse.Namespace) -> list[str]:
    urls = [f"http://127.0.0.1:{replica_port(args, number)}" for number in range(args.replicas)]
    command = [sys.executable, "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", str(args.port)]
    command += ["--policy", args.policy, "--prometheus-port", str(args.port + 1 + args.replicas)]
    return [*command, "--worker-urls", *urls]


def serve_replica(args: argparse.Namespace) -> None:
    """One replica, in this process: vLLM's own server."""
    from softprompt_fast.integrations.vllm.serve import run
    from softprompt_fast.serving.settings import ServeSettings

    settings = ServeSettings(
        model=args.model, prompts_folder=args.prompts, port=replica_port(args, args.replica), engine="vllm"
    )
    sizes = ["--tensor-parallel-size", str(args.tensor_parallel_size)]
    run(settings, [*sizes, "--pipeline-parallel-size", str(args.pipeline_parallel_size)])


class Fleet:
    """The replicas and their router, from the beginning of a ``with`` block, once all are healthy, to its end.

    Raises:
        RuntimeError: a process ended, or was not healthy in time.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.url = f"http://127.0.0.1:{args.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Fleet:
        with self.stack:  # undone where something below fails
            for number, environment in enumerate(environments(self.args)):
                self._start(f"replica {number}", replica_command(self.args, number), environment)
            for number in range(self.args.replicas):
                self._wait_for(f"http://127.0.0.1:{replica_port(self.args, number)}/health")
            self._start("router", router_command(self.args), {})
            self._wait_for(f"{self.url}/health")
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def check(self) -> None:
        for name, process in self.processes.items():
            if (status := process.poll()) is not None:
                raise RuntimeError(f"{name} ended with status {status}")

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        process = self.processes[name] = subprocess.Popen(command, env={**os.environ, **environment})
        self.stack.callback(self._end, process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(timeout=ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_for(self, url: str) -> None:
        until = time.monotonic() + self.args.starts_within
        while time.monotonic() < until:
            self.check()
            try:
                with urllib.request.urlopen(url, timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"{url}: not healthy within {self.args.starts_within:.0f} s")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base: a folder or a hub name")
    parser.add_argument("--prompts", type=Path, required=True, help="folder; each subfolder is a prompt of that name")
    parser.add_argument("--port", type=int, default=8000, help="of the router; the replicas take the next ones")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="of each replica")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1, help="of each replica")
    parser.add_argument("--devices", help="GPUs, with commas, shared equally; without: this machine's cores are")
    parser.add_argument("--policy", default="power_of_two", help="the router's; see vllm-router --help")
    parser.add_argument("--starts-within", type=float, default=1200.0, help="seconds until all have to be healthy")
    parser.add_argument("--replica", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.replica is not None:
        serve_replica(args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the block below ends all
    try:
        with Fleet(args) as fleet:
            print(f"ready: {fleet.url}", flush=True)
            while True:
                fleet.check()
                time.sleep(1)
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
