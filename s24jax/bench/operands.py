"""What an FFN's sparse products are made of: random values, with the zeros of a trained model.

Dense products run faster on zeros, and a sparse one drops values where the non-zeros crowd, so the
zeros have to lie as they do in training: a few features are active often, most of them rarely, and
the two kinds stand in random order. Tokens are independent, which is what strided groups of tokens
are there to bring about.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s24jax.bench.shapes import Shape
from s24jax.compressed import Compressed24
from s24jax.feature_split import FeatureSplit, dense_feature_count
from s24jax.ops.matmul_feature_wise24.reference import pruned_dy1
from s24jax.ops.sparsify24 import sparsify24
from s24jax.ops.split_features import split_features
from s24jax.token_groups import TokenGrouping
from s24jax.typing import Array, Float, Int

DTYPE = jnp.bfloat16
STRIDED = TokenGrouping("strided")
# 90 % zeros: the densest share of the features, its density, and that of the others.
DENSE_SHARE, DENSE, SPARSE = 0.05, 0.39, 0.085
_LOG = logging.getLogger(__name__)


class Operands(NamedTuple):
    """Everything that the four sparse products of one FFN take.

    `y2` and `dy1` are compressed token-wise, under one mask; `counts_F` are Y2's non-zeros per
    feature before pruning.
    """

    y2: Compressed24
    dy1: Compressed24
    counts_F: Int[Array, "F"]
    w_up_FD: Float[Array, "F D"]
    w_down_FD: Float[Array, "F D"]
    x_TD: Float[Array, "T D"]
    dy3_TD: Float[Array, "T D"]


def densities(key: Array, features: int) -> Float[Array, "F"]:
    """How often each feature is active: `DENSE` for `DENSE_SHARE` of them, at random places."""
    dense = round(DENSE_SHARE * features)
    return jax.random.permutation(key, jnp.where(jnp.arange(features) < dense, DENSE, SPARSE))


@partial(jax.jit, static_argnums=(0, 1))
def pre_activation(shape: Shape, seed: int = 0) -> Float[Array, "T F"]:
    """Y1: |N(0, 1)| where a feature is active, -|N(0, 1)| elsewhere."""
    order, active, size = jax.random.split(jax.random.key(seed), 3)
    dims = (shape.T, shape.F)
    is_active = jax.random.uniform(active, dims) < densities(order, shape.F)
    # Away from zero, so that what is active stays a non-zero after squaring and rounding.
    magnitude = jnp.abs(jax.random.normal(size, dims)) + 2.0**-10
    return jnp.where(is_active, magnitude, -magnitude).astype(DTYPE)


@partial(jax.jit, static_argnums=0)
def make_operands(shape: Shape) -> Operands:
    """The operands of a shape, always the same; Y2 and dY1 come from their reference."""
    keys = jax.random.split(jax.random.key(1), 5)
    T, D, F = shape
    dims = [(T, F), (F, D), (F, D), (T, D), (T, D)]
    drawn = [jax.random.normal(k, d).astype(DTYPE) for k, d in zip(keys, dims, strict=True)]
    dy2_TF, w_up_FD, w_down_FD, x_TD, dy3_TD = drawn
    y2, counts_F = sparsify24(pre_activation(shape), implementation="reference")
    dy1 = pruned_dy1(y2, dy2_TF)
    return Operands(y2, dy1, counts_F, w_up_FD, w_down_FD, x_TD, dy3_TD)


def each_product(
    bench: str, shapes: Sequence[Shape], products: Sequence[str]
) -> Iterator[tuple[Shape, Operands, str]]:
    """Every product of a bench at every shape, announced by a line of the log."""
    for shape in shapes:
        operands = make_operands(shape)
        for product in products:
            _LOG.info("%s: %s of %s", bench, product, shape)
            yield shape, operands, product


def dense_features(features: int) -> int:
    """The recipe's number of dense features; small widths, as of tests, have smaller tiles."""
    return dense_feature_count(
        features, share=DENSE_SHARE, multiple=max(1, min(128, features // 4))
    )


@jax.jit
def make_split(counts_F: Int[Array, "F"]) -> FeatureSplit:
    """The recipe's split of the features into dense and sparse ones."""
    return split_features(counts_F, dense_features(counts_F.size), implementation="reference")
