"""relu2_ffn as XLA compiles and differentiates it."""

from s24jax.activation import relu2
from s24jax.typing import Array, Float


def relu2_ffn(
    x: Float[Array, "T D"], w_up: Float[Array, "F D"], w_down: Float[Array, "F D"]
) -> Float[Array, "T D"]:
    """See `s24jax.ops.relu2_ffn.api`."""
    return relu2(x @ w_up.T) @ w_down
