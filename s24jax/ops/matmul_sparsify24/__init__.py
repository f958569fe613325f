"""The FFN's first product, with Squared ReLU, 2:4 pruning and compression in its epilogue."""

from s24jax.ops.matmul_sparsify24.api import CANDIDATES, matmul_sparsify24

__all__ = ["CANDIDATES", "matmul_sparsify24"]
