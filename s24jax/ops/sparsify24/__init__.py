"""Squared ReLU, token-wise 2:4 pruning and compression in one op."""

from s24jax.ops.sparsify24.api import CANDIDATES, sparsify24

__all__ = ["CANDIDATES", "sparsify24"]
