"""feature_wise24 in pure JAX."""

from s24jax.compressed import Compressed24, compress24
from s24jax.feature_split import FeatureSplit
from s24jax.ops.feature_wise24.operand import SplitOperand, dense_rows
from s24jax.token_groups import TokenGrouping
from s24jax.typing import Array, Float


def feature_wise24(
    y2: Compressed24 | Float[Array, "T F"],
    dy1: Compressed24 | Float[Array, "T F"],
    split: FeatureSplit,
    *,
    grouping: TokenGrouping,
    shared_mask: bool,
) -> tuple[SplitOperand, SplitOperand]:
    """See `s24jax.ops.feature_wise24.api`."""
    y2_TF, dy1_TF = (y.decompress() if isinstance(y, Compressed24) else y for y in (y2, dy1))
    y2_sparse, dy1_sparse = y2_TF[:, split.sparse], dy1_TF[:, split.sparse]
    y2_grouped = compress24(y2_sparse, axis=0, grouping=grouping)
    if shared_mask:
        dy1_grouped = y2_grouped.gather(dy1_sparse)
    else:
        dy1_grouped = compress24(dy1_sparse, axis=0, grouping=grouping)
    return (
        SplitOperand(y2_grouped, dense_rows(y2_TF[:, split.dense], grouping)),
        SplitOperand(dy1_grouped, dense_rows(dy1_TF[:, split.dense], grouping)),
    )
