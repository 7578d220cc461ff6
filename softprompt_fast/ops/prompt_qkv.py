# SPDX-License-Identifier: Apache-2.0
"""A decoder layer's way from its input to the attention: (gather + concatenate +) norm + QKV projection + RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from softprompt_fast.backends._registry import Backends
from softprompt_fast.ops._checks import describe
from softprompt_fast.ops._library import autograd, call, define
from softprompt_fast.ops.prompt_concat import check_values, padded_left, prologue
from softprompt_fast.reference.prompt_qkv import prompt_qkv as reference

__all__ = ["prompt_qkv"]

BACKENDS = Backends("prompt_qkv")


def prompt_qkv(
    tokens: Tensor,
    weight: Tensor | Sequence[Tensor],
    *,
    q_heads: int,
    kv_heads: int,
    bias: Tensor | Sequence[Tensor] | None = None,
    norm: Literal["rms", "layer", "none"] = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_offset: float = 0.0,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    table: Tensor | None = None,
    prompt: Tensor | None = None,
    prompt_offsets: Tensor | None = None,
    prompt_index: Tensor | None = None,
    own_start: Tensor | None = None,
    prompt_length: int | None = None,
    scale: float | None = None,
    prompt_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
    padding_side: Literal["left", "right"] = "left",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Queries, keys and values of a decoder layer from its input.

    .. math::
        x = concat(tokens, prompt) \text{ or } tokens, \quad
        y = norm(x) (norm\_offset + norm\_weight) + norm\_bias, \quad
        q, k, v = split(y W^T + bias), \quad q, k = rope(q, k)

    with norm(x) = ``x / sqrt(mean(x^2) + eps)`` ("rms", Zhang and Sennrich, 2019), the same of ``x - mean(x)``
    ("layer"), or x ("none"), and RoPE (Su et al., 2021) turning each pair (x_i, x_j) of a head to
    ``(x_i cos_i - x_j sin_i, x_j cos_j + x_i sin_j)``.

    Args:
        tokens: without a prompt: hidden states, floating ``[B, S, H]``. With one: what :func:`prompt_concat` takes.
        weight: ``[Hq * D + 2 * Hkv * D, H]``, rows of q, then k, then v; or three tensors ``[Hq * D, H]``, ``[Hkv * D,
            H]``, ``[Hkv * Dv, H]``.
        q_heads, kv_heads: Hq and Hkv.
        bias: like weight, without H.
        norm, norm_weight, norm_bias, norm_offset, eps: see above; weight and bias ``[H]``. Gemma's norm has
            norm_offset 1.
        cos, sin: ``[B or 1, S', D_rot]`` with even D_rot <= D, S' the length of the result: cosine and sine for every
            element. None: no rotation.
        interleaved: the pairs are (0, 1), (2, 3), ... (Cohere, GPT-J) instead of (0, D_rot / 2), (1, D_rot / 2 + 1),
            ...
        table, prompt, prompt_offsets, prompt_index, own_start, prompt_length, scale, prompt_scale, out_dtype,
            padding_side: the prologue, as in :func:`prompt_concat`; prompt None: there is none.
        backend: a backend name; None: the environment variable SOFTPROMPT_FAST_BACKEND, else the first that can.

    Returns:
        ``query [B, Hq, S', D]``, ``key [B, Hkv, S', D]``, ``value [B, Hkv, S', Dv]``, views of ``[B, S', heads, D]``
        memory, and ``residual [B, S', H]``, x itself; all in x's dtype, S' = prompt_length + S (S without a prompt).
        Differentiable in prompt and in floating tokens; in table, weights, biases, cos and sin through the reference
        only.

    Raises:
        IndexError: a token id is outside the table (on an accelerator: PyTorch's device-side assertion).
        ValueError: a shape, dtype, device or option does not fit. Values of index tensors are checked on the CPU only.
        BackendError: the backend asked for cannot serve this call.
    """
    if prompt is None:
        given = {
            "table": table,
            "prompt_offsets": prompt_offsets,
            "prompt_index": prompt_index,
            "own_start": own_start,
            "prompt_length": prompt_length,
            "scale": scale,
            "prompt_scale": prompt_scale,
            "out_dtype": out_dtype,
        }
        for name, argument in given.items():
            if argument is not None:
                raise ValueError(f"{name}: expected None without a prompt, found {argument!r}")
        if tokens.dim() != 3 or not tokens.is_floating_point():
            raise ValueError(f"tokens: expected floating [B, S, H] without a prompt, found {describe(tokens)}")
        start: tuple[Any, ...] = (tokens, None, None, None, None, None, 0, 1.0, 1.0, tokens.dtype, True)
        width, length = tokens.shape[2], tokens.shape[1]
    else:
        concat = (tokens, table, prompt, prompt_offsets, prompt_index, own_start)
        start = prologue(*concat, prompt_length, scale, prompt_scale, out_dtype, padded_left(padding_side))
        width, length = prompt.shape[1], start[6] + tokens.shape[1]
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    parameters = [("norm_weight", norm_weight), ("norm_bias", norm_bias), ("cos", cos), ("sin", sin)]
    for name, x in [*(("weight", w) for w in weights), *(("bias", b) for b in biases), *parameters]:
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, found {describe(x)}")
    _check_projection(weights, biases, q_heads, kv_heads, width)
    if norm not in ("rms", "layer", "none"):
        raise ValueError(f"norm: expected 'rms', 'layer' or 'none', found {norm!r}")
    for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if x is not None and (norm == "none" or x.shape != (width,)):
            expected = "None with norm='none'" if norm == "none" else f"[{width}]"
            raise ValueError(f"{name}: expected {expected}, found {describe(x)}")
    if norm_bias is not None and norm == "rms":
        raise ValueError("norm_bias: expected None with norm='rms'")
    _check_rotation(
        cos, sin, tokens.shape[0], length, weights[0].shape[0] // _heads_in_first(weights, q_heads, kv_heads)
    )
    args = (
        *start,
        weights,
        biases,
        q_heads,
        kv_heads,
        norm,
        norm_weight,
        norm_bias,
        float(norm_offset),
        float(eps),
        cos,
        sin,
        interleaved,
    )
    name = BACKENDS.select(backend, args)
    if name == "reference":
        if prompt is not None:
            check_values(*start)
        return reference(*args)
    return call(_forward, *args, name)


def _heads_in_first(weights: Sequence[Tensor], q_heads: int, kv_heads: int) -> int:
    return q_heads if len(weights) == 3 else q_heads + 2 * kv_heads


def _check_projection(
    weights: Sequence[Tensor], biases: Sequence[Tensor], q_heads: int, kv_heads: int, width: int
) -> None:
    if len(weights) not in (1, 3):
        raise ValueError(f"weight: expected one tensor or three (q, k, v), found {len(weights)}")
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"q_heads: expected a multiple of kv_heads, {kv_heads}, found {q_heads}")
    heads = (q_heads, kv_heads, kv_heads) if len(weights) == 3 else (q_heads + 2 * kv_heads,)
    for weight, count in zip(weights, heads, strict=True):
        if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] % count or not weight.shape[0]:
            raise ValueError(f"weight: expected [a multiple of {count} heads, {width}], found {describe(weight)}")
    if len(weights) == 3 and weights[0].shape[0] // q_heads != weights[1].shape[0] // kv_heads:
        dims = weights[0].shape[0] // q_heads, weights[1].shape[0] // kv_heads
        raise ValueError(f"weight: expected one head dimension for q and k, found {dims[0]} and {dims[1]}")
    if biases and [b.shape for b in biases] != [w.shape[:1] for w in weights]:
        expected, found = [list(w.shape[:1]) for w in weights], [list(b.shape) for b in biases]
        raise ValueError(f"bias: expected shapes {expected} beside these weights, found {found}")


def _check_rotation(cos: Tensor | None, sin: Tensor | None, batch: int, length: int, head_dim: int) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither")
    if cos is None or sin is None:
        return
    for name, x in (("cos", cos), ("sin", sin)):
        size = x.shape[-1] if x.dim() == 3 else 0
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] != length or size % 2 or size > head_dim:
            expected = f"[{batch} or 1, {length}, even and at most {head_dim}]"
            raise ValueError(f"{name}: expected {expected}, found {describe(x)}")
    if cos.shape != sin.shape:
        raise ValueError(f"sin: expected the shape of cos, {list(cos.shape)}, found {list(sin.shape)}")


def _forward_impl(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if args[2] is not None:
        check_values(*args[:11])
    return BACKENDS[args[-1]].forward(*args[:-1])


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, prompt, prompt_length, out_dtype, weights, q_heads, kv_heads = (args[i] for i in (0, 2, 6, 9, 11, 13, 14))
    batch, length = tokens.shape[0], prompt_length + tokens.shape[1]
    rows = [weights[0].shape[0] // (q_heads + 2 * kv_heads)] * 3
    if len(weights) == 3:
        rows = [w.shape[0] // count for w, count in zip(weights, (q_heads, kv_heads, kv_heads), strict=True)]
    width = tokens.shape[2] if prompt is None else prompt.shape[1]
    query, key, value = (
        tokens.new_empty(batch, length, count, dim, dtype=out_dtype).transpose(1, 2)
        for count, dim in zip((q_heads, kv_heads, kv_heads), rows, strict=True)
    )
    residual = torch.empty_like(tokens) if prompt is None else tokens.new_empty(batch, length, width, dtype=out_dtype)
    return query, key, value, residual


def _backward_impl(*args: Any) -> tuple[Tensor, Tensor]:
    # A schema cannot say "a Tensor or nothing" of a result: what has no gradient gets an empty tensor.
    grad_tokens, grad_prompt = BACKENDS[args[-1]].backward(*args[:-1])
    nothing = args[4].new_empty(0)
    return (
        nothing if grad_tokens is None else grad_tokens.contiguous(),
        nothing if grad_prompt is None else grad_prompt,
    )


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    residual, tokens, prompt = args[4:7]
    grad_tokens = tokens.new_empty(tokens.shape) if tokens.is_floating_point() else residual.new_empty(0)
    return grad_tokens, residual.new_empty(0) if prompt is None else prompt.new_empty(prompt.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    tokens, _, prompt, offsets, index, start, length, scale, prompt_scale, _, left = inputs[:11]
    weights, biases, q_heads, kv_heads, norm, norm_weight, _, norm_offset, eps, cos, sin, interleaved, ctx.backend = (
        inputs[11:]
    )
    ctx.prologue = length, scale, prompt_scale, left
    ctx.layer = (q_heads, kv_heads, norm), (norm_offset, eps), interleaved
    ctx.lists = [None] * len(weights), [None] * len(biases)  # the gradients of two lists of tensors: lists
    ctx.save_for_backward(output[3], tokens, prompt, offsets, index, start, norm_weight, cos, sin, *weights)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    residual, tokens, prompt, offsets, index, start, norm_weight, cos, sin, *weights = ctx.saved_tensors
    heads, numbers, interleaved = ctx.layer
    concat = (residual, tokens, prompt, offsets, index, start, *ctx.prologue)
    layer = (weights, *heads, norm_weight, *numbers, cos, sin, interleaved)
    grad_tokens, grad_prompt = _backward_op(*grads, *concat, *layer, ctx.backend)
    grad_tokens = grad_tokens if tokens.is_floating_point() else None
    grad_prompt = None if prompt is None else grad_prompt
    return (grad_tokens, None, grad_prompt, *(None,) * 8, *ctx.lists, *(None,) * 11)


_PROLOGUE = (
    "Tensor? prompt, Tensor? prompt_offsets, Tensor? prompt_index, Tensor? own_start, SymInt prompt_length, "
    "float scale, float prompt_scale"
)
_forward = define(
    f"prompt_qkv(Tensor tokens, Tensor? table, {_PROLOGUE}, ScalarType out_dtype, bool left, Tensor[] weights, "
    "Tensor[] biases, int q_heads, int kv_heads, str norm, Tensor? norm_weight, Tensor? norm_bias, float norm_offset, "
    "float eps, Tensor? cos, Tensor? sin, bool interleaved, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward_op = define(
    "prompt_qkv_backward(Tensor? grad_query, Tensor? grad_key, Tensor? grad_value, Tensor? grad_residual, "
    f"Tensor residual, Tensor tokens, {_PROLOGUE}, bool left, Tensor[] weights, int q_heads, int kv_heads, str norm, "
    "Tensor? norm_weight, float norm_offset, float eps, Tensor? cos, Tensor? sin, bool interleaved, "
    "str backend) -> (Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
autograd("prompt_qkv", _backward, _setup_context)
