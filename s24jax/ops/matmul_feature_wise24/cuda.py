"""matmul_feature_wise24 in one kernel, for one mask that Y2 and dY1 share.

Its source is ffi/matmul_feature_wise24.cu.
"""

import jax

from s24jax import cuda_library
from s24jax.compressed import Compressed24
from s24jax.feature_split import FeatureSplit
from s24jax.ops import fused_product
from s24jax.ops.feature_wise24.cuda import recipe_reason, result_types, split_operands
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
    return fused_product.reason_against(dy3, w_down) or recipe_reason(grouping, shared_mask)


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
    dy1_values, *results = cuda_library.call(
        "s24jax_matmul_feature_wise24",
        [jax.ShapeDtypeStruct(y2.values.shape, y2.dtype), *result_types(y2, split)],
        dy3,
        w_down,
        y2.values,
        y2.metadata,
        split.dense,
        split.sparse,
        strided=int(grouping.kind == "strided"),
        group=fused_product.GROUP,
    )
    splits = split_operands(results, y2, split, grouping)
    return BackwardOperands(y2.with_values(dy1_values), *splits)
