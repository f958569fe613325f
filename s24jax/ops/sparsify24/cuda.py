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
    return compressed_y2("s24jax_sparsify24", y1.shape, y1)


def compressed_y2(
    target: str, shape: tuple[int, int], *operands: Array, **attributes: int
) -> tuple[Compressed24, Int[Array, "F"]]:
    """Y2 [T, F] and its counts from a handler that makes them of `operands`, in their dtype."""
    tokens, features = shape
    values, metadata, counts_F = cuda_library.call(
        target,
        [
            jax.ShapeDtypeStruct((tokens, features // 2), operands[0].dtype),
            jax.ShapeDtypeStruct(metadata_shape(tokens, features), jnp.uint32),
            jax.ShapeDtypeStruct((features,), jnp.int32),
        ],
        *operands,
        **attributes,
    )
    return Compressed24(values, metadata, axis=1, shape=shape), counts_F
