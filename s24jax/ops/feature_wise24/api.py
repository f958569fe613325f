"""feature_wise24: Y2 and dY1 -> the operands of dW_down and dW_up."""

from s24jax.compressed import Compressed24
from s24jax.errors import InvalidInput
from s24jax.feature_split import FeatureSplit
from s24jax.ops import dispatch
from s24jax.ops.feature_wise24 import cuda, reference
from s24jax.ops.feature_wise24.operand import SplitOperand
from s24jax.token_groups import TokenGrouping
from s24jax.typing import Array, Float, Implementation

__all__ = ["CANDIDATES", "SplitOperand", "feature_wise24"]

CANDIDATES = [
    dispatch.Candidate("cuda", cuda.feature_wise24, cuda.reason_against),
    dispatch.Candidate("reference", reference.feature_wise24),
]


def feature_wise24(
    y2: Compressed24 | Float[Array, "T F"],
    dy1: Compressed24 | Float[Array, "T F"],
    split: FeatureSplit,
    *,
    grouping: TokenGrouping,
    shared_mask: bool,
    implementation: Implementation = "auto",
) -> tuple[SplitOperand, SplitOperand]:
    """Splits Y2 and dY1 by feature and prunes the sparse features in groups of 4 tokens.

    Args:
      y2, dy1: [T, F], token-wise compressed with one metadata (mask consistency) or dense; T a
        multiple of 4.
      split: which features are dense.
      grouping: which tokens share a group.
      shared_mask: dY1 is pruned by the mask chosen on |Y2|; False: by its own magnitudes.
      implementation: see `s24jax.ops.dispatch`.

    Returns:
      The operands of dW_down (from Y2) and of dW_up (from dY1), compressed along axis 0 in
      `grouping`'s groups. Ties keep the member that comes first in its group.

    Raises:
      InvalidInput: T is no multiple of 4, or shapes or dtypes do not fit.
      Unsupported: the named implementation cannot run here.

    Source: arXiv 2503.16672, section 4.
    """
    _check(y2, dy1, split)
    candidate = dispatch.resolve(
        "feature_wise24",
        implementation,
        CANDIDATES,
        y2,
        dy1,
        split,
        grouping=grouping,
        shared_mask=shared_mask,
    )
    return candidate.run(y2, dy1, split, grouping=grouping, shared_mask=shared_mask)


def check_split(op: str, shape: tuple[int, int], split: FeatureSplit) -> None:
    """Raises InvalidInput where a [T, F] matrix has no groups of 4 tokens, or another split."""
    tokens, features = shape
    if tokens % 4:
        raise InvalidInput(f"{op}: {tokens} tokens; pad T to a multiple of 4")
    if split.dense.size + split.sparse.size != features:
        raise InvalidInput(
            f"{op}: the split has {split.dense.size} dense and {split.sparse.size} sparse "
            f"features; together they must be F={features}"
        )


def _check(y2, dy1, split: FeatureSplit) -> None:
    if y2.shape != dy1.shape or y2.dtype != dy1.dtype:
        raise InvalidInput(
            f"feature_wise24: y2 is {y2.dtype} {y2.shape}, dy1 {dy1.dtype} {dy1.shape}; "
            "they must have one dtype and one shape"
        )
    check_split("feature_wise24", y2.shape, split)
    for name, y in (("y2", y2), ("dy1", dy1)):
        if isinstance(y, Compressed24) and y.axis != 1:
            raise InvalidInput(f"feature_wise24: {name} is compressed along axis 0; use axis 1")
