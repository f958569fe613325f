"""The operands of the weight gradients: split by feature, pruned in groups of 4 tokens."""

from s24jax.ops.feature_wise24.api import CANDIDATES, SplitOperand, feature_wise24

__all__ = ["CANDIDATES", "SplitOperand", "feature_wise24"]
