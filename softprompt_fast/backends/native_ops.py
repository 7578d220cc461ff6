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
_STATES = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
SCHEMAS = {
    "prefix_attention": f"({_CALL}) -> (Tensor?, Tensor?)",
    "prefix_attention.out": f"({_CALL}, *, Tensor(a!) out, Tensor(b!) lse) -> bool",
    "prefix_attention_backward": f"(Tensor grad_out, Tensor? grad_lse, {_CALL}, Tensor out, Tensor lse, "
    "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!) grad_prefix_key, "
    "Tensor(e!) grad_prefix_value, Tensor(f!)? delta) -> bool",
    "prompt_qkv": "(Tensor tokens, Tensor? table, Tensor? prompt, Tensor? prompt_offsets, Tensor? prompt_index, "
    "Tensor? own_start, SymInt prompt_length, float scale, float prompt_scale, bool left, Tensor q_weight, "
    "Tensor k_weight, Tensor v_weight, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, int q_heads, int kv_heads, "
    "int norm, Tensor? norm_weight, Tensor? norm_bias, float norm_offset, float eps, Tensor? cos, Tensor? sin, "
    "bool interleaved, Tensor? start, Tensor(a!) query, Tensor(b!) key, Tensor(c!) value, Tensor(d!)? residual) "
    "-> bool",
    "merge_states": f"({_STATES}) -> (Tensor?, Tensor?)",
    "merge_states.out": f"({_STATES}, *, Tensor(a!) out, Tensor(b!) lse) -> bool",
    "merge_states_backward": f"(Tensor grad_out, Tensor? grad_lse, {_STATES}, Tensor(a!) grad_a, "
    "Tensor(b!) grad_lse_a, Tensor(c!) grad_b, Tensor(d!) grad_lse_b) -> bool",
}
"""The C++ side reads arguments in this order. Results are None, or False, where it refuses a call."""

_LIBRARY = torch.library.Library("softprompt_fast", "FRAGMENT")


def op(name: str, backend: str, results: Callable[..., tuple[Tensor, Tensor]] | None = None) -> Any:
    """The overload of an op of one backend, which this defines.

    Args:
        name: of `SCHEMAS`. backend: part of the op's name, ``softprompt_fast::<name>_<backend>``.
        results: memory for the two results of a call with the op's arguments. None: the op gives a bool.

    Raises:
        ImportError: the extension that was to implement it (:func:`implement`) does not.
    """

    def fake(*args: Any, **written: Tensor) -> Any:
        tensors = [x for x in (*args, *written.values()) if isinstance(x, Tensor)]
        fits = all(x.device == tensors[0].device for x in tensors)  # one on "meta" brings the others here
        if results is None:
            return fits
        try:
            return results(*args) if fits else (None, None)
        except (IndexError, ValueError):  # a wrong number of dimensions
            return None, None

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


def served(extension: ModuleType, done: bool) -> None:
    """Where the extension's op, whose result was `done`, refused its call, say why.

    Raises:
        ValueError: its arguments. RuntimeError: something else failed.
    """
    if not done:
        why, failed = extension.refusal()
        raise RuntimeError(why) if failed else ValueError(why)


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
