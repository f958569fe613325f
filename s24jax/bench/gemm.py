"""The bench of the four sparse products: our kernel, the reference, and what users have today.

Implementations:
    cuda        matmul24 with our kernel
    xla_dense   the dense product through XLA, of the same pruned A with its zeros
    cublas      the same through torch
    cusparselt  the 2:4 product through torch
    reference   matmul24 in pure JAX
    cuda_split  a weight gradient as the FFN takes it, its densest features dense (`split_matmul24`)
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from s24jax.bench import torch_peers
from s24jax.bench.operands import Operands, dense_features, each_product, make_split
from s24jax.bench.products import (
    PRODUCTS,
    WEIGHT_GRADIENTS,
    Problem,
    SplitProblem,
    contender,
    make_problem,
    make_sparse_part,
    make_split_problem,
)
from s24jax.bench.rows import DENSE, Row, make_rows
from s24jax.bench.shapes import Shape, Size
from s24jax.bench.timing import Contender, Result, measure
from s24jax.ops import matmul24 as op
from s24jax.ops.split_matmul24 import split_matmul24

__all__ = ["IMPLEMENTATIONS", "PRODUCTS", "bench"]

SPLIT = "cuda_split"
IMPLEMENTATIONS = ("cuda", "xla_dense", "cublas", "cusparselt", "reference", SPLIT)
_SPARSE_PART = "the sparse part of cuda_split"  # timed for a note, no row


def bench(
    shapes: Sequence[Shape], products: Sequence[str], implementations: Sequence[str], rounds: int
) -> Iterator[list[Row]]:
    """The rows of each product at each shape, as soon as they are there."""
    for shape, operands, product in each_product("gemm", shapes, products):
        problem = make_problem(operands, product)
        makers = {n: make for n, make in _makers(problem).items() if n in implementations}
        if product in WEIGHT_GRADIENTS and SPLIT in implementations:
            makers |= _split_makers(operands, product)
        results = _with_dense_slice(measure(makers, rounds))
        nbytes = {name: _bytes(problem.size, name) for name in results}
        yield make_rows("gemm", product, shape, results, nbytes=nbytes, size=problem.size)


def _makers(problem: Problem) -> dict[str, Callable[[], Contender]]:
    return {
        "cuda": partial(_ours, problem, "cuda"),
        "xla_dense": partial(_xla_dense, problem),
        "cublas": partial(torch_peers.dense, problem),
        "cusparselt": partial(torch_peers.sparse, problem),
        "reference": partial(_ours, problem, "reference"),
    }


def _split_makers(operands: Operands, product: str) -> dict[str, Callable[[], Contender]]:
    problem = make_split_problem(operands, product, make_split(operands.counts_F))
    return {
        SPLIT: partial(_split, problem),
        _SPARSE_PART: lambda: _ours(make_sparse_part(problem), "cuda"),
    }


def _ours(problem: Problem, implementation: str) -> Contender:
    call = jax.jit(partial(op.matmul24, implementation=implementation))
    return contender(call, problem.a, problem.b, oracle=problem.oracle)


def _xla_dense(problem: Problem) -> Contender:
    transposed = problem.a.axis == 0
    call = jax.jit(lambda a, b: jnp.dot(a.T if transposed else a, b))
    return contender(call, problem.a_dense, problem.b, oracle=problem.oracle)


def _split(problem: SplitProblem) -> Contender:
    call = jax.jit(partial(split_matmul24, implementation="cuda"))
    return contender(call, problem.a, problem.b, problem.split, oracle=problem.oracle)


def _with_dense_slice(results: dict[str, Result]) -> dict[str, Result]:
    """Without the sparse part's result, which goes into the note of the whole."""
    sparse_part = results.pop(_SPARSE_PART, Result())
    whole = results.get(SPLIT, Result())
    if whole.seconds and sparse_part.seconds:
        slice_ms, all_ms = 1e3 * (whole.seconds - sparse_part.seconds), 1e3 * whole.seconds
        note = f"the dense slice takes {slice_ms:.3f} of {all_ms:.3f} ms"
        results[SPLIT] = whole._replace(note=note)
    return results


def _bytes(size: Size, implementation: str) -> int:
    """A, B and the product in bfloat16, each once; a compressed A has 9/16 of a dense one's."""
    dense_rows = size.M if implementation in DENSE else 0
    if implementation == SPLIT:
        dense_rows = dense_features(size.M)
    a = (16 * dense_rows + 9 * (size.M - dense_rows)) * size.K // 8
    return a + 2 * size.K * size.N + 2 * size.M * size.N
