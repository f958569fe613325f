"""feature_wise24 as one pass in CUDA, for one mask shared by Y2 and dY1 (ffi/feature_wise24.cu)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from s24jax import cuda_library, device
from s24jax.compressed import Compressed24, metadata_shape
from s24jax.feature_split import FeatureSplit
from s24jax.ops.feature_wise24.operand import SplitOperand
from s24jax.token_groups import TokenGrouping
from s24jax.typing import Array, Float


def reason_against(
    y2: Compressed24 | Float[Array, "T F"],
    dy1: Compressed24 | Float[Array, "T F"],
    split: FeatureSplit,
    *,
    grouping: TokenGrouping,
    shared_mask: bool,
) -> str | None:
    """Why this implementation cannot take the case here; None where it can."""
    reason = device.hopper_reason() or cuda_library.reason_against()
    if reason is not None:
        return reason
    if not isinstance(y2, Compressed24) or not isinstance(dy1, Compressed24):
        return "Y2 and dY1 are dense; it starts from token-wise compressed ones (mask_consistency)"
    reason = recipe_reason(grouping, shared_mask)
    if reason is not None:
        return reason
    if y2.dtype != jnp.bfloat16:
        return f"Y2 is {y2.dtype}; cast it to bfloat16"
    tokens, features = y2.shape
    if tokens == 0:
        return "T=0: there are no tokens"
    if features % 16:
        return f"F={features}; pad it to a multiple of 16"
    return None


def feature_wise24(
    y2: Compressed24,
    dy1: Compressed24,
    split: FeatureSplit,
    *,
    grouping: TokenGrouping,
    shared_mask: bool,
) -> tuple[SplitOperand, SplitOperand]:
    """See `s24jax.ops.feature_wise24.api`."""
    results = cuda_library.call(
        "s24jax_feature_wise24",
        result_types(y2, split),
        y2.values,
        y2.metadata,
        dy1.values,
        split.dense,
        split.sparse,
        strided=int(grouping.kind == "strided"),
    )
    return split_operands(results, y2, split, grouping)


# ---------------------------------------------------------------- what matmul_feature_wise24 shares


def recipe_reason(grouping: TokenGrouping, shared_mask: bool) -> str | None:
    """Why a kernel cannot prune like this; None where it can."""
    if not shared_mask:
        return "dY1 has a mask of its own; it takes one mask for both (shared_feature_mask)"
    if grouping.kind == "random":
        return "it has no random groups of tokens; use strided or adjacent ones"
    return None


def result_types(y2: Compressed24, split: FeatureSplit) -> list[jax.ShapeDtypeStruct]:
    """Of a handler: sparse values of Y2 and dY1, their metadata, dense rows of both, and where the
    values and the metadata of each feature go, which is the kernel's own."""
    tokens, features = y2.shape
    dense, sparse = split.dense.size, split.sparse.size
    values = jax.ShapeDtypeStruct((sparse, tokens // 2), y2.dtype)
    metadata = jax.ShapeDtypeStruct(metadata_shape(sparse, tokens), jnp.uint32)
    dense_rows = jax.ShapeDtypeStruct((2, dense, tokens // 2), y2.dtype)
    places = jax.ShapeDtypeStruct((2, features), jnp.int32)
    return [values, values, metadata, dense_rows, dense_rows, places]


def split_operands(
    results: Sequence[Array], y2: Compressed24, split: FeatureSplit, grouping: TokenGrouping
) -> tuple[SplitOperand, SplitOperand]:
    """The operands of dW_down and dW_up from results of `result_types`."""
    y2_values, dy1_values, metadata, y2_dense, dy1_dense, _ = results
    shape = y2.shape[0], split.sparse.size
    y2_sparse = Compressed24(y2_values, metadata, 0, shape, grouping)
    return (
        SplitOperand(y2_sparse, y2_dense),
        SplitOperand(y2_sparse.with_values(dy1_values), dy1_dense),
    )
