"""Compressed 2:4 matrix times dense matrix."""

from s24jax.ops.matmul24.api import CANDIDATES, matmul24

__all__ = ["CANDIDATES", "matmul24"]
