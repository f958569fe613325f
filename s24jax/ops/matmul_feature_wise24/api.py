"""matmul_feature_wise24: dY3, W_down and Y2 -> the operands of dX, dW_down and dW_up."""

from s24jax.compressed import Compressed24
from s24jax.errors import InvalidInput
from s24jax.feature_split import FeatureSplit
from s24jax.ops import dispatch
from s24jax.ops.feature_wise24.api import check_split
from s24jax.ops.matmul_feature_wise24 import cuda, reference
from s24jax.ops.matmul_feature_wise24.operands import BackwardOperands
from s24jax.token_groups import TokenGrouping
from s24jax.typing import Array, Float, Implementation

__all__ = ["CANDIDATES", "BackwardOperands", "matmul_feature_wise24"]

CANDIDATES = [
    dispatch.Candidate("cuda", cuda.matmul_feature_wise24, cuda.reason_against),
    dispatch.Candidate("reference", reference.matmul_feature_wise24),
]


def matmul_feature_wise24(
    dy3: Float[Array, "T D"],
    w_down: Float[Array, "F D"],
    y2: Compressed24,
    split: FeatureSplit,
    *,
    grouping: TokenGrouping,
    shared_mask: bool,
    implementation: Implementation = "auto",
) -> BackwardOperands:
    """dY1 = 2 * sqrt(Y2) * dY2 with dY2 = dY3 @ W_down^T, and `feature_wise24` of Y2 and dY1.

    dY2 accumulates in float32 and is rounded once to the operands' dtype, and so is dY1, which is
    zero wherever the pruned Y2 is.

    Args:
      dy3: gradient of the FFN's output; T a multiple of 4.
      w_down: feature-major.
      y2: token-wise compressed, [T, F].
      split, grouping, shared_mask: see `feature_wise24`.
      implementation: see `s24jax.ops.dispatch`.

    Raises:
      InvalidInput: T is no multiple of 4, or shapes or dtypes do not fit.
      Unsupported: the named implementation cannot run here.

    Source: arXiv 2503.16672, section 4.
    """
    _check(dy3, w_down, y2, split)
    arguments = dy3, w_down, y2, split
    how = {"grouping": grouping, "shared_mask": shared_mask}
    candidate = dispatch.resolve(
        "matmul_feature_wise24", implementation, CANDIDATES, *arguments, **how
    )
    return candidate.run(*arguments, **how)


def _check(dy3: Array, w_down: Array, y2: Compressed24, split: FeatureSplit) -> None:
    shapes = dy3.ndim == w_down.ndim == 2 and (dy3.shape[1] == w_down.shape[1])
    if not shapes or y2.shape != (dy3.shape[0], w_down.shape[0]) or y2.axis != 1:
        raise InvalidInput(
            f"matmul_feature_wise24: dy3 {dy3.shape}, w_down {w_down.shape}, y2 {y2.shape} "
            f"compressed along axis {y2.axis} do not fit; they must be [T, D], [F, D] and [T, F] "
            "compressed along axis 1"
        )
    if not dy3.dtype == w_down.dtype == y2.dtype:
        raise InvalidInput(
            f"matmul_feature_wise24: dy3 is {dy3.dtype}, w_down {w_down.dtype}, y2 {y2.dtype}; "
            "cast them to one dtype"
        )
    check_split("matmul_feature_wise24", y2.shape, split)
