"""split_matmul24: a feature-wise operand times a dense matrix, rows back in their place."""

from s24jax.errors import InvalidInput
from s24jax.feature_split import FeatureSplit
from s24jax.ops import dispatch
from s24jax.ops.feature_wise24.operand import SplitOperand
from s24jax.ops.split_matmul24 import cuda, reference
from s24jax.typing import Array, Float, Implementation

CANDIDATES = [
    dispatch.Candidate("cuda", cuda.split_matmul24, cuda.reason_against),
    dispatch.Candidate("reference", reference.split_matmul24),
]


def split_matmul24(
    a: SplitOperand,
    b: Float[Array, "T N"],
    split: FeatureSplit,
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "F N"]:
    """A^T @ B for an A [T, F] whose features are split: the gradient of a weight.

    Accumulation in float32, one rounding to the operands' dtype.

    Args:
      a: from `feature_wise24`.
      b: dense, of `a`'s dtype; tokens in their natural order.
      split: which rows of the result are which features of `a`.
      implementation: see `s24jax.ops.dispatch`.

    Raises:
      InvalidInput: shapes or dtypes do not fit.
      Unsupported: the named implementation cannot run here.

    Source: arXiv 2503.16672, section 4.
    """
    tokens = a.sparse.shape[0]
    if b.ndim != 2 or b.shape[0] != tokens:
        raise InvalidInput(
            f"split_matmul24: b has shape {b.shape}, its first axis must have the length {tokens} "
            "of a's tokens"
        )
    if a.sparse.dtype != b.dtype:
        raise InvalidInput(
            f"split_matmul24: a is {a.sparse.dtype}, b is {b.dtype}; cast them to one dtype"
        )
    features = a.dense.shape[1], a.sparse.shape[1]
    if (split.dense.size, split.sparse.size) != features:
        raise InvalidInput(
            f"split_matmul24: a has {features[0]} dense and {features[1]} sparse features, the "
            f"split has {split.dense.size} and {split.sparse.size}; pass the split that made a"
        )
    candidate = dispatch.resolve("split_matmul24", implementation, CANDIDATES, a, b, split)
    return candidate.run(a, b, split)
