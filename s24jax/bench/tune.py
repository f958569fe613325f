"""The fastest schedule of our kernel for each product, measured and saved."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import jax

from s24jax import device
from s24jax.bench.operands import make_operands, make_split
from s24jax.bench.products import (
    Problem,
    contender,
    make_problem,
    make_sparse_part,
    make_split_problem,
)
from s24jax.bench.shapes import Shape
from s24jax.bench.timing import Contender, measure
from s24jax.errors import Unsupported
from s24jax.ops.matmul24 import cuda, tuning

_LOG = logging.getLogger(__name__)


def tune(shapes: Sequence[Shape], rounds: int) -> Iterator[str]:
    """Times every schedule on every product and saves the best; a line for each product.

    Entries are keyed by (M, N, K, strided), `strided` where A's groups of four lie apart. Those of
    other products stay.

    Raises:
      Unsupported: there is no Hopper GPU, or no schedule runs here; the first one's reason.
    """
    if device.hopper_reason():
        raise Unsupported(f"tune: {device.hopper_reason()}")
    for shape in shapes:
        for name, problem in _problems(shape):
            size, strided = problem.size, problem.a.axis == 0
            makers = {schedule: partial(_ours, problem, schedule) for schedule in tuning.VARIANTS}
            results = measure(makers, rounds)
            for schedule, result in results.items():
                time = f"{1e3 * result.seconds:.3f} ms" if result.seconds else result.note
                _LOG.info("%s: %s, %s", name, schedule, time)
            times = {key: r.seconds for key, r in results.items() if r.seconds}
            if not times:
                reason = next(iter(results.values())).note
                raise Unsupported(f"tune: no schedule runs {name} of {shape} ({reason})")
            best = min(times, key=times.get)
            tuning.save(tuning.load() | {(*size, strided): best})
            rate = size.flops / times[best] / 1e12
            yield f"{name} of {shape}: {best}, {1e3 * times[best]:.3f} ms, {rate:,.0f} TFLOP/s"


def _problems(shape: Shape) -> Iterator[tuple[str, Problem]]:
    """One product for each key: y3 and dx have one size, and so have both weight gradients."""
    operands = make_operands(shape)
    yield "y3", make_problem(operands, "y3")
    yield "dw_down", make_problem(operands, "dw_down")
    split = make_split(operands.counts_F)
    yield "dw_down's sparse part", make_sparse_part(make_split_problem(operands, "dw_down", split))


def _ours(problem: Problem, schedule: tuning.Schedule) -> Contender:
    call = jax.jit(partial(cuda.matmul24, schedule=schedule))
    return contender(call, problem.a, problem.b, oracle=problem.oracle)
