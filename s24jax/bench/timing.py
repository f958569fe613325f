"""Contenders measured in turns.

A rested GPU is faster than one in a long run, by a tenth for 0.1 s, and its clock is unsteady for
two seconds (experiments/009); later it falls with the power of what runs, within some 50 ms. So
what runs first, or after something cool, looks faster than it is in training. All contenders
therefore run for two seconds before the first sample, and every sample begins with calls that are
not timed, until the clock is the contender's own. Every contender is sampled in every round, each
time in another order, so that none always follows the same neighbour, and its time is the median
over rounds. The calls of a sample are queued without waiting in between, and so many that Python's
part and the wait at the end do not count. Operands do not fit into the cache.

Contenders share a process here. A 2:4 product slows the dense ones of its process (see
`s24jax.bench.clock`), so `experiments.bench` gives each implementation a process of its own unless
it is told otherwise, and then calls this for one at a time.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from s24jax.errors import EXPECTED

SETTLE_S, WARM_UP_S, SAMPLE_S = 2.0, 0.06, 0.08
# A product of bfloat16 operands, rounded once, is off by 0.002; this is no rounding any more.
WRONG = 1e-2

Clock = Callable[[], float]
Name = TypeVar("Name")


def overwrite(out: Any) -> None:
    """Fills the memory of jax arrays, which the next call is likely to get, with what is wrong.

    Without it, what a kernel fails to write would still be there from the call before.
    """
    jax.block_until_ready(_overwritten(out))


def _overwritten_leaf(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x * jnp.nan
    return x | jnp.array(jnp.iinfo(x.dtype).max, x.dtype)


_overwritten = jax.jit(
    lambda out: jax.tree.map(_overwritten_leaf, out), donate_argnums=0, keep_unused=True
)


class Contender(NamedTuple):
    """One way to compute something.

    Attributes:
      call: queues one run on the device and returns its output.
      error: how far an output is from the oracle, relative; None where that cannot be told.
      wait: returns when an output is there.
      spoil: overwrites the memory of an output.
      note: what to know about this contender.
    """

    call: Callable[[], Any]
    error: Callable[[Any], float] | None = None
    wait: Callable[[Any], Any] = jax.block_until_ready
    spoil: Callable[[Any], Any] = overwrite
    note: str = ""


class Result(NamedTuple):
    """What came of a contender; `seconds` of one call, None where it has no right result."""

    seconds: float | None = None
    rel_error: float | None = None
    note: str = ""


def measure(
    makers: Mapping[Name, Callable[[], Contender]],
    rounds: int,
    *,
    clock: Clock = time.perf_counter,
) -> dict[Name, Result]:
    """Checks every contender, times those that are right in turns, and checks them again.

    Args:
      makers: make the contenders. One that cannot run here raises; its error is its note.
      rounds: samples of each contender.
      clock: seconds.
    """
    results, running = {}, {}
    for name, make in makers.items():
        try:
            contender = make()
            error = checked_error(contender)
        except EXPECTED as refusal:
            results[name] = Result(note=str(refusal))
            continue
        results[name] = _result(contender, None, error)
        if not is_wrong(error):
            running[name] = contender
    settle_s = SETTLE_S if jax.default_backend() == "gpu" else 0.0
    for name, seconds in interleave(running, rounds, settle_s=settle_s, clock=clock).items():
        before, after = results[name].rel_error, checked_error(running[name])
        worst = None if before is None else float(np.maximum(before, after))
        results[name] = _result(running[name], seconds, worst)
    return results


def interleave(
    contenders: Mapping[Name, Contender],
    rounds: int,
    *,
    settle_s: float = 0.0,
    clock: Clock = time.perf_counter,
) -> dict[Name, float]:
    """Median seconds of one call of each contender; the orders are the same in every run.

    Args:
      contenders: to be sampled.
      rounds: samples of each.
      settle_s: seconds in which they run before.
      clock: seconds.
    """
    seconds = {}
    for name, contender in contenders.items():
        sample(contender, 1, clock)
        seconds[name] = max(sample(contender, 3, clock), 1e-9)

    def warm_up(name: Name) -> None:
        sample(contenders[name], math.ceil(WARM_UP_S / seconds[name]), clock)

    settled = clock() + settle_s
    while contenders and clock() < settled:
        for name in contenders:
            warm_up(name)
    samples = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            warm_up(name)
            calls = math.ceil(SAMPLE_S / seconds[name])
            samples[name].append(sample(contenders[name], calls, clock))
    return {name: statistics.median(values) for name, values in samples.items()}


def sample(contender: Contender, calls: int, clock: Clock) -> float:
    """Seconds of one call, over so many that follow each other."""
    start = clock()
    for _ in range(calls):
        out = contender.call()  # drops the output before, so that its memory goes round
    contender.wait(out)
    return (clock() - start) / calls


def checked_error(contender: Contender) -> float | None:
    """The error of an output in memory that held none before."""
    contender.spoil(contender.call())
    out = contender.call()
    return None if contender.error is None else contender.error(out)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a compiled function holds at its peak: arguments, new results and temporaries."""
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + new + memory.temp_size_in_bytes


def is_wrong(error: float | None) -> bool:
    """Whether a relative error is more than rounding; NaN is."""
    return error is not None and not error <= WRONG


def _result(contender: Contender, seconds: float | None, error: float | None) -> Result:
    if not is_wrong(error):
        return Result(seconds, error, contender.note)
    note = f"wrong result: relative error {error:.2g}"
    return Result(None, error, "; ".join(filter(None, [note, contender.note])))
