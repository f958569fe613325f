"""split_features in one small kernel (ffi/split_features.cu)."""

import jax
import jax.numpy as jnp

from s24jax import cuda_library, device
from s24jax.feature_split import FeatureSplit
from s24jax.typing import Array, Int

MOST_FEATURES = 56 * 1024  # their counts lie in a block's shared memory


def reason_against(counts: Int[Array, "F"], dense_features: int) -> str | None:
    """Why this implementation cannot run here; None where it can."""
    reason = device.hopper_reason() or cuda_library.reason_against()
    if reason is None and counts.dtype != jnp.int32:
        reason = f"counts are {counts.dtype}; cast them to int32"
    if reason is None and counts.size > MOST_FEATURES:
        reason = f"F={counts.size} is more than {MOST_FEATURES}"
    return reason


def split_features(counts: Int[Array, "F"], dense_features: int) -> FeatureSplit:
    """See `s24jax.ops.split_features.api`."""
    dense, sparse = cuda_library.call(
        "s24jax_split_features",
        [
            jax.ShapeDtypeStruct((dense_features,), jnp.int32),
            jax.ShapeDtypeStruct((counts.size - dense_features,), jnp.int32),
        ],
        counts,
    )
    return FeatureSplit(dense, sparse)
