"""The method's parts, each of which can be turned off alone."""

import dataclasses

from s24jax.errors import InvalidInput
from s24jax.feature_split import dense_feature_count
from s24jax.token_groups import Kind, TokenGrouping


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How `ffn24` uses 2:4 sparsity; the defaults are the full recipe (arXiv 2503.16672).

    Attributes:
      token_wise: prune Y2 in groups of 4 features inside a token, in the forward pass.
      mask_consistency: the backward pass starts from the pruned Y2, and dX has the forward's mask.
        False: the unpruned Y2 is saved, dX is dense, and feature-wise pruning starts from the
        unpruned Y2.
      feature_wise: prune Y2 and dY1 in groups of 4 tokens inside a feature, for both weight
        gradients. False: those are dense products.
      token_grouping: which tokens share a group: "strided", "adjacent" or "random".
      grouping_seed: draws the permutation of "random".
      dense_share: share of the features that are left out of feature-wise pruning, 0 to 1.
      dense_multiple: that number of features is rounded up to a multiple of this.
      shared_feature_mask: both weight gradients use the mask chosen on Y2's magnitudes.
        False: dY1 has its own.

    Raises:
      InvalidInput: a value out of range.
    """

    token_wise: bool = True
    mask_consistency: bool = True
    feature_wise: bool = True
    token_grouping: Kind = "strided"
    grouping_seed: int = 0
    dense_share: float = 0.05
    dense_multiple: int = 128
    shared_feature_mask: bool = True

    def __post_init__(self):
        TokenGrouping(self.token_grouping, self.grouping_seed)
        if not 0 <= self.dense_share < 1:
            raise InvalidInput(f"dense_share={self.dense_share} is no share; use 0 <= share < 1")
        if self.dense_multiple < 1:
            raise InvalidInput(f"dense_multiple={self.dense_multiple} must be at least 1")

    @property
    def grouping(self) -> TokenGrouping:
        return TokenGrouping(self.token_grouping, self.grouping_seed)

    @property
    def saves_pruned(self) -> bool:
        """Whether the backward pass starts from the forward's compressed Y2."""
        return self.token_wise and self.mask_consistency

    def dense_features(self, features: int) -> int:
        """Size of the dense part of the split (see `dense_feature_count`)."""
        return dense_feature_count(features, share=self.dense_share, multiple=self.dense_multiple)
