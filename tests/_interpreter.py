"""Repairs of Triton's CPU interpreter, for the tests alone; imported by conftest after TRITON_INTERPRET is set.

Triton 3.6 to 3.9 interpret bfloat16 wrongly on their own: `tl.dot` multiplies the raw 16-bit patterns, arithmetic works
on them as integers, and a cast from float32 truncates where a GPU rounds to nearest, ties to even. 3.6.0 fails on
runtime loop bounds with numpy 2.4. Scans and nested calls are made faster on the way. Then bfloat16 kernels compute
what a GPU would, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle: Any = interpreter.TensorHandle
Builder: Any = interpreter.InterpreterBuilder


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 as bit patterns of bfloat16, to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    return Handle(bf16_to_f32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _repair_casts() -> None:
    def convert(handle: Any, target: Any, otherwise: Callable[[Any, Any], Any]) -> Any:
        to = target.scalar
        if _is_bf16(handle) and to != tl.bfloat16:
            wide = _widen(handle)
            return wide if to == tl.float32 else otherwise(wide, to)
        if to == tl.bfloat16 and not _is_bf16(handle):
            wide = handle if handle.dtype.scalar == tl.float32 else otherwise(handle, tl.float32)
            return Handle(f32_to_bf16(wide.data), tl.bfloat16)
        return otherwise(handle, target)

    cast, narrow = Builder.cast_impl, Builder.create_fp_to_fp
    Builder.cast_impl = lambda self, src, dst: convert(src, dst, lambda a, b: cast(self, a, b))
    Builder.create_fp_to_fp = lambda self, src, dst, mode: convert(src, dst, lambda a, b: narrow(self, a, b, mode))


def _repair_arithmetic() -> None:
    binary, unary = Builder.binary_op, Builder.unary_op

    def binary_op(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        if not _is_bf16(left):
            return binary(self, left, right, op)
        result = op(bf16_to_f32(left.data), bf16_to_f32(right.data))
        return Handle(result, tl.int1) if result.dtype == np.bool_ else Handle(f32_to_bf16(result), tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        left, right = _widen(a).data, _widen(b).data
        # Row by row: without AVX-512, numpy's product of matrices makes a row's roundings depend on its place.
        product = np.matmul(left[..., :, None, :], right[..., None, :, :], dtype=d.data.dtype)
        return Handle(product[..., 0, :] + d.data, d.dtype.scalar)

    def unary_op(self: Any, value: Any, op: Callable[..., Any]) -> Any:
        if not _is_bf16(value):
            return unary(self, value, op)
        return Handle(f32_to_bf16(op(bf16_to_f32(value.data))), tl.bfloat16)

    Builder.binary_op, Builder.unary_op = binary_op, unary_op
    Builder.create_dot = dot


def _repair_loop_bounds() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_tensor


def _hasten_scans() -> None:
    """Step along the scanned axis only, with whole slices, not element by element."""

    def slices(self: Any, tensors: Any) -> Iterator[tuple[int, tuple[Any, ...]]]:
        for i in range(tensors[0].handle.data.shape[self.axis]):
            yield i, tuple(self.to_tensor(np.take(t.handle.data, i, axis=self.axis), t.dtype) for t in tensors)

    def data(value: Any) -> np.ndarray:
        return value.handle.data if isinstance(value, tl.core.tensor) else np.asarray(value)

    def generic_scan(self: Any, tensors: Any) -> list[Any]:
        outputs = [np.zeros_like(t.handle.data) for t in tensors]
        carried: Any = None
        for i, current in slices(self, tensors):
            carried = current if carried is None else self.combine_fn.fn(*carried, *current)
            carried = carried if isinstance(carried, tuple) else (carried,)
            for output, value in zip(outputs, carried, strict=True):
                place = [slice(None)] * output.ndim
                place[self.axis] = i  # type: ignore[call-overload]
                output[tuple(place)] = data(value).reshape(output[tuple(place)].shape)
        return [self.to_tensor(output, t.dtype) for output, t in zip(outputs, tensors, strict=True)]

    interpreter.ScanOps.generic_scan = generic_scan


def _hasten_calls() -> None:
    """Patch triton.language once a launch, not once for every nested call: that takes 40 % of the time."""
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        namespace = id(self.fn.__globals__)
        if namespace not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(namespace)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def grid_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = grid_call


for _repair in (_repair_casts, _repair_arithmetic, _repair_loop_bounds, _hasten_scans, _hasten_calls):
    _repair()
