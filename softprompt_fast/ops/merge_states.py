# SPDX-License-Identifier: Apache-2.0
"""Exact merge of two partial attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends._registry import Backends
from softprompt_fast.ops._library import autograd, call, define
from softprompt_fast.reference.merge_states import merge_states as reference

__all__ = ["merge_states"]

BACKENDS = Backends("merge_states")


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Merge attention over a set of keys A and over another set B into attention over both.

    .. math::
        lse = \log(e^{lse_a} + e^{lse_b}), \qquad out = e^{lse_a - lse}\, out_a + e^{lse_b - lse}\, out_b

    Exact, because a softmax over a union of keys is the two softmaxes weighted by their sums of exponentials (the
    "online softmax" of Milakov and Gimelshein, 2018). An empty state is (zeros, -inf); two of them merge to an empty
    state.

    Args:
        out_a, out_b: ``[..., Dv]`` floating, same shape and dtype: normalised partial outputs.
        lse_a, lse_b: ``[...]``, the natural-log sums of exponentials; float32 (float64 where out is float64).
        backend: a backend name; None: the environment variable SOFTPROMPT_FAST_BACKEND, else the first that can.

    Returns:
        ``(out, lse)`` shaped and typed like the inputs, their strides those of ``torch.empty_like`` of out_a and of
        lse_a. Differentiable in all four inputs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
        BackendError: the backend asked for cannot serve this call.
    """
    direct = BACKENDS.direct(backend, out_a, lse_a, out_b, lse_b)
    if direct is not None:
        return direct
    if out_a.shape != out_b.shape:
        raise ValueError(f"out_b: expected the shape of out_a, {list(out_a.shape)}, found {list(out_b.shape)}")
    if out_a.dtype != out_b.dtype or not out_a.is_floating_point():
        raise ValueError(f"out_a, out_b: expected one floating dtype, found {out_a.dtype} and {out_b.dtype}")
    lse_dtype = torch.promote_types(out_a.dtype, torch.float32)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(f"{name}: expected shape {list(out_a.shape[:-1])}, found {list(lse.shape)}")
        if lse.dtype != lse_dtype:
            raise ValueError(f"{name}: expected {lse_dtype} beside {out_a.dtype} outputs, found {lse.dtype}")
    args = (out_a, lse_a, out_b, lse_b)
    name = BACKENDS.select(backend, args)
    if name == "reference":
        return reference(*args)
    return call(_forward, *args, name)


def _forward_impl(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return BACKENDS[backend].forward(out_a, lse_a, out_b, lse_b)


def _forward_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a)


def _backward_impl(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    lse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return BACKENDS[backend].backward(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, lse)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    lse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(out_a), torch.empty_like(lse_a), torch.empty_like(out_b), torch.empty_like(lse_b)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[0])
    return (*_backward_op(grad_out, grad_lse, *saved, ctx.backend), None)


_forward = define(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str backend) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward_op = define(
    "merge_states_backward(Tensor grad_out, Tensor? grad_lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, "
    "Tensor lse, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
autograd("merge_states", _backward, _setup_context)
