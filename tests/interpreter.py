# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter computes with bfloat16 like a GPU. On its own it cuts float32 off where kernels on a device
round to the nearest, so that results would be off by a unit in the last place and sums of them biased; it multiplies
matrices of bfloat16 by their bits, negates them so too, and turns integers into such bits."""

from __future__ import annotations

from typing import Any

import torch


def round_like_a_gpu() -> None:
    """Replace the interpreter's casts between float32 and bfloat16 by PyTorch's, and multiply bfloat16 in float32."""
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(src.data.copy()).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(torch.from_numpy(src.data.copy()).view(torch.bfloat16).float().numpy(), tl.float32)
        if kinds[1] == tl.bfloat16 and kinds[0].is_int():
            return cast_impl(self, cast(self, src, tl.float32), dst_type)
        return cast(self, src, dst_type)

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    binary = InterpreterBuilder.binary_op

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16 or b.dtype.scalar != tl.bfloat16:
            return binary(self, a, b, op)
        result = binary(self, cast_impl(self, a, tl.float32), cast_impl(self, b, tl.float32), op)
        return result if result.data.dtype == bool else cast_impl(self, result, tl.bfloat16)

    unary = InterpreterBuilder.unary_op

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return unary(self, a, op)
        return cast_impl(self, unary(self, cast_impl(self, a, tl.float32), op), tl.bfloat16)

    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


def loop_to_a_tensor() -> None:
    """Triton 3.6 makes a loop's bounds Python numbers in a way that NumPy 2.4 refuses for arrays of one element."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def look_dtypes_up_once() -> None:
    """For every value the interpreter built its table of NumPy's dtypes anew, a twelfth of its time."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    find = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def patch_once_a_launch() -> None:
    """The interpreter replaces the functions of triton.language when a kernel is launched, and again at every call of
    a function within it, which changes nothing and took more than a third of its time. Here once a launch, for every
    module that such functions are of."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None  # a call's: only a launch takes back what was replaced
        patched.add(id(fn.__globals__))
        scope = patch(fn)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang
