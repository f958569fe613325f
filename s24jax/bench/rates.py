"""In what a bench is rated, and how high that can get."""

from collections.abc import Sequence

from s24jax.bench.rows import Row

# Bench: the row's key, and the words for it.
RATES = {
    "gemm": ("tflops", "TFLOP/s of the dense product"),
    "sparsify": ("gbps", "GB/s"),
    "ffn": ("tflops", "TFLOP/s of the dense products"),
    "step": ("tokens_per_s", "tokens/s of training steps"),
    "prefill": ("tokens_per_s", "tokens/s of a prompt"),
    "decode": ("tokens_per_s", "tokens/s, one for each sequence"),
    "scaling": ("tokens_per_s", "tokens/s of training steps on all devices"),
    "clock": ("tflops", "TFLOP/s of one dense product"),
}
# TFLOP/s of bfloat16 on random data, dense-equivalent: a loop of wgmma instructions, 128x256 tiles
# from shared memory, and of the copies into it, without an epilogue. Short bursts on operands in
# the L2 cache, so upper bounds. Measured for this project on one H200 (132 SMs, 700 W).
CEILINGS = {"2:4": 1344.0, "dense": 883.0}
COPY = "copy"  # the product whose rate is the ceiling of a pass over memory


def share_of_ceiling(row: Row, rows: Sequence[Row]) -> float | None:
    """Of a 2:4 product's rate in its ceiling; of a pass's in the copy of the same run and shape.

    None where there is no one ceiling: a whole FFN or model, a row without a time.
    """
    if row["ms"] is None or row["bench"] not in ("gemm", "sparsify"):
        return None
    if row["bench"] == "gemm":
        return row["tflops"] / CEILINGS["2:4"]
    keys = ("bench", "T", "D", "F")
    same = [other for other in rows if all(other.get(key) == row[key] for key in keys)]
    copies = [other["gbps"] for other in same if other["product"] == COPY and other["gbps"]]
    return row["gbps"] / copies[0] if copies else None
