"""split_features: non-zeros per feature -> which features are dense."""

from s24jax.errors import InvalidInput
from s24jax.feature_split import FeatureSplit
from s24jax.ops import dispatch
from s24jax.ops.split_features import cuda, reference
from s24jax.typing import Array, Implementation, Int

CANDIDATES = [
    dispatch.Candidate("cuda", cuda.split_features, cuda.reason_against),
    dispatch.Candidate("reference", reference.split_features),
]


def split_features(
    counts: Int[Array, "F"], dense_features: int, *, implementation: Implementation = "auto"
) -> FeatureSplit:
    """The features with the most non-zeros are dense; among equals the lowest.

    Args:
      counts: non-zeros per feature, none negative.
      dense_features: how many are dense, at most F (static).
      implementation: see `s24jax.ops.dispatch`.

    Raises:
      InvalidInput: `dense_features` is negative or more than F.
      Unsupported: the named implementation cannot run here.

    Source: arXiv 2503.16672, section 4.
    """
    if not 0 <= dense_features <= counts.size:
        raise InvalidInput(
            f"split_features: dense_features={dense_features} of F={counts.size}; use 0 to F"
        )
    candidate = dispatch.resolve(
        "split_features", implementation, CANDIDATES, counts, dense_features
    )
    return candidate.run(counts, dense_features)
