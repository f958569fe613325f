"""split_matmul24 in pure JAX: two products, scattered."""

import jax.numpy as jnp

from s24jax.feature_split import FeatureSplit
from s24jax.numerics import dot
from s24jax.ops.feature_wise24.operand import SplitOperand
from s24jax.ops.matmul24 import reference
from s24jax.typing import Array, Float


def split_matmul24(
    a: SplitOperand, b: Float[Array, "T N"], split: FeatureSplit
) -> Float[Array, "F N"]:
    """See `s24jax.ops.split_matmul24.api`."""
    dw_FN = jnp.zeros((split.sparse.size + split.dense.size, b.shape[1]), b.dtype)
    dw_FN = dw_FN.at[split.sparse].set(reference.matmul24(a.sparse, b))
    return dw_FN.at[split.dense].set(dot(a.dense_features(), b, contract=(0, 0)))
