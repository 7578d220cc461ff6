# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENGINE = """
    import json, sys
    import vllm
    import softprompt_fast as spf

    if __name__ == "__main__":
        model, folder, options, rows, names, new = (json.loads(text) for text in sys.argv[1:])
        fields = {"dtype": "float32", "block_size": 32, "enforce_eager": True, "seed": 0, "disable_log_stats": False}
        config = spf.vllm.kv_transfer_config(prompts_folder=folder)
        llm = vllm.LLM(model, kv_transfer_config=config, **fields | options)
        params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        outputs = spf.vllm.generate(llm, rows, names, params, use_tqdm=False)
        counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        print("ANSWER", json.dumps([answers, counts["vllm:num_preemptions"]]), flush=True)
"""


def run(
    model: Path, folder: Path, tmp_path: Path, options: dict[str, Any], asked: list[Any], new: int
) -> tuple[list[Any], float]:
    """Answers of an engine of its own, and how often it took a row's blocks away."""
    script = tmp_path / "engine.py"
    script.write_text(textwrap.dedent(ENGINE))
    # One process where there is one rank: starting more takes longer than all the rest.
    ranks = options.get("tensor_parallel_size", 1)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1))}
    if ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"
    rows, names = zip(*asked, strict=True)
    arguments = [json.dumps(value) for value in (str(model), str(folder), options, rows, names, new)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if "ANSWER" in line]
    assert lines, done.stdout[-6000:] + done.stderr[-6000:]
    return tuple(json.loads(lines[0].partition("ANSWER ")[2]))
