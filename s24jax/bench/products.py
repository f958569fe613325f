"""One sparse product of the FFN, in the forms that its contenders take, with its oracle.

    y3       A = Y2     [T, F]   token-wise      B = W_down [F, D]
    dx       A = dY1    [T, F]   Y2's metadata   B = W_up   [F, D]
    dw_down  A = Y2^T   [F, T]   feature-wise    B = dY3    [T, D]
    dw_up    A = dY1^T  [F, T]   dw_down's mask  B = X      [T, D]

In the weight gradients all features are 2:4 here, so that every contender has the same M, N and K.
The FFN itself keeps its densest features dense: that product is `make_split_problem`'s.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from s24jax.bench.operands import STRIDED, Operands
from s24jax.bench.shapes import Size
from s24jax.bench.timing import Contender
from s24jax.compressed import Compressed24, compress24
from s24jax.feature_split import FeatureSplit
from s24jax.ops.feature_wise24 import SplitOperand, feature_wise24
from s24jax.typing import Array, Float

PRODUCTS = ("y3", "dx", "dw_down", "dw_up")
WEIGHT_GRADIENTS = ("dw_down", "dw_up")


class Problem(NamedTuple):
    """A compressed A times a dense B.

    Attributes:
      a: A, compressed along K.
      a_dense: the same numbers as a dense product's user has them, [M, K], or [K, M] where
        `a.axis` is 0.
      b: [K, N].
      oracle: [M, N], the product in float32.
    """

    a: Compressed24
    a_dense: Float[Array, "rows columns"]
    b: Float[Array, "K N"]
    oracle: Float[Array, "M N"]

    @property
    def size(self) -> Size:
        return Size(*self.oracle.shape, self.b.shape[0])


class SplitProblem(NamedTuple):
    """A weight gradient with its densest features dense: see `Problem`."""

    a: SplitOperand
    split: FeatureSplit
    b: Float[Array, "T D"]
    oracle: Float[Array, "F D"]


@partial(jax.jit, static_argnums=1)
def make_problem(operands: Operands, product: str) -> Problem:
    """The product of that name."""
    if product in WEIGHT_GRADIENTS:
        y2 = compress24(operands.y2.decompress(), axis=0, grouping=STRIDED)
        if product == "dw_down":
            return _problem(y2, operands.dy3_TD)
        return _problem(y2.gather(operands.dy1.decompress()), operands.x_TD)
    if product == "dx":
        return _problem(operands.dy1, operands.w_up_FD)
    return _problem(operands.y2, operands.w_down_FD)


@partial(jax.jit, static_argnums=1)
def make_split_problem(operands: Operands, product: str, split: FeatureSplit) -> SplitProblem:
    """The weight gradient of that name."""
    weights = feature_wise24(
        operands.y2,
        operands.dy1,
        split,
        grouping=STRIDED,
        shared_mask=True,
        implementation="reference",
    )
    a = weights[WEIGHT_GRADIENTS.index(product)]
    b_TD = operands.dy3_TD if product == "dw_down" else operands.x_TD
    a_TF = jnp.zeros(operands.y2.shape, b_TD.dtype)
    a_TF = a_TF.at[:, split.sparse].set(a.sparse.decompress())
    a_TF = a_TF.at[:, split.dense].set(a.dense_features())
    return SplitProblem(a, split, b_TD, _oracle(a_TF, b_TD, axis=0))


@jax.jit
def make_sparse_part(problem: SplitProblem) -> Problem:
    """The 2:4 part of a weight gradient alone: fewer rows than features."""
    return _problem(problem.a.sparse, problem.b)


def _problem(a: Compressed24, b: Float[Array, "K N"]) -> Problem:
    a_dense = a.decompress()
    return Problem(a, a_dense, b, _oracle(a_dense, b, axis=a.axis))


def _oracle(a_dense: Array, b: Array, *, axis: int) -> Float[Array, "M N"]:
    """Float32 operands and sums: the bfloat16 ones' products are exact there."""
    dimension_numbers = (((axis,), (0,)), ((), ()))
    a_dense, b = a_dense.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(a_dense, b, dimension_numbers, precision=lax.Precision.HIGHEST)


def contender(call: Callable, *arguments: Any, oracle: Array) -> Contender:
    """Of a jax function; the arguments are no constants of the compiled program."""
    return Contender(partial(call, *arguments), lambda out: float(relative_error(out, oracle)))


@jax.jit
def relative_error(out: Array, oracle: Array) -> Float[Array, ""]:
    """||out - oracle|| / ||oracle||, in float32."""
    difference = out.astype(jnp.float32) - oracle
    return jnp.sqrt(jnp.sum(jnp.square(difference)) / jnp.sum(jnp.square(oracle)))
