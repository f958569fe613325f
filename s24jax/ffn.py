"""The 2:4 feed-forward network: one custom_vjp with the paper's equations.

    forward     Y1 = X @ W_up^T            dense
                Y2 = relu(Y1)^2            pruned 2:4 inside each token
                Y3 = Y2 @ W_down           2:4
    backward    dY2 = dY3 @ W_down^T       dense
                dY1 = 2*relu(Y1) * dY2     under the pruned Y2's mask; relu(Y1) = sqrt(Y2)
                dX = dY1 @ W_up            2:4, the forward's mask
                dW_down = Y2^T @ dY3       2:4 in groups of 4 tokens, densest features dense
                dW_up = dY1^T @ X          2:4, the same mask

X and the compressed Y2 are all that is saved: relu(Y1) is sqrt(Y2), and where the pruned Y2 is zero
so is dY1. The two dense products are ops of their own with what becomes of their result
(`matmul_sparsify24`, `matmul_feature_wise24`), so that a kernel need not write Y1 or dY2 to memory.
Source: Haziza et al. 2025, arXiv 2503.16672.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from s24jax.activation import relu2, relu2_gradient
from s24jax.compressed import Compressed24
from s24jax.errors import InvalidInput
from s24jax.mesh import vary_alike
from s24jax.numerics import dot
from s24jax.ops.feature_wise24 import feature_wise24
from s24jax.ops.matmul24 import matmul24
from s24jax.ops.matmul_feature_wise24 import matmul_feature_wise24
from s24jax.ops.matmul_feature_wise24.reference import pruned_dy1
from s24jax.ops.matmul_sparsify24 import matmul_sparsify24
from s24jax.ops.relu2_ffn.api import check_operands
from s24jax.ops.sparsify24 import sparsify24
from s24jax.ops.split_features import split_features
from s24jax.ops.split_matmul24 import split_matmul24
from s24jax.recipe import Recipe
from s24jax.typing import Array, Float, Implementation

SAVED_Y2 = "ffn24_y2"
"""`checkpoint_name` of the saved Y2, for a remat policy that keeps it."""


def ffn24(
    x: Float[Array, "... D"],
    w_up: Float[Array, "F D"],
    w_down: Float[Array, "F D"],
    *,
    recipe: Recipe = Recipe(),
    implementation: Implementation = "auto",
) -> Float[Array, "... D"]:
    """Squared-ReLU FFN, Y3 = relu(X @ W_up^T)^2 @ W_down, with 2:4 sparse activations.

    Its gradient is the recipe's (module docstring), which is no derivative of the forward pass
    where `recipe.feature_wise` prunes the weight gradients. Works under jit, grad, vmap, remat and
    scan.

    Args:
      x: activations; all axes but the last are tokens, of any number T. Groups of tokens are formed
        over T padded with zeros to a multiple of 4.
      w_up, w_down: feature-major weights of `x`'s dtype; F must be a multiple of 4.
      recipe: which parts of the method are on.
      implementation: of every op inside; see `s24jax.ops.dispatch`.

    Numerics: products accumulate in float32; Y1, Y2, Y3 and every gradient are rounded once to
    `x`'s dtype, and the choice of 2 in 4 is made on the rounded Y1.

    Raises:
      InvalidInput: shapes or dtypes do not fit, F is no multiple of 4, or the recipe leaves no
        sparse feature.
      Unsupported: the named implementation cannot run here.
    """
    _check(x, w_up, w_down, recipe)
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    tokens = x_TD.shape[0]
    x_TD = jnp.pad(x_TD, ((0, -tokens % 4), (0, 0)))
    x_TD, w_up, w_down = vary_alike(x_TD, w_up, w_down)
    y3_TD = _ffn24(recipe, implementation, x_TD, w_up, w_down)
    return y3_TD[:tokens].reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ffn24(recipe, implementation, x_TD, w_up_FD, w_down_FD):
    y3_TD, _ = _forward(recipe, implementation, x_TD, w_up_FD, w_down_FD)
    return y3_TD


def _forward(recipe, implementation, x_TD, w_up_FD, w_down_FD):
    """Y3 and what the backward pass needs of Y2: itself and its non-zeros per feature."""
    if recipe.saves_pruned:
        y2, counts_F = matmul_sparsify24(x_TD, w_up_FD, implementation=implementation)
        return matmul24(y2, w_down_FD, implementation=implementation), (y2, counts_F)
    y1_TF = dot(x_TD, w_up_FD, contract=(1, 1))
    y2_TF = relu2(y1_TF)
    if recipe.token_wise:
        y2, counts_F = sparsify24(y1_TF, implementation=implementation)
        y3_TD = matmul24(y2, w_down_FD, implementation=implementation)
    else:
        counts_F = jnp.sum(y2_TF != 0, axis=0, dtype=jnp.int32)
        y3_TD = dot(y2_TF, w_down_FD, contract=(1, 0))
    return y3_TD, (y2_TF, counts_F)


def _ffn24_forward(recipe, implementation, x_TD, w_up_FD, w_down_FD):
    y3_TD, saved = _forward(recipe, implementation, x_TD, w_up_FD, w_down_FD)
    y2, counts_F = checkpoint_name(saved, SAVED_Y2)
    return y3_TD, (x_TD, w_up_FD, w_down_FD, y2, counts_F)


def _ffn24_backward(recipe, implementation, saved, dy3_TD):
    x_TD, w_up_FD, w_down_FD, y2, counts_F = saved
    if not recipe.feature_wise:
        dy1 = _dy1(y2, dot(dy3_TD, w_down_FD, contract=(1, 1)))
        dw_down_FD = dot(_dense(y2), dy3_TD, contract=(0, 0))
        dw_up_FD = dot(_dense(dy1), x_TD, contract=(0, 0))
        return _dx(dy1, w_up_FD, implementation), dw_up_FD, dw_down_FD
    split = split_features(
        counts_F, recipe.dense_features(counts_F.size), implementation=implementation
    )
    prune = {
        "grouping": recipe.grouping,
        "shared_mask": recipe.shared_feature_mask,
        "implementation": implementation,
    }
    if recipe.saves_pruned:
        dy1, y2_split, dy1_split = matmul_feature_wise24(dy3_TD, w_down_FD, y2, split, **prune)
    else:
        dy1 = _dy1(y2, dot(dy3_TD, w_down_FD, contract=(1, 1)))
        y2_split, dy1_split = feature_wise24(y2, dy1, split, **prune)
    dw_down_FD = split_matmul24(y2_split, dy3_TD, split, implementation=implementation)
    dw_up_FD = split_matmul24(dy1_split, x_TD, split, implementation=implementation)
    return _dx(dy1, w_up_FD, implementation), dw_up_FD, dw_down_FD


_ffn24.defvjp(_ffn24_forward, _ffn24_backward)


def _dy1(y2: Compressed24 | Float[Array, "T F"], dy2_TF: Float[Array, "T F"]):
    """2 * sqrt(Y2) * dY2, compressed under Y2's mask where Y2 is."""
    if isinstance(y2, Compressed24):
        return pruned_dy1(y2, dy2_TF)
    return relu2_gradient(y2, dy2_TF)


def _dx(dy1: Compressed24 | Float[Array, "T F"], w_up_FD, implementation) -> Float[Array, "T D"]:
    if isinstance(dy1, Compressed24):
        return matmul24(dy1, w_up_FD, implementation=implementation)
    return dot(dy1, w_up_FD, contract=(1, 0))


def _dense(y: Compressed24 | Float[Array, "T F"]) -> Float[Array, "T F"]:
    return y.decompress() if isinstance(y, Compressed24) else y


def _check(x: Array, w_up: Array, w_down: Array, recipe: Recipe) -> None:
    check_operands("ffn24", x, w_up, w_down)
    features = w_up.shape[0]
    if features % 4:
        raise InvalidInput(f"ffn24: F={features} is no multiple of 4; pad the hidden width")
    if recipe.feature_wise:
        recipe.dense_features(features)
