"""PTX instructions for which Triton has no word: one function each, elementwise.

A packed operand is a uint32 that holds two bfloat16 or four bytes, the first in the lowest bits.
The tests replace the instructions by what the PTX ISA says they do; so keep them single.
"""

from typing import no_type_check

import triton
import triton.language as tl

# no_type_check: a run-time type checker would wrap the function, and Triton wants the function.


@triton.jit
@no_type_check
def max_nan_bf16x2(x, y):
    """The larger of each half; NaN (0x7FFF) where either is NaN; +0.0 above -0.0."""
    return tl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
@no_type_check
def prmt(x, y, selector):
    """Four of the eight bytes of y:x, one for each of the selector's four lowest nibbles.

    A nibble is the number of a byte, x's first; plus 8, it is that byte's sign, 0x00 or 0xFF.
    """
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [x, y, selector],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
@no_type_check
def dp4a(x, y, z):
    """z plus the dot product of the signed bytes of x and y."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
@no_type_check
def mul_ftz(x, y):
    """The float32 product; zero where it is below the smallest normal number, 2^-126."""
    return tl.inline_asm_elementwise(
        "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
@no_type_check
def cvt_bf16x2(high, low):
    """Two float32 rounded to nearest even and packed; NaN becomes 0x7FFF."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $2;",
        "=r,f,f",
        [high, low],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )
