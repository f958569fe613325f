"""Which features of a step are dense and which are sparse.

The densest few percent of the features carry most groups with more than two non-zeros. They go
through a dense product, all the others through the 2:4 product. The choice is made anew in every
step and layer, by non-zeros per feature; only the sizes are static, so it lives under jit.
"""

import math
from fractions import Fraction
from typing import NamedTuple

from s24jax.errors import InvalidInput
from s24jax.typing import Array, Int


class FeatureSplit(NamedTuple):
    """Feature indices: the densest `Fd` and the remaining `Fs`, both ascending.

    Only the membership matters to the products; in their natural order the features that a kernel
    reads side by side are also written side by side.
    """

    dense: Int[Array, "Fd"]
    sparse: Int[Array, "Fs"]


def dense_feature_count(features: int, *, share: float, multiple: int) -> int:
    """Number of dense features: `share * features` rounded up to `multiple`.

    Raises:
      InvalidInput: no sparse feature would remain.
    """
    # As a decimal fraction: in floating point 0.07 * 3200 is a little above 224.
    exact = Fraction(str(share)) * features
    dense = math.ceil(exact / multiple) * multiple
    if dense >= features:
        raise InvalidInput(
            f"dense_share={share} of F={features} rounded up to dense_multiple={multiple} leaves "
            "no sparse feature; lower dense_share or dense_multiple"
        )
    return dense
