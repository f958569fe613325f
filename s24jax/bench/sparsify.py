"""The bench of the passes that make the sparse operands: bound by memory, so rated in GB/s.

Products:
    copy            Y1 to another place: what the memory gives, measured in the same run
    sparsify24      Y1 -> compressed Y2 and its non-zeros per feature
    feature_wise24  Y2 and dY1, token-wise -> the operands of both weight gradients
    split_features  non-zeros per feature -> which features are dense

The bytes counted are the fewest: each input read once, each output written once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s24jax.activation import relu2
from s24jax.bench import torch_peers
from s24jax.bench.operands import (
    STRIDED,
    Operands,
    dense_features,
    each_product,
    make_split,
    pre_activation,
)
from s24jax.bench.products import relative_error
from s24jax.bench.rows import Row, make_rows
from s24jax.bench.shapes import Shape
from s24jax.bench.timing import Contender, measure
from s24jax.compressed import Compressed24
from s24jax.feature_split import FeatureSplit
from s24jax.ops.feature_wise24 import SplitOperand, feature_wise24
from s24jax.ops.sparsify24 import sparsify24
from s24jax.ops.split_features import split_features
from s24jax.prune24 import prune24

PRODUCTS = ("copy", "sparsify24", "feature_wise24", "split_features")
OPS = ("cuda", "triton", "reference")
CUSPARSELT = "cusparselt_compress"
IMPLEMENTATIONS = ("xla", *OPS, CUSPARSELT)

Makers = dict[str, Callable[[], Contender]]


def bench(
    shapes: Sequence[Shape], products: Sequence[str], implementations: Sequence[str], rounds: int
) -> Iterator[list[Row]]:
    """The rows of each product at each shape, as soon as they are there."""
    for shape, operands, product in each_product("sparsify", shapes, products):
        makers = _MAKERS[product](shape, operands)
        chosen = {name: make for name, make in makers.items() if name in implementations}
        nbytes = dict.fromkeys(chosen, fewest_bytes(product, shape))
        results = measure(chosen, rounds)
        yield make_rows("sparsify", product, shape, results, nbytes=nbytes)


def fewest_bytes(product: str, shape: Shape) -> int:
    """Of bfloat16 values, four bits of metadata for every four of them, and int32 counts."""
    elements, counts = shape.T * shape.F, 4 * shape.F
    if product == "copy":
        return 4 * elements
    if product == "sparsify24":
        return 2 * elements + 9 * elements // 8 + counts
    if product == "split_features":
        return 2 * counts
    # Both matrices share one mask; the dense features leave as they are.
    dense = shape.T * dense_features(shape.F)
    return 17 * elements // 8 + 17 * (elements - dense) // 8 + 4 * dense


def _copy(shape: Shape, operands: Operands) -> Makers:
    y1 = pre_activation(shape)
    return {"xla": lambda: Contender(partial(jax.jit(jnp.copy), y1))}


def _sparsify(shape: Shape, operands: Operands) -> Makers:
    y1 = pre_activation(shape)

    def make(implementation: str) -> Contender:
        call = jax.jit(partial(sparsify24, implementation=implementation))
        return Contender(partial(call, y1), lambda out: float(_sparsify_error(out, y1)))

    makers = {name: partial(make, name) for name in OPS}
    return makers | {CUSPARSELT: lambda: torch_peers.compress(operands.y2)}


@jax.jit
def _sparsify_error(out: tuple[Compressed24, jax.Array], y1: jax.Array) -> jax.Array:
    y2, counts = out
    oracle = relu2(prune24(jnp.maximum(y1, 0), axis=1)[0].astype(jnp.float32))
    same_counts = jnp.all(counts == jnp.sum(y1 > 0, axis=0))
    return jnp.where(same_counts, relative_error(y2.decompress(), oracle), jnp.inf)


def _feature_wise(shape: Shape, operands: Operands) -> Makers:
    y2, dy1, split = operands.y2, operands.dy1, make_split(operands.counts_F)

    def call(implementation: str) -> Callable:
        op = partial(
            feature_wise24, grouping=STRIDED, shared_mask=True, implementation=implementation
        )
        return partial(jax.jit(op), y2, dy1, split)

    expected = call("reference")()

    def make(implementation: str) -> Contender:
        return Contender(call(implementation), lambda out: _selection_error(out, expected))

    return {name: partial(make, name) for name in OPS}


@jax.jit
def _dense_parts(out: tuple[SplitOperand, SplitOperand]) -> list[jax.Array]:
    return [part for operand in out for part in (operand.sparse.decompress(), operand.dense)]


def _selection_error(out: Any, expected: Any) -> float:
    """The op selects and does not calculate, so the reference's own numbers are the oracle."""
    pairs = zip(_dense_parts(out), _dense_parts(expected), strict=True)
    return max(float(relative_error(a, b.astype(jnp.float32))) for a, b in pairs)


def _split_features(shape: Shape, operands: Operands) -> Makers:
    counts = operands.counts_F
    order = np.argsort(-np.asarray(counts), kind="stable")
    dense = dense_features(counts.size)
    expected = FeatureSplit(np.sort(order[:dense]), np.sort(order[dense:]))

    def error(split: FeatureSplit) -> float:
        same = all(np.array_equal(a, b) for a, b in zip(split, expected, strict=True))
        return 0.0 if same else np.inf

    def make(implementation: str) -> Contender:
        op = partial(split_features, dense_features=dense, implementation=implementation)
        return Contender(partial(jax.jit(op), counts), error)

    return {name: partial(make, name) for name in OPS}


_MAKERS = {
    "copy": _copy,
    "sparsify24": _sparsify,
    "feature_wise24": _feature_wise,
    "split_features": _split_features,
}
