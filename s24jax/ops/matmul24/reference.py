"""matmul24 in pure JAX: decompress, then a dense product."""

from s24jax.compressed import Compressed24
from s24jax.numerics import dot
from s24jax.typing import Array, Float


def matmul24(a: Compressed24, b: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """See `s24jax.ops.matmul24.api`."""
    return dot(a.decompress(), b, contract=(a.axis, 0))
