# SPDX-License-Identifier: Apache-2.0
"""The ops that C++ implements for PyTorch's dispatcher: ``softprompt_fast::<op>_<backend>`` (``csrc/torch_abi.h``).

A call of one goes from Python straight to the kernel: for `prefix_attention` with its 20 arguments some 4 us, where an
implementation in Python takes 15 between the two. They have no gradient. Whatever their kernels don't take they refuse
without an exception, which could not pass through PyTorch: by results that are None, or False.
``softprompt_fast/ops/<op>.py`` tries them first where no gradient is wanted (:meth:`Backends.direct`). What they
refuse goes the long way, which says what is wrong, or finds another backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from softprompt_fast.backends import native

_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? prefix_offsets, "
    "Tensor? prefix_index, Tensor? own_start, Tensor? own_end, Tensor? query_start, float? scale, bool causal, "
    "SymInt? sliding_window, float? softcap, Tensor? sinks, Tensor? bias, Tensor? prefix_key_scale, "
    "Tensor? prefix_value_scale, SymInt? prefix_scale_block, SymInt? max_prefix_length"
)
_CONCAT = (
    "Tensor tokens, Tensor? table, Tensor? prompt, Tensor? prompt_offsets, Tensor? prompt_index, Tensor? own_start, "
    "SymInt? prompt_length, float? scale, float? prompt_scale, bool left"
)
_STATES = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
SCHEMAS = {
    "prefix_attention": f"({_CALL}) -> (Tensor?, Tensor?)",
    "prefix_attention.out": f"({_CALL}, *, Tensor(a!) out, Tensor(b!) lse) -> bool",
    "prefix_attention_backward": f"(Tensor grad_out, Tensor? grad_lse, {_CALL}, Tensor out, Tensor lse, "
    "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!) grad_prefix_key, "
    "Tensor(e!) grad_prefix_value, Tensor(f!)? delta) -> bool",
    "prompt_concat": f"({_CONCAT}, ScalarType? out_dtype) -> Tensor?",
    "prompt_concat.out": f"({_CONCAT}, *, Tensor(a!) out) -> bool",
    "prompt_concat_backward": f"(Tensor grad_out, {_CONCAT}, Tensor(a!) grad_prompt, Tensor(b!)? grad_tokens) -> bool",
    "prompt_qkv": f"({_CONCAT}, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? v_bias, int q_heads, int kv_heads, int norm, Tensor? norm_weight, Tensor? norm_bias, float norm_offset, "
    "float eps, Tensor? cos, Tensor? sin, bool interleaved, Tensor? start, Tensor(a!) query, Tensor(b!) key, "
    "Tensor(c!) value, Tensor(d!)? residual) -> bool",
    "head_norm": "(Tensor(a!) query, Tensor(b!) key, Tensor q_weight, float q_offset, float q_eps, Tensor k_weight, "
    "float k_offset, float k_eps, Tensor cos, Tensor sin, Tensor? start) -> bool",
    "merge_states": f"({_STATES}) -> (Tensor?, Tensor?)",
    "merge_states.out": f"({_STATES}, *, Tensor(a!) out, Tensor(b!) lse) -> bool",
    "merge_states_backward": f"(Tensor grad_out, Tensor? grad_lse, {_STATES}, Tensor(a!) grad_a, "
    "Tensor(b!) grad_lse_a, Tensor(c!) grad_b, Tensor(d!) grad_lse_b) -> bool",
}
"""The C++ side reads arguments in this order. Results are None, or False, where it refuses a call."""
_REFUSED: dict[str, Any] = {"bool": False, "Tensor?": None, "(Tensor?, Tensor?)": (None, None)}

_LIBRARY = torch.library.Library("softprompt_fast", "FRAGMENT")


def op(name: str, backend: str, results: Callable[..., Any] | None = None) -> Any:
    """The overload of an op of one backend, which this defines.

    Args:
        name: of `SCHEMAS`. backend: part of the op's name, ``softprompt_fast::<name>_<backend>``.
        results: memory for the results of a call with the op's arguments. None: the op gives a bool.

    Raises:
        ImportError: the extension that was to implement it (:func:`implement`) does not.
    """
    refused = _REFUSED[SCHEMAS[name].rpartition(" -> ")[2]]

    def fake(*args: Any, **written: Tensor) -> Any:
        tensors = [x for x in (*args, *written.values()) if isinstance(x, Tensor)]
        if any(x.device != tensors[0].device for x in tensors):  # one on "meta" brings the others here
            return refused
        try:
            return True if results is None else results(*args)
        except (IndexError, ValueError):  # a wrong number of dimensions
            return refused

    stem, _, overload = name.partition(".")
    full = f"{stem}_{backend}" + (f".{overload}" if overload else "")
    if not torch._C._dispatch_has_kernel(f"softprompt_fast::{full}"):  # undefined ops are there if implemented
        raise ImportError(native.lacks(f"softprompt_fast::{full}"))
    _LIBRARY.define(full + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"softprompt_fast::{full}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops.softprompt_fast, f"{stem}_{backend}"), overload or "default")


def prefix_attention_results(query: Tensor, key: Tensor, value: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    """Memory for the results of a call: out, a view of ``[B, S, Hq, Dv]``, and lse."""
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, queries, dtype=torch.float32)


def merge_states_results(out_a: Tensor, lse_a: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the results of a call."""
    return torch.empty_like(out_a), torch.empty_like(lse_a)


def prompt_concat_results(
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int | None,
    scale: float | None,
    prompt_scale: float | None,
    left: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Memory for the result of a call."""
    packed, width = prompt.shape
    slots: Any = packed if prompt_length is None else prompt_length
    if prompt_length is None and prompt_offsets is not None:  # only their values know it
        slots = torch.library.get_ctx().new_dynamic_size()
    dtype = (tokens if table is None else table).dtype if out_dtype is None else out_dtype
    return prompt.new_empty(tokens.shape[0], slots + tokens.shape[1], width, dtype=dtype)


def prompt_concat(
    extension: ModuleType,
    op: Any,
    tokens: Tensor,
    table: Tensor | None,
    prompt: Tensor,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    prompt_length: int,
    scale: float,
    prompt_scale: float,
    out_dtype: torch.dtype,
    left: bool,
) -> Tensor:
    """A backend's `forward`, by its op ``prompt_concat.out``."""
    rows = dense(prompt_offsets, prompt_index, own_start)
    args: Any = (tokens, table, prompt, *rows, prompt_length, scale, prompt_scale, left, out_dtype)
    out = prompt_concat_results(*args)
    served(extension, op(*args[:-1], out=out))
    return out


def prompt_concat_backward(
    extension: ModuleType,
    op: Any,
    grad_out: Tensor,
    tokens: Tensor,
    prompt: Tensor,
    prompt_offsets: Tensor | None,
    prompt_index: Tensor | None,
    own_start: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor | None]:
    """A backend's `backward`, by its op: gradients of prompt, summed over the rows, and of tokens where they are
    embeddings."""
    grads = prompt.new_empty(prompt.shape), tokens.new_empty(tokens.shape) if tokens.is_floating_point() else None
    rows = dense(prompt_offsets, prompt_index, own_start)
    served(extension, op(grad_out, tokens, None, prompt, *rows, *options, *grads))
    return grads


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of one number a row or a prompt: small enough to copy where they are apart in memory."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


def served(extension: ModuleType, done: bool) -> None:
    """Where the extension's op, whose result was `done`, refused its call, raise why.

    Raises:
        ValueError, IndexError: its arguments. RuntimeError: something else failed.
    """
    if not done:
        extension.raise_refusal()


@cache
def implement(extension: ModuleType) -> None:
    """Let an extension give PyTorch its kernels.

    Raises:
        ImportError: this PyTorch lacks what that takes; the message says what.
    """
    try:
        extension.implement_ops(str(Path(torch.__file__).parent / "lib"))
    except RuntimeError as error:
        raise ImportError(f"{extension.__name__}: {error}") from None
