# SPDX-License-Identifier: Apache-2.0
"""prompt_qkv in Triton, in two forms.

``one_kernel``: a program owns a tile of rows and of columns of q, k or v. It gathers its rows where they lie,
normalises them on their way into the product, and turns its columns before they are written: columns come in the
pairs that RoPE turns, so that both halves are in one accumulator. Nothing between embeddings and q, k, v is ever in
memory; but every tile of columns normalises its rows again, which pays where reading the weights takes the time:
decoding.

``composed``: gather, concatenation and norm in one kernel, one library product each for q, k and v, written where the
attention reads them, and one kernel that turns q and k in place. ``heuristics.fuse_projection`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from softprompt_fast.backends import heuristics
from softprompt_fast.backends.torch import prompt_qkv as torch_backend
from softprompt_fast.backends.triton import _prompt_rows, _runtime, _tuning, prompt_concat
from softprompt_fast.backends.triton._prompt_rows import load_rows, locate

OP = "prompt_qkv"


def reasons(*args: Any) -> list[str]:
    tensors = [*args[:3], *args[11], *args[12], args[16], args[17], args[20], args[21]]
    why = _runtime.refusals(*(x for x in tensors if x is not None and x.is_floating_point()))
    if args[9] not in _runtime.DTYPES:
        why.append(f"it gives float32, bfloat16 and float16, asked for {str(args[9]).removeprefix('torch.')}")
    return why + torch_backend.reasons(*args)


def forward(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    out_dtype: torch.dtype,
    left: bool,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *layer: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = tokens.shape[0] * (prompt_length + tokens.shape[1])
    concat = (tokens, table, prompt, prompt_offsets, prompt_index, own_start)
    form = one_kernel if heuristics.fuse_projection(rows) and _one_kernel_takes(weights, biases) else composed
    return form(*concat, prompt_length, scale, prompt_scale, out_dtype, left, weights, biases, *layer)


def one_kernel(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    out_dtype: torch.dtype,
    left: bool,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    q_heads: int,
    kv_heads: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_offset: float,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole op in one launch. Weights of q, k and v need one dtype and one distance between columns."""
    if not _one_kernel_takes(weights, biases):
        raise ValueError("weights, biases: expected one dtype and, of the weights, one stride between columns")
    heads = (q_heads, kv_heads, kv_heads)
    weights, biases = torch_backend._split(weights, heads), torch_backend._split(biases, heads) if biases else ()
    query, key, value, residual = _results(tokens, prompt, prompt_length, out_dtype, weights, heads)
    rows, width = residual.shape[0] * residual.shape[1], residual.shape[2]
    if rows == 0:
        return query, key, value, residual
    arguments, flags = _prompt_rows.sources(
        tokens, table, prompt, prompt_offsets, prompt_index, own_start, prompt_length, scale, prompt_scale, left
    )
    mode = "few" if heuristics.fuse_projection(rows) else "many"
    config = _tuning.configuration(
        OP, "one_kernel", f"{mode}-{_prompt_rows.bits(out_dtype)}", _runtime.places(tokens.device)
    )
    head_dim, value_dim = query.shape[3], value.shape[3]
    # A head of odd size ends with half a pair.
    pairs = (count * triton.cdiv(dim, 2) for count, dim in zip(heads, (head_dim, head_dim, value_dim), strict=True))
    blocks = [triton.cdiv(2 * n, config["BLOCK_N"]) for n in pairs]
    copies = triton.cdiv(width, config["BLOCK_COPY"])
    grid = (triton.cdiv(rows, config["BLOCK_M"]) * (sum(blocks) + copies),)
    _runtime.launch(
        _one_kernel,
        grid,
        *(query, key, value, residual, residual.stride()),
        *arguments,
        *(y for w in weights for y in (w, w.stride(0))),
        weights[0].stride(1),
        *(biases[i].contiguous() if biases else None for i in range(3)),
        *(None if x is None else x.contiguous() for x in (norm_weight, norm_bias)),
        *(norm_offset, eps),
        *_rotation(cos, sin),
        *(width, *heads[:2], *blocks, copies),
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        ROTATION=0 if cos is None else cos.shape[2],
        NORM=norm,
        # Statistics first, in a pass of their own, or alongside the product? An rms may come last, for it is a factor
        # of the whole row; but what it has not yet tamed may be too large for float16.
        TWO_PASSES=norm == "layer" or (norm == "rms" and out_dtype == torch.float16),
        INTERLEAVED=interleaved,
        PRECISION=_runtime.dot_precision(out_dtype),
        **flags,
        **_prompt_rows.assertions(table),
        **config,
    )
    return query, key, value, residual


def composed(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    out_dtype: torch.dtype,
    left: bool,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    q_heads: int,
    kv_heads: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_offset: float,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three products of a library between two kernels."""
    batch, length = tokens.shape[0], prompt_length + tokens.shape[1]
    residual = _residual(tokens, prompt, length, out_dtype)
    rows, width = batch * length, residual.shape[2]
    normed = residual
    if norm != "none":
        normed = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if residual.numel():
        arguments, flags = _prompt_rows.sources(
            tokens, table, prompt, prompt_offsets, prompt_index, own_start, prompt_length, scale, prompt_scale, left
        )
        config = _norm_configuration("normalise", residual, width)
        _runtime.launch(
            _normalise,
            (triton.cdiv(rows, config["BLOCK_ROWS"]),),
            *(residual, residual.stride(), normed),
            *arguments,
            *(None if x is None else x.contiguous() for x in (norm_weight, norm_bias)),
            *(norm_offset, eps, width),
            NORM=norm,
            **flags,
            **_prompt_rows.assertions(table),
            **config,
        )
    heads = (q_heads, kv_heads, kv_heads)
    bias_of = torch_backend._split(biases, heads) if biases else (None, None, None)
    results = []
    for weight, bias, count in zip(torch_backend._split(weights, heads), bias_of, heads, strict=True):
        projected = F.linear(normed, weight.to(out_dtype), None if bias is None else bias.to(out_dtype))
        results.append(projected.view(batch, length, count, weight.shape[0] // count).transpose(1, 2))
    query, key, value = results
    if cos is not None and sin is not None:
        _turn(query, key, query, key, cos, sin, interleaved, back=False)
    return query, key, value, residual


def backward(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_residual: Tensor | None,
    residual: Tensor,
    tokens: Tensor,
    prompt: Tensor | None,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    left: bool,
    weights: Sequence[Tensor],
    q_heads: int,
    kv_heads: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_offset: float,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of tokens (where they are hidden states or embeddings) and of prompt: q and k turned back in one
    kernel, a library product each for q, k and v, and the norm's gradient with the residual's in one more."""
    batch, length, width = residual.shape
    dtype = residual.dtype
    if cos is not None and sin is not None and (grad_query is not None or grad_key is not None):
        grad_query, grad_key = _turned_back(grad_query, grad_key, cos, sin, interleaved, dtype)
    grad_hidden: Tensor | None = None
    projections = zip(
        (grad_query, grad_key, grad_value),
        torch_backend._split(weights, (q_heads, kv_heads, kv_heads)),
        strict=True,
    )
    for grad, weight in projections:
        if grad is not None:
            flat = grad.to(dtype).transpose(1, 2).reshape(batch * length, weight.shape[0])
            if grad_hidden is None:
                grad_hidden = flat @ weight.to(dtype)
            else:
                grad_hidden.addmm_(flat, weight.to(dtype))
    if grad_hidden is None:
        through = torch.zeros_like(residual) if grad_residual is None else grad_residual
    elif norm == "none":
        through = grad_hidden.view(batch, length, width)
        through = through if grad_residual is None else through + grad_residual
    else:
        through = grad_hidden.view(batch, length, width)
        if through.numel():
            config = _norm_configuration("normalise_backward", residual, width)
            _runtime.launch(
                _normalise_backward,
                (triton.cdiv(batch * length, config["BLOCK_ROWS"]),),
                *(through, residual, residual.stride()),
                *(grad_residual, (0, 0, 0) if grad_residual is None else grad_residual.stride()),
                *(None if norm_weight is None else norm_weight.contiguous(), norm_offset, eps),
                *(batch * length, length, width),
                NORM=norm,
                **config,
            )
    if prompt is None:
        return through.to(tokens.dtype, copy=grad_hidden is None), None  # a result may not be an argument
    grad_prompt, grad_tokens = prompt_concat.backward(
        through, tokens, prompt, prompt_offsets, prompt_index, own_start, prompt_length, scale, prompt_scale, left
    )
    return grad_tokens, grad_prompt


def _one_kernel_takes(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    return (
        all(len({x.dtype for x in xs}) <= 1 for xs in (weights, biases)) and len({w.stride(1) for w in weights}) == 1
    )


def _residual(tokens: Tensor, prompt: Tensor | None, length: int, dtype: torch.dtype) -> Tensor:
    if prompt is None:
        return torch.empty_like(tokens)
    return prompt.new_empty(tokens.shape[0], length, prompt.shape[1], dtype=dtype)


def _results(
    tokens: Tensor,
    prompt: Tensor | None,
    prompt_length: int,
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    heads: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length = tokens.shape[0], prompt_length + tokens.shape[1]
    query, key, value = (
        tokens.new_empty(batch, length, count, w.shape[0] // count, dtype=dtype).transpose(1, 2)
        for w, count in zip(weights, heads, strict=True)
    )
    return query, key, value, _residual(tokens, prompt, length, dtype)


def _rotation(cos: Tensor | None, sin: Tensor | None) -> tuple[Any, ...]:
    """cos and sin with their strides: 0 over the batch where all rows share them."""
    if cos is None or sin is None:
        return None, (0, 0, 0), None, (0, 0, 0)
    strides = (((x.stride(0) if x.shape[0] > 1 else 0), *x.stride()[1:]) for x in (cos, sin))
    cos_strides, sin_strides = strides
    return cos, cos_strides, sin, sin_strides


def _norm_configuration(kernel: str, x: Tensor, width: int) -> dict[str, Any]:
    """A program holds whole rows."""
    key = _prompt_rows.width_key(width, x.element_size())
    config = _tuning.configuration(OP, kernel, key, _runtime.places(x.device))
    return {**config, "BLOCK_WIDTH": triton.next_power_of_2(width)}


def _turned_back(
    grad_query: Tensor | None, grad_key: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients before the rotation, as views of dense ``[B, S, heads, D]`` memory."""

    def dense(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        batch, heads, length, head_dim = grad.shape
        return grad.new_empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)

    turned = dense(grad_query), dense(grad_key)
    # Where one of them has no gradient, the other alone is turned.
    pairs = [(x, y) for x, y in zip((grad_query, grad_key), turned, strict=True) if x is not None and y is not None]
    (first, first_out), (second, second_out) = pairs[0], pairs[-1]
    _turn(first, second, first_out, second_out, cos, sin, interleaved, back=True, heads_of_second=len(pairs) > 1)
    return turned


def _turn(
    query: Tensor,
    key: Tensor,
    query_out: Tensor,
    key_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    *,
    back: bool,
    heads_of_second: bool = True,
) -> None:
    """Turn the heads of q and k into ``*_out``; in place, where those are the same, touching only what turns."""
    batch, q_heads, length, head_dim = query.shape
    kv_heads = key.shape[1] if heads_of_second else 0
    pairs = cos.shape[2] // 2 if query_out is query else triton.cdiv(head_dim, 2)
    total = batch * length * (q_heads + kv_heads)
    if total == 0 or pairs == 0:
        return
    key_name = f"d{_runtime.block(min(head_dim, 256))}-{_prompt_rows.bits(query_out.dtype)}"
    config = _tuning.configuration(OP, "turn", key_name, _runtime.places(query.device))
    _runtime.launch(
        _turn_kernel,
        (triton.cdiv(total, config["BLOCK_ROWS"]),),
        *(y for x in (query_out, key_out, query, key) for y in (x, x.stride())),
        *_rotation(cos, sin),
        *(total, length),
        Q_HEADS=q_heads,
        HEADS=q_heads + kv_heads,
        HEAD_DIM=head_dim,
        ROTATION=cos.shape[2],
        PAIRS=pairs,
        ALIGNED=all(_prompt_rows.aligned(x) for x in (query_out, key_out, query, key)),
        INTERLEAVED=interleaved,
        BACK=back,
        BLOCK_PAIRS=triton.next_power_of_2(pairs),
        **config,
    )


@triton.jit
def _pair(j, dim, rotation, INTERLEAVED: tl.constexpr, ALL_TURN: tl.constexpr):
    """The two elements of a head that pair ``j`` holds: pairs that turn, as RoPE couples them, then the rest in
    order. Of an odd head the last pair's second element is ``dim``, which no head has."""
    half = rotation // 2
    if INTERLEAVED:
        first = 2 * j
        second = 2 * j + 1
    else:
        first = j
        second = j + half
    if not ALL_TURN:  # said apart, for a selection between them is not seen to be contiguous
        rest = (dim - rotation + 1) // 2
        first = tl.where(j < half, first, half + j)
        second = tl.where(j < half, second, half + j + rest)
    return first, second


@triton.jit
def _rotated(
    b_first, b_second, p_cos, p_sin, cos_step, sin_step, first, second, mask, BACK: tl.constexpr
):  # fmt: skip
    """Pairs turned by their position's angles; where ``mask`` is False they pass."""
    b_cos_first = tl.load(p_cos + first.to(tl.int64) * cos_step, mask=mask, other=1.0).to(tl.float32)
    b_cos_second = tl.load(p_cos + second.to(tl.int64) * cos_step, mask=mask, other=1.0).to(tl.float32)
    b_sin_first = tl.load(p_sin + first.to(tl.int64) * sin_step, mask=mask, other=0.0).to(tl.float32)
    b_sin_second = tl.load(p_sin + second.to(tl.int64) * sin_step, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        x = b_first * b_cos_first + b_second * b_sin_second
        y = b_second * b_cos_second - b_first * b_sin_first
    else:
        x = b_first * b_cos_first - b_second * b_sin_first
        y = b_second * b_cos_second + b_first * b_sin_second
    return x, y


@triton.jit(do_not_specialize=_prompt_rows.LENGTHS)
def _one_kernel(
    query, key, value, residual, residual_strides,
    source, source_strides, ids, ids_row, ids_step, vocabulary,
    prompt, prompt_strides, packed, offsets, index, start, prompt_length, own, rows, scale, prompt_scale,
    weight_q, stride_q, weight_k, stride_k, weight_v, stride_v, weight_step,
    bias_q, bias_k, bias_v, norm_weight, norm_bias, norm_offset, eps,
    cos, cos_strides, sin, sin_strides,
    width, q_heads, kv_heads, q_blocks, k_blocks, v_blocks, copies,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTATION: tl.constexpr,
    NORM: tl.constexpr, TWO_PASSES: tl.constexpr, INTERLEAVED: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr, JOINED: tl.constexpr, ALIGNED: tl.constexpr, LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COPY: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    dtype = residual.dtype.element_ty
    slots = prompt_length + own
    # Groups of row tiles, so that programs that run at one time share weights and rows in the L2 cache.
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = q_blocks + k_blocks + v_blocks + copies
    group = tl.program_id(0) // (GROUP_M * column_tiles)
    in_group = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    place = tl.program_id(0) % (GROUP_M * column_tiles)
    tile = place // in_group
    row = (group * GROUP_M + place % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_prompt, p_own, from_prompt, from_own = locate(
        row,
        source, source_strides, ids, ids_row, ids_step, vocabulary,
        prompt, prompt_strides, packed, offsets, index, start, prompt_length, own, rows, LEFT,
    )  # fmt: skip
    exists = row < rows
    b = (row // slots).to(tl.int64)
    slot = (row % slots).to(tl.int64)

    if tile >= q_blocks + k_blocks + v_blocks:  # the residual stream: tiles of its own, that copy and do nothing else
        column = (tile - q_blocks - k_blocks - v_blocks) * BLOCK_COPY + tl.arange(0, BLOCK_COPY)[None, :]
        inside = column < width
        b_x = load_rows(
            p_prompt, prompt_strides[1], p_own, source_strides[2], from_prompt, from_own, column, inside,
            scale, prompt_scale, dtype, SCALED, JOINED, ALIGNED,
        )  # fmt: skip
        p_row = residual + b * residual_strides[0] + slot * residual_strides[1]
        tl.store(p_row[:, None] + column.to(tl.int64) * residual_strides[2], b_x, mask=exists[:, None] & inside)
        return

    is_q = tile < q_blocks
    is_k = tile < q_blocks + k_blocks
    weight = tl.where(is_q, weight_q, tl.where(is_k, weight_k, weight_v))
    weight_stride = tl.where(is_q, stride_q, tl.where(is_k, stride_k, stride_v)).to(tl.int64)
    out = tl.where(is_q, query, tl.where(is_k, key, value))
    heads = tl.where(is_q, q_heads, kv_heads)
    dim = tl.where(is_k, HEAD_DIM, VALUE_DIM)
    turning = tl.where(is_k, ROTATION, 0)
    pairs = (dim + 1) // 2
    first_column = (tile - tl.where(is_q, 0, tl.where(is_k, q_blocks, q_blocks + k_blocks))) * BLOCK_N

    # Neighbouring columns of the tile are the two elements of a pair.
    column = first_column + tl.arange(0, BLOCK_N)
    head = column // 2 // pairs
    first, second = _pair(column // 2 % pairs, dim, turning, INTERLEAVED, False)
    element = tl.where(column % 2 == 0, first, second)
    is_column = (head < heads) & (element < dim)
    weight_row = head * dim + element
    p_weight = weight + weight_row.to(tl.int64) * weight_stride  # [BLOCK_N]

    # Mean and 1 / deviation of each row.
    b_mean = tl.zeros([BLOCK_M], tl.float32)
    b_square = tl.zeros([BLOCK_M], tl.float32)
    b_inverse = b_mean + 1.0
    if TWO_PASSES:
        for k in range(0, width, BLOCK_K):
            inside = k + tl.arange(0, BLOCK_K)[None, :] < width
            b_x = load_rows(
                p_prompt, prompt_strides[1], p_own, source_strides[2], from_prompt, from_own,
                k + tl.arange(0, BLOCK_K)[None, :], inside, scale, prompt_scale, dtype, SCALED, JOINED, ALIGNED,
            ).to(tl.float32)  # fmt: skip
            if NORM == "layer":
                # Chan, Golub and LeVeque (1979): squares around each block's own mean, joined without cancellation.
                count = tl.minimum(width - k, BLOCK_K).to(tl.float32)
                b_block_mean = tl.sum(b_x, 1) / count
                b_centred = tl.where(inside, b_x - b_block_mean[:, None], 0.0)
                b_step = b_block_mean - b_mean
                share = count / (k + count)
                b_square += tl.sum(b_centred * b_centred, 1) + b_step * b_step * k * share
                b_mean += b_step * share
            else:
                b_square += tl.sum(b_x * b_x, 1)
        b_inverse = tl.rsqrt(b_square / width + eps)

    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if norm_weight is not None:
        b_gain = tl.load(norm_weight + tl.arange(0, BLOCK_K), mask=tl.arange(0, BLOCK_K) < width, other=0.0)
    for k in range(0, width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = depth < width
        b_x = load_rows(
            p_prompt, prompt_strides[1], p_own, source_strides[2], from_prompt, from_own,
            depth[None, :], inside[None, :], scale, prompt_scale, dtype, SCALED, JOINED, ALIGNED,
        )  # fmt: skip
        b_weight = tl.load(
            p_weight[None, :] + depth.to(tl.int64)[:, None] * weight_step,
            mask=inside[:, None] & is_column[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        if NORM != "none":
            b_hidden = b_x.to(tl.float32)
            if not TWO_PASSES:
                b_square += tl.sum(b_hidden * b_hidden, 1)
            if TWO_PASSES:
                b_hidden = (b_hidden - b_mean[:, None]) * b_inverse[:, None]
            if norm_weight is not None:
                b_hidden *= (b_gain.to(tl.float32) + norm_offset)[None, :]
                # A step ahead: Triton pipelines no load of 2 bytes a thread.
                b_gain = tl.load(norm_weight + depth + BLOCK_K, mask=depth + BLOCK_K < width, other=0.0)
            if norm_bias is not None:
                b_hidden += tl.load(norm_bias + depth, mask=inside, other=0.0).to(tl.float32)[None, :]
            # No row changes that is written. Without a selection Triton would read the tile from shared memory once
            # more, in the product's layout, for which it is not swizzled: 8 rows of each read would share their banks.
            b_x = tl.where(exists[:, None], b_hidden, 0.0).to(dtype)
        b_out = tl.dot(b_x, b_weight.to(dtype), b_out, input_precision=PRECISION)
    if NORM == "rms" and not TWO_PASSES:
        b_out *= tl.rsqrt(b_square / width + eps)[:, None]
    if bias_q is not None:
        bias = tl.where(is_q, bias_q, tl.where(is_k, bias_k, bias_v))
        b_out += tl.load(bias + weight_row, mask=is_column, other=0.0).to(tl.float32)[None, :]

    b_first, b_second = tl.split(tl.reshape(b_out, [BLOCK_M, BLOCK_N // 2, 2]))  # [BLOCK_M, BLOCK_N // 2] each
    pair = first_column // 2 + tl.arange(0, BLOCK_N // 2)
    head = pair // pairs
    j = pair % pairs
    first, second = _pair(j, dim, turning, INTERLEAVED, False)
    is_pair = head < heads
    if cos is not None:
        p_cos = cos + b * cos_strides[0] + slot * cos_strides[1]
        p_sin = sin + b * sin_strides[0] + slot * sin_strides[1]
        b_first, b_second = _rotated(
            b_first, b_second, p_cos[:, None], p_sin[:, None], cos_strides[2], sin_strides[2],
            first[None, :], second[None, :], exists[:, None] & (is_pair & (j < turning // 2))[None, :], False,
        )  # fmt: skip
    p_out = out + row.to(tl.int64)[:, None] * (heads * dim) + (head * dim)[None, :]
    tl.store(p_out + first[None, :], b_first.to(dtype), mask=exists[:, None] & is_pair[None, :])
    tl.store(p_out + second[None, :], b_second.to(dtype), mask=exists[:, None] & (is_pair & (second < dim))[None, :])


@triton.jit(do_not_specialize=_prompt_rows.LENGTHS)
def _normalise(
    residual, residual_strides, normed,
    source, source_strides, ids, ids_row, ids_step, vocabulary,
    prompt, prompt_strides, packed, offsets, index, start, prompt_length, own, rows, scale, prompt_scale,
    norm_weight, norm_bias, norm_offset, eps, width,
    NORM: tl.constexpr, SCALED: tl.constexpr, JOINED: tl.constexpr, ALIGNED: tl.constexpr, LEFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    mask = (row < rows)[:, None] & inside[None, :]
    p_prompt, p_own, from_prompt, from_own = locate(
        row,
        source, source_strides, ids, ids_row, ids_step, vocabulary,
        prompt, prompt_strides, packed, offsets, index, start, prompt_length, own, rows, LEFT,
    )  # fmt: skip
    b_x = load_rows(
        p_prompt, prompt_strides[1], p_own, source_strides[2], from_prompt, from_own, column[None, :], inside[None, :],
        scale, prompt_scale, residual.dtype.element_ty, SCALED, JOINED, ALIGNED,
    )  # fmt: skip
    slots = prompt_length + own
    b = (row // slots).to(tl.int64)
    slot = (row % slots).to(tl.int64)
    p_row = residual + b * residual_strides[0] + slot * residual_strides[1]
    tl.store(p_row[:, None] + column.to(tl.int64)[None, :] * residual_strides[2], b_x, mask=mask)
    if NORM != "none":
        b_hidden = b_x.to(tl.float32)  # [BLOCK_ROWS, BLOCK_WIDTH]
        if NORM == "layer":
            b_hidden = tl.where(mask, b_hidden - (tl.sum(b_hidden, 1) / width)[:, None], 0.0)
        b_hidden *= tl.rsqrt(tl.sum(b_hidden * b_hidden, 1) / width + eps)[:, None]
        if norm_weight is not None:
            b_gain = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
            b_hidden *= (b_gain + norm_offset)[None, :]
        if norm_bias is not None:
            b_hidden += tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        p_normed = normed + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(p_normed, b_hidden.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length"])
def _normalise_backward(
    grad, residual, residual_strides, grad_residual, grad_residual_strides,
    norm_weight, norm_offset, eps, rows, length, width,
    NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    # In place. y = gain * x_hat with x_hat = (x - mean) / deviation: the gradient of x is that of x_hat without its
    # parts along x_hat (and, LayerNorm, along the constant vector), over the deviation.
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = column < width
    mask = (row < rows)[:, None] & inside
    b = (row // length).to(tl.int64)
    slot = (row % length).to(tl.int64)
    p_x = (
        residual
        + (b * residual_strides[0] + slot * residual_strides[1])[:, None]
        + column.to(tl.int64) * residual_strides[2]
    )
    p_grad = grad + row.to(tl.int64)[:, None] * width + column
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_WIDTH]
    b_grad = tl.load(p_grad, mask=mask, other=0.0).to(tl.float32)
    if norm_weight is not None:
        b_grad *= tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32) + norm_offset
    if NORM == "layer":
        b_x = tl.where(mask, b_x - (tl.sum(b_x, 1) / width)[:, None], 0.0)
        b_grad = tl.where(mask, b_grad - (tl.sum(b_grad, 1) / width)[:, None], 0.0)
    b_inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / width + eps)[:, None]
    b_x *= b_inverse
    b_grad = (b_grad - b_x * (tl.sum(b_grad * b_x, 1) / width)[:, None]) * b_inverse
    if grad_residual is not None:
        p_row = grad_residual + b * grad_residual_strides[0] + slot * grad_residual_strides[1]
        b_grad += tl.load(p_row[:, None] + column.to(tl.int64) * grad_residual_strides[2], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(p_grad, b_grad.to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length"])
def _turn_kernel(
    query_out, query_out_strides, key_out, key_out_strides, query, query_strides, key, key_strides,
    cos, cos_strides, sin, sin_strides,
    rows, length,
    Q_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATION: tl.constexpr, PAIRS: tl.constexpr,
    ALIGNED: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    # Rows count over [B, S, heads of q, then of k]: neighbours share a position, so its angles come from the L1 cache.
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    head = row % HEADS
    slot = (row // HEADS % length).to(tl.int64)
    b = (row // HEADS // length).to(tl.int64)
    is_q = head < Q_HEADS
    q_row = b * query_strides[0] + head * query_strides[1] + slot * query_strides[2]
    k_row = b * key_strides[0] + (head - Q_HEADS) * key_strides[1] + slot * key_strides[2]
    q_out_row = b * query_out_strides[0] + head * query_out_strides[1] + slot * query_out_strides[2]
    k_out_row = b * key_out_strides[0] + (head - Q_HEADS) * key_out_strides[1] + slot * key_out_strides[2]
    p_row = tl.where(is_q, query + q_row, key + k_row)
    p_out = tl.where(is_q, query_out + q_out_row, key_out + k_out_row)
    if ALIGNED:
        p_row = tl.multiple_of(p_row, [16])
        p_out = tl.multiple_of(p_out, [16])
    p_row, p_out = p_row[:, None], p_out[:, None]
    step = tl.where(is_q, query_strides[3], key_strides[3])[:, None]

    j = tl.arange(0, BLOCK_PAIRS)[None, :]
    first, second = _pair(j, HEAD_DIM, ROTATION, INTERLEAVED, 2 * PAIRS == ROTATION)
    mask = exists[:, None] & (j < PAIRS)
    b_first = tl.load(p_row + first.to(tl.int64) * step, mask=mask, other=0.0).to(
        tl.float32
    )  # [BLOCK_ROWS, BLOCK_PAIRS]
    b_second = tl.load(p_row + second.to(tl.int64) * step, mask=mask & (second < HEAD_DIM), other=0.0).to(tl.float32)
    b_first, b_second = _rotated(
        b_first, b_second,
        (cos + b * cos_strides[0] + slot * cos_strides[1])[:, None],
        (sin + b * sin_strides[0] + slot * sin_strides[1])[:, None],
        cos_strides[2], sin_strides[2], first, second, mask & (j < ROTATION // 2), BACK,
    )  # fmt: skip
    dtype = query_out.dtype.element_ty
    tl.store(p_out + first, b_first.to(dtype), mask=mask)
    tl.store(p_out + second, b_second.to(dtype), mask=mask & (second < HEAD_DIM))
