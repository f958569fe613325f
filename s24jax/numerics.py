"""Products that accumulate in float32 and round once, where the program says so.

XLA may keep a bfloat16 intermediate in float32 (its "excess precision"). The 2:4 choice depends on
the last bit of such values, and the forward and the backward pass must see the same ones, so every
rounding that matters is explicit here.
"""

import jax.numpy as jnp
from jax import lax

from s24jax.typing import Array


def round_to(x: Array, dtype) -> Array:
    """`x` rounded to `dtype` (to nearest, ties to even), a rounding that XLA may not remove.

    Magnitudes below the smallest normal number of `dtype` become zero in float16 (2^-14); in
    bfloat16 and float32 (2^-126) they do on a CPU, and stay on a GPU.
    """
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant).astype(dtype)


def dot(a: Array, b: Array, *, contract: tuple[int, int], dtype=None) -> Array:
    """Dense product of two matrices, accumulated in float32.

    Args:
      a, b: matrices of one dtype.
      contract: the axis of `a` and the axis of `b` that are summed over.
      dtype: what the result is rounded to; `a`'s dtype where it is None.

    Float32 operands follow `jax_default_matmul_precision` (TF32 on Hopper by default).
    """
    dimension_numbers = (((contract[0],), (contract[1],)), ((), ()))
    product = lax.dot_general(a, b, dimension_numbers, preferred_element_type=jnp.float32)
    return round_to(product, dtype or a.dtype)
