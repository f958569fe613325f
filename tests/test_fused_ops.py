"""The contract of the ops that are a dense product with an epilogue: see test_ops.py.

Operands are -1, 0 and 1 and D is small, so that every product is exact in every dtype.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_ops import (
    GROUPINGS,
    STORE,
    check_stored,
    expected_sparsify,
    implementations,
    random_split,
    run,
)

from s24jax import TokenGrouping, compress24
from s24jax.errors import InvalidInput
from s24jax.feature_split import FeatureSplit
from s24jax.ops import matmul_feature_wise24 as matmul_feature_wise24_op
from s24jax.ops import matmul_sparsify24 as matmul_sparsify24_op
from s24jax.ops import relu2_ffn as relu2_ffn_op
from s24jax.ops.matmul_feature_wise24 import matmul_feature_wise24
from s24jax.ops.matmul_sparsify24 import matmul_sparsify24
from s24jax.ops.relu2_ffn import relu2_ffn

D = 8
# T and F: the first is what the kernels refuse, the last is more than one tile and fills none.
SHAPES = {"small": (12, 20), "tile": (128, 256), "odd": (272, 304)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def signs(rng, shape, dtype="bfloat16"):
    return rng.integers(-1, 2, shape).astype(oracles.FLOATS[dtype])


# ------------------------------------------------------------------------------- matmul_sparsify24


@implementations(matmul_sparsify24_op)
@shapes
@dtypes
def test_matmul_sparsify24(shape, dtype, implementation):
    """Values between -8 and 8 tie often."""
    rng = np.random.default_rng(0)
    x, w_up = (signs(rng, (rows, D), dtype) for rows in shape)
    y2, counts = run(
        matmul_sparsify24, jnp.asarray(x), jnp.asarray(w_up), implementation=implementation
    )
    expected, expected_counts = expected_sparsify(oracles.product(x, w_up.T))
    check_stored(y2, expected, TokenGrouping("adjacent"), 1, shape)
    np.testing.assert_array_equal(counts, expected_counts)
    assert counts.dtype == jnp.int32


@implementations(matmul_sparsify24_op)
def test_matmul_sparsify24_chooses_on_the_rounded_product(implementation):
    """256, 16*16 + 1*1 and 128: the first two are one number in bfloat16, and the first is kept."""
    x = np.zeros((16, 8), np.float32)
    x[:, :2] = 16, 1
    w_up = np.zeros((64, 8), np.float32)
    w_up[:, :2] = np.tile([(16, 0), (16, 1), (16, 1), (8, 0)], (16, 1))
    x, w_up = (jnp.asarray(a, jnp.bfloat16) for a in (x, w_up))
    y2, _ = run(matmul_sparsify24, x, w_up, implementation=implementation)
    np.testing.assert_array_equal(y2.indices(), np.tile([0, 1], (16, 16, 1)))


@implementations(matmul_sparsify24_op)
def test_matmul_sparsify24_keeps_nan(implementation):
    x = np.ones((16, 8), np.float32)
    x[3, 0] = np.nan
    w_up = jnp.ones((16, 8), jnp.bfloat16)
    y2, counts = run(
        matmul_sparsify24, jnp.asarray(x, jnp.bfloat16), w_up, implementation=implementation
    )
    values = np.asarray(y2.values, np.float32)
    assert np.isnan(values[3]).all() and np.isfinite(np.delete(values, 3, 0)).all()
    np.testing.assert_array_equal(counts, np.full(16, 16))


@implementations(matmul_sparsify24_op)
def test_matmul_sparsify24_of_no_token(implementation):
    x, w_up = jnp.zeros((0, D), jnp.bfloat16), jnp.ones((16, D), jnp.bfloat16)
    y2, counts = run(matmul_sparsify24, x, w_up, implementation=implementation)
    assert (y2.shape, y2.values.shape, y2.metadata.shape) == ((0, 16), (0, 8), (0, 1, 128))
    assert not np.any(counts)


@implementations(matmul_sparsify24_op)
def test_matmul_sparsify24_under_vmap(implementation):
    rng = np.random.default_rng(0)
    x, w_up = signs(rng, (3, 16, D)), signs(rng, (32, D))
    y2, counts = run(
        matmul_sparsify24,
        jnp.asarray(x),
        jnp.asarray(w_up),
        in_axes=(0, None),
        implementation=implementation,
    )
    for i in range(3):
        expected, expected_counts = expected_sparsify(oracles.product(x[i], w_up.T))
        np.testing.assert_array_equal(y2.metadata[i], expected.metadata)
        oracles.assert_bits(y2.values[i], expected.values)
        np.testing.assert_array_equal(counts[i], expected_counts)


@pytest.mark.parametrize(
    "x, w_up, message",
    [
        (
            jnp.ones((4, 8)),
            jnp.ones((8, 4)),
            "matmul_sparsify24: x is float32 (4, 8), w_up float32 (8, 4); "
            "they must be [T, D] and [F, D] of one dtype",
        ),
        (
            jnp.ones((4, 8)),
            jnp.ones((8, 8), jnp.bfloat16),
            "matmul_sparsify24: x is float32 (4, 8), w_up bfloat16 (8, 8); "
            "they must be [T, D] and [F, D] of one dtype",
        ),
        (
            jnp.ones((4, 8)),
            jnp.ones((6, 8)),
            "matmul_sparsify24: F=6 is no multiple of 4; pad the hidden width",
        ),
    ],
)
def test_matmul_sparsify24_errors(x, w_up, message):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        matmul_sparsify24(x, w_up)
    assert oracles.assert_one_line(error) == message


# --------------------------------------------------------------------------- matmul_feature_wise24


@functools.cache
def backward_data(shape, dtype):
    """dY3, W_down, and a token-wise pruned Y2 of squares, whose roots are exact."""
    rng = np.random.default_rng(0)
    tokens, features = shape
    y2 = rng.choice([0, 0, 0, 1, 4, 9, 16], shape).astype(oracles.FLOATS[dtype])
    y2 = oracles.keep(y2, oracles.prune_mask(y2, 1))
    return signs(rng, (tokens, D), dtype), signs(rng, (features, D), dtype), y2


@implementations(matmul_feature_wise24_op)
@pytest.mark.parametrize("mask", ["shared", "own"])
@pytest.mark.parametrize("kind", GROUPINGS)
@shapes
@dtypes
def test_matmul_feature_wise24(shape, dtype, kind, mask, implementation):
    grouping, (tokens, features) = GROUPINGS[kind], shape
    dy3, w_down, y2 = backward_data(shape, dtype)
    split = random_split(np.random.default_rng(1), features, features // 5)
    dy1_out, *splits = run(
        matmul_feature_wise24,
        jnp.asarray(dy3),
        jnp.asarray(w_down),
        STORE(jnp.asarray(y2), 1),
        split,
        grouping=grouping,
        shared_mask=mask == "shared",
        implementation=implementation,
    )
    dy1 = oracles.relu2_gradient(y2, oracles.product(dy3, w_down.T))
    expected = oracles.compress(dy1, 1, choose_by=y2)
    np.testing.assert_array_equal(dy1_out.metadata, expected.metadata)
    # Where the pruned Y2 is zero a gradient may be -0.0.
    np.testing.assert_array_equal(dy1_out.values, expected.values)
    groups = oracles.token_groups(grouping.kind, grouping.seed, tokens)
    sparse = np.asarray(split.sparse)
    for out, y, choose_by in zip(
        splits, (y2, dy1), (y2, y2 if mask == "shared" else dy1), strict=True
    ):
        expected = oracles.compress(y[:, sparse], 0, groups, choose_by=choose_by[:, sparse])
        np.testing.assert_array_equal(out.sparse.metadata, expected.metadata)
        np.testing.assert_array_equal(out.sparse.values, expected.values)
        planes = oracles.dense_planes(y[:, split.dense], groups)
        np.testing.assert_array_equal(out.dense, planes)


@implementations(matmul_feature_wise24_op)
def test_matmul_feature_wise24_under_vmap(implementation):
    """Each example has its own gradient and its own split."""
    shape = SHAPES["odd"]
    _, w_down, y2 = backward_data(shape, "bfloat16")
    dy3 = signs(np.random.default_rng(2), (2, shape[0], D))
    splits = [random_split(np.random.default_rng(i), shape[1], 40) for i in range(2)]
    y2_in = STORE(jnp.asarray(y2), 1)
    out = run(
        lambda dy3, split, **how: matmul_feature_wise24(
            dy3, jnp.asarray(w_down), y2_in, split, **how
        ),
        jnp.asarray(dy3),
        jax.tree.map(lambda *parts: jnp.stack(parts), *splits),
        in_axes=(0, 0),
        grouping=TokenGrouping(),
        shared_mask=True,
        implementation=implementation,
    )
    groups = oracles.token_groups("strided", 0, shape[0])
    for i, split in enumerate(splits):
        dy1 = oracles.relu2_gradient(y2, oracles.product(dy3[i], w_down.T))
        expected = oracles.compress(dy1, 1, choose_by=y2)
        np.testing.assert_array_equal(out.dy1.values[i], expected.values)
        sparse = np.asarray(split.sparse)
        for operand, y in ((out.y2_split, y2), (out.dy1_split, dy1)):
            expected = oracles.compress(y[:, sparse], 0, groups, choose_by=y2[:, sparse])
            np.testing.assert_array_equal(operand.sparse.metadata[i], expected.metadata)
            np.testing.assert_array_equal(operand.sparse.values[i], expected.values)
            planes = oracles.dense_planes(y[:, split.dense], groups)
            np.testing.assert_array_equal(operand.dense[i], planes)


@implementations(matmul_feature_wise24_op)
def test_matmul_feature_wise24_keeps_nan(implementation):
    """A NaN of Y2 ranks highest, and its gradient is one."""
    y2 = np.tile(np.array([1, np.nan, 4, 9], np.float32)[:, None], (16, 16))
    y2 = jnp.asarray(y2 * (np.arange(16) % 4 < 2), jnp.bfloat16)
    dy3, w_down = jnp.ones((64, D), jnp.bfloat16), jnp.ones((16, D), jnp.bfloat16)
    split = FeatureSplit(jnp.arange(0), jnp.arange(16))
    dy1, *operands = run(
        matmul_feature_wise24,
        dy3,
        w_down,
        STORE(y2, 1),
        split,
        grouping=TokenGrouping("adjacent"),
        shared_mask=True,
        implementation=implementation,
    )
    active = np.arange(16) % 4 < 2
    assert np.isnan(np.asarray(dy1.decompress(), np.float32)[1::4, active]).all()
    for operand in operands:
        found = np.asarray(operand.sparse.decompress(), np.float32)[:, active]
        assert np.isnan(found[1::4]).all()
        assert np.all(found[3::4] > 0) and not np.any(found[0::4]) and not np.any(found[2::4])


Y2 = compress24(jnp.ones((8, 16)), 1)


@pytest.mark.parametrize(
    "dy3, w_down, y2, dense, message",
    [
        (
            jnp.ones((8, 4)),
            jnp.ones((16, 8)),
            Y2,
            4,
            "dy3 (8, 4), w_down (16, 8), y2 (8, 16) compressed along axis 1 do not fit; they must "
            "be [T, D], [F, D] and [T, F] compressed along axis 1",
        ),
        (
            jnp.ones((8, 4)),
            jnp.ones((16, 4)),
            compress24(jnp.ones((8, 16)), 0),
            4,
            "dy3 (8, 4), w_down (16, 4), y2 (8, 16) compressed along axis 0 do not fit; they must "
            "be [T, D], [F, D] and [T, F] compressed along axis 1",
        ),
        (
            jnp.ones((8, 4), jnp.bfloat16),
            jnp.ones((16, 4)),
            Y2,
            4,
            "dy3 is bfloat16, w_down float32, y2 float32; cast them to one dtype",
        ),
        (
            jnp.ones((6, 4)),
            jnp.ones((16, 4)),
            compress24(jnp.ones((6, 16)), 1),
            4,
            "6 tokens; pad T to a multiple of 4",
        ),
        (
            jnp.ones((8, 4)),
            jnp.ones((16, 4)),
            Y2,
            3,
            "the split has 3 dense and 12 sparse features; together they must be F=16",
        ),
    ],
)
def test_matmul_feature_wise24_errors(dy3, w_down, y2, dense, message):
    split = FeatureSplit(jnp.arange(dense), jnp.arange(4, 16))
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        matmul_feature_wise24(dy3, w_down, y2, split, grouping=TokenGrouping(), shared_mask=True)
    assert oracles.assert_one_line(error) == f"matmul_feature_wise24: {message}"


# --------------------------------------------------------------------------------------- relu2_ffn


@implementations(relu2_ffn_op)
@pytest.mark.parametrize("leading", [(144,), (3, 48), (2, 3, 4), (), (0,)], ids=str)
@dtypes
def test_relu2_ffn(leading, dtype, implementation):
    """Value and gradients; tokens may have any number of axes, or none."""
    rng = np.random.default_rng(0)
    features = 272
    x, dy3 = (signs(rng, (*leading, D), dtype) for _ in range(2))
    w_up, w_down = (signs(rng, (features, D), dtype) for _ in range(2))

    def both(x, w_up, w_down, dy3, *, implementation):
        ffn = functools.partial(relu2_ffn, implementation=implementation)
        y3, pull_back = jax.vjp(ffn, x, w_up, w_down)
        return y3, pull_back(dy3)

    arrays = map(jnp.asarray, (x, w_up, w_down, dy3))
    y3, (dx, dw_up, dw_down) = run(both, *arrays, implementation=implementation)

    x_TD, dy3_TD = (a.reshape(math.prod(leading), D) for a in (x, dy3))
    y1 = oracles.product(x_TD, w_up.T)
    y2 = oracles.relu2(y1)
    dy1 = oracles.relu2_gradient(y2, oracles.product(dy3_TD, w_down.T))
    for actual, expected in (
        (y3, oracles.product(y2, w_down).reshape(x.shape)),
        (dx, oracles.product(dy1, w_up).reshape(x.shape)),
        (dw_up, oracles.product(dy1.T, x_TD)),
        (dw_down, oracles.product(y2.T, dy3_TD)),
    ):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "x, w_up, w_down, message",
    [
        (
            jnp.ones((4, 8)),
            jnp.ones((16, 4)),
            jnp.ones((16, 4)),
            "x (4, 8), w_up (16, 4), w_down (16, 4) do not fit; "
            "both weights must be [F, D] with D the last axis of x",
        ),
        (
            jnp.ones((4, 8)),
            jnp.ones((16, 8)),
            jnp.ones((12, 8)),
            "x (4, 8), w_up (16, 8), w_down (12, 8) do not fit; "
            "both weights must be [F, D] with D the last axis of x",
        ),
        (
            jnp.ones((4, 8)),
            jnp.ones((16, 8), jnp.bfloat16),
            jnp.ones((16, 8)),
            "x is float32, w_up bfloat16, w_down float32; cast them to one dtype",
        ),
    ],
)
def test_relu2_ffn_errors(x, w_up, w_down, message):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        relu2_ffn(x, w_up, w_down)
    assert oracles.assert_one_line(error) == f"relu2_ffn: {message}"
