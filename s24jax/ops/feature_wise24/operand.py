"""What `feature_wise24` returns."""

from typing import NamedTuple

from s24jax.compressed import Compressed24
from s24jax.typing import Array, Float


class SplitOperand(NamedTuple):
    """One [T, F] operand of a weight gradient: its sparse features 2:4, its dense ones as they are.

    Columns follow `FeatureSplit.sparse` and `FeatureSplit.dense`.
    """

    sparse: Compressed24
    dense: Float[Array, "T Fd"]
