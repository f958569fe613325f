"""What the bench of the whole FFN runs on."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from s24jax.activation import relu2
from s24jax.bench.operands import DTYPE, densities
from s24jax.bench.shapes import Shape
from s24jax.typing import Array, Float

SYNTHETIC = "synthetic"
_DENSITIES = 1e-7, 1 - 1e-7


class Operands(NamedTuple):
    """X, both weights, and the gradient of the output."""

    x_TD: Float[Array, "T D"]
    w_up_FD: Float[Array, "F D"]
    w_down_FD: Float[Array, "F D"]
    dy3_TD: Float[Array, "T D"]

    @property
    def shape(self) -> Shape:
        return Shape(*self.x_TD.shape, self.w_up_FD.shape[0])


class Case(NamedTuple):
    """Operands and where they are from: "synthetic", or a layer of a model."""

    source: str
    operands: Operands


def some_layers(layers: int) -> list[int]:
    """Of a model: the first, the middle and the last."""
    return list(dict.fromkeys((0, layers // 2, layers - 1)))


@partial(jax.jit, static_argnums=0)
def make_operands(shape: Shape, density_F: Float[Array, "F"] | None = None) -> Operands:
    """Operands whose Y2 has the zeros of a trained model.

    X's first column is 1, so that W_up's first column sets how often each feature is active; Y1 is
    normal, of unit variance.

    Args:
      density_F: how often each feature is active; by default as in `s24jax.bench.operands`. They
        stand in random order.
    """
    keys = jax.random.split(jax.random.key(2), 5)
    T, D, F = shape
    x = jax.random.normal(keys[0], (T, D)).at[:, 0].set(1)
    w_up = jax.random.normal(keys[1], (F, D)) * (D - 1) ** -0.5
    if density_F is None:
        density_F = densities(keys[2], F)
    else:
        # A feature that is never active would have an infinite weight.
        density_F = jax.random.permutation(keys[2], jnp.clip(density_F, *_DENSITIES))
    w_up = w_up.at[:, 0].set(ndtri(density_F))
    w_down = jax.random.normal(keys[3], (F, D)) * F**-0.5
    dy3 = jax.random.normal(keys[4], (T, D))
    return Operands(*(a.astype(DTYPE) for a in (x, w_up, w_down, dy3)))


@jax.jit
def zero_share(operands: Operands) -> Float[Array, ""]:
    """Of Y2 before pruning."""
    return jnp.mean(relu2(operands.x_TD @ operands.w_up_FD.T) == 0)
