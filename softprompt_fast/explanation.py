# SPDX-License-Identifier: Apache-2.0
"""What path each layer of a model takes, and why: the answer of ``spf.explain(model)``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from softprompt_fast.backends import heuristics
from softprompt_fast.backends._registry import available_backends, requested


@dataclass(frozen=True)
class LayerPath:
    """One layer: ``path`` is "shared prefix" or "expanded prefix", with ", fused decoder" (of a model in training mode
    ", fused training") where the whole layer runs without the base's modules; ``backend`` serves its op; ``reason``
    says why a slower path was taken (empty where the best one was)."""

    layer: int
    path: str
    backend: str
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """Paths of all layers of one model, printable and as plain data. ``note``: what holds for all of them."""

    model: str
    layers: tuple[LayerPath, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "layers": [asdict(layer) for layer in self.layers], "note": self.note}

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        lines = [f"{self.model}: {len(self.layers)} layers{note}"]
        start = 0
        for i, layer in enumerate(self.layers):
            following = self.layers[i + 1] if i + 1 < len(self.layers) else None
            same = following is not None and (following.path, following.backend, following.reason) == (
                layer.path,
                layer.backend,
                layer.reason,
            )
            if same:
                continue
            span = f"layer {start}" if start == i else f"layers {start}-{i}"
            why = f" ({layer.reason})" if layer.reason else ""
            lines.append(f"  {span}: {layer.path}, backend {layer.backend}{why}")
            start = i + 1
        return "\n".join(lines)


def serving_backend(op: str, device_type: str, backend: str | None = None) -> tuple[str, str]:
    """The backend that serves `op` on a device type, and why each one that would be preferred to it can't."""
    name = requested(backend)
    if name != "auto":
        return name, "asked for by name"
    refused = available_backends(op)
    order = heuristics.backend_order(device_type)
    chosen = next(candidate for candidate in order if not refused[candidate])
    before = order[: order.index(chosen)]
    return chosen, "; ".join(f"{candidate}: {', '.join(refused[candidate])}" for candidate in before)


def explain(model: Any) -> Explanation:
    """Which path each layer of `model` (an ``spf`` model) takes, by which backend, and why not a faster one.

    Raises:
        TypeError: `model` is none of this package's models.
    """
    if not callable(getattr(model, "explain", None)):
        raise TypeError(f"model: expected a model of softprompt_fast, found {type(model).__name__}")
    return model.explain()
