"""Triton's interpreter made to round as the hardware does.

Where a GPU rounds float32 to bfloat16 to the nearest, ties to even, the interpreter of Triton 3.6 and 3.9 cuts the last
bits off; its matrix product of bfloat16 multiplies the bits as integers; and its fused multiply-add rounds the product.
conftest.py calls `install` where TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 `x` rounded to bfloat16: to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def install() -> None:
    """Replaces the interpreter's casts and its product for this process."""
    builder, patch_tensor = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> Any:
        found = patch_tensor(tensor, *scope)
        # Triton 3.6 calls int() on an array of one dimension, which NumPy 2.5 refuses
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return found

    interpreter._patch_lang_tensor = patch_lang_tensor
    cast, dot = builder.cast_impl, builder.create_dot
    fp_to_fp = builder.create_fp_to_fp

    def is_narrowing(src: Any, dst_type: Any) -> bool:
        return src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if is_narrowing(src, dst_type):
            return interpreter.TensorHandle(round_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if is_narrowing(src, dst_type):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen_bfloat16(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *args)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)

    builder.create_fma = create_fma
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
