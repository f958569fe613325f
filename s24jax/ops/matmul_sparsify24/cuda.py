"""matmul_sparsify24 in one kernel (ffi/matmul_sparsify24.cu)."""

from s24jax.compressed import Compressed24
from s24jax.ops import fused_product
from s24jax.ops.fused_product import reason_against
from s24jax.ops.sparsify24.cuda import compressed_y2
from s24jax.typing import Array, Float, Int

__all__ = ["matmul_sparsify24", "reason_against"]


def matmul_sparsify24(
    x: Float[Array, "T D"], w_up: Float[Array, "F D"]
) -> tuple[Compressed24, Int[Array, "F"]]:
    """See `s24jax.ops.matmul_sparsify24.api`."""
    shape = x.shape[0], w_up.shape[0]
    return compressed_y2("s24jax_matmul_sparsify24", shape, x, w_up, group=fused_product.GROUP)
