"""sparsify24 as one pass in CUDA (ffi/sparsify24.cu)."""

import jax
import jax.numpy as jnp

from s24jax import cuda_library, device
from s24jax.compressed import Compressed24, metadata_shape
from s24jax.typing import Array, Float, Int


def reason_against(y1: Float[Array, "T F"]) -> str | None:
    """Why this implementation cannot take `y1` here; None where it can."""
    reason = device.hopper_reason() or cuda_library.reason_against()
    if reason is None and y1.dtype != jnp.bfloat16:
        reason = f"y1 is {y1.dtype}; cast it to bfloat16"
    if reason is None and y1.shape[1] % 16:
        reason = f"F={y1.shape[1]}; pad it to a multiple of 16"
    return reason


def sparsify24(y1: Float[Array, "T F"]) -> tuple[Compressed24, Int[Array, "F"]]:
    """See `s24jax.ops.sparsify24.api`."""
    tokens, features = y1.shape
    values, metadata, counts_F = cuda_library.call(
        "s24jax_sparsify24",
        [
            jax.ShapeDtypeStruct((tokens, features // 2), y1.dtype),
            jax.ShapeDtypeStruct(metadata_shape(tokens, features), jnp.uint32),
            jax.ShapeDtypeStruct((features,), jnp.int32),
        ],
        y1,
    )
    return Compressed24(values, metadata, axis=1, shape=y1.shape), counts_F
