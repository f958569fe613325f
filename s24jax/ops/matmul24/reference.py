"""matmul24 in pure JAX: decompress, then a dense product."""

from s24jax.compressed import Compressed24
from s24jax.numerics import dot
from s24jax.token_groups import ADJACENT
from s24jax.typing import Array, Float


def matmul24(a: Compressed24, b: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """See `s24jax.ops.matmul24.api`.

    B's rows are taken in A's group order, rather than A's columns put back in theirs: a sum over K
    does not care, and XLA's CPU backend has no 16-bit product of an operand permuted along K.
    """
    if a.grouping != ADJACENT:
        b = b[a.grouping.order(b.shape[0])]
    return dot(a.dense_rows(), b, contract=(1, 0))
