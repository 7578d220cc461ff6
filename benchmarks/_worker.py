# SPDX-License-Identifier: Apache-2.0
"""A process that measures: this folder's cases, with the package that ``PYTHONPATH`` finds.

Lines of JSON on standard input are requests, and each gets one line on standard output (what libraries print goes to
standard error). A first line says which package was found. A case is made ready by ``prepare``; then every round
begins with ``inputs``, each system in it gets a ``turn`` (or a ``warm``, which is not timed and may be shorter), and
``check`` says how far the results of the round are off. What raises is answered with ``{"error": why}``. Between
requests the process waits without computing. ``--give-back`` as its argument makes it a process for ``memory``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

if __name__ == "__main__":
    # An editable installation finds modules that this tree lacks in the tree that was installed: a mixture of both.
    sys.meta_path[:] = [
        x for x in sys.meta_path if not getattr(x, "__module__", "").startswith("__editable___softprompt")
    ]

import _memory
import torch
from _gpu import tensors_of
from _harness import MACHINE, Repeated
from _suite import OURS, Prepared, cases, reason

import softprompt_fast
from softprompt_fast.backends import native


class Worker:
    """Requests are its methods, a request's only key beside their arguments: ``{"turn": {"system": "ours"}}``."""

    REQUESTS = ("prepare", "record", "inputs", "warm", "turn", "check", "machine", "memory")

    def __init__(self) -> None:
        self.cases = {case.id: case for case in cases()}
        self.prepared: Prepared | None = None
        self.given: Any = None
        self.results: dict[str, Any] = {}

    def answer(self, request: dict[str, dict[str, Any]]) -> dict[str, Any]:
        try:
            ((name, arguments),) = request.items()
            if name not in self.REQUESTS:
                raise ValueError(f"no request is called {name}")
            return getattr(self, name)(**arguments) or {}
        except Exception as error:
            return {"error": reason(error)}

    @property
    def ready(self) -> Prepared:
        if self.prepared is None:
            raise RuntimeError("no case is prepared")
        return self.prepared

    def prepare(self, case: str, systems: Sequence[str], seed: int = 0) -> dict[str, Any]:
        self.close()
        torch.manual_seed(seed)
        self.prepared = ready = self.cases[case].prepare(frozenset(systems))
        torch.manual_seed(seed)  # whatever loading a model left
        facts = {name: getattr(ready, name) for name in ("compared", "tolerance", "flops", "moved", "skipped")}
        return {"systems": list(ready.turns), **facts}

    def record(self, file: str, turns: int) -> dict[str, Any]:
        """Untimed turns of ours, the last one's result into a file, and the backends that served them."""
        with serving_backends() as served:
            for _ in range(turns):
                found, _ = self.ready.turns[OURS](self.ready.inputs())
        torch.save([x.detach().cpu() for x in tensors_of(found)], file)
        return {"backends": {op: sorted(names) for op, names in served.items()}}

    def inputs(self) -> None:
        self.results = {}
        self.given = self.ready.inputs()

    def warm(self, system: str) -> None:
        self.ready.warm.get(system, self.ready.turns[system])(self.given)

    def turn(self, system: str) -> dict[str, Any]:
        self.results[system], times = self.ready.turns[system](self.given)
        return {"times": times}

    def check(self) -> dict[str, Any]:
        return {"errors": self.ready.errors(self.given, self.results)}

    def machine(self) -> dict[str, Any]:
        """Seconds of products and of a copy, for shares of the roofline."""
        return {"times": {name: one()[1] for name, one in self.roofs.items()}}

    @cached_property
    def roofs(self) -> dict[str, Repeated]:
        return MACHINE.turns()

    def memory(self, system: str) -> dict[str, Any]:
        """What a turn with the inputs takes; in a process that gives back what is freed."""
        if why := self.ready.elsewhere.get(system):
            raise _memory.Unavailable(why)
        return {"bytes": _memory.peak_beyond(lambda: self.ready.turns[system](self.given))}

    def close(self) -> None:
        if self.prepared is not None:
            self.prepared.close()
        self.prepared, self.given, self.results = None, None, {}
        gc.collect()


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
    with contextlib.suppress(_memory.Unavailable):
        _memory.keep_freed_memory(_memory.GIVE_BACK not in sys.argv)
    worker = Worker()
    loaded, why = native.status()
    ready = {"package": softprompt_fast.__file__, "extension": why, "isa": native.cpu_isa() if loaded else None}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)
    worker.close()


if __name__ == "__main__":
    main()
