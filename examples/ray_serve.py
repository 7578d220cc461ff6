# SPDX-License-Identifier: Apache-2.0
"""Many soft prompts on several machines: replicas of this package's own server behind Ray Serve.

    pip install 'softprompt-fast[serve]' 'ray[serve]>=2.60'
    python examples/ray_serve.py --model demo --prompts PROMPTS --replicas 2
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "legal", "prompt": "Clause 4 says", "max_tokens": 16}'

Each replica is an engine with the base and all prompts, and the same application that ``softprompt-fast serve`` runs:
completions, chat, streaming, errors and limits are those of docs/serving.md. Ray Serve starts replicas wherever its
cluster has room, sends a request to the less busy of two, replaces replicas that fail their health check, and lets
requests end before it stops one. Every subfolder of PROMPTS is a prompt, and each replica reads all of them when it
starts, so PROMPTS and the model must be there under the same path on every machine.

``RAY_ADDRESS`` names a cluster to join; without it Ray starts on this machine. What belongs to one replica, such as
``/metrics``, answers for whichever replica is asked; Ray has its own metrics of all of them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve

from softprompt_fast.serving.app import create_app
from softprompt_fast.serving.embedded import chat_template, load_engine
from softprompt_fast.serving.settings import ServeSettings


@serve.deployment
@serve.ingress()
class SoftPrompts:
    """One replica."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.engine = load_engine(settings)

    def __serve_build_asgi_app__(self) -> Any:
        """Ray's hook: the application, once the replica is made."""
        return create_app(
            self.engine,
            base_name=self.settings.base_name,
            chat_template=chat_template(self.settings),
            api_key=self.settings.api_key,
        )

    def check_health(self) -> None:
        """Ray's hook: raises where the replica has to be replaced."""
        if self.engine.draining:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        if engine := getattr(self, "engine", None):  # none where loading failed
            engine.close()


def application(settings: ServeSettings, replicas: int, num_cpus: float, num_gpus: float) -> Any:
    """What ``serve.run`` takes. Ray hands a replica as many requests as its engine runs and queues: its own default of
    5 would keep the batches small."""
    return SoftPrompts.options(
        num_replicas=replicas,
        max_ongoing_requests=settings.max_batch + settings.max_waiting,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        graceful_shutdown_timeout_s=settings.grace,
    ).bind(settings)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="the base: a folder, a hub name, or demo")
    parser.add_argument("--prompts", type=Path, required=True, help="folder; each subfolder is a prompt of that name")
    parser.add_argument("--host", default="127.0.0.1", help="others than loopback need SOFTPROMPT_FAST_API_KEY")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--num-cpus", type=float, default=1, help="of each replica, and its threads")
    parser.add_argument("--num-gpus", type=float, default=0, help="of each replica")
    args = parser.parse_args(given)
    settings = ServeSettings(
        model=args.model,
        prompts_folder=args.prompts.resolve(),
        host=args.host,
        port=args.port,
        api_key=os.environ.get("SOFTPROMPT_FAST_API_KEY"),
    )
    ray.init(ignore_reinit_error=True, include_dashboard=False)
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application(settings, args.replicas, args.num_cpus, args.num_gpus))
        print(f"ready: http://{settings.host}:{settings.port}", flush=True)
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
