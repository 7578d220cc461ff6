# SPDX-License-Identifier: Apache-2.0
"""A process of the regression guard: our systems of this folder's cases, with the package that ``PYTHONPATH`` finds.

Lines of JSON on standard input are requests, and each gets one line on standard output (what libraries print goes to
standard error). A first line says which package was found. ``{"prepare": case, "result": file}`` makes a case ready,
runs it untimed and leaves the result in the file; ``{"turn": true}`` runs one and says its seconds. What raises is
answered with ``{"error": why}``. Between requests the process waits without computing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

# An editable installation finds modules that this tree lacks in the tree that was installed: a mixture of both.
sys.meta_path[:] = [x for x in sys.meta_path if not getattr(x, "__module__", "").startswith("__editable___softprompt")]

import torch  # noqa: E402
from _gpu import tensors_of  # noqa: E402
from _suite import OURS, Prepared, cases, reason  # noqa: E402

import softprompt_fast  # noqa: E402
from softprompt_fast.backends import native  # noqa: E402


class Worker:
    def __init__(self) -> None:
        self.cases = {case.id: case for case in cases()}
        self.prepared: Prepared | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "prepare" in request:
            return self.prepare(request["prepare"], request["result"])
        assert self.prepared is not None
        return {"times": self.prepared.turns[OURS](self.prepared.inputs())[1]}

    def prepare(self, name: str, result: str) -> dict[str, Any]:
        self.close()
        torch.manual_seed(0)
        case = self.cases[name]
        self.prepared = case.prepare(frozenset({OURS}))
        with serving_backends() as served:
            for _ in range(max(1, case.warmup)):
                found, _ = self.prepared.turns[OURS](self.prepared.inputs())
        torch.save([x.detach().cpu() for x in tensors_of(found)], result)
        return {"backends": {op: sorted(names) for op, names in served.items()}, "tolerance": self.prepared.tolerance}

    def close(self) -> None:
        if self.prepared is not None:
            self.prepared.close()
        self.prepared = None


@contextlib.contextmanager
def serving_backends() -> Iterator[dict[str, set[str]]]:
    """Op -> the backends that its calls were given to meanwhile. Fused passes, which call no op, show nothing."""
    served: dict[str, set[str]] = defaultdict(set)
    from softprompt_fast.backends._registry import Backends

    select = Backends.select

    def recorded(self: Backends, *args: Any) -> str:
        chosen = select(self, *args)
        served[self.op].add(chosen)
        return chosen

    Backends.select = recorded  # type: ignore[method-assign]
    try:
        yield served
    finally:
        Backends.select = select  # type: ignore[method-assign]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    loaded, why = native.status()
    ready = {"package": softprompt_fast.__file__, "extension": why, "isa": native.cpu_isa() if loaded else None}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answered = worker.answer(json.loads(line))
        except Exception as error:
            answered = {"error": reason(error)}
        print(json.dumps(answered), file=answers, flush=True)
    worker.close()


if __name__ == "__main__":
    main()
