# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call, and why the others do not.

A backend is a module ``softprompt_fast.backends.<backend>.<op>`` with

* ``reasons(*args) -> list[str]``: why it cannot serve a call with these arguments of the op; empty when it can. It
  looks at devices, dtypes and options, never at batch size or lengths (under ``torch.compile`` those would become
  guards) and never at tensor values (on an accelerator that waits for the device).
* the functions that the op's file in ``softprompt_fast/ops`` calls.

The name comes from the ``backend`` argument, else from the environment variable ``SOFTPROMPT_FAST_BACKEND``, else it
is ``"auto"``. A name that was asked for runs or raises :class:`BackendError`; only ``"auto"`` goes on to the next one.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType
from typing import Any

import torch

from softprompt_fast.backends import heuristics

__all__ = ["BACKENDS", "ENVIRONMENT_VARIABLE", "OPS", "BackendError", "Backends", "available_backends", "requested"]

OPS = ("prefix_attention", "merge_states", "prompt_concat", "prompt_qkv")
BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "SOFTPROMPT_FAST_BACKEND"

_DESCRIPTIONS = {"cpu": "C++ kernels", "triton": "Triton kernels", "cuda": "CUDA C++ kernels"}
_logger = logging.getLogger("softprompt_fast")
_told: set[tuple[str, str]] = set()


class BackendError(RuntimeError):
    """No backend, or not the one that was asked for, can serve a call. The message lists every reason."""


class Backends:
    """The backends of one op: ``backends[name]`` is a module; ``missing[name]`` says why one could not be loaded."""

    def __init__(self, op: str) -> None:
        if op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, found {op!r}")
        self.op = op
        self.modules: dict[str, ModuleType] = {}
        self.missing: dict[str, str] = {}
        for backend in BACKENDS:
            if backend != "reference":  # the op's own file calls its definition
                loaded = _load(op, backend)
                if isinstance(loaded, str):
                    self.missing[backend] = loaded
                else:
                    self.modules[backend] = loaded

    def __getitem__(self, backend: str) -> ModuleType:
        return self.modules[backend]

    def select(self, backend: str | None, args: tuple[Any, ...]) -> str:
        """The name of the backend that serves a call of the op with ``args``, of which the first is a tensor.

        Raises:
            ValueError: there is no backend of that name.
            BackendError: the backend asked for cannot serve the call, or (``"auto"``) none can.
        """
        name = requested(backend)
        candidates = heuristics.backend_order(args[0].device.type) if name == "auto" else (name,)
        refused: dict[str, list[str]] = {}
        for candidate in candidates:
            if candidate == "reference":  # it serves everything
                why: list[str] = []
            elif candidate in self.missing:
                why = [self.missing[candidate]]
            else:
                why = self.modules[candidate].reasons(*args)
            if not why:
                if len(refused) > 0 and name == "auto" and not torch.compiler.is_compiling():
                    self._tell_once(candidate, refused)
                return candidate
            refused[candidate] = why
        lines = [f"{self.op}: backend {name!r} cannot serve this call:"]
        lines += [f"  {candidate}: {reason}" for candidate, why in refused.items() for reason in why]
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        shapes = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}" for t in tensors)
        raise BackendError("\n".join([*lines, f"  called with {', '.join(shapes)}"]))

    def direct(self, backend: str | None, *args: Any) -> Any:
        """What the C++ op (``NATIVE`` in its module, see `native_ops`) of the backend that is asked for, or that
        ``"auto"`` prefers, gives for a call. None where there is none, or it refuses: :meth:`select` then says why, or
        finds another.

        Also None where a call has to be seen whole: a gradient is wanted, something traces, or results are to come
        from ``torch.empty``, which fills them.
        """
        if torch.compiler.is_compiling() or torch._C._get_deterministic_algorithms():
            return None
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            return None
        name = requested(backend)
        if name == "auto":
            name = heuristics.backend_order(args[0].device.type)[0]
        op = getattr(self.modules.get(name), "NATIVE", None)
        if op is None:
            return None
        try:
            results = op(*args)
        except RuntimeError:  # no tensors of this kind, or no such argument: not the op's words, but the dispatcher's
            return None
        refused = results is None or (isinstance(results, tuple) and results[0] is None)
        return None if refused else results

    def _tell_once(self, chosen: str, refused: dict[str, list[str]]) -> None:
        """Log that a backend which is here would not take a call. What is merely not installed is no news."""
        why = "; ".join(f"{name}: {', '.join(rs)}" for name, rs in refused.items() if name in self.modules)
        if why and (self.op, why) not in _told:
            _told.add((self.op, why))
            _logger.warning("%s runs on backend %r (%s)", self.op, chosen, why)


def available_backends(op: str) -> dict[str, list[str]]:
    """Every backend name with the reasons why it cannot run ``op`` on this machine at all; an empty list: it can."""
    missing = Backends(op).missing
    return {name: [missing[name]] if name in missing else [] for name in BACKENDS}


def requested(backend: str | None = None) -> str:
    """The backend name a call asks for: the argument, else the environment variable, else ``"auto"``."""
    if backend is not None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, found {backend!r}")
        return backend
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name != "auto" and name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ValueError(f"environment {ENVIRONMENT_VARIABLE}: expected 'auto' or one of {known}, found {name!r}")
    return name


@cache
def _load(op: str, backend: str) -> ModuleType | str:
    """The module of a backend, or the reason why there is none."""
    name = f"softprompt_fast.backends.{backend}.{op}"
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the folder
        found = False
    if not found:
        return f"{_DESCRIPTIONS.get(backend, backend)} for {op} are not part of this version"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return str(error)
