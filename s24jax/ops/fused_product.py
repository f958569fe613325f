"""What the kernels on ffi/dense_matmul.cuh have in common: a product of dense operands, K-major."""

import jax.numpy as jnp

from s24jax import cuda_library, device
from s24jax.typing import Array, Float

# Tiles of 256 tokens that are walked together, so that they share the rows of W in the L2 cache.
GROUP = 8


def reason_against(a: Float[Array, "T D"], w: Float[Array, "F D"]) -> str | None:
    """Why such a kernel cannot take A @ W^T here; None where it can."""
    reason = device.hopper_reason() or cuda_library.reason_against()
    if reason is not None:
        return reason
    if a.dtype != jnp.bfloat16:
        return f"the operands are {a.dtype}; cast them to bfloat16"
    tokens, width = a.shape
    features = w.shape[0]
    if 0 in (tokens, width, features):
        return f"T={tokens}, D={width}, F={features} is an empty product"
    # The copy engine takes rows whose length in bytes is a multiple of 16.
    if width % 8 or features % 16:
        return f"D={width}, F={features}; pad D to a multiple of 8 and F to a multiple of 16"
    return None
