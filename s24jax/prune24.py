"""Choose 2 of 4: the rule that every implementation follows bit for bit.

In each group of four the two largest magnitudes are kept. Ties keep the lowest index, NaN ranks
above everything, +0.0 and -0.0 are equal. Exactly two positions of each group are kept, also where
fewer than two are non-zero, so that a mask always has legal 2:4 metadata.
"""

import jax.numpy as jnp
from jax import lax

from s24jax.errors import InvalidInput
from s24jax.typing import Array, Bool, Float, UInt8


def magnitude_rank(y: Float[Array, "..."]) -> Array:
    """|y| as an unsigned integer: same order as the magnitudes, NaN above infinity, -0.0 == 0.0.

    The bits of a non-negative IEEE float sort like the number itself. Comparing integers keeps the
    choice independent of a device's treatment of subnormal numbers.
    """
    unsigned = jnp.dtype(f"uint{8 * y.dtype.itemsize}")
    bits = lax.bitcast_convert_type(jnp.abs(y), unsigned)
    return jnp.where(jnp.isnan(y), jnp.array(jnp.iinfo(unsigned).max, unsigned), bits)


def choose_two(rank: Array) -> Bool[Array, "... 4"]:
    """Which two of each group (last axis, length 4) are kept: those that fewer than two beat."""
    index = jnp.arange(4)
    challenger, holder = rank[..., :, None], rank[..., None, :]
    earlier = index[:, None] < index[None, :]
    beats = (challenger > holder) | ((challenger == holder) & earlier)
    return beats.sum(axis=-2) < 2


def kept_indices(mask: Bool[Array, "... 4"]) -> UInt8[Array, "... 2"]:
    """Positions of the two kept members of each group, ascending."""
    m0, m1, m2, m3 = (mask[..., i] for i in range(4))
    first = jnp.where(m0, 0, jnp.where(m1, 1, 2))
    second = jnp.where(m3, 3, jnp.where(m2, 2, 1))
    return jnp.stack([first, second], axis=-1).astype(jnp.uint8)


def split_groups(y: Array, axis: int) -> Array:
    """`y` with `axis` moved last and cut into consecutive groups: [..., n] -> [..., n/4, 4]."""
    y = jnp.moveaxis(y, axis, -1)
    return y.reshape(*y.shape[:-1], y.shape[-1] // 4, 4)


def join_groups(groups: Array, axis: int) -> Array:
    """The inverse of `split_groups`."""
    joined = groups.reshape(*groups.shape[:-2], 4 * groups.shape[-2])
    return jnp.moveaxis(joined, -1, axis)


def check_axis(y: Array, axis: int, op: str) -> None:
    """Raises where `axis` does not exist or cannot be cut into groups of four."""
    if not -y.ndim <= axis < y.ndim:
        raise InvalidInput(
            f"{op}: axis {axis} does not exist in shape {y.shape}; "
            f"use one from {-y.ndim} to {y.ndim - 1}"
        )
    if y.shape[axis] % 4:
        raise InvalidInput(
            f"{op}: axis {axis} of shape {y.shape} has length {y.shape[axis]}; "
            "pad it to a multiple of 4"
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise InvalidInput(f"{op}: dtype {y.dtype} has no magnitude order here; use a float dtype")


def prune24(y: Float[Array, "..."], axis: int) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Keeps the two largest magnitudes of every four consecutive elements along `axis`.

    Args:
      y: any shape; `axis` must have a length that is a multiple of 4.
      axis: the axis that is cut into groups of four.

    Returns:
      `pruned`, `y` with the dropped elements set to +0.0, and `mask`, True where an element was
      kept: exactly two per group, the lowest index first among equals, NaN before all.

    Raises:
      InvalidInput: `axis` does not exist, has another length, or `y` is not of a float dtype.

    Source: arXiv 2503.16672, section 3; 2:4 structure: PTX ISA, "Sparse matrix storage".
    """
    check_axis(y, axis, "prune24")
    mask = join_groups(choose_two(magnitude_rank(split_groups(y, axis))), axis)
    return jnp.where(mask, y, jnp.zeros_like(y)), mask
