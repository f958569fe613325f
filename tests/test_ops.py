"""The contract of each op, run by every implementation that is registered for it.

A GPU implementation joins by being in its op's CANDIDATES. Where it refuses a case it is skipped
with its own reason; `reference` may refuse nothing. Data are small integers wherever possible: they
are exact in every dtype and in every order of summation, so that results can be compared bit for
bit, whatever the hardware accumulates in, as long as it holds 24 bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s24jax import Compressed24, TokenGrouping, compress24, matmul24, numerics, sparsify24
from s24jax.errors import InvalidInput, Unsupported
from s24jax.feature_split import FeatureSplit
from s24jax.ops import feature_wise24 as feature_wise24_op
from s24jax.ops import matmul24 as matmul24_op
from s24jax.ops import sparsify24 as sparsify24_op
from s24jax.ops import split_features as split_features_op
from s24jax.ops import split_matmul24 as split_matmul24_op
from s24jax.ops.feature_wise24 import SplitOperand, feature_wise24
from s24jax.ops.split_features import split_features
from s24jax.ops.split_matmul24 import split_matmul24

DTYPES = list(oracles.FLOATS)
GROUPINGS = {
    "adjacent": TokenGrouping("adjacent"),
    "strided": TokenGrouping("strided"),
    "random": TokenGrouping("random", 3),
}
# The first has an odd number of groups on both axes, which the CUDA kernels refuse. They take the
# others: the second is made of whole blocks, the third fills none; the last is more than one tile
# of a product, and fills none either.
SHAPES = {"small": (12, 20), "tiles": (128, 256), "odd": (144, 272), "large": (1040, 656)}
COLUMNS = 200  # of a product's B


def cases(names: str, values: list[tuple]):
    """Parameters that begin with the name of a shape; their ids are as they are written."""
    return pytest.mark.parametrize(
        names,
        [(SHAPES[shape], *others) for shape, *others in values],
        ids=["-".join(map(str, value)) for value in values],
    )


dtypes = pytest.mark.parametrize("dtype", DTYPES)
groupings = pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)
dtyped_shapes = cases(
    "shape, dtype",
    [(shape, dtype) for shape in ("small", "tiles", "odd") for dtype in DTYPES]
    + [("large", "bfloat16")],
)
layouts = cases(
    "shape, grouping, dtype",
    [(shape, kind, dtype) for shape in ("small", "odd") for kind in GROUPINGS for dtype in DTYPES]
    + [("tiles", "strided", dtype) for dtype in DTYPES]
    + [("large", kind, "bfloat16") for kind in ("strided", "adjacent")],
)
STORE = jax.jit(compress24, static_argnames=("axis", "grouping"))


def implementations(op):
    return pytest.mark.parametrize("implementation", [c.name for c in op.CANDIDATES])


def run(op, *args, implementation, in_axes=None, **static):
    """The op, compiled; skips where the implementation says that it cannot take the case."""

    def call(*args):
        return op(*args, implementation=implementation, **static)

    try:
        return jax.jit(call if in_axes is None else jax.vmap(call, in_axes))(*args)
    except Unsupported as refusal:
        if implementation == "reference":
            raise
        pytest.skip(str(refusal))


def integers(rng, shape, dtype, bound=8):
    return rng.integers(-bound, bound + 1, shape).astype(oracles.FLOATS[dtype])


def check_stored(actual: Compressed24, expected: oracles.Stored, grouping, axis, shape):
    """Masks first: a wrong mask makes every value wrong."""
    np.testing.assert_array_equal(actual.indices(), expected.indices)
    oracles.assert_bits(actual.values, expected.values)
    assert (actual.axis, actual.shape, actual.grouping) == (axis, shape, grouping)
    np.testing.assert_array_equal(actual.metadata, expected.metadata)


# -------------------------------------------------------------------------------------- sparsify24


def expected_sparsify(y1: np.ndarray) -> tuple[oracles.Stored, np.ndarray]:
    y2 = oracles.relu2(y1)
    return oracles.compress(y2, 1, choose_by=oracles.relu(y1)), np.sum(y2 != 0, axis=0)


def check_sparsify(y1: np.ndarray, implementation: str):
    y2, counts = run(sparsify24, jnp.asarray(y1), implementation=implementation)
    expected, expected_counts = expected_sparsify(y1)
    check_stored(y2, expected, TokenGrouping("adjacent"), 1, y1.shape)
    np.testing.assert_array_equal(counts, expected_counts)
    assert counts.dtype == jnp.int32


@implementations(sparsify24_op)
@dtyped_shapes
def test_sparsify24(shape, dtype, implementation):
    """Integers tie often, and half of the values are negative."""
    check_sparsify(integers(np.random.default_rng(0), shape, dtype), implementation)


@implementations(sparsify24_op)
@dtyped_shapes
def test_sparsify24_of_values_that_round(shape, dtype, implementation):
    y1 = np.random.default_rng(1).normal(size=shape).astype(oracles.FLOATS[dtype])
    # float16 squares below its smallest normal number are the device's business
    y1[np.abs(y1.astype(np.float32)) < 2.0**-6] = 0
    check_sparsify(y1, implementation)


@implementations(sparsify24_op)
@dtypes
def test_sparsify24_of_mostly_zeros(dtype, implementation):
    """85-98 % zeros is the usual case: groups with none, one and two survivors."""
    rng = np.random.default_rng(2)
    y1 = integers(rng, (64, 128), dtype) * (rng.random((64, 128)) < 0.2).astype(
        oracles.FLOATS[dtype]
    )
    check_sparsify(y1, implementation)


@implementations(sparsify24_op)
@dtypes
def test_sparsify24_of_special_values(dtype, implementation):
    N, INF = np.nan, np.inf
    groups = [[1, N, 2, 3], [-1, -N, -INF, -2], [INF, 1, INF, N], [-0.0, 0, -INF, 0]]
    y1 = np.tile(np.array(groups, oracles.FLOATS[dtype]), (4, 4))
    y2, counts = run(sparsify24, jnp.asarray(y1), implementation=implementation)
    kept = np.array([[1, 3], [0, 1], [0, 3], [0, 1]])
    np.testing.assert_array_equal(y2.indices(), np.tile(kept[:, None], (4, 4, 1)))
    values = np.asarray(y2.values).astype(np.float32)
    np.testing.assert_array_equal(
        values, np.tile([[N, 9], [0, N], [INF, N], [0, 0]], (4, 4)).astype(np.float32)
    )
    assert not np.signbit(values[values == 0]).any()
    np.testing.assert_array_equal(counts, [8, 12, 8, 8] * 4)  # NaN counts as a non-zero


@implementations(sparsify24_op)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparsify24_ranks_before_it_squares(dtype, implementation):
    """Squares that underflow or overflow tie; what they came from does not."""
    groups = [[1e-25, 2e-25, 3e-25, 4e-25], [1e25, 2e25, 3e25, 4e25]]
    y1 = np.tile(np.array(groups, oracles.FLOATS[dtype]), (8, 4))
    y2, counts = run(sparsify24, jnp.asarray(y1), implementation=implementation)
    np.testing.assert_array_equal(y2.indices(), [[[2, 3]] * 4] * 16)
    np.testing.assert_array_equal(np.asarray(y2.values, np.float32), [[0] * 8, [np.inf] * 8] * 8)
    # non-zeros of Y2, not of Y1
    np.testing.assert_array_equal(counts, [8] * 16)


@implementations(sparsify24_op)
def test_sparsify24_counts_before_pruning(implementation):
    ones = jnp.ones((16, 16), jnp.bfloat16)
    y2, counts = run(sparsify24, ones, implementation=implementation)
    np.testing.assert_array_equal(counts, [16] * 16)
    np.testing.assert_array_equal(np.count_nonzero(y2.decompress(), axis=0), [16, 16, 0, 0] * 4)


@implementations(sparsify24_op)
@dtypes
def test_sparsify24_of_any_bits(dtype, implementation):
    """The choice only: values outside the normal numbers have tests of their own."""
    run(sparsify24, jnp.zeros((4, 16), dtype), implementation=implementation)  # or skip
    indices = jax.jit(lambda y1: sparsify24(y1, implementation=implementation)[0].indices())

    @given(oracles.bit_patterns(dtype, (4, 16)))
    def check(y1):
        expected = oracles.compress(oracles.relu(y1), 1)
        np.testing.assert_array_equal(indices(jnp.asarray(y1)), expected.indices)

    check()


@implementations(sparsify24_op)
def test_sparsify24_of_no_tokens(implementation):
    none = jnp.zeros((0, 16), jnp.bfloat16)
    y2, counts = run(sparsify24, none, implementation=implementation)
    assert y2.decompress().shape == (0, 16)
    np.testing.assert_array_equal(counts, [0] * 16)


@implementations(sparsify24_op)
def test_sparsify24_under_vmap(implementation):
    y1 = integers(np.random.default_rng(0), (3, 8, 16), "bfloat16")
    y2, counts = run(sparsify24, jnp.asarray(y1), in_axes=0, implementation=implementation)
    for i in range(3):
        expected, expected_counts = expected_sparsify(y1[i])
        oracles.assert_bits(y2.values[i], expected.values)
        np.testing.assert_array_equal(counts[i], expected_counts)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        (
            (4, 6),
            "float32",
            "sparsify24: axis 1 of shape (4, 6) has length 6; pad it to a multiple of 4",
        ),
        ((4, 8), "int32", "sparsify24: dtype int32 has no magnitude order here; use a float dtype"),
        ((8,), "float32", "sparsify24: axis 1 does not exist in shape (8,); use one from -1 to 0"),
        ((2, 4, 8), "float32", "shape (2, 4, 8) is no matrix; reshape it to two axes"),
    ],
)
def test_sparsify24_errors(shape, dtype, message):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        sparsify24(jnp.ones(shape, dtype))
    assert message in oracles.assert_one_line(error)


# ---------------------------------------------------------------------------------------- matmul24


def expected_product(a: np.ndarray, b: np.ndarray, axis: int, groups) -> np.ndarray:
    pruned = oracles.keep(a, oracles.prune_mask(a, axis, groups))
    return oracles.product(pruned if axis == 1 else pruned.T, b)


@implementations(matmul24_op)
@pytest.mark.parametrize("axis", [0, 1])
@layouts
def test_matmul24(shape, axis, dtype, grouping, implementation):
    rng = np.random.default_rng(0)
    a, b = integers(rng, shape, dtype), integers(rng, (shape[axis], COLUMNS), dtype)
    grouping = GROUPINGS[grouping]
    groups = oracles.token_groups(grouping.kind, grouping.seed, shape[axis])
    stored = STORE(jnp.asarray(a), axis, grouping=grouping)
    actual = run(matmul24, stored, jnp.asarray(b), implementation=implementation)
    oracles.assert_bits(actual, expected_product(a, b, axis, groups))


@implementations(matmul24_op)
@dtypes
@pytest.mark.parametrize("axis", [0, 1])
def test_matmul24_of_values_that_round(axis, dtype, implementation):
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=shape).astype(oracles.FLOATS[dtype])
        for shape in (SHAPES["tiles"], (SHAPES["tiles"][axis], 64))
    )
    grouping = TokenGrouping("strided")
    groups = oracles.token_groups("strided", 0, a.shape[axis])
    stored = STORE(jnp.asarray(a), axis, grouping=grouping)
    with jax.default_matmul_precision("highest"):
        actual = run(matmul24, stored, jnp.asarray(b), implementation=implementation)
    oracles.assert_close(actual, expected_product(a, b, axis, groups))


@implementations(matmul24_op)
@groupings
@pytest.mark.parametrize("axis", [0, 1])
def test_matmul24_by_the_identity_is_decompress(axis, grouping, implementation):
    y = np.random.default_rng(0).normal(size=(64, 64)).astype(oracles.FLOATS["bfloat16"])
    stored = STORE(jnp.asarray(y), axis, grouping=grouping)
    actual = run(matmul24, stored, jnp.eye(64, dtype=jnp.bfloat16), implementation=implementation)
    dense = jax.jit(Compressed24.decompress)(stored)
    np.testing.assert_array_equal(
        np.asarray(actual if axis == 1 else actual.T, np.float32), np.asarray(dense, np.float32)
    )


@implementations(matmul24_op)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_matmul24_accumulates_in_float32(axis, dtype, implementation):
    """A running sum of ones in 16 bits stops at 256 or 2048."""
    length = 8448
    ones = jnp.ones((length, 64) if axis == 0 else (64, length), dtype)
    b = jnp.ones((length, 64), dtype)
    product = run(matmul24, STORE(ones, axis), b, implementation=implementation)
    expected = np.float32(length / 2).astype(oracles.FLOATS[dtype])
    oracles.assert_bits(product, np.full((64, 64), expected))


@implementations(matmul24_op)
def test_matmul24_shows_nan_in_its_row_only(implementation):
    a = np.ones((64, 64), oracles.FLOATS["bfloat16"])
    a[3, 5] = np.nan
    b = jnp.ones((64, 64), jnp.bfloat16)
    product = run(matmul24, STORE(jnp.asarray(a), 1), b, implementation=implementation)
    np.testing.assert_array_equal(np.isnan(product), np.arange(64)[:, None] == 3 + np.zeros(64))


@implementations(matmul24_op)
def test_matmul24_of_no_rows(implementation):
    a, b = STORE(jnp.zeros((0, 16), jnp.bfloat16), 1), jnp.zeros((16, 8), jnp.bfloat16)
    product = run(matmul24, a, b, implementation=implementation)
    assert (product.shape, product.dtype) == ((0, 8), jnp.bfloat16)


@implementations(matmul24_op)
def test_matmul24_under_vmap(implementation):
    rng = np.random.default_rng(0)
    a, b = integers(rng, (3, 8, 16), "bfloat16"), integers(rng, (3, 16, 8), "bfloat16")

    def compress_and_multiply(a, b, implementation):
        return matmul24(compress24(a, 1), b, implementation=implementation)

    product = run(
        compress_and_multiply,
        jnp.asarray(a),
        jnp.asarray(b),
        in_axes=(0, 0),
        implementation=implementation,
    )
    for i in range(3):
        oracles.assert_bits(product[i], expected_product(a[i], b[i], 1, None))


@implementations(matmul24_op)
def test_matmul24_of_a_batch_of_stored_matrices(implementation):
    """Compressed24 as vmap's own argument, the other operand shared."""
    rng = np.random.default_rng(0)
    a, b = integers(rng, (3, 8, 16), "bfloat16"), integers(rng, (16, 8), "bfloat16")
    stored = jax.vmap(lambda a: STORE(a, 1))(jnp.asarray(a))
    product = run(
        matmul24, stored, jnp.asarray(b), in_axes=(0, None), implementation=implementation
    )
    for i in range(3):
        oracles.assert_bits(product[i], expected_product(a[i], b, 1, None))


@pytest.mark.parametrize(
    "axis, b_shape, b_dtype, message",
    [
        (
            1,
            (8, 3),
            "float32",
            "matmul24: b has shape (8, 3), its first axis must have the length 12 of a's "
            "compressed axis (a has shape (8, 12), axis 1)",
        ),
        (
            0,
            (12, 3),
            "float32",
            "matmul24: b has shape (12, 3), its first axis must have the length 8 of a's "
            "compressed axis (a has shape (8, 12), axis 0)",
        ),
        (
            1,
            (12,),
            "float32",
            "matmul24: b has shape (12,), its first axis must have the length 12 of a's "
            "compressed axis (a has shape (8, 12), axis 1)",
        ),
        (1, (12, 3), "bfloat16", "matmul24: a is float32, b is bfloat16; cast them to one dtype"),
    ],
)
def test_matmul24_errors(axis, b_shape, b_dtype, message):
    a = STORE(jnp.ones((8, 12)), axis)
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        matmul24(a, jnp.ones(b_shape, b_dtype))
    assert oracles.assert_one_line(error) == message


# ---------------------------------------------------------------------------------- split_features


@implementations(split_features_op)
def test_split_features_golden(implementation):
    counts = jnp.array([3, 9, 0, 3, 9, 3, 1, 0])
    split = run(split_features, counts, dense_features=3, implementation=implementation)
    assert split.dense.tolist() == [0, 1, 4]
    assert split.sparse.tolist() == [2, 3, 5, 6, 7]
    assert split.dense.dtype == split.sparse.dtype == jnp.int32


@implementations(split_features_op)
@pytest.mark.parametrize("dense", [0, 1, 64, 655, 656])
@pytest.mark.parametrize("largest", [1, 20, 2**31 - 1])
def test_split_features(largest, dense, implementation):
    """Few distinct counts, so that ties decide, and many."""
    counts = np.random.default_rng(0).integers(0, largest, 656, np.int32, endpoint=True)
    split = run(
        split_features, jnp.asarray(counts), dense_features=dense, implementation=implementation
    )
    expected = sorted(oracles.densest(counts, dense))
    assert split.dense.tolist() == expected
    assert split.sparse.tolist() == sorted(set(range(656)) - set(expected))


@implementations(split_features_op)
def test_split_features_of_any_counts(implementation):
    how = {"dense_features": 5, "implementation": implementation}
    run(split_features, jnp.zeros(16, jnp.int32), **how)  # or skip
    split_16 = jax.jit(lambda counts: split_features(counts, **how))

    @given(st.lists(st.integers(0, 3), min_size=16, max_size=16))
    def check(counts):
        split = split_16(jnp.array(counts))
        expected = sorted(oracles.densest(counts, 5))
        assert split.dense.tolist() == expected
        assert split.sparse.tolist() == sorted(set(range(16)) - set(expected))

    check()


@implementations(split_features_op)
def test_split_features_under_vmap(implementation):
    counts = np.random.default_rng(0).integers(0, 5, (3, 16))
    split = run(
        split_features,
        jnp.asarray(counts),
        in_axes=0,
        dense_features=4,
        implementation=implementation,
    )
    assert split.dense.tolist() == [sorted(oracles.densest(row, 4)) for row in counts]


@pytest.mark.parametrize("dense", [-1, 9])
def test_split_features_errors(dense):
    with pytest.raises(InvalidInput) as error:
        split_features(jnp.zeros(8, jnp.int32), dense)
    assert oracles.assert_one_line(error) == (
        f"split_features: dense_features={dense} of F=8; use 0 to F"
    )


# ---------------------------------------------------------------------------------- feature_wise24

# How Y2 and dY1 come, and whose mask dY1 gets.
FORMS = [(form, mask) for form in ("compressed", "dense") for mask in ("shared", "own")]
feature_wise_cases = cases(
    "shape, grouping, dense, form, mask",
    [("small", kind, 4, *form) for kind in GROUPINGS for form in FORMS]
    + [("tiles", "strided", 64, *form) for form in FORMS]
    # Dense features: none, some, all but a few.
    + [("small", "strided", dense, "compressed", "shared") for dense in (0, 17)]
    + [("odd", "strided", dense, "compressed", "shared") for dense in (0, 64, 269)]
    + [(shape, "adjacent", 64, "compressed", "shared") for shape in ("odd", "large")],
)


def random_split(rng, features: int, dense: int) -> FeatureSplit:
    """In no particular order, which a split from elsewhere than `split_features` may have."""
    order = jnp.asarray(rng.permutation(features), jnp.int32)
    return FeatureSplit(order[:dense], order[dense:])


@functools.cache
def feature_wise_data(shape, dtype):
    """Token-wise pruned Y2, and dY1 under its mask."""
    rng = np.random.default_rng(0)
    y2 = np.abs(integers(rng, shape, dtype)) * (rng.random(shape) < 0.6).astype(
        oracles.FLOATS[dtype]
    )
    y2 = oracles.keep(y2, oracles.prune_mask(y2, 1))
    return y2, np.where(y2 != 0, integers(rng, shape, dtype), np.zeros_like(y2))


@implementations(feature_wise24_op)
@feature_wise_cases
def test_feature_wise24(shape, grouping, dense, form, mask, implementation):
    tokens, grouping = shape[0], GROUPINGS[grouping]
    y2, dy1 = feature_wise_data(shape, "bfloat16" if form == "compressed" else "float32")
    split = random_split(np.random.default_rng(1), shape[1], dense)
    y2_in, dy1_in = jnp.asarray(y2), jnp.asarray(dy1)
    if form == "compressed":
        y2_in = STORE(y2_in, 1)
        dy1_in = jax.jit(Compressed24.gather)(y2_in, dy1_in)
    y2_out, dy1_out = run(
        feature_wise24,
        y2_in,
        dy1_in,
        split,
        grouping=grouping,
        shared_mask=mask == "shared",
        implementation=implementation,
    )
    groups = oracles.token_groups(grouping.kind, grouping.seed, tokens)
    sparse = np.asarray(split.sparse)
    for out, y, choose_by in (
        (y2_out, y2, y2),
        (dy1_out, dy1, y2 if mask == "shared" else dy1),
    ):
        expected = oracles.compress(y[:, sparse], 0, groups, choose_by=choose_by[:, sparse])
        check_stored(out.sparse, expected, grouping, 0, (tokens, len(sparse)))
        oracles.assert_bits(out.dense, oracles.dense_planes(y[:, split.dense], groups))


@groupings
def test_dense_features_come_back(grouping):
    """`SplitOperand.dense_features` of planes that the oracle made."""
    y = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    groups = oracles.token_groups(grouping.kind, grouping.seed, 20)
    sparse = STORE(jnp.zeros((20, 1)), 0, grouping=grouping)
    operand = SplitOperand(sparse, jnp.asarray(oracles.dense_planes(y, groups)))
    oracles.assert_bits(jax.jit(SplitOperand.dense_features)(operand), y)


@implementations(feature_wise24_op)
@pytest.mark.parametrize("kind", ["random", "strided"])
def test_feature_wise24_ties_keep_the_first_of_the_group(kind, implementation):
    """First in the group's own order, which for a random grouping is not the lowest token."""
    grouping = GROUPINGS[kind]
    groups = oracles.token_groups(kind, grouping.seed, 64)
    assert any(group != sorted(group) for group in groups) == (kind == "random")
    # Of features 0 and 1 in each group of four, so that all that is there is equal.
    ones = STORE(jnp.ones((64, 64), jnp.bfloat16), 1)
    split = FeatureSplit(jnp.arange(0), jnp.arange(64))
    y2, dy1 = run(
        feature_wise24,
        ones,
        ones,
        split,
        grouping=grouping,
        shared_mask=True,
        implementation=implementation,
    )
    expected = np.zeros((64, 64))
    expected[[token for group in groups for token in group[:2]]] = [1, 1, 0, 0] * 16
    for operand in (y2, dy1):
        np.testing.assert_array_equal(operand.sparse.decompress(), expected)


@implementations(feature_wise24_op)
def test_feature_wise24_own_mask_is_by_magnitude(implementation):
    """dY1 has signs, Y2 has none."""
    y2 = jnp.broadcast_to(jnp.array([4.0, 3, 2, 1])[:, None], (4, 64))
    dy1 = jnp.broadcast_to(jnp.array([-1.0, 2, -3, -4])[:, None], (4, 64))
    y2, dy1 = jnp.tile(y2, (16, 1)), jnp.tile(dy1, (16, 1))
    split = FeatureSplit(jnp.arange(0), jnp.arange(64))
    for shared, kept in ((True, [[0, 1]]), (False, [[2, 3]])):
        _, out = run(
            feature_wise24,
            y2,
            dy1,
            split,
            grouping=TokenGrouping("adjacent"),
            shared_mask=shared,
            implementation=implementation,
        )
        np.testing.assert_array_equal(out.sparse.indices(), np.tile([kept], (64, 16, 1)))


@implementations(feature_wise24_op)
def test_feature_wise24_under_vmap(implementation):
    """Each example has its own split."""
    y2, dy1 = feature_wise_data(SHAPES["odd"], "bfloat16")
    y2_in = STORE(jnp.asarray(y2), 1)
    dy1_in = jax.jit(Compressed24.gather)(y2_in, jnp.asarray(dy1))
    splits = [random_split(np.random.default_rng(i), 272, 40) for i in range(2)]
    y2_out, dy1_out = run(
        lambda split, **how: feature_wise24(y2_in, dy1_in, split, **how),
        jax.tree.map(lambda *parts: jnp.stack(parts), *splits),
        in_axes=0,
        grouping=TokenGrouping(),
        shared_mask=True,
        implementation=implementation,
    )
    groups = oracles.token_groups("strided", 0, 144)
    for i, split in enumerate(splits):
        sparse = np.asarray(split.sparse)
        for out, y in ((y2_out, y2), (dy1_out, dy1)):
            expected = oracles.compress(y[:, sparse], 0, groups, choose_by=y2[:, sparse])
            np.testing.assert_array_equal(out.sparse.metadata[i], expected.metadata)
            oracles.assert_bits(out.sparse.values[i], expected.values)
            oracles.assert_bits(out.dense[i], oracles.dense_planes(y[:, split.dense], groups))


@pytest.mark.parametrize(
    "y2, dy1, dense, message",
    [
        (
            jnp.ones((22, 8)),
            jnp.ones((22, 8)),
            4,
            "feature_wise24: 22 tokens; pad T to a multiple of 4",
        ),
        (
            jnp.ones((24, 8)),
            jnp.ones((24, 12)),
            4,
            "feature_wise24: y2 is float32 (24, 8), dy1 float32 (24, 12); "
            "they must have one dtype and one shape",
        ),
        (
            jnp.ones((24, 8)),
            jnp.ones((24, 8), jnp.bfloat16),
            4,
            "feature_wise24: y2 is float32 (24, 8), dy1 bfloat16 (24, 8); "
            "they must have one dtype and one shape",
        ),
        (
            jnp.ones((24, 8)),
            jnp.ones((24, 8)),
            2,
            "feature_wise24: the split has 2 dense and 4 sparse features; "
            "together they must be F=8",
        ),
        (
            jnp.ones((24, 8)),
            compress24(jnp.ones((24, 8)), 0),
            4,
            "feature_wise24: dy1 is compressed along axis 0; use axis 1",
        ),
    ],
)
def test_feature_wise24_errors(y2, dy1, dense, message):
    split = FeatureSplit(jnp.arange(dense), jnp.arange(4, 8))
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        feature_wise24(y2, dy1, split, grouping=TokenGrouping(), shared_mask=True)
    assert oracles.assert_one_line(error) == message


# ---------------------------------------------------------------------------------- split_matmul24


def split_operand(y: np.ndarray, split: FeatureSplit, grouping: TokenGrouping):
    """`y` [T, F] as `feature_wise24` would leave it, and as a dense matrix."""
    groups = oracles.token_groups(grouping.kind, grouping.seed, len(y))
    sparse = np.asarray(split.sparse)
    kept = y.copy()
    kept[:, sparse] = oracles.keep(y[:, sparse], oracles.prune_mask(y[:, sparse], 0, groups))
    stored = STORE(jnp.asarray(y[:, sparse]), 0, grouping=grouping)
    return SplitOperand(stored, jnp.asarray(oracles.dense_planes(y[:, split.dense], groups))), kept


@implementations(split_matmul24_op)
@cases(
    "shape, grouping, dtype, dense",
    [("small", kind, dtype, 4) for kind in GROUPINGS for dtype in DTYPES]
    + [("odd", kind, "bfloat16", 64) for kind in GROUPINGS]
    # Dense features: none, and all but a few.
    + [("small", "strided", "float32", dense) for dense in (0, 17)]
    + [("odd", "strided", "bfloat16", dense) for dense in (0, 269)]
    + [("large", "strided", "bfloat16", 64)],
)
def test_split_matmul24(shape, grouping, dtype, dense, implementation):
    rng = np.random.default_rng(0)
    split = random_split(rng, shape[1], dense)
    a, kept = split_operand(integers(rng, shape, dtype), split, GROUPINGS[grouping])
    b = integers(rng, (shape[0], COLUMNS), dtype)
    actual = run(split_matmul24, a, jnp.asarray(b), split, implementation=implementation)
    oracles.assert_bits(actual, oracles.product(kept.T, b))


@implementations(split_matmul24_op)
@dtypes
def test_split_matmul24_of_values_that_round(dtype, implementation):
    rng = np.random.default_rng(0)
    y, b = (
        rng.normal(size=shape).astype(oracles.FLOATS[dtype])
        for shape in (SHAPES["odd"], (SHAPES["odd"][0], COLUMNS))
    )
    split = random_split(rng, y.shape[1], 64)
    a, kept = split_operand(y, split, TokenGrouping())
    with jax.default_matmul_precision("highest"):
        actual = run(split_matmul24, a, jnp.asarray(b), split, implementation=implementation)
    oracles.assert_close(actual, oracles.product(kept.T, b))


@implementations(split_matmul24_op)
@groupings
def test_split_matmul24_by_the_identity_is_the_operand(grouping, implementation):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(64, 80)).astype(oracles.FLOATS["bfloat16"])
    split = random_split(rng, 80, 24)
    a, kept = split_operand(y, split, grouping)
    eye = jnp.eye(64, dtype=jnp.bfloat16)
    actual = run(split_matmul24, a, eye, split, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(actual, np.float32).T, kept.astype(np.float32))


@implementations(split_matmul24_op)
def test_split_matmul24_accumulates_in_float32(implementation):
    """A running sum of ones in bfloat16 stops at 256; the two halves of a dense feature add up."""
    tokens = 8448
    split = FeatureSplit(jnp.arange(8), jnp.arange(8, 16))
    ones = np.ones((tokens, 16), oracles.FLOATS["bfloat16"])
    a, _ = split_operand(ones, split, TokenGrouping())
    b = jnp.ones((tokens, 8), jnp.bfloat16)
    product = run(split_matmul24, a, b, split, implementation=implementation)
    expected = np.repeat([tokens, tokens / 2], 8).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(product, np.float32), np.tile(expected, (8, 1)).T)


@implementations(split_matmul24_op)
def test_split_matmul24_under_vmap(implementation):
    rng = np.random.default_rng(0)
    y, b = integers(rng, (2, 16, 24), "bfloat16"), integers(rng, (2, 16, 8), "bfloat16")
    splits = [random_split(rng, 24, 8) for _ in range(2)]
    operands, kept = zip(
        *(split_operand(*one, TokenGrouping()) for one in zip(y, splits, strict=True)), strict=True
    )
    a, split = (jax.tree.map(lambda *x: jnp.stack(x), *both) for both in (operands, splits))
    product = run(
        split_matmul24, a, jnp.asarray(b), split, in_axes=0, implementation=implementation
    )
    for i in range(2):
        oracles.assert_bits(product[i], oracles.product(kept[i].T, b[i]))


@pytest.mark.parametrize(
    "b_shape, b_dtype, dense, message",
    [
        (
            (8, 3),
            "float32",
            4,
            "split_matmul24: b has shape (8, 3), its first axis must have the length 16 of a's "
            "tokens",
        ),
        (
            (16,),
            "float32",
            4,
            "split_matmul24: b has shape (16,), its first axis must have the length 16 of a's "
            "tokens",
        ),
        (
            (16, 3),
            "bfloat16",
            4,
            "split_matmul24: a is float32, b is bfloat16; cast them to one dtype",
        ),
        (
            (16, 3),
            "float32",
            5,
            "split_matmul24: a has 4 dense and 8 sparse features, the split has 5 and 7; "
            "pass the split that made a",
        ),
    ],
)
def test_split_matmul24_errors(b_shape, b_dtype, dense, message):
    split = FeatureSplit(jnp.arange(4), jnp.arange(4, 12))
    a, _ = split_operand(np.ones((16, 12), np.float32), split, TokenGrouping())
    split = FeatureSplit(jnp.arange(dense), jnp.arange(dense, 12))
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        split_matmul24(a, jnp.ones(b_shape, b_dtype), split)
    assert oracles.assert_one_line(error) == message


# ------------------------------------------------------------------------------ in bfloat16, jitted


def test_the_choice_is_made_on_the_rounded_pre_activation():
    """XLA may keep Y1 in float32 between the product and its use; the choice must not see that."""
    rng = np.random.default_rng(0)
    x, w_up = (rng.normal(size=s).astype(oracles.FLOATS["bfloat16"]) for s in ((256, 8), (64, 8)))

    def forward(x, w_up):
        return sparsify24(numerics.dot(x, w_up, contract=(1, 1)), implementation="reference")

    y1 = np.asarray(numerics.dot(jnp.asarray(x), jnp.asarray(w_up), contract=(1, 1)))
    exact = x.astype(np.float64) @ w_up.astype(np.float64).T
    expected, counts = expected_sparsify(y1)
    by_exact = oracles.compress(y1, 1, choose_by=np.maximum(exact, 0))
    assert np.any(by_exact.indices != expected.indices), "else this test could not fail"
    y2, actual_counts = jax.jit(forward)(jnp.asarray(x), jnp.asarray(w_up))
    check_stored(y2, expected, TokenGrouping("adjacent"), 1, (256, 64))
    np.testing.assert_array_equal(actual_counts, counts)
