"""matmul24: compressed A times dense B."""

from s24jax.compressed import Compressed24
from s24jax.errors import InvalidInput
from s24jax.ops import dispatch
from s24jax.ops.matmul24 import cuda, reference
from s24jax.typing import Array, Float, Implementation

CANDIDATES = [
    dispatch.Candidate("cuda", cuda.matmul24, cuda.reason_against),
    dispatch.Candidate("reference", reference.matmul24),
]


def matmul24(
    a: Compressed24, b: Float[Array, "K N"], *, implementation: Implementation = "auto"
) -> Float[Array, "M N"]:
    """Contracts `a`'s compressed axis with `b`'s first axis.

    Axis 1: a [M, K] -> a @ b. Axis 0: a [K, M] -> a^T @ b. Rows of `b` are in their natural order
    whatever `a.grouping` is. Accumulation in float32, one rounding to the operands' dtype.

    Args:
      a: the compressed operand.
      b: dense, of `a`'s dtype.
      implementation: see `s24jax.ops.dispatch`.

    Raises:
      InvalidInput: shapes or dtypes do not fit.
      Unsupported: the named implementation cannot run here.
    """
    if b.ndim != 2 or b.shape[0] != a.shape[a.axis]:
        raise InvalidInput(
            f"matmul24: b has shape {b.shape}, its first axis must have the length "
            f"{a.shape[a.axis]} of a's compressed axis (a has shape {a.shape}, axis {a.axis})"
        )
    if a.dtype != b.dtype:
        raise InvalidInput(f"matmul24: a is {a.dtype}, b is {b.dtype}; cast them to one dtype")
    return dispatch.resolve("matmul24", implementation, CANDIDATES, a, b).run(a, b)
