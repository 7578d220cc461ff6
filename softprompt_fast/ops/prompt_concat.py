# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens in front of a batch's token embeddings: gather, scale, cast and concatenate at once."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from softprompt_fast.backends._registry import Backends
from softprompt_fast.ops._checks import check_index, check_offsets, check_range, describe
from softprompt_fast.ops._library import autograd, call, define
from softprompt_fast.reference.prompt_concat import prompt_concat as reference

__all__ = ["prompt_concat", "prompt_layout"]

BACKENDS = Backends("prompt_concat")


def prompt_concat(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor,
    *,
    prompt_offsets: Tensor | None = None,
    prompt_index: Tensor | None = None,
    own_start: Tensor | None = None,
    prompt_length: int | None = None,
    scale: float | None = None,
    prompt_scale: float | None = None,
    out_dtype: torch.dtype | None = None,
    padding_side: Literal["left", "right"] = "left",
    backend: str | None = None,
) -> Tensor:
    """Put every row's virtual tokens directly in front of its own tokens.

    Row b of the result, with P its number of virtual tokens and a = own_start[b]::

        padding_side "left":   prompt_length - P zeros | a zeros | P virtual tokens | own tokens a..S-1
        padding_side "right":  a zeros | P virtual tokens | own tokens a..S-1 | prompt_length - P zeros

    So a left-padded row keeps its prompt next to its own tokens. :func:`prompt_layout` gives the mask and the
    positions.

    Args:
        tokens: int64 ``[B, S]`` token ids, or floating ``[B, S, H]`` embeddings.
        table: floating ``[V, H]``, the embedding table of the ids; None with embeddings.
        prompt: floating ``[L, H]``: N soft prompts packed end to end. A prompt a row, ``[B, P, H]``, is
            ``prompt.flatten(0, 1)`` with offsets ``arange(B + 1) * P`` and index ``arange(B)``.
        prompt_offsets: int32 or int64 ``[N + 1]``, rising from >= 0 to <= L. None: one prompt of L virtual tokens.
        prompt_index: int ``[B]``, each row's prompt, -1 for none. None: prompt 0 for all rows.
        own_start: int ``[B]``, within 0..S: where a row's own tokens begin; those before are not read. None: 0.
        prompt_length: slots for the virtual tokens, at least the longest prompt's. None: the longest; with
            prompt_offsets this reads their values (an accelerator waits; a graph being traced breaks), so give it
            there.
        scale, prompt_scale: factors of the tokens' and the prompt's embeddings (Gemma: ``H ** 0.5``, for both). None:
            1.
        out_dtype: None: the dtype of table, or of tokens where they are embeddings.
        padding_side: which side of a row is padded.
        backend: a backend name; None: the environment variable SOFTPROMPT_FAST_BACKEND, else the first that can.

    Returns:
        ``[B, prompt_length + S, H]`` in out_dtype, contiguous. Differentiable in prompt (summed over the rows that use
        it) and in tokens where they are embeddings; in table through the reference only.

    Raises:
        IndexError: a token id is outside the table (on an accelerator: PyTorch's device-side assertion).
        ValueError: a shape, dtype, device or option does not fit. Values of index tensors are checked on the CPU only.
        BackendError: the backend asked for cannot serve this call.
    """
    left = padded_left(padding_side)
    given = (tokens, table, prompt, prompt_offsets, prompt_index, own_start, prompt_length, scale, prompt_scale)
    direct = BACKENDS.direct(backend, *given, left, out_dtype)
    if direct is not None:
        return direct
    args = prologue(*given, out_dtype, left)
    name = BACKENDS.select(backend, args)
    if name == "reference":
        check_values(*args)
        return reference(*args)
    return call(_forward, *args, name)


def prompt_layout(
    tokens: Tensor,
    prompt: Tensor,
    *,
    prompt_offsets: Tensor | None = None,
    prompt_index: Tensor | None = None,
    own_start: Tensor | None = None,
    own_end: Tensor | None = None,
    prompt_length: int | None = None,
    padding_side: Literal["left", "right"] = "left",
) -> tuple[Tensor, Tensor]:
    """The attention mask and the position ids of what :func:`prompt_concat` returns for the same arguments.

    Args:
        own_end: int ``[B]``, where a row's own tokens end (right padding). None: S. The others: see prompt_concat.

    Returns:
        ``(attention_mask, position_ids)``, int64 ``[B, prompt_length + S]``: 1 at virtual and own tokens; and their
        places counted from the row's first virtual token, 0 in padding before it.
    """
    batch, own = tokens.shape[:2]
    prompt_length = _prompt_length(prompt, prompt_offsets, prompt_length)
    device = prompt.device

    def per_row(values: Tensor | None, default: int) -> Tensor:  # [B, 1]
        return torch.full((batch, 1), default, device=device) if values is None else values.to(torch.int64)[:, None]

    index, start, end = per_row(prompt_index, 0), per_row(own_start, 0), per_row(own_end, own)
    length = torch.full((batch, 1), prompt.shape[0], device=device)
    if prompt_offsets is not None:
        length = prompt_offsets.to(torch.int64).diff()[index.clamp(min=0)]
    length = length.where(index >= 0, 0)
    lead = start + (prompt_length - length if padding_side == "left" else 0)
    place = torch.arange(prompt_length + own, device=device) - lead
    mask = (place >= 0) & (place < length + end - start)
    return mask.to(torch.int64), place.clamp(min=0)


def padded_left(padding_side: str) -> bool:
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', found {padding_side!r}")
    return padding_side == "left"


def prologue(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int | None,
    scale: float | None,
    prompt_scale: float | None,
    out_dtype: torch.dtype | None,
    left: bool,
) -> tuple[Any, ...]:
    """Check the arguments and fill in the defaults: what prompt_concat and prompt_qkv hand to a backend."""
    ids = not tokens.is_floating_point()
    if prompt.dim() != 2 or not prompt.is_floating_point():
        raise ValueError(f"prompt: expected floating [L, H], found {describe(prompt)}")
    width, device = prompt.shape[1], prompt.device
    if ids and (tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.device != device):
        raise ValueError(
            f"tokens: expected int64 [B, S] or floating [B, S, {width}] on {device}, found {describe(tokens)}"
        )
    if not ids and (tokens.dim() != 3 or tokens.shape[2] != width or tokens.device != device):
        raise ValueError(
            f"tokens: expected floating [B, S, {width}], as wide as prompt, on {device}, found {describe(tokens)}"
        )
    if ids != (table is not None):
        raise ValueError(f"table: expected {'an embedding table' if ids else 'None'} with tokens {describe(tokens)}")
    if table is not None and (table.dim() != 2 or table.shape[1] != width or table.device != device):
        raise ValueError(
            f"table: expected floating [V, {width}], as wide as prompt, on {device}, found {describe(table)}"
        )
    if table is not None and not table.is_floating_point():
        raise ValueError(f"table: expected a floating dtype, found {describe(table)}")
    check_index("prompt_offsets", prompt_offsets, None, device)
    check_index("prompt_index", prompt_index, tokens.shape[0], device)
    check_index("own_start", own_start, tokens.shape[0], device)
    if out_dtype is None:
        out_dtype = tokens.dtype if table is None else table.dtype
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype: expected a floating dtype, found {out_dtype}")
    return (
        tokens,
        table,
        prompt,
        prompt_offsets,
        prompt_index,
        own_start,
        _prompt_length(prompt, prompt_offsets, prompt_length),
        1.0 if scale is None else float(scale),
        1.0 if prompt_scale is None else float(prompt_scale),
        out_dtype,
        left,
    )


def _prompt_length(prompt: Tensor, prompt_offsets: Tensor | None, prompt_length: int | None) -> int:
    if prompt_offsets is None:
        if prompt_length is not None and prompt_length < prompt.shape[0]:
            raise ValueError(f"prompt_length: expected at least {prompt.shape[0]}, found {prompt_length}")
        return prompt.shape[0] if prompt_length is None else prompt_length
    if prompt_length is None:
        return int(prompt_offsets.diff().max())
    return prompt_length


def check_values(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    *rest: Any,
) -> None:
    """Values that lie in host memory. Called by the ops and not by the public functions: tracing has no values."""
    if tokens.device.type != "cpu":
        return
    prompts, longest = check_offsets("prompt_offsets", prompt_offsets, prompt.shape[0])
    if longest > prompt_length:
        raise ValueError(f"prompt_length: expected at least {longest}, the longest prompt, found {prompt_length}")
    check_range("prompt_index", prompt_index, -1, prompts - 1)
    check_range("own_start", own_start, 0, tokens.shape[1])
    if table is not None and tokens.numel():
        low, high = tokens.aminmax()
        if low < 0 or high >= table.shape[0]:
            wrong = (tokens < 0) | (tokens >= table.shape[0])
            if own_start is not None:  # what is not read cannot be wrong
                wrong &= torch.arange(tokens.shape[1]) >= own_start[:, None]
            for row, column in wrong.nonzero()[:1].tolist():
                raise IndexError(
                    f"tokens: id {int(tokens[row, column])} in row {row}, column {column} is outside the vocabulary "
                    f"of {table.shape[0]} tokens"
                )


def _forward_impl(*args: Any) -> Tensor:
    *given, backend = args
    # Without a table, no pass over the ids: the C++ kernel reports a wrong one when it comes to it.
    check_values(given[0], None if backend == "cpu" else given[1], *given[2:])
    return BACKENDS[backend].forward(*given)


def _forward_fake(tokens: Tensor, table: Tensor | None, prompt: Tensor, *rest: Any) -> Tensor:
    prompt_length, out_dtype = rest[3], rest[6]
    return prompt.new_empty(tokens.shape[0], prompt_length + tokens.shape[1], prompt.shape[1], dtype=out_dtype)


def _backward_impl(*args: Any) -> tuple[Tensor, Tensor]:
    grad_prompt, grad_tokens = BACKENDS[args[-1]].backward(*args[:-1])
    return grad_prompt, grad_prompt.new_empty(0) if grad_tokens is None else grad_tokens.contiguous()


def _backward_fake(grad_out: Tensor, tokens: Tensor, prompt: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grad_tokens = tokens.new_empty(tokens.shape) if tokens.is_floating_point() else prompt.new_empty(0)
    return prompt.new_empty(prompt.shape), grad_tokens


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, _, prompt, offsets, index, start, length, scale, prompt_scale, _, left, ctx.backend = inputs
    ctx.options = length, scale, prompt_scale, left
    ctx.save_for_backward(tokens, prompt, offsets, index, start)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    tokens = ctx.saved_tensors[0]
    grad_prompt, grad_tokens = _backward_op(grad_out, *ctx.saved_tensors, *ctx.options, ctx.backend)
    return (grad_tokens if tokens.is_floating_point() else None, None, grad_prompt, *(None,) * 9)


_forward = define(
    "prompt_concat(Tensor tokens, Tensor? table, Tensor prompt, Tensor? prompt_offsets, Tensor? prompt_index, "
    "Tensor? own_start, SymInt prompt_length, float scale, float prompt_scale, ScalarType out_dtype, bool left, "
    "str backend) -> Tensor",
    _forward_impl,
    _forward_fake,
)
_backward_op = define(
    "prompt_concat_backward(Tensor grad_out, Tensor tokens, Tensor prompt, Tensor? prompt_offsets, "
    "Tensor? prompt_index, Tensor? own_start, SymInt prompt_length, float scale, float prompt_scale, bool left, "
    "str backend) -> (Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
autograd("prompt_concat", _backward, _setup_context)
