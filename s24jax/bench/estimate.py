"""Where 2:4's gain goes on many GPUs: arithmetic from what one GPU was measured to do.

A step of a model on N GPUs, in seconds:

    compute = microbatches * (layers * FFN + rest)
    fsdp    = microbatches * bytes of (two gathers of the layers' weights, one of the embedding,
              one scattered sum of all gradients) / rate
    data    = bytes of one sum of the gradients / rate
    tensor  = microbatches * layers * bytes of four sums of activations / rate

With overlap a step takes max(compute, fsdp + data) + tensor, for nothing else can be computed while
the outputs of FFN and attention or their inputs' gradients are summed; without, the sum of all.

Assumptions:
    FFN      forward and backward as measured on an H200 (experiments/002), of XLA and of 2:4
    rest     attention, logits, optimizer at the rate of their operations in the measured step of
             the 1.5B model, what its FFNs take left out: 88 TFLOP in 244.0 ms dense and 244.1 ms
             beside 2:4. What 2:4 takes from the clock (`s24jax.bench.clock`) is not in it
    rates    what a GPU receives: 370 GB/s inside a node of eight, 40 GB/s between nodes, some four
             fifths of what the data sheets of NVLink 4 and of a 400 Gbit/s adapter name
    mesh     tensor inside a node; fsdp inside a node as well, where the model then fits, else over
             nodes. Logits are the same on all GPUs of a tensor group, as `s24jax.mesh` has it
    batch    4,194,304 tokens a step, microbatches of at most 16,384 tokens for each GPU that has
             sequences of its own
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

BATCH, MICROBATCH, CONTEXT = 2**22, 2**14, 4096
NODE, INSIDE, BETWEEN = 8, 370e9, 40e9
REST = 88e12 / 0.2440  # operations a second
BF16, FLOAT32 = 2, 4


class Model(NamedTuple):
    """Sizes, mesh sizes of fsdp and tensor, and seconds of an FFN for a token, forward and back."""

    layers: int
    width: int
    hidden: int
    vocabulary: int
    fsdp: int
    tensor: int
    dense_ffn: float
    sparse_ffn: float


_LARGE = Model(80, 8192, 28672, 131_072, 64, 1, 31.966e-3 / 8192, 26.356e-3 / 8192)
# The measured FFNs are those of experiments/002, at T 16384, 16384 and 8192.
MODELS = {
    "1.5B": Model(25, 2048, 8192, 131_072, 8, 1, 4.600e-3 / 16384, 4.005e-3 / 16384),
    "7B": Model(32, 4096, 16384, 131_072, 8, 1, 18.467e-3 / 16384, 15.508e-3 / 16384),
    "70B": _LARGE,
    "70B, tensor 2": _LARGE._replace(fsdp=32, tensor=2),
    "70B, tensor 8": _LARGE._replace(fsdp=8, tensor=8),
}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


class Step(NamedTuple):
    """Seconds of a step's parts."""

    dense: float
    sparse: float
    fsdp: float
    data: float
    tensor: float

    def gain(self, *, overlap: bool) -> float:
        """How many times as fast 2:4 is."""
        return self._seconds(self.dense, overlap) / self._seconds(self.sparse, overlap)

    def _seconds(self, compute: float, overlap: bool) -> float:
        passed = self.fsdp + self.data
        return (max(compute, passed) if overlap else compute + passed) + self.tensor


def step_of(model: Model, gpus: int) -> Step:
    """The parts of a step on so many GPUs, a multiple of the model's fsdp * tensor."""
    m = model
    data = gpus // (m.fsdp * m.tensor)
    tokens = BATCH // (data * m.fsdp)
    microbatches = math.ceil(tokens / MICROBATCH)
    layers = m.layers / m.tensor  # of which a GPU has a part; logits it has whole
    # A token looks at half of its context.
    attention = 2 * 4 * m.width**2 + 4 * m.width * CONTEXT // 2
    rest = 3 * (layers * attention + 2 * m.width * m.vocabulary) * tokens / REST
    weights = layers * (4 * m.width**2 + 2 * m.width * m.hidden)
    embedding = m.width * m.vocabulary
    gathered = BF16 * (3 * weights + 2 * embedding) * (m.fsdp - 1) / m.fsdp
    summed = 2 * FLOAT32 * (weights + embedding) / m.fsdp * (data - 1) / data
    activations = 4 * 2 * BF16 * tokens * m.width * (m.tensor - 1) / m.tensor
    return Step(
        dense=rest + layers * tokens * m.dense_ffn,
        sparse=rest + layers * tokens * m.sparse_ffn,
        fsdp=microbatches * gathered / (INSIDE if m.fsdp * m.tensor <= NODE else BETWEEN),
        data=summed / BETWEEN,
        tensor=m.layers * activations / INSIDE,
    )


def lines() -> Iterator[str]:
    """The estimate as a Markdown table."""
    columns = ("model", "GPUs", "mesh", "tokens a GPU", "dense, s", "2:4, s", "fsdp, s", "data, s")
    yield f"| {' | '.join(columns)} | tensor, s | gain, overlapped | gain, not |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, model in MODELS.items():
        for gpus in GPUS:
            data = gpus // (model.fsdp * model.tensor)
            if data:
                step = step_of(model, gpus)
                seconds = " | ".join(f"{part:.3f}" for part in step)
                gains = " | ".join(f"{step.gain(overlap=overlap):.2f}" for overlap in (True, False))
                yield (
                    f"| {name} | {gpus} | {data}x{model.fsdp}x{model.tensor} | "
                    f"{BATCH // gpus:,} | {seconds} | {gains} |"
                )
