"""matmul_sparsify24 in pure JAX: the product, then the pass over it."""

from s24jax.compressed import Compressed24
from s24jax.numerics import dot
from s24jax.ops.sparsify24 import reference
from s24jax.typing import Array, Float, Int


def matmul_sparsify24(
    x: Float[Array, "T D"], w_up: Float[Array, "F D"]
) -> tuple[Compressed24, Int[Array, "F"]]:
    """See `s24jax.ops.matmul_sparsify24.api`."""
    return reference.sparsify24(dot(x, w_up, contract=(1, 1)))
