"""matmul_feature_wise24 in one kernel, for one mask that Y2 and dY1 share.

Its source is ffi/matmul_feature_wise24.cu.
"""

import jax
import jax.numpy as jnp

from s24jax import cuda_library
from s24jax.compressed import Compressed24, metadata_shape
from s24jax.feature_split import FeatureSplit
from s24jax.ops import fused_product
from s24jax.ops.feature_wise24 import SplitOperand
from s24jax.ops.matmul_feature_wise24.operands import BackwardOperands
from s24jax.token_groups import TokenGrouping
from s24jax.typing import Array, Float


def reason_against(
    dy3: Float[Array, "T D"],
    w_down: Float[Array, "F D"],
    y2: Compressed24,
    split: FeatureSplit,
    *,
    grouping: TokenGrouping,
    shared_mask: bool,
) -> str | None:
    """Why this implementation cannot take the case here; None where it can."""
    reason = fused_product.reason_against(dy3, w_down)
    if reason is None and not shared_mask:
        reason = "dY1 has a mask of its own; it takes one mask for both (shared_feature_mask)"
    if reason is None and grouping.kind == "random":
        reason = "it has no random groups of tokens; use strided or adjacent ones"
    return reason


def matmul_feature_wise24(
    dy3: Float[Array, "T D"],
    w_down: Float[Array, "F D"],
    y2: Compressed24,
    split: FeatureSplit,
    *,
    grouping: TokenGrouping,
    shared_mask: bool,
) -> BackwardOperands:
    """See `s24jax.ops.matmul_feature_wise24.api`."""
    tokens, features = y2.shape
    dense, sparse = split.dense.size, split.sparse.size
    sparse_rows = jax.ShapeDtypeStruct((sparse, tokens // 2), y2.dtype)
    dense_rows = jax.ShapeDtypeStruct((2, dense, tokens // 2), y2.dtype)
    dy1_values, y2_sparse, dy1_sparse, metadata, y2_dense, dy1_dense, _ = cuda_library.call(
        "s24jax_matmul_feature_wise24",
        [
            jax.ShapeDtypeStruct(y2.values.shape, y2.dtype),
            sparse_rows,
            sparse_rows,
            jax.ShapeDtypeStruct(metadata_shape(sparse, tokens), jnp.uint32),
            dense_rows,
            dense_rows,
            jax.ShapeDtypeStruct((features,), jnp.int32),  # the kernel's own
        ],
        dy3,
        w_down,
        y2.values,
        y2.metadata,
        split.dense,
        split.sparse,
        strided=int(grouping.kind == "strided"),
        group=fused_product.GROUP,
    )
    y2_grouped = Compressed24(y2_sparse, metadata, 0, (tokens, sparse), grouping)
    return BackwardOperands(
        y2.with_values(dy1_values),
        SplitOperand(y2_grouped, y2_dense),
        SplitOperand(y2_grouped.with_values(dy1_sparse), dy1_dense),
    )
