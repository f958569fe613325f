"""sparsify24 in pure JAX."""

import jax.numpy as jnp

from s24jax.activation import relu2
from s24jax.compressed import Compressed24, compress24_by
from s24jax.typing import Array, Float, Int


def sparsify24(y1: Float[Array, "T F"]) -> tuple[Compressed24, Int[Array, "F"]]:
    """See `s24jax.ops.sparsify24.api`."""
    y2_TF = relu2(y1)
    # Ranked before squaring: two values whose squares underflow or round alike still differ here.
    y2 = compress24_by(y2_TF, jnp.maximum(y1, 0), axis=1)
    counts_F = jnp.sum(y2_TF != 0, axis=0, dtype=jnp.int32)
    return y2, counts_F
