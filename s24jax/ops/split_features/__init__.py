"""split_features: which features of a step go through the dense product."""

from s24jax.ops.split_features.api import CANDIDATES, split_features

__all__ = ["CANDIDATES", "split_features"]
