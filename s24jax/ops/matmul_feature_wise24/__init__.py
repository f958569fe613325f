"""The backward pass's first product, with all that becomes of dY2 in its epilogue."""

from s24jax.ops.matmul_feature_wise24.api import CANDIDATES, BackwardOperands, matmul_feature_wise24

__all__ = ["CANDIDATES", "BackwardOperands", "matmul_feature_wise24"]
