"""What `matmul_feature_wise24` returns."""

from typing import NamedTuple

from s24jax.compressed import Compressed24
from s24jax.ops.feature_wise24 import SplitOperand


class BackwardOperands(NamedTuple):
    """The sparse operands of the three products that end the backward pass.

    Attributes:
      dy1: of dX; compressed token-wise, under Y2's mask.
      y2_split: of dW_down.
      dy1_split: of dW_up.
    """

    dy1: Compressed24
    y2_split: SplitOperand
    dy1_split: SplitOperand
