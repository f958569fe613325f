"""sparsify24: Y1 -> compressed Y2."""

from s24jax.compressed import Compressed24
from s24jax.ops import dispatch
from s24jax.ops.sparsify24 import cuda, reference, triton
from s24jax.prune24 import check_axis
from s24jax.typing import Array, Float, Implementation, Int

CANDIDATES = [
    # Triton's is the faster one (experiments/001_gpu_ops); CUDA's can be part of a CUDA graph.
    dispatch.Candidate("triton", triton.sparsify24, triton.reason_against),
    dispatch.Candidate("cuda", cuda.sparsify24, cuda.reason_against),
    dispatch.Candidate("reference", reference.sparsify24),
]


def sparsify24(
    y1: Float[Array, "T F"], *, implementation: Implementation = "auto"
) -> tuple[Compressed24, Int[Array, "F"]]:
    """Y2 = relu(Y1)^2, pruned to 2:4 in groups of 4 features inside a token, and compressed.

    The two largest of relu(Y1) are kept, compared in `y1`'s own dtype (round Y1 before the call);
    ties keep the lowest feature, NaN ranks highest and stays NaN. Squares are taken in float32 and
    rounded once.

    Args:
      y1: pre-activation; F must be a multiple of 4.
      implementation: see `s24jax.ops.dispatch`.

    Returns:
      Y2 compressed along axis 1, and the number of non-zeros of Y2 per feature before pruning
      (int32; NaN counts as a non-zero).

    Raises:
      InvalidInput: F is no multiple of 4 or the dtype is no float.
      Unsupported: the named implementation cannot run here.

    Source: arXiv 2503.16672, section 3.
    """
    check_axis(y1, 1, "sparsify24")
    return dispatch.resolve("sparsify24", implementation, CANDIDATES, y1).run(y1)
