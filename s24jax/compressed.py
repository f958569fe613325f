"""A 2:4 matrix as it is stored: half of the values and two bits for each of them.

Layout, for a matrix whose compressed axis has length K and whose other axis has length M:

    values    [M, K/2]  the kept elements, row-major along K: group g gives columns 2g, 2g + 1
    metadata  [ceil(M/64), ceil(K/64), 128] uint32: the positions of the kept elements, in the order
              in which the tensor cores' registers take them

Group g of row m is a nibble, i0 | i1 << 2 with i0 < i1 the positions of the kept elements inside
the group. Word 32w + 4r + q of the metadata of 64 rows by 64 positions along K holds

    bits  0-15  row 16w + r      nibbles of the groups 4q .. 4q + 3, the first in the lowest bits
    bits 16-31  row 16w + r + 8  likewise

which is what thread 32w + 4r + q of a warpgroup hands to `wgmma.mma_async.sp` (m64n*k32, 16-bit
types) for two steps along K: threads with q < 2 feed the first step (sparsity selector 0), the
others the second (selector 1). A block is 512 contiguous bytes. Source: PTX ISA, "Sparse matrix
storage".

Rows always run along the axis that is not compressed, so a product reads A along K whichever axis
that was. Every nibble is legal, padding included: an empty group keeps positions 0 and 1 (0x4).
Users read the positions through `indices()`.
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
from s24jax.typing import Array, Float, UInt8, UInt32

EMPTY_GROUP = 0x4  # positions 0 and 1
BLOCK = 64  # rows, and positions along K, of a block of metadata


def metadata_shape(rows: int, length: int) -> tuple[int, int, int]:
    """The shape of the metadata of `rows` rows whose compressed axis has this length."""
    return -(-rows // BLOCK), -(-length // BLOCK), 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compressed24:
    """A matrix with at most two non-zeros in every group of four along one axis (a pytree).

    Attributes:
      values: [M, K/2], the kept elements (module docstring).
      metadata: [ceil(M/64), ceil(K/64), 128] uint32 (module docstring); read it through
        `indices()`.
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
        """Bytes stored: 0.5625 of the dense matrix in a 16-bit dtype, up to padded metadata."""
        return self.values.nbytes + self.metadata.nbytes

    def indices(self) -> UInt8[Array, "M groups 2"]:
        """Positions 0..3 of each group's two kept elements, ascending."""
        nibbles = _unpack(self.metadata, self.values.shape[0], self.shape[self.axis] // 4)
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
        index = self.indices()
        # Selections, not a gather: on a GPU they fuse with what made `dense`.
        values = groups[..., :1]
        for i in range(1, 4):
            values = jnp.where(index == i, groups[..., i, None], values)
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
    rank = magnitude_rank(split_groups(_to_rows(choose_by, axis, grouping), 1))
    indices = kept_indices(choose_two(rank))
    groups = split_groups(_to_rows(y, axis, grouping), 1)
    kept = jnp.take_along_axis(groups, indices.astype(jnp.int32), axis=-1)
    values = kept.reshape(groups.shape[0], 2 * groups.shape[1])
    return Compressed24(values, _pack(indices), axis, y.shape, grouping)


# The axes of a block: row 16w + 8*half + r, group 4q + i.
_BLOCK_AXES = (4, 2, 8, 4, 4)
_GROUP_SHIFT = 4 * np.arange(4, dtype=np.uint32)  # [i]
_SHIFT = 16 * np.arange(2, dtype=np.uint32)[:, None] + _GROUP_SHIFT  # [half, i]


def _pack(indices: UInt8[Array, "M groups 2"]) -> UInt32[Array, "rows columns 128"]:
    nibbles = indices[..., 0] | indices[..., 1] << 2
    padding = [(0, -nibbles.shape[0] % BLOCK), (0, -nibbles.shape[1] % (BLOCK // 4))]
    nibbles = jnp.pad(nibbles, padding, constant_values=EMPTY_GROUP)
    rows, columns = nibbles.shape[0] // BLOCK, nibbles.shape[1] // (BLOCK // 4)
    w, half, r, q, i = _BLOCK_AXES
    groups = nibbles.reshape(rows, w, half, r, columns, q, i).astype(jnp.uint32)
    # Words first, so that an eighth as many elements are left to be transposed.
    half_words = jnp.sum(groups << _GROUP_SHIFT, axis=-1, dtype=jnp.uint32)
    words = half_words[:, :, 0] | half_words[:, :, 1] << 16
    return words.transpose(0, 3, 1, 2, 4).reshape(rows, columns, w * r * q)


def _unpack(words: UInt32[Array, "rows columns 128"], m: int, groups: int) -> UInt8[Array, "M g"]:
    rows, columns = words.shape[:2]
    w, half, r, q, i = _BLOCK_AXES
    blocks = words.reshape(rows, columns, w, r, q, 1, 1) >> _SHIFT & 0xF
    nibbles = blocks.transpose(0, 2, 5, 3, 1, 4, 6).reshape(rows * BLOCK, columns * BLOCK // 4)
    return nibbles[:m, :groups].astype(jnp.uint8)


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
