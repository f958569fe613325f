"""matmul_sparsify24 in one kernel (ffi/matmul_sparsify24.cu)."""

import jax
import jax.numpy as jnp

from s24jax import cuda_library
from s24jax.compressed import Compressed24, metadata_shape
from s24jax.ops import fused_product
from s24jax.ops.fused_product import reason_against
from s24jax.typing import Array, Float, Int

__all__ = ["matmul_sparsify24", "reason_against"]


def matmul_sparsify24(
    x: Float[Array, "T D"], w_up: Float[Array, "F D"]
) -> tuple[Compressed24, Int[Array, "F"]]:
    """See `s24jax.ops.matmul_sparsify24.api`."""
    shape = tokens, features = x.shape[0], w_up.shape[0]
    values, metadata, counts_F = cuda_library.call(
        "s24jax_matmul_sparsify24",
        [
            jax.ShapeDtypeStruct((tokens, features // 2), x.dtype),
            jax.ShapeDtypeStruct(metadata_shape(tokens, features), jnp.uint32),
            jax.ShapeDtypeStruct((features,), jnp.int32),
        ],
        x,
        w_up,
        group=fused_product.GROUP,
    )
    return Compressed24(values, metadata, axis=1, shape=shape), counts_F
