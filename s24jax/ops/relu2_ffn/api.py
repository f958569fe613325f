"""relu2_ffn: the dense feed-forward network with Squared ReLU."""

import math

from s24jax.errors import InvalidInput
from s24jax.mesh import vary_alike
from s24jax.ops import dispatch
from s24jax.ops.relu2_ffn import cuda, reference
from s24jax.typing import Array, Float, Implementation

CANDIDATES = [
    dispatch.Candidate("cuda", cuda.relu2_ffn, cuda.reason_against),
    dispatch.Candidate("reference", reference.relu2_ffn),
]


def relu2_ffn(
    x: Float[Array, "... D"],
    w_up: Float[Array, "F D"],
    w_down: Float[Array, "F D"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "... D"]:
    """Y3 = relu(X @ W_up^T)^2 @ W_down, all of it dense, with its exact gradient.

    Products accumulate in float32; Y1, Y2, Y3 and every gradient are rounded once to `x`'s dtype.
    Gradients are reverse mode's: `jax.jvp` goes with "reference" alone.

    Args:
      x: activations; all axes but the last are tokens.
      w_up, w_down: feature-major weights of `x`'s dtype.
      implementation: see `s24jax.ops.dispatch`.

    Raises:
      InvalidInput: shapes or dtypes do not fit.
      Unsupported: the named implementation cannot run here.
    """
    check_operands("relu2_ffn", x, w_up, w_down)
    x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    candidate = dispatch.resolve("relu2_ffn", implementation, CANDIDATES, x_TD, w_up, w_down)
    return candidate.run(*vary_alike(x_TD, w_up, w_down)).reshape(x.shape)


def check_operands(op: str, x: Array, w_up: Array, w_down: Array) -> None:
    """Raises InvalidInput where they are no FFN's, or of several dtypes."""
    if x.ndim < 1 or w_up.ndim != 2 or w_up.shape != w_down.shape or w_up.shape[1] != x.shape[-1]:
        raise InvalidInput(
            f"{op}: x {x.shape}, w_up {w_up.shape}, w_down {w_down.shape} do not fit; "
            "both weights must be [F, D] with D the last axis of x"
        )
    if not x.dtype == w_up.dtype == w_down.dtype:
        raise InvalidInput(
            f"{op}: x is {x.dtype}, w_up {w_up.dtype}, w_down {w_down.dtype}; "
            "cast them to one dtype"
        )
