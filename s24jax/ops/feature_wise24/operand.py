"""What `feature_wise24` returns."""

from typing import NamedTuple

import numpy as np

from s24jax.compressed import Compressed24
from s24jax.token_groups import TokenGrouping
from s24jax.typing import Array, Float


class SplitOperand(NamedTuple):
    """One [T, F] operand of a weight gradient: its sparse features 2:4, its dense ones as they are.

    Rows follow `FeatureSplit.sparse` and `FeatureSplit.dense`.

    A dense row is the sum of two 2:4 rows, one that keeps members 0 and 1 of every group of four
    tokens and one that keeps members 2 and 3. The dense features are stored as these two, so that
    the sparse product takes them as well, without metadata of their own and in the same launch.
    """

    sparse: Compressed24
    dense: Float[Array, "2 Fd kept"]  # kept = T/2

    def dense_features(self) -> Float[Array, "T Fd"]:
        """The dense features as columns, tokens in their natural order."""
        _, features, kept = self.dense.shape
        grouped = self.dense.reshape(2, features, kept // 2, 2).transpose(2, 0, 3, 1)
        return grouped.reshape(2 * kept, features)[np.argsort(self.sparse.grouping.order(2 * kept))]


def dense_rows(y_TFd: Float[Array, "T Fd"], grouping: TokenGrouping) -> Float[Array, "2 Fd kept"]:
    """`SplitOperand.dense` of columns with tokens in their natural order."""
    tokens, features = y_TFd.shape
    grouped = y_TFd[grouping.order(tokens)].reshape(tokens // 4, 2, 2, features)
    return grouped.transpose(1, 3, 0, 2).reshape(2, features, tokens // 2)
