# SPDX-License-Identifier: Apache-2.0
"""Products with a frozen layer's weights: packed once, norm, bias, residual and activation on the way.

See ``csrc/cpu/linear.h``. Nothing here is differentiable: it serves inference and the compiling of prefixes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from softprompt_fast.backends.cpu import _tensors
from softprompt_fast.backends.norm import Norm

_C = _tensors.extension()

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class PackedLinear:
    """The weights ``[N, K]`` of a frozen layer, packed into panels for the C++ product: a copy of them.

    Args:
        weights: ``[N_i, K]``, stacked along N; one floating dtype of float32, bfloat16, float16.
        biases: ``[N_i]`` or None for each weight.
        heads: into how many equal sections each weight falls, as ``prompt_qkv`` wants it. None: one.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] = (),
        *,
        heads: Sequence[int] | None = None,
    ) -> None:
        self.in_features = weights[0].shape[1]
        self.out_features = sum(weight.shape[0] for weight in weights)
        sections = []
        for weight, count in zip(weights, heads or (1,) * len(weights), strict=True):
            if weight.dim() != 2 or weight.shape[1] != self.in_features or weight.device.type != "cpu":
                raise ValueError(f"weights: expected [N, {self.in_features}] on cpu, found {list(weight.shape)}")
            step = weight.shape[0] // count
            sections += [(_tensors.view(weight), first, step) for first in range(0, weight.shape[0], step)]
        # Packing reads the values only: a weight that requires grad is no obstacle here.
        self.layer = _C.PackedLinear(sections, self.in_features, torch.get_num_threads())
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            filled = [
                torch.zeros(weight.shape[0]) if bias is None else bias.detach().to(torch.float32)
                for weight, bias in zip(weights, biases, strict=True)
            ]
            self.bias = torch.cat(filled)
        self.bias_pointer = 0 if self.bias is None else self.bias.data_ptr()

    @property
    def nbytes(self) -> int:
        """Memory of the packed copy."""
        return self.layer.nbytes


@dataclass
class _Kept:
    layer: PackedLinear
    weights: tuple[weakref.ref[Tensor], ...]
    state: tuple[tuple[int, int], ...]


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


def packed(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (), *, heads: Sequence[int] | None = None
) -> PackedLinear:
    """The packed form of weights, made at the first call and again when they or their biases have been written to.
    It lives as long as the first weight."""
    tensors = (*weights, *(bias for bias in biases if bias is not None))
    state = tuple((x.data_ptr(), -1 if x.is_inference() else x._version) for x in tensors)
    with _lock:
        kept = _kept.get(weights[0])
        same = kept is not None and kept.state == state and len(kept.weights) == len(tensors)
        if not same or any(ref() is not x for ref, x in zip(kept.weights, tensors, strict=True)):
            layer = PackedLinear(weights, biases or (None,) * len(weights), heads=heads)
            kept = _kept[weights[0]] = _Kept(layer, tuple(weakref.ref(x) for x in tensors), state)
        return kept.layer


def _check_dense(name: str, x: Tensor, shape: tuple[int, int]) -> None:
    # The extension takes it as a pointer: rows further apart than they are wide would be read as other rows.
    if x.shape != shape or x.dtype != torch.float32 or not x.is_contiguous():
        dense = "dense" if x.is_contiguous() else "strided"
        raise ValueError(f"{name}: expected dense float32 {list(shape)}, found {dense} {_tensors.describe(x)}")


def linear(x: Tensor, layer: PackedLinear, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
    """``norm(x) W^T + b``, float32 ``[M, N]``; with `residual` (float32 ``[M, N]``, dense) added to it in place.

    Args:
        x: ``[M, K]``, any strides, float32, bfloat16 or float16.
    """
    rows = x.shape[0]
    if x.shape != (rows, layer.in_features):
        raise ValueError(f"x: expected [M, {layer.in_features}], found {list(x.shape)}")
    if residual is not None:
        _check_dense("residual", residual, (rows, layer.out_features))
    out = torch.empty(rows, layer.out_features) if residual is None else residual
    _C.linear(
        _tensors.view(x),
        rows,
        layer.layer,
        None if norm is None else norm.packed,
        layer.bias_pointer,
        out.data_ptr(),
        residual is not None,
        torch.get_num_threads(),
    )
    return out


def gated_mlp(
    x: Tensor, norm: Norm, gate_up: PackedLinear, down: PackedLinear, activation: str, residual: Tensor
) -> Tensor:
    """Add ``down(act(g) * u)``, where ``g, u = gate_up(norm(x))``, to `residual` in place.

    Both `x` and `residual` are float32 ``[M, H]`` and dense, and may be the same tensor."""
    shape = x.shape[0], gate_up.in_features
    _check_dense("x", x, shape)
    _check_dense("residual", residual, shape)
    if gate_up.out_features != 2 * down.in_features or down.out_features != shape[1]:
        found = gate_up.in_features, gate_up.out_features, down.in_features, down.out_features
        raise ValueError(f"gate_up, down: expected [2 I, H] and [H, I], found sizes {found}")
    _C.gated_mlp(
        x.data_ptr(),
        x.shape[0],
        norm.packed,
        gate_up.layer,
        gate_up.bias_pointer,
        down.layer,
        down.bias_pointer,
        _ACTIVATIONS[activation],
        residual.data_ptr(),
        torch.get_num_threads(),
    )
    return residual
