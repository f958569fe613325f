"""Squared ReLU and its gradient, taken from the output alone."""

import jax.numpy as jnp

from s24jax.numerics import round_to
from s24jax.typing import Array, Float


def relu2(y1: Float[Array, "..."]) -> Float[Array, "..."]:
    """Squared ReLU, `relu(y1)**2`, elementwise.

    The square is rounded once to the input's dtype. NaN stays NaN; the result is never -0.0.

    Source: So et al. 2021 (Primer), arXiv 2109.08668, section 3.1.
    """
    # Not widened: autodiff would keep a float32 copy for the backward pass.
    return round_to(jnp.square(jnp.maximum(y1, 0)), y1.dtype)


def relu2_gradient(y2: Float[Array, "..."], dy2: Float[Array, "..."]) -> Float[Array, "..."]:
    """dY1 = 2 * sqrt(Y2) * dY2, elementwise: Squared ReLU's gradient without its input.

    relu(Y1) = sqrt(Y2), so only Y2 has to be saved for the backward pass. Computed in float32,
    rounded once to `y2`'s dtype. Zero wherever Y2 is zero and dY2 is finite.
    """
    dy1 = 2 * jnp.sqrt(y2.astype(jnp.float32)) * dy2.astype(jnp.float32)
    return round_to(dy1, y2.dtype)
