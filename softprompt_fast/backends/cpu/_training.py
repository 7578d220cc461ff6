# SPDX-License-Identifier: Apache-2.0
"""What a differentiated pass over a frozen decoder is made of; see ``csrc/cpu/training.h``.

Plain functions of dense float32 tensors, none of them differentiable: whoever calls them writes the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softprompt_fast.backends.cpu import _tensors
from softprompt_fast.backends.cpu._linear import _ACTIVATIONS, _check_dense
from softprompt_fast.backends.norm import Norm

_C = _tensors.extension()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check_rows(name: str, x: Tensor, shape: tuple[int, int]) -> None:
    if x.shape != shape or x.dtype != torch.float32 or x.device.type != "cpu" or x.stride(1) != 1:
        raise ValueError(
            f"{name}: expected float32 {list(shape)} on cpu with dense rows, found {_tensors.describe(x)} of strides "
            f"{x.stride()}"
        )


def _check_matrix(name: str, b: Tensor, depth: int) -> None:
    plain = b.dim() == 2 and b.dtype == torch.float32 and b.device.type == "cpu"
    if not plain or b.shape[0] != depth or 1 not in b.stride():
        raise ValueError(
            f"{name}: expected float32 [{depth}, N] on cpu with a stride of 1, "
            f"found {_tensors.describe(b)} of strides {b.stride()}"
        )


def _check_bias(name: str, bias: Tensor | None, columns: int) -> None:
    if bias is not None and (bias.shape != (columns,) or bias.dtype != torch.float32 or not bias.is_contiguous()):
        raise ValueError(f"{name}: expected dense float32 [{columns}], found {_tensors.describe(bias)}")


def product(
    x: Tensor, b: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """``x b + bias``, float32 ``[M, N]``.

    Args:
        x: ``[M, K]`` with dense rows.
        b: ``[K, N]``, one stride 1: a layer's weight, or its transpose, as PyTorch holds it.
        bias: ``[N]``.
        out: ``[M, N]`` with dense rows to write to; None: a new tensor. add: to what `out` holds.

    Raises:
        ValueError: a shape, dtype or stride other than these.
    """
    rows, depth, columns = x.shape[0], x.shape[1], b.shape[-1]
    _check_rows("x", x, (rows, depth))
    _check_matrix("b", b, depth)
    _check_bias("bias", bias, columns)
    if out is None:
        out, add = x.new_empty(rows, columns), False
    _check_rows("out", out, (rows, columns))
    sizes = (rows, depth, columns)
    threads = torch.get_num_threads()
    _C.product(sizes, _tensors.view(x), _tensors.view(b), _pointer(bias), _tensors.view(out), add, threads)
    return out


def gated_product(
    x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``g = x gate + gate_bias``, ``u = x up + up_bias`` and ``act(g) * u``, each ``[M, N]``.

    Args:
        x: ``[M, K]`` with dense rows. gate, up: ``[K, N]``, see :func:`product`.
    """
    sizes = (x.shape[0], x.shape[1], gate.shape[-1])
    _check_rows("x", x, sizes[:2])
    for name, b, bias in (("gate", gate, gate_bias), ("up", up, up_bias)):
        _check_matrix(name, b, sizes[1])
        _check_bias(f"{name}_bias", bias, sizes[2])
    if gate.shape != up.shape:
        raise ValueError(f"up: expected {list(gate.shape)}, as gate has, found {list(up.shape)}")
    g, u, out = (x.new_empty(sizes[0], sizes[2]) for _ in range(3))
    _C.gated_product(
        sizes,
        _tensors.view(x),
        _tensors.view(gate),
        _pointer(gate_bias),
        _tensors.view(up),
        _pointer(up_bias),
        _ACTIVATIONS[activation],
        _tensors.view(g),
        _tensors.view(u),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return g, u, out


def gated_product_backward(
    grad: Tensor, down: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` and `up` through ``down(act(gate) * up)``, each ``[M, N]``.

    Args:
        grad: ``[M, K]`` of the result. down: ``[K, N]``, see :func:`product`. gate, up: ``[M, N]``, dense.
    """
    sizes = (grad.shape[0], grad.shape[1], down.shape[-1])
    _check_rows("grad", grad, sizes[:2])
    _check_matrix("down", down, sizes[1])
    _check_dense("gate", gate, (sizes[0], sizes[2]))
    _check_dense("up", up, (sizes[0], sizes[2]))
    grads = torch.empty_like(gate), torch.empty_like(up)
    _C.gated_product_backward(
        sizes,
        _tensors.view(grad),
        _tensors.view(down),
        _ACTIVATIONS[activation],
        gate.data_ptr(),
        up.data_ptr(),
        grads[0].data_ptr(),
        grads[1].data_ptr(),
        torch.get_num_threads(),
    )
    return grads


def norm_rows(x: Tensor, norm: Norm) -> Tensor:
    """``norm(x)`` over the rows of ``[M, N]``, in float32."""
    out = torch.empty(x.shape)
    _C.norm_rows(_tensors.view(x), *x.shape, norm.packed, out.data_ptr(), torch.get_num_threads())
    return out


def norm_rows_backward(x: Tensor, grad: Tensor, norm: Norm, *, out: Tensor | None = None) -> Tensor:
    """The gradient of `x` ``[M, N]`` through an RMS norm of its rows, given that of the result; with `out` (dense
    ``[M, N]``) added to it in place."""
    shape = (x.shape[0], x.shape[1])
    _check_dense("x", x, shape)
    _check_dense("grad", grad, shape)
    add = out is not None
    out = torch.empty_like(x) if out is None else out
    _check_dense("out", out, shape)
    pointers = (x.data_ptr(), grad.data_ptr(), *shape, norm.packed, out.data_ptr())
    _C.norm_rows_backward(*pointers, add, torch.get_num_threads())
    return out


def rotate_rows(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, *, transposed: bool = False) -> Tensor:
    """Turn the heads of dense ``[M, heads * head_dim]`` in place by their row's angles (RoPE, halves), or by the
    transposed map, which is the backward. cos, sin: dense ``[M, rotated]``."""
    rows, width = x.shape
    _check_dense("x", x, (rows, width))
    _check_dense("cos", cos, (rows, cos.shape[1]))
    _check_dense("sin", sin, (rows, cos.shape[1]))
    if width % head_dim:
        raise ValueError(f"head_dim: expected a divisor of {width}, found {head_dim}")
    pointers = (cos.data_ptr(), sin.data_ptr(), cos.shape[1])
    _C.rotate_rows(x.data_ptr(), rows, width // head_dim, head_dim, *pointers, transposed, torch.get_num_threads())
    return x


def cross_entropy_rows(logits: Tensor, labels: Tensor, weights: Tensor | None, *, gradient: bool = True) -> Tensor:
    """Weighted cross-entropy of each row, float32 ``[M]``; with `gradient` the logits become its gradient, in place.

    Formula: ``weight * (log(sum(exp(logits))) - logits[label])`` and ``weight * (softmax(logits) - one_hot(label))``;
    both 0 where the label is negative.

    Args:
        logits: dense float32 ``[M, V]``. labels: dense int64 ``[M]``, below V. weights: float32 ``[M]`` or None: ones.

    Raises:
        ValueError: a shape or dtype other than these, or a label not below V.
    """
    rows, columns = logits.shape
    _check_dense("logits", logits, (rows, columns))
    _check_bias("weights", weights, rows)
    if labels.shape != (rows,) or labels.dtype != torch.int64 or not labels.is_contiguous():
        raise ValueError(f"labels: expected dense int64 [{rows}], found {_tensors.describe(labels)}")
    losses = logits.new_empty(rows)
    arguments = (logits.data_ptr(), rows, columns, _tensors.indexes(labels), _pointer(weights), losses.data_ptr())
    _C.cross_entropy_rows(*arguments, gradient, torch.get_num_threads())
    return losses
