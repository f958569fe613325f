"""s24jax: transformers with 2:4 activation sparsity, in JAX.

The method is in `s24jax.ffn`; its parts are one file each: `prune24`, `compressed`, `token_groups`,
`feature_split`. Importing this package touches no device.
"""

from s24jax.activation import relu2
from s24jax.compressed import Compressed24, compress24
from s24jax.ffn import ffn24
from s24jax.ops.matmul24 import matmul24
from s24jax.ops.sparsify24 import sparsify24
from s24jax.prune24 import prune24
from s24jax.recipe import Recipe
from s24jax.token_groups import TokenGrouping

__all__ = [
    "Compressed24",
    "Recipe",
    "TokenGrouping",
    "compress24",
    "ffn24",
    "matmul24",
    "prune24",
    "relu2",
    "sparsify24",
]
