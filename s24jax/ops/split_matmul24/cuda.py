"""split_matmul24 in one launch of matmul24's kernel: dense rows are tiles among the others."""

from s24jax.feature_split import FeatureSplit
from s24jax.ops.feature_wise24.operand import SplitOperand
from s24jax.ops.matmul24 import cuda, tuning
from s24jax.typing import Array, Float


def reason_against(a: SplitOperand, b: Float[Array, "T N"], split: FeatureSplit) -> str | None:
    """Why this implementation cannot take the product here; None where it can."""
    reason = cuda.reason_against(a.sparse, b)
    if reason is None and a.sparse.values.shape[0] == 0:
        reason = "every feature is dense, so this is no sparse product"
    return reason


def split_matmul24(
    a: SplitOperand, b: Float[Array, "T N"], split: FeatureSplit
) -> Float[Array, "F N"]:
    """See `s24jax.ops.split_matmul24.api`."""
    sparse, strided = a.sparse.values.shape[0], a.sparse.grouping.kind == "strided"
    return cuda.launch(
        a.sparse.values,
        a.sparse.metadata,
        b,
        strided=strided,
        rows=sparse + split.dense.size,
        schedule=tuning.schedule_for(sparse, b.shape[1], b.shape[0], strided),
        dense=a.dense,
        places=(split.sparse, split.dense),
    )
