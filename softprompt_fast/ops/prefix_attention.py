# SPDX-License-Identifier: Apache-2.0
"""Attention of every row to one shared prefix and to its own keys."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from softprompt_fast.backends._registry import Backends
from softprompt_fast.backends.quantized import LARGEST, dequantize
from softprompt_fast.ops._checks import check_index, check_offsets, check_range, describe
from softprompt_fast.ops._library import autograd, call, define
from softprompt_fast.reference.prefix_attention import prefix_attention as reference

__all__ = ["prefix_attention"]

BACKENDS = Backends("prefix_attention")


# The two kinds of result, for type checkers; the options are those of the definition below.
@overload
def prefix_attention(*tensors: Tensor, return_lse: Literal[False] = False, **options: Any) -> Tensor: ...
@overload
def prefix_attention(*tensors: Tensor, return_lse: Literal[True], **options: Any) -> tuple[Tensor, Tensor]: ...
def prefix_attention(  # type: ignore[misc]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    prefix_offsets: Tensor | None = None,
    prefix_index: Tensor | None = None,
    own_start: Tensor | None = None,
    own_end: Tensor | None = None,
    query_start: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    prefix_key_scale: Tensor | None = None,
    prefix_value_scale: Tensor | None = None,
    prefix_scale_block: int | None = None,
    max_prefix_length: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend from every row's queries to the row's prefix, of which there is one copy, and to the row's own keys.

    .. math::
        s_j = cap(scale \cdot q \cdot k_j) + bias_j, \qquad
        lse = \log \sum_j e^{s_j}, \qquad
        out = \sum_j e^{s_j - lse} v_j

    over the visible keys j of "prefix, then own keys"; ``cap(x) = softcap * tanh(x / softcap)``. B rows, Hq = G * Hkv
    query heads over Hkv key/value heads (query head h reads head h // G), S queries a row, T own keys a row, L prefix
    entries.

    **What a query sees.** Query i of row b stands at own position ``query_start[b] + i``. It sees the whole prefix,
    and own key j if ``own_start[b] <= j < own_end[b]`` and (causal) ``j <= position``. With a sliding window W, also
    ``query place - key place < W``, counted over the sequence "prefix, then own tokens from own_start": prefix entry p
    of P stands at place p, own position j at place ``P + j - own_start[b]``. A query outside ``[own_start, own_end)``
    is padding: its output is finite and otherwise unspecified. A query that sees nothing gives zeros and lse = -inf,
    never NaN.

    Args:
        query: ``[B, Hq, S, D]`` floating. Any strides, here and below.
        key, value: ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, dtype and device of query. Hidden ones must be finite.
        prefix_key, prefix_value: ``[Hkv, L, D]`` and ``[Hkv, L, Dv]``, same dtype and device: N prefixes packed end to
            end. int8 or float8_e4m3fn with the three arguments below; they then get no gradient.
        prefix_offsets: int32 or int64 ``[N + 1]``, rising from >= 0 to <= L: prefix n is entries ``[offsets[n],
            offsets[n + 1])``. None: one prefix of L entries.
        prefix_index: int ``[B]``, each row's prefix, -1 for none. None: prefix 0 for all rows.
        own_start, own_end: int ``[B]``, within 0..T: each row's range of own keys (left and right padding, or the
            filled part of a static cache). None: 0 and T.
        query_start: int ``[B]``, own position of each row's first query. None: ``T - S``.
        scale: None: ``D ** -0.5``.
        causal: False: a query sees all its row's own keys.
        sliding_window: W > 0; needs causal.
        softcap: > 0.
        sinks: floating ``[Hq]``, one more logit a head in the softmax's denominator, with no value (gpt-oss). lse
            includes it.
        bias: floating ``[B or 1, Hq or 1, S or 1, W + T]``, added after the softcap (ALiBi, T5). The last T columns
            belong to the own keys, column p before them to entry p of the row's own prefix; W is L for one prefix,
            else at least the longest.
        prefix_key_scale, prefix_value_scale: float32 ``[Hkv, ceil(L / prefix_scale_block)]``, of an 8-bit prefix:
            entry l of head h stands for ``prefix[h, l] * scale[h, l // prefix_scale_block]``. All three or none.
        prefix_scale_block: > 0, entries of the pack that share a scale.
        max_prefix_length: >= 0, tokens of the longest prefix that a row uses, where the caller knows it: a hint by
            which kernels share out their work without reading `prefix_offsets` from the device. Results do not depend
            on it. None: L / N, their mean length, or L is taken for it.
        return_lse: return ``(out, lse)``.
        backend: a backend name; None: the environment variable SOFTPROMPT_FAST_BACKEND, else the first that can.

    Returns:
        ``out [B, Hq, S, Dv]`` in query's dtype, a view of ``[B, S, Hq, Dv]`` memory; with return_lse also ``lse [B,
        Hq, S]``, natural logarithm, float32 (float64 for float64 inputs). Differentiable in query, key, value,
        prefix_key, prefix_value (summed over the rows that use them), sinks and, through the reference only, bias;
        gradients flow through lse as well.

    Source: Hydragen (Juravsky et al., 2024) for the shared prefix, FlashAttention (Dao et al., 2022) for the
    gradients.

    Raises:
        ValueError: a shape, dtype, device or option does not fit. Values of prefix_offsets, prefix_index, own_start
            and own_end are checked on the CPU only: elsewhere reading them would wait for the device.
        BackendError: the backend asked for cannot serve this call.
    """
    direct = BACKENDS.direct(
        backend,
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        prefix_offsets,
        prefix_index,
        own_start,
        own_end,
        query_start,
        scale,
        causal,
        sliding_window,
        softcap,
        sinks,
        bias,
        prefix_key_scale,
        prefix_value_scale,
        prefix_scale_block,
        max_prefix_length,
    )
    if direct is not None:
        return direct if return_lse else direct[0]
    quantized = _is_quantized(prefix_key_scale, prefix_value_scale, prefix_scale_block)
    _check(query, key, value, prefix_key, prefix_value, quantized)
    if quantized:
        _check_scales(prefix_key, prefix_key_scale, prefix_value_scale, prefix_scale_block)
    batch, device = query.shape[0], query.device
    check_index("prefix_offsets", prefix_offsets, None, device)
    check_index("prefix_index", prefix_index, batch, device)
    check_index("own_start", own_start, batch, device)
    check_index("own_end", own_end, batch, device)
    check_index("query_start", query_start, batch, device)
    if sliding_window is not None and (sliding_window <= 0 or not causal):
        raise ValueError(
            f"sliding_window: expected None, or > 0 with causal=True, found {sliding_window} with {causal=}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected None or > 0, found {softcap}")
    if sinks is not None and (sinks.dim() != 1 or sinks.shape[0] != query.shape[1] or sinks.device != query.device):
        raise ValueError(f"sinks: expected [{query.shape[1]}] on {query.device}, found {describe(sinks)}")
    if max_prefix_length is not None and max_prefix_length < 0:
        raise ValueError(f"max_prefix_length: expected None or >= 0, found {max_prefix_length}")
    if bias is not None:
        _check_bias(bias, query, key.shape[2], prefix_key.shape[1], prefix_offsets)
    args = (
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        prefix_offsets,
        prefix_index,
        own_start,
        own_end,
        query_start,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        causal,
        sliding_window,
        softcap,
        sinks,
        bias,
        prefix_key_scale,
        prefix_value_scale,
        prefix_scale_block,
        max_prefix_length,
    )
    name = BACKENDS.select(backend, args)
    if name == "reference":
        if device.type == "cpu" and not torch.compiler.is_compiling():
            _check_values(args)
        out, lse = reference(*args)
    else:
        out, lse = call(_forward, *args, name)
    return (out, lse) if return_lse else out


def _check(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, quantized: bool
) -> None:
    if query.dim() != 4 or not query.is_floating_point() or query.shape[-1] == 0:
        raise ValueError(f"query: expected floating [B, Hq, S, D] with D > 0, found {describe(query)}")
    if value.dim() != 4:
        raise ValueError(f"value: expected [B, Hkv, T, Dv], found {describe(value)}")
    batch, q_heads, _, head_dim = query.shape
    _, kv_heads, own, v_dim = value.shape
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"query: expected a multiple of value's {kv_heads} heads, found {q_heads} heads")
    prefix_len = prefix_key.shape[1] if prefix_key.dim() == 3 else -1
    prefix_dtype = query.dtype
    if quantized:
        prefix_dtype = prefix_key.dtype if prefix_key.dtype in LARGEST else torch.int8
    for name, x, shape, dtype in (
        ("key", key, (batch, kv_heads, own, head_dim), query.dtype),
        ("value", value, (batch, kv_heads, own, v_dim), query.dtype),
        ("prefix_key", prefix_key, (kv_heads, prefix_len, head_dim), prefix_dtype),
        ("prefix_value", prefix_value, (kv_heads, prefix_len, v_dim), prefix_dtype),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != query.device:
            expected = f"{str(dtype).removeprefix('torch.')} {list(shape)} on {query.device}".replace("-1", "L")
            raise ValueError(f"{name}: expected {expected}, found {describe(x)}")


def _is_quantized(key_scale: Tensor | None, value_scale: Tensor | None, block: int | None) -> bool:
    given = {"prefix_key_scale": key_scale, "prefix_value_scale": value_scale, "prefix_scale_block": block}
    missing = [name for name, argument in given.items() if argument is None]
    if len(missing) in (1, 2):
        raise ValueError(f"{', '.join(given)}: expected all or none, found no {' and no '.join(missing)}")
    return not missing


def _check_scales(prefix_key: Tensor, key_scale: Any, value_scale: Any, block: Any) -> None:
    if not isinstance(block, (int, torch.SymInt)) or block <= 0:
        raise ValueError(f"prefix_scale_block: expected an integer > 0, found {block!r}")
    heads, packed, _ = prefix_key.shape
    shape = (heads, (packed + block - 1) // block)
    for name, scale in (("prefix_key_scale", key_scale), ("prefix_value_scale", value_scale)):
        if scale.shape != shape or scale.dtype != torch.float32 or scale.device != prefix_key.device:
            raise ValueError(f"{name}: expected float32 {list(shape)} on {prefix_key.device}, found {describe(scale)}")


def _check_bias(bias: Tensor, query: Tensor, own: int, packed: int, prefix_offsets: Tensor | None) -> None:
    batch, q_heads, queries, _ = query.shape
    fits = bias.dim() == 4 and bias.is_floating_point() and bias.device == query.device
    fits = fits and all(have in (1, want) for have, want in zip(bias.shape, (batch, q_heads, queries), strict=False))
    if fits:
        width = bias.shape[3] - own
        fits = width == packed if prefix_offsets is None else min(packed, 1) <= width <= packed
    if not fits:
        columns = f"{packed + own}" if prefix_offsets is None else f"longest prefix + {own}"
        raise ValueError(
            f"bias: expected floating [{batch} or 1, {q_heads} or 1, {queries} or 1, {columns}] on {query.device}, "
            f"found {describe(bias)}"
        )


def _check_values(args: tuple[Any, ...]) -> None:
    """Values that lie in host memory. In the op and not in the public function: tracing has no values."""
    _, key, _, prefix_key, _, prefix_offsets, prefix_index, own_start, own_end = args[:9]
    own, bias = key.shape[2], args[15]
    if prefix_offsets is not None or prefix_index is not None:
        prefixes, longest = check_offsets("prefix_offsets", prefix_offsets, prefix_key.shape[1])
        check_range("prefix_index", prefix_index, -1, prefixes - 1)
        if bias is not None and bias.shape[3] - own < longest:
            raise ValueError(f"bias: expected at least {longest} + {own} columns, found {bias.shape[3]}")
    check_range("own_start", own_start, 0, own)
    check_range("own_end", own_end, 0, own)


def _forward_impl(*args: Any) -> tuple[Tensor, Tensor]:
    if args[0].device.type == "cpu":
        _check_values(args)
    return BACKENDS[args[-1]].forward(*args[:-1])


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, queries, dtype=torch.promote_types(query.dtype, torch.float32))


def _backward_impl(*args: Any) -> tuple[Tensor, ...]:
    # A schema cannot say "a Tensor or nothing" of a result: without sinks their gradient is an empty tensor.
    *grads, grad_sinks = BACKENDS[args[-1]].backward(*args[:-1])
    return (*grads, args[0].new_empty(0) if grad_sinks is None else grad_sinks)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    sinks = rest[9]
    batch, heads, queries, head_dim = query.shape
    return (
        query.new_empty(batch, queries, heads, head_dim).transpose(1, 2),
        *(x.new_empty(x.shape) for x in (key, value, prefix_key, prefix_value)),
        grad_out.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.options, ctx.scale_block, ctx.backend = inputs[10:14], inputs[18], inputs[20]
    ctx.save_for_backward(*inputs[:10], *inputs[14:18], *output)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, sinks, bias, key_scale, value_scale, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    quantized = ctx.scale_block is not None
    if quantized:
        # Kept in 8 bits between the passes; no backend's backward has to know of it.
        for i, scale in ((3, key_scale), (4, value_scale)):
            tensors[i] = dequantize(tensors[i], scale, ctx.scale_block, out.dtype)
    *grads, grad_sinks = _backward_op(grad_out, grad_lse, *tensors, *ctx.options, sinks, bias, out, lse, ctx.backend)
    if quantized:
        grads[3:] = None, None
    return (*grads, *(None,) * 9, None if sinks is None else grad_sinks, *(None,) * 6)


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? prefix_offsets, "
    "Tensor? prefix_index, Tensor? own_start, Tensor? own_end, Tensor? query_start, float scale, bool causal, "
    "SymInt? sliding_window, float? softcap, Tensor? sinks, Tensor? bias"
)
_SCALES = "Tensor? prefix_key_scale, Tensor? prefix_value_scale, SymInt? prefix_scale_block"
_forward = define(
    f"prefix_attention({_ARGUMENTS}, {_SCALES}, SymInt? max_prefix_length, str backend) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward_op = define(
    f"prefix_attention_backward(Tensor grad_out, Tensor? grad_lse, {_ARGUMENTS}, Tensor out, Tensor lse, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
autograd("prefix_attention", _backward, _setup_context)
