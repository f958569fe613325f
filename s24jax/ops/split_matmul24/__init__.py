"""split_matmul24: a weight gradient, sparse features 2:4 and dense ones dense."""

from s24jax.ops.split_matmul24.api import CANDIDATES, split_matmul24

__all__ = ["CANDIDATES", "split_matmul24"]
