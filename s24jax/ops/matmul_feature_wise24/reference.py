"""matmul_feature_wise24 in pure JAX: the product, then the passes over it."""

from s24jax.activation import relu2_gradient
from s24jax.compressed import Compressed24
from s24jax.feature_split import FeatureSplit
from s24jax.numerics import dot
from s24jax.ops.feature_wise24 import reference
from s24jax.ops.matmul_feature_wise24.operands import BackwardOperands
from s24jax.token_groups import TokenGrouping
from s24jax.typing import Array, Float


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
    dy1 = pruned_dy1(y2, dot(dy3, w_down, contract=(1, 1)))
    splits = reference.feature_wise24(y2, dy1, split, grouping=grouping, shared_mask=shared_mask)
    return BackwardOperands(dy1, *splits)


def pruned_dy1(y2: Compressed24, dy2: Float[Array, "T F"]) -> Compressed24:
    """dY1 = 2 * sqrt(Y2) * dY2, compressed under Y2's mask."""
    return y2.with_values(relu2_gradient(y2.values, y2.gather(dy2).values))
