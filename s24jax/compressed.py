"""A 2:4 matrix as it is stored: half of the values and two bits for each of them.

Layout, for a matrix whose compressed axis has length K and whose other axis has length M:

    values    [M, K/2]       the kept elements, row-major along K: group g gives columns 2g, 2g + 1
    metadata  [M, ceil(K/8)] uint8; group g is a nibble, i0 | i1 << 2 with i0 < i1 the positions of
                             the kept elements inside the group; even groups take the low nibble

Rows always run along the axis that is not compressed, so a product reads A along K whichever axis
that was. Every nibble is legal, padding included: an empty group keeps positions 0 and 1 (0x4).
Users read the positions through `indices()`; the metadata's byte order belongs to the kernels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s24jax.errors import InvalidInput
from s24jax.prune24 import (
    check_axis,
    choose_two,
    join_groups,
    kept_indices,
    magnitude_rank,
    split_groups,
)
from s24jax.token_groups import ADJACENT, TokenGrouping
from s24jax.typing import Array, Float, UInt8

EMPTY_GROUP = 0x4  # positions 0 and 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed24:
    """A matrix with at most two non-zeros in every group of four along one axis (a pytree).

    Attributes:
      values: [M, K/2], the kept elements (module docstring).
      metadata: [M, ceil(K/8)] uint8, opaque; read it through `indices()`.
      axis: the compressed axis, 0 or 1.
      shape: the shape of the dense matrix.
      grouping: which positions of the compressed axis share a group.
    """

    # Any: jax also puts shapes and specs in the leaves of a pytree.
    values: Any
    metadata: Any
    axis: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    grouping: TokenGrouping = dataclasses.field(default=ADJACENT, metadata={"static": True})

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes stored: 0.5625 of the dense matrix in a 16-bit dtype."""
        return self.values.nbytes + self.metadata.nbytes

    def indices(self) -> UInt8[Array, "M groups 2"]:
        """Positions 0..3 of each group's two kept elements, ascending."""
        groups = self.shape[self.axis] // 4
        nibbles = jnp.stack([self.metadata & 0xF, self.metadata >> 4], axis=-1)
        nibbles = nibbles.reshape(nibbles.shape[0], 2 * nibbles.shape[1])[:, :groups]
        return jnp.stack([nibbles & 3, nibbles >> 2], axis=-1)

    def decompress(self) -> Float[Array, "rows columns"]:
        """The dense matrix of shape `shape`; dropped elements are +0.0."""
        return _from_rows(self.dense_rows(), self.axis, self.grouping)

    def dense_rows(self) -> Float[Array, "M K"]:
        """The dense elements as they are stored: rows along the other axis, K in group order."""
        rows, kept_columns = self.values.shape
        kept = self.values.reshape(rows, kept_columns // 2, 2)
        position = jnp.arange(4, dtype=jnp.uint8)
        first, second = (self.indices()[..., i, None] == position for i in range(2))
        return join_groups(jnp.where(first, kept[..., :1], jnp.where(second, kept[..., 1:], 0)), 1)

    def gather(self, dense: Float[Array, "rows columns"]) -> "Compressed24":
        """The elements of another matrix of the same shape at this one's kept positions."""
        groups = split_groups(_to_rows(dense, self.axis, self.grouping), 1)
        values = jnp.take_along_axis(groups, self.indices().astype(jnp.int32), axis=-1)
        return self.with_values(values.reshape(self.values.shape))

    def with_values(self, values: Float[Array, "M kept"]) -> "Compressed24":
        """Other values under the same mask and metadata."""
        return dataclasses.replace(self, values=values)


def compress24(
    y: Float[Array, "rows columns"], axis: int, *, grouping: TokenGrouping | None = None
) -> Compressed24:
    """Stores the two largest magnitudes of each group of four along `axis`; drops the others.

    The choice is `prune24`'s (ties keep the first of the group, NaN ranks highest), so on a matrix
    that is 2:4 already nothing is lost: `compress24(y, axis).decompress()` has `y`'s bits, except
    that a dropped -0.0 comes back as +0.0.

    Args:
      y: a matrix; `axis` must have a length that is a multiple of 4.
      axis: the axis to compress, 0 or 1 (negative axes count from the end).
      grouping: which positions along `axis` share a group; consecutive ones where it is None.

    Raises:
      InvalidInput: `y` is no matrix of a float dtype, or `axis` does not fit it.
    """
    return compress24_by(y, y, axis, grouping=grouping)


def compress24_by(
    y: Float[Array, "rows columns"],
    choose_by: Float[Array, "rows columns"],
    axis: int,
    *,
    grouping: TokenGrouping | None = None,
) -> Compressed24:
    """`compress24` of `y` with the positions that are chosen on another matrix's magnitudes."""
    if y.ndim != 2:
        raise InvalidInput(f"compress24: shape {y.shape} is no matrix; reshape it to two axes")
    check_axis(y, axis, "compress24")
    axis, grouping = axis % 2, grouping or ADJACENT
    by_rows = _to_rows(choose_by, axis, grouping)
    rank = magnitude_rank(split_groups(by_rows, 1))
    metadata = _pack(kept_indices(choose_two(rank)))
    empty = jnp.zeros((by_rows.shape[0], by_rows.shape[1] // 2), y.dtype)
    return Compressed24(empty, metadata, axis, y.shape, grouping).gather(y)


def _pack(indices: UInt8[Array, "M groups 2"]) -> UInt8[Array, "M bytes"]:
    nibbles = indices[..., 0] | indices[..., 1] << 2
    odd = nibbles.shape[1] % 2
    nibbles = jnp.pad(nibbles, ((0, 0), (0, odd)), constant_values=EMPTY_GROUP)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def _to_rows(y: Array, axis: int, grouping: TokenGrouping) -> Array:
    """[M, K] with K in group order."""
    order = grouping.order(y.shape[axis])
    rows = y if axis == 1 else y.T
    return rows if grouping == ADJACENT else rows[:, order]


def _from_rows(rows: Array, axis: int, grouping: TokenGrouping) -> Array:
    """The inverse of `_to_rows`."""
    if grouping != ADJACENT:
        rows = rows[:, np.argsort(grouping.order(rows.shape[1]))]
    return rows if axis == 1 else rows.T
