"""The contract of each op, run by every implementation that is registered for it.

A GPU implementation joins by being in its op's CANDIDATES. Where it refuses a case it is skipped
with its own reason; `reference` may refuse nothing. Data are small integers wherever possible: they
are exact in every dtype and in every order of summation, so that results can be compared bit for
bit, whatever the hardware accumulates in, as long as it holds 24 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given

from s24jax import Compressed24, TokenGrouping, compress24, matmul24, numerics, sparsify24
from s24jax.errors import InvalidInput, Unsupported
from s24jax.feature_split import FeatureSplit
from s24jax.ops import feature_wise24 as feature_wise24_op
from s24jax.ops import matmul24 as matmul24_op
from s24jax.ops import sparsify24 as sparsify24_op
from s24jax.ops.feature_wise24 import feature_wise24

DTYPES = list(oracles.FLOATS)
GROUPINGS = {
    "adjacent": TokenGrouping("adjacent"),
    "strided": TokenGrouping("strided"),
    "random": TokenGrouping("random", 3),
}
# The first has an odd number of groups on both axes, so padding nibbles; the second is made of
# whole tiles, which is what a kernel may insist on.
SHAPES = {"small": (12, 20), "tiles": (128, 256)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
groupings = pytest.mark.parametrize("grouping", GROUPINGS.values(), ids=GROUPINGS)


# Every grouping, axis and dtype at the small shape; the tiles once for each axis and dtype.
LAYOUTS = [(SHAPES["small"], grouping) for grouping in GROUPINGS] + [(SHAPES["tiles"], "strided")]
layouts = pytest.mark.parametrize(
    "shape, grouping", LAYOUTS, ids=lambda v: v if isinstance(v, str) else f"{v[0]}x{v[1]}"
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
    # Legal in every nibble, padding included, whatever order a kernel keeps the bytes in.
    nibbles = np.asarray(actual.metadata)[..., None] >> np.array([0, 4], np.uint8) & 0xF
    assert np.all((nibbles & 3) < nibbles >> 2)


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
@dtypes
@shapes
def test_sparsify24(shape, dtype, implementation):
    """Integers tie often, and half of the values are negative."""
    check_sparsify(integers(np.random.default_rng(0), shape, dtype), implementation)


@implementations(sparsify24_op)
@dtypes
@shapes
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
    y1 = np.array(
        [[1, N, 2, 3], [-1, -N, -INF, -2], [INF, 1, INF, N], [-0.0, 0, -INF, 0]] * 4,
        oracles.FLOATS[dtype],
    )
    y2, counts = run(sparsify24, jnp.asarray(y1), implementation=implementation)
    np.testing.assert_array_equal(y2.indices()[:4, 0], [[1, 3], [0, 1], [0, 3], [0, 1]])
    values = np.asarray(y2.values).astype(np.float32)
    np.testing.assert_array_equal(values[:4], [[N, 9], [0, N], [INF, N], [0, 0]])
    assert not np.signbit(values[values == 0]).any()
    np.testing.assert_array_equal(counts, [8, 12, 8, 8])  # NaN counts as a non-zero


@implementations(sparsify24_op)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparsify24_ranks_before_it_squares(dtype, implementation):
    """Squares that underflow or overflow tie; what they came from does not."""
    y1 = np.array(
        [[1e-25, 2e-25, 3e-25, 4e-25], [1e25, 2e25, 3e25, 4e25]] * 8, oracles.FLOATS[dtype]
    )
    y2, counts = run(sparsify24, jnp.asarray(y1), implementation=implementation)
    np.testing.assert_array_equal(y2.indices(), [[[2, 3]]] * 16)
    np.testing.assert_array_equal(np.asarray(y2.values, np.float32), [[0, 0], [np.inf] * 2] * 8)
    # non-zeros of Y2, not of Y1
    np.testing.assert_array_equal(counts, [8, 8, 8, 8])


@implementations(sparsify24_op)
def test_sparsify24_counts_before_pruning(implementation):
    y2, counts = run(sparsify24, jnp.ones((16, 8)), implementation=implementation)
    np.testing.assert_array_equal(counts, [16] * 8)
    np.testing.assert_array_equal(np.count_nonzero(y2.decompress(), axis=0), [16, 16, 0, 0] * 2)


@implementations(sparsify24_op)
@dtypes
def test_sparsify24_of_any_bits(dtype, implementation):
    """The choice only: values outside the normal numbers have tests of their own."""
    run(sparsify24, jnp.zeros((4, 12), dtype), implementation=implementation)  # or skip
    indices = jax.jit(lambda y1: sparsify24(y1, implementation=implementation)[0].indices())

    @given(oracles.bit_patterns(dtype, (4, 12)))
    def check(y1):
        expected = oracles.compress(oracles.relu(y1), 1)
        np.testing.assert_array_equal(indices(jnp.asarray(y1)), expected.indices)

    check()


@implementations(sparsify24_op)
def test_sparsify24_of_no_tokens(implementation):
    y2, counts = run(sparsify24, jnp.zeros((0, 8)), implementation=implementation)
    assert y2.decompress().shape == (0, 8)
    np.testing.assert_array_equal(counts, [0] * 8)


@implementations(sparsify24_op)
def test_sparsify24_under_vmap(implementation):
    y1 = integers(np.random.default_rng(0), (3, 8, 12), "float32")
    y2, counts = run(sparsify24, jnp.asarray(y1), in_axes=0, implementation=implementation)
    for i in range(3):
        expected, expected_counts = expected_sparsify(y1[i])
        oracles.assert_bits(y2.values[i], expected.values)
        np.testing.assert_array_equal(counts[i], expected_counts)


# ---------------------------------------------------------------------------------------- matmul24


def expected_product(a: np.ndarray, b: np.ndarray, axis: int, groups) -> np.ndarray:
    pruned = oracles.keep(a, oracles.prune_mask(a, axis, groups))
    return oracles.product(pruned if axis == 1 else pruned.T, b)


@implementations(matmul24_op)
@dtypes
@pytest.mark.parametrize("axis", [0, 1])
@layouts
def test_matmul24(shape, axis, dtype, grouping, implementation):
    rng = np.random.default_rng(0)
    a, b = integers(rng, shape, dtype), integers(rng, (shape[axis], 24), dtype)
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
    a = np.ones((64, 64), np.float32)
    a[3, 5] = np.nan
    product = run(
        matmul24, STORE(jnp.asarray(a), 1), jnp.ones((64, 64)), implementation=implementation
    )
    np.testing.assert_array_equal(np.isnan(product), np.arange(64)[:, None] == 3 + np.zeros(64))


@implementations(matmul24_op)
def test_matmul24_under_vmap(implementation):
    rng = np.random.default_rng(0)
    a, b = integers(rng, (3, 8, 12), "float32"), integers(rng, (3, 12, 4), "float32")

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
    a, b = integers(rng, (3, 8, 12), "float32"), integers(rng, (12, 4), "float32")
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


# ---------------------------------------------------------------------------------- feature_wise24


# Number of dense features: some, none, and all but a few.
FEATURE_WISE = [(*layout, 4 if layout[0] == SHAPES["small"] else 64) for layout in LAYOUTS] + [
    (SHAPES["small"], "strided", 0),
    (SHAPES["small"], "strided", 17),
]


def feature_wise_case(shape, dtype, dense):
    """Token-wise pruned Y2, dY1 under its mask, and a split in no particular order."""
    rng = np.random.default_rng(0)
    y2 = np.abs(integers(rng, shape, dtype)) * (rng.random(shape) < 0.6).astype(
        oracles.FLOATS[dtype]
    )
    y2 = oracles.keep(y2, oracles.prune_mask(y2, 1))
    dy1 = np.where(y2 != 0, integers(rng, shape, dtype), np.zeros_like(y2))
    features = rng.permutation(shape[1])
    return y2, dy1, features[:dense], features[dense:]


@implementations(feature_wise24_op)
@pytest.mark.parametrize("shared_mask", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("compressed", [True, False], ids=["compressed", "dense"])
@pytest.mark.parametrize("shape, grouping, dense", FEATURE_WISE, ids=str)
def test_feature_wise24(shape, grouping, dense, compressed, shared_mask, implementation):
    dtype = "bfloat16" if compressed else "float32"
    tokens, grouping = shape[0], GROUPINGS[grouping]
    y2, dy1, dense, sparse = feature_wise_case(shape, dtype, dense)
    y2_in, dy1_in = jnp.asarray(y2), jnp.asarray(dy1)
    if compressed:
        y2_in = STORE(y2_in, 1)
        dy1_in = jax.jit(Compressed24.gather)(y2_in, dy1_in)
    y2_out, dy1_out = run(
        feature_wise24,
        y2_in,
        dy1_in,
        FeatureSplit(jnp.asarray(dense), jnp.asarray(sparse)),
        grouping=grouping,
        shared_mask=shared_mask,
        implementation=implementation,
    )
    groups = oracles.token_groups(grouping.kind, grouping.seed, tokens)
    expected_y2 = oracles.compress(y2[:, sparse], 0, groups)
    expected_dy1 = oracles.compress(
        dy1[:, sparse], 0, groups, choose_by=y2[:, sparse] if shared_mask else None
    )
    check_stored(y2_out.sparse, expected_y2, grouping, 0, (tokens, len(sparse)))
    check_stored(dy1_out.sparse, expected_dy1, grouping, 0, (tokens, len(sparse)))
    oracles.assert_bits(y2_out.dense, y2[:, dense])
    oracles.assert_bits(dy1_out.dense, dy1[:, dense])


@implementations(feature_wise24_op)
def test_feature_wise24_ties_keep_the_first_of_the_group(implementation):
    """First in the group's own order, which for a random grouping is not the lowest token."""
    grouping = TokenGrouping("random", 3)
    groups = oracles.token_groups("random", 3, 64)
    assert any(group != sorted(group) for group in groups)
    ones = jnp.ones((64, 64))
    split = FeatureSplit(jnp.arange(0), jnp.arange(64))
    y2, dy1 = run(
        feature_wise24,
        ones,
        ones,
        split,
        grouping=grouping,
        shared_mask=False,
        implementation=implementation,
    )
    expected = np.zeros(64)
    expected[[token for group in groups for token in group[:2]]] = 1
    for operand in (y2, dy1):
        np.testing.assert_array_equal(
            operand.sparse.decompress(), np.broadcast_to(expected[:, None], (64, 64))
        )


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


def test_feature_wise24_needs_whole_groups_of_tokens():
    split = FeatureSplit(jnp.arange(4), jnp.arange(4, 8))
    with pytest.raises(InvalidInput) as error:
        feature_wise24(
            jnp.ones((22, 8)), jnp.ones((22, 8)), split, grouping=TokenGrouping(), shared_mask=True
        )
    assert oracles.assert_one_line(error) == ("feature_wise24: 22 tokens; pad T to a multiple of 4")


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
