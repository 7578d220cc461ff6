# SPDX-License-Identifier: Apache-2.0
"""Products of activations with frozen weights. A stand-in in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass
class Norm:
    kind: str  # "rms" | "layer" | "none"
    weight: Tensor | None
    bias: Tensor | None
    offset: float = 0.0
    eps: float = 1e-6

    def __call__(self, x: Tensor) -> Tensor:
        gain = self.weight if self.weight is None or not self.offset else self.weight + self.offset
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], gain, self.eps)
        return F.layer_norm(x, x.shape[-1:], gain, self.bias, self.eps) if self.kind == "layer" else x


class PackedLinear:
    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, pack: bool = True) -> None:
        self.weights, self.biases = [w.detach() for w in weights], list(biases)
        if pack:
            self.weights = [w.clone() for w in self.weights]
        self.in_features, self.out_features = weights[0].shape[1], sum(w.shape[0] for w in weights)
        self.nbytes = sum(w.nbytes for w in weights) if pack else 0


def linear(x: Tensor, layer: PackedLinear, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
    x = x if norm is None else norm(x)
    out = torch.cat([F.linear(x, w, b) for w, b in zip(layer.weights, layer.biases, strict=True)], dim=-1)
    return out if residual is None else out + residual


def gated_mlp(
    x: Tensor, norm: Norm, gate_up: PackedLinear, down: PackedLinear, activation: str, residual: Tensor
) -> Tensor:
    gate, up = linear(x, gate_up, norm=norm).chunk(2, dim=-1)
    return linear(_ACTIVATIONS[activation](gate) * up, down, residual=residual)
