"""The bench of the whole FFN: our fused 2:4 path, beside dense and beside 2:4 in separate passes.

Implementations:
    cuda        ffn24 on our kernels, every cost included
    unfused     the same recipe with passes of their own: product, sparsify24, feature_wise24
    relu2_cuda  dense, Squared ReLU in the epilogues of our products
    xla_dense   dense, as a JAX user writes it
    reference   ffn24 in pure JAX

Products: `ffn` is the whole in three passes: forward; backward, from what the forward saved; both
in one program. The others are its parts, one at a time.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s24jax.bench.ffn_operands import SYNTHETIC, Case, Operands, make_operands, zero_share
from s24jax.bench.ffn_parts import PARTS, part_makers
from s24jax.bench.operands import STRIDED, dense_features
from s24jax.bench.products import relative_error
from s24jax.bench.rows import Row, add_ratios, make_rows
from s24jax.bench.shapes import Shape
from s24jax.bench.timing import Contender, Result, measure, peak_bytes
from s24jax.compressed import compress24
from s24jax.ffn import ffn24
from s24jax.ops.feature_wise24 import feature_wise24
from s24jax.ops.matmul24 import matmul24
from s24jax.ops.matmul_feature_wise24.reference import pruned_dy1
from s24jax.ops.relu2_ffn import relu2_ffn
from s24jax.ops.sparsify24 import sparsify24
from s24jax.ops.split_features import split_features
from s24jax.ops.split_matmul24 import split_matmul24
from s24jax.recipe import Recipe
from s24jax.typing import Array

PASSES = {"forward": 2, "backward": 4, "both": 6}  # products of 2*T*D*F in each
PRODUCTS = ("ffn", *PARTS)
IMPLEMENTATIONS = ("cuda", "unfused", "relu2_cuda", "xla_dense", "reference")
DENSE = ("relu2_cuda", "xla_dense")
_LOG = logging.getLogger(__name__)

FFN = Callable[[Array, Array, Array], Array]


class Compiled(NamedTuple):
    """A compiled function of arrays, and the bytes that it holds at its peak."""

    call: Callable[[], Any]
    peak_bytes: int


def bench(
    shapes: Sequence[Shape], products: Sequence[str], implementations: Sequence[str], rounds: int
) -> Iterator[list[Row]]:
    """`bench_cases` of synthetic operands of each shape."""
    cases = (Case(SYNTHETIC, make_operands(shape)) for shape in shapes)
    return bench_cases(cases, products, implementations, rounds)


def bench_cases(
    cases: Iterable[Case], products: Sequence[str], implementations: Sequence[str], rounds: int
) -> Iterator[list[Row]]:
    """The rows of each pass and part of each case, as soon as they are there."""
    for source, operands in cases:
        added = {"source": source, "zeros": float(zero_share(operands))}
        for rows in _rows_of(operands, products, implementations, rounds):
            yield [row | added for row in rows]


def _rows_of(operands, products, implementations, rounds) -> Iterator[list[Row]]:
    shape = operands.shape
    if "ffn" in products:
        yield from _whole(shape, operands, implementations, rounds)
    parts = [part for part in PARTS if part in products]
    if parts:
        makers = part_makers(operands)
    for part in parts:
        _LOG.info("ffn: %s of %s", part, shape)
        chosen = {n: m for n, m in makers[part].items() if n in implementations}
        yield _rows(shape, part, PARTS[part], measure(chosen, rounds), int(part != "split"))


def recipe_of(shape: Shape) -> Recipe:
    """The full recipe; small widths, as of tests, have smaller tiles."""
    dense = dense_features(shape.F)
    return Recipe(dense_share=dense / shape.F, dense_multiple=1)


# --------------------------------------------------------------------------------------- the whole


def _whole(shape, operands, implementations, rounds) -> Iterator[list[Row]]:
    ffns = {n: ffn for n, ffn in _ffns(recipe_of(shape)).items() if n in implementations}
    oracles = {dense: _oracle(dense, operands) for dense in (True, False)}
    pull_backs, peaks = {}, {}

    def make(name: str, implementation: str) -> Contender:
        ffn = ffns[implementation]
        if implementation not in pull_backs:
            pull_backs[implementation] = _pull_back(ffn, operands)
        compiled = _compile(name, ffn, operands, pull_backs[implementation])
        peaks[name, implementation] = compiled.peak_bytes
        oracle = oracles[implementation in DENSE][name]
        return Contender(compiled.call, partial(_worst_error, oracle=oracle))

    for name, products in PASSES.items():
        _LOG.info("ffn: %s of %s", name, shape)
        results = measure({n: partial(make, name, n) for n in ffns}, rounds)
        rows = _rows(shape, "ffn", name, results, products)
        for row in rows:
            implementation = row["implementation"]
            if implementation in pull_backs:
                row["saved_bytes"] = _saved_bytes(pull_backs[implementation], operands)
            row["peak_bytes"] = peaks.get((name, implementation))
        yield rows


def _ffns(recipe: Recipe) -> dict[str, FFN]:
    return {
        "cuda": partial(ffn24, recipe=recipe, implementation="cuda"),
        "unfused": partial(unfused_ffn24, recipe),
        "relu2_cuda": partial(relu2_ffn, implementation="cuda"),
        "xla_dense": xla_dense,
        "reference": partial(ffn24, recipe=recipe, implementation="reference"),
    }


def xla_dense(x_TD: Array, w_up_FD: Array, w_down_FD: Array) -> Array:
    """What XLA is usually given."""
    return jnp.square(jax.nn.relu(x_TD @ w_up_FD.T)) @ w_down_FD


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def unfused_ffn24(recipe: Recipe, x_TD: Array, w_up_FD: Array, w_down_FD: Array) -> Array:
    """The full recipe with a pass over memory wherever `ffn24` has an epilogue."""
    return _unfused_forward(recipe, x_TD, w_up_FD, w_down_FD)[0]


def _unfused_forward(recipe, x_TD, w_up_FD, w_down_FD):
    y2, counts_F = sparsify24(x_TD @ w_up_FD.T, implementation="cuda")
    y3_TD = matmul24(y2, w_down_FD, implementation="cuda")
    return y3_TD, (x_TD, w_up_FD, w_down_FD, y2, counts_F)


def _unfused_backward(recipe, saved, dy3_TD):
    x_TD, w_up_FD, w_down_FD, y2, counts_F = saved
    dy1 = pruned_dy1(y2, dy3_TD @ w_down_FD.T)
    split = split_features(counts_F, recipe.dense_features(counts_F.size), implementation="cuda")
    y2_split, dy1_split = feature_wise24(
        y2, dy1, split, grouping=recipe.grouping, shared_mask=True, implementation="cuda"
    )
    dx_TD = matmul24(dy1, w_up_FD, implementation="cuda")
    dw_up_FD = split_matmul24(dy1_split, x_TD, split, implementation="cuda")
    dw_down_FD = split_matmul24(y2_split, dy3_TD, split, implementation="cuda")
    return dx_TD, dw_up_FD, dw_down_FD


unfused_ffn24.defvjp(_unfused_forward, _unfused_backward)


def _pull_back(ffn: FFN, operands: Operands) -> Callable:
    """The backward pass, which holds what the forward saved."""
    *inputs, _ = operands
    return jax.jit(lambda *inputs: jax.vjp(ffn, *inputs)[1])(*inputs)


def _saved_bytes(pull_back: Callable, operands: Operands) -> int:
    """Between forward and backward, X and weights apart, be they transposed."""
    *inputs, _ = operands
    # Each of them is left out once: where T = D, Y2 has a weight's shape.
    left_out, saved = Counter(map(_kind, inputs)), 0
    for leaf in jax.tree.leaves(pull_back):
        if left_out[_kind(leaf)]:
            left_out[_kind(leaf)] -= 1
        else:
            saved += leaf.nbytes
    return saved


def _kind(array: Array) -> tuple:
    return tuple(sorted(array.shape)), array.dtype


def _compile(name: str, ffn: FFN, operands: Operands, pull_back: Callable) -> Compiled:
    *inputs, dy3_TD = operands

    def both(x, w_up, w_down, dy3):
        y3, pull_back = jax.vjp(ffn, x, w_up, w_down)
        return y3, pull_back(dy3)

    if name == "forward":
        return _compiled(ffn, *inputs)
    if name == "backward":
        return _compiled(lambda pull_back, dy3: pull_back(dy3), pull_back, dy3_TD)
    return _compiled(both, *operands)


def _compiled(function: Callable, *arguments) -> Compiled:
    compiled = jax.jit(function).lower(*arguments).compile()
    return Compiled(partial(compiled, *arguments), peak_bytes(compiled))


def _oracle(dense: bool, operands: Operands) -> dict[str, Any]:
    """Outputs of each pass in float32, from the same bfloat16 operands."""
    with jax.default_matmul_precision("highest"):
        y3, gradients = (_dense_oracle if dense else _masked_oracle)(operands)
    return {"forward": y3, "backward": gradients, "both": (y3, gradients)}


@jax.jit
def _dense_oracle(operands: Operands) -> tuple[Array, tuple[Array, ...]]:
    *inputs, dy3 = (a.astype(jnp.float32) for a in operands)
    y3, pull_back = jax.vjp(xla_dense, *inputs)
    return y3, pull_back(dy3)


@jax.jit
def _masked_oracle(operands: Operands) -> tuple[Array, tuple[Array, ...]]:
    """Dense products of Y2 and dY1 under the masks that the rounded Y1 and Y2 decide."""
    x, w_up, w_down, dy3 = (a.astype(jnp.float32) for a in operands)
    y1_TF = operands.x_TD @ operands.w_up_FD.T
    pruned, counts_F = sparsify24(y1_TF, implementation="reference")
    pruned_TF = pruned.decompress()
    features = counts_F.size
    split = split_features(counts_F, dense_features(features), implementation="reference")
    grouped = compress24(pruned_TF[:, split.sparse], axis=0, grouping=STRIDED)
    kept = grouped.with_values(jnp.ones_like(grouped.values)).decompress()
    mask_TF = jnp.ones(pruned_TF.shape).at[:, split.sparse].set(kept.astype(jnp.float32))
    y2 = pruned_TF.astype(jnp.float32)
    dy1 = 2 * jnp.sqrt(y2) * (dy3 @ w_down.T)
    gradients = dy1 @ w_up, (dy1 * mask_TF).T @ x, (y2 * mask_TF).T @ dy3
    return y2 @ w_down, gradients


def _worst_error(out: Any, *, oracle: Any) -> float:
    pairs = zip(jax.tree.leaves(out), jax.tree.leaves(oracle), strict=True)
    return max(float(relative_error(ours, theirs)) for ours, theirs in pairs)


# --------------------------------------------------------------------------------------------- rows


def _rows(
    shape: Shape, product: str, name: str, results: dict[str, Result], products: int
) -> list[Row]:
    """Rows with what this bench adds; `products` of 2*T*D*F each are in the time."""
    flops = 2 * shape.T * shape.D * shape.F * products
    rows = make_rows("ffn", product, shape, results, flops=flops)
    rows = add_ratios([row | {"pass": name} for row in rows])
    return [row | {"saved_bytes": None, "peak_bytes": None} for row in rows]
