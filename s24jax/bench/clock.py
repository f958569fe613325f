"""The bench of what a 2:4 product does to the dense work beside it: by the clock, and the power.

From the first kernel with sparse tensor-core instructions that a process runs until that process
ends, the GPU draws more power when it idles, and at its power limit dense work of all processes on
it is slower. Found on H200s with our kernel and with cuSPARSELt (experiments/009). Such a kernel
says so in its binary (EIATTR_SPARSE_MMA_MASK, by `cuobjdump -elf`).

Products, one dense product each time:
    before                   on a GPU on which no living process ran a 2:4 product
    after matmul_sparsify24  which prunes and compresses in the epilogue of a dense product
    after matmul24           one 2:4 product
    later                    the GPU having idled
"""

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from s24jax import device
from s24jax.bench.rows import Row, make_rows
from s24jax.bench.shapes import Shape, Size
from s24jax.bench.timing import Contender, Result, sample
from s24jax.errors import BrokenEnvironment, Unsupported
from s24jax.ops.matmul24 import matmul24
from s24jax.ops.matmul_sparsify24 import matmul_sparsify24
from s24jax.typing import Implementation

_CALLS = 20  # of the product, between looks at the time
_EVERY_MS = 50
Out = TypeVar("Out")


class Reading(NamedTuple):
    """What nvidia-smi told, the medians."""

    mhz: float | None = None
    watts: float | None = None


def bench(
    *,
    size: int = 8192,
    seconds: float = 3.0,
    rest: float = 10.0,
    implementation: Implementation = "cuda",
) -> Iterator[list[Row]]:
    """The rows of each product, in their order: there is no way back.

    Args:
      size: M, N and K.
      seconds: of each product's loop; its second half counts, and idle for as long.
      rest: seconds before "later".
      implementation: of the ops in between.

    Raises:
      Unsupported: the device is no Hopper GPU.
      BrokenEnvironment: there is no nvidia-smi.
    """
    reason = device.hopper_reason()
    if reason:
        raise Unsupported(f"clock: {reason}")
    x, w = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = Contender(partial(jax.jit(jnp.dot), x, w))
    y2, _ = jax.block_until_ready(_up("reference")(x, w))
    between = {
        "before": lambda: None,
        "after matmul_sparsify24": lambda: _up(implementation)(x, w),
        "after matmul24": lambda: _down(implementation)(y2, w),
        "later": lambda: time.sleep(rest),
    }
    for name, run in between.items():
        jax.block_until_ready(run())
        yield _rows(name, product, size, seconds)


def _up(implementation: Implementation) -> Callable:
    return jax.jit(partial(matmul_sparsify24, implementation=implementation))


def _down(implementation: Implementation) -> Callable:
    return jax.jit(partial(matmul24, implementation=implementation))


def _rows(name: str, product: Contender, size: int, seconds: float) -> list[Row]:
    _sustained(product, seconds / 2)
    took, loaded = _watched(lambda: _sustained(product, seconds / 2))
    time.sleep(seconds / 2)
    _, idle = _watched(lambda: time.sleep(seconds / 2))
    shape, result = Shape(size, size, size), {"xla": Result(took)}
    (row,) = make_rows("clock", name, shape, result, size=Size(size, size, size))
    row |= {"mhz": loaded.mhz, "watts": loaded.watts}
    row |= {"idle_mhz": idle.mhz, "idle_watts": idle.watts}
    return [row]


def _sustained(product: Contender, seconds: float) -> float:
    """Seconds of a call, the median over a loop of so many seconds."""
    samples, end = [], time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        samples.append(sample(product, _CALLS, time.perf_counter))
    return statistics.median(samples)


def _watched(run: Callable[[], Out]) -> tuple[Out, Reading]:
    """What `run` returns, and the clock and the power of the default GPU meanwhile.

    nvidia-smi numbers GPUs as CUDA_VISIBLE_DEVICES does where all of them are of one kind.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=clocks.sm,power.draw.instant"]
    command += ["--format=csv,noheader,nounits", f"--loop-ms={_EVERY_MS}"]
    try:
        watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise BrokenEnvironment(
            f"clock: nvidia-smi does not start ({error}); it comes with the GPU's driver, put it "
            "on PATH"
        ) from error
    try:
        out = run()
    finally:
        watcher.terminate()
        lines = watcher.communicate()[0].splitlines()
    readings = [line.split(",") for line in lines if line.count(",") == 1]
    reading = Reading(*map(_median, zip(*readings, strict=True))) if readings else Reading()
    return out, reading


def _median(column: tuple[str, ...]) -> float | None:
    """Of the numbers among the readings; None where the GPU tells none."""
    numbers = []
    for reading in column:
        with contextlib.suppress(ValueError):
            numbers.append(float(reading))
    return statistics.median(numbers) if numbers else None
