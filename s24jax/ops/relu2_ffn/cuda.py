"""relu2_ffn with Squared ReLU and its gradient in the epilogues of products (ffi/relu2_ffn.cu).

    forward     Y2 = relu(X @ W_up^T)^2              one kernel
                Y3 = Y2 @ W_down
    backward    dY1 = 2 * sqrt(Y2) * (dY3 @ W_down^T)    one kernel
                dX = dY1 @ W_up, dW_down = Y2^T @ dY3, dW_up = dY1^T @ X

The plain products are XLA's. X and Y2 are all that is saved.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from s24jax import cuda_library
from s24jax.ops import fused_product
from s24jax.ops.relu2_ffn.saved import SAVED_HIDDEN
from s24jax.typing import Array, Float


def reason_against(
    x: Float[Array, "T D"], w_up: Float[Array, "F D"], w_down: Float[Array, "F D"]
) -> str | None:
    """Why this implementation cannot run here; None where it can."""
    return fused_product.reason_against(x, w_up)


@jax.custom_vjp
def relu2_ffn(
    x: Float[Array, "T D"], w_up: Float[Array, "F D"], w_down: Float[Array, "F D"]
) -> Float[Array, "T D"]:
    """See `s24jax.ops.relu2_ffn.api`."""
    return _forward(x, w_up, w_down)[0]


def y2_of(x: Float[Array, "T D"], w_up: Float[Array, "F D"]) -> Float[Array, "T F"]:
    """Y2 = relu(X @ W_up^T)^2."""
    return _call("s24jax_relu2_ffn_y2", x, w_up)


def dy1_of(
    dy3: Float[Array, "T D"], w_down: Float[Array, "F D"], y2: Float[Array, "T F"]
) -> Float[Array, "T F"]:
    """dY1 = 2 * sqrt(Y2) * (dY3 @ W_down^T)."""
    return _call("s24jax_relu2_ffn_dy1", dy3, w_down, y2)


def _forward(x_TD, w_up_FD, w_down_FD):
    y2_TF = checkpoint_name(y2_of(x_TD, w_up_FD), SAVED_HIDDEN)
    return y2_TF @ w_down_FD, (x_TD, w_up_FD, w_down_FD, y2_TF)


def _backward(saved, dy3_TD):
    x_TD, w_up_FD, w_down_FD, y2_TF = saved
    dy1_TF = dy1_of(dy3_TD, w_down_FD, y2_TF)
    return dy1_TF @ w_up_FD, dy1_TF.T @ x_TD, y2_TF.T @ dy3_TD


relu2_ffn.defvjp(_forward, _backward)


def _call(target, a_TD, w_FD, *more) -> Float[Array, "T F"]:
    out = jax.ShapeDtypeStruct((a_TD.shape[0], w_FD.shape[0]), a_TD.dtype)
    return cuda_library.call(target, out, a_TD, w_FD, *more, group=fused_product.GROUP)
