"""Squared ReLU and its gradient, taken from the output alone."""

from functools import partial

import jax
import jax.numpy as jnp

from s24jax.numerics import round_to
from s24jax.typing import Array, Float


# Without the checkpoint a float32 copy of relu(y1) would be kept for the backward pass.
@partial(jax.checkpoint, prevent_cse=False)
def relu2(y1: Float[Array, "..."]) -> Float[Array, "..."]:
    """Squared ReLU, `relu(y1)**2`, elementwise.

    The square is taken in float32, zero below the smallest normal number, and rounded once to the
    input's dtype. NaN stays NaN; the result is never -0.0. For its gradient autodiff keeps y1
    alone.

    Source: So et al. 2021 (Primer), arXiv 2109.08668, section 3.1.
    """
    square = jnp.square(jnp.maximum(y1, 0).astype(jnp.float32))
    # A CPU flushes these by itself, a GPU does not; the split counts non-zeros.
    square = jnp.where(square < jnp.finfo(jnp.float32).tiny, 0, square)
    return round_to(square, y1.dtype)


def relu2_gradient(y2: Float[Array, "..."], dy2: Float[Array, "..."]) -> Float[Array, "..."]:
    """dY1 = 2 * sqrt(Y2) * dY2, elementwise: Squared ReLU's gradient without its input.

    relu(Y1) = sqrt(Y2), so only Y2 has to be saved for the backward pass. Computed in float32,
    rounded once to `y2`'s dtype. Zero wherever Y2 is zero and dY2 is finite.
    """
    dy1 = 2 * jnp.sqrt(y2.astype(jnp.float32)) * dy2.astype(jnp.float32)
    return round_to(dy1, y2.dtype)
