"""matmul_sparsify24: X and W_up -> compressed Y2."""

from s24jax.compressed import Compressed24
from s24jax.errors import InvalidInput
from s24jax.ops import dispatch
from s24jax.ops.matmul_sparsify24 import cuda, reference
from s24jax.typing import Array, Float, Implementation, Int

CANDIDATES = [
    dispatch.Candidate("cuda", cuda.matmul_sparsify24, cuda.reason_against),
    dispatch.Candidate("reference", reference.matmul_sparsify24),
]


def matmul_sparsify24(
    x: Float[Array, "T D"], w_up: Float[Array, "F D"], *, implementation: Implementation = "auto"
) -> tuple[Compressed24, Int[Array, "F"]]:
    """`sparsify24` of Y1 = X @ W_up^T.

    Y1 accumulates in float32 and is rounded once to `x`'s dtype; the choice of 2 in 4 is made on
    the rounded Y1.

    Args:
      x: T tokens.
      w_up: feature-major, of `x`'s dtype; F must be a multiple of 4.
      implementation: see `s24jax.ops.dispatch`.

    Returns:
      As `sparsify24`: Y2 compressed along axis 1, and its non-zeros per feature before pruning.

    Raises:
      InvalidInput: shapes or dtypes do not fit.
      Unsupported: the named implementation cannot run here.

    Source: arXiv 2503.16672, section 3.
    """
    if x.ndim != 2 or w_up.ndim != 2 or x.shape[1] != w_up.shape[1] or x.dtype != w_up.dtype:
        raise InvalidInput(
            f"matmul_sparsify24: x is {x.dtype} {x.shape}, w_up {w_up.dtype} {w_up.shape}; "
            "they must be [T, D] and [F, D] of one dtype"
        )
    if w_up.shape[0] % 4:
        raise InvalidInput(
            f"matmul_sparsify24: F={w_up.shape[0]} is no multiple of 4; pad the hidden width"
        )
    return dispatch.resolve("matmul_sparsify24", implementation, CANDIDATES, x, w_up).run(x, w_up)
