"""relu2_ffn as XLA compiles and differentiates it."""

from jax.ad_checkpoint import checkpoint_name

from s24jax.activation import relu2
from s24jax.ops.relu2_ffn.saved import SAVED_HIDDEN
from s24jax.typing import Array, Float


def relu2_ffn(
    x: Float[Array, "T D"], w_up: Float[Array, "F D"], w_down: Float[Array, "F D"]
) -> Float[Array, "T D"]:
    """See `s24jax.ops.relu2_ffn.api`."""
    return relu2(checkpoint_name(x @ w_up.T, SAVED_HIDDEN)) @ w_down
