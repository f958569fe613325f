"""prune24: the choice of two in four, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given

from s24jax import prune24
from s24jax.errors import InvalidInput

DTYPES = list(oracles.FLOATS)
# One compilation for each dtype and axis, not one for each example.
PRUNE = jax.jit(prune24, static_argnums=1)
SHAPE = {0: (8, 3), 1: (3, 8), -1: (2, 3, 4), -2: (2, 8, 3)}


def check_prune(y: np.ndarray, axis: int) -> None:
    mask = oracles.prune_mask(y, axis)
    pruned, actual_mask = PRUNE(jnp.asarray(y), axis)
    np.testing.assert_array_equal(actual_mask, mask)
    oracles.assert_bits(pruned, oracles.keep(y, mask))


@pytest.mark.parametrize("axis", SHAPE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits_against_the_oracle(dtype, axis):
    @given(oracles.bit_patterns(dtype, SHAPE[axis]))
    def check(y):
        check_prune(y, axis)

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_properties(dtype):
    """Said without the oracle, so that a mistake there shows as well."""

    @given(oracles.bit_patterns(dtype, SHAPE[1]))
    def check(y):
        pruned, mask = (np.asarray(a) for a in PRUNE(jnp.asarray(y), 1))
        groups, kept = y.reshape(-1, 4).astype(np.float64), mask.reshape(-1, 4)
        assert np.all(kept.sum(-1) == 2), "exactly two of each group are kept"
        rank = np.where(np.isnan(groups), np.inf, np.abs(groups))
        nan = np.isnan(groups)
        for g in range(len(groups)):
            assert rank[g][kept[g]].min() >= rank[g][~kept[g]].max(), "the two largest are kept"
            assert nan[g][kept[g]].sum() == min(2, nan[g].sum()), "NaN before all"
        again, mask_again = PRUNE(jnp.asarray(pruned), 1)
        oracles.assert_bits(again, pruned, "pruning twice is pruning once")
        if not (rank == 0).any():  # a kept zero competes anew with the dropped ones
            np.testing.assert_array_equal(mask_again, mask)
        dropped = pruned[~mask]
        assert np.all(dropped == 0) and not np.signbit(dropped).any(), "dropped means +0.0"

    check()


N, INF = np.nan, np.inf
TILE_CASES = {
    # four rows, and the mask of each as the two positions kept
    "distinct": (
        [[1, 2, 3, 4], [4, 3, 2, 1], [1, 4, 2, 3], [3, 1, 4, 2]],
        ["23", "01", "13", "02"],
    ),
    "signs": (
        [[-1, 2, -3, 1], [-4, -3, -2, -1], [1, -1, 2, -2], [0, -5, 5, 4]],
        ["12", "01", "23", "12"],
    ),
    "ties": ([[1, 1, 1, 1], [0, 1, 1, 1], [2, 1, 1, 1], [1, -1, 1, 2]], ["01", "12", "01", "03"]),
    "zeros": (
        [[0, 0, 0, 0], [0, 0, 0, 7], [0, -0.0, 5, 0], [-0.0, 0, 0, -0.0]],
        ["01", "03", "02", "01"],
    ),
    "special": (
        [[1, N, INF, 2], [INF, -INF, INF, N], [N, N, N, N], [9, 8, -N, N]],
        ["12", "03", "01", "23"],
    ),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case", TILE_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_tiles(case, axis, dtype):
    tile, kept = TILE_CASES[case]
    expected = np.array([[str(i) in row for i in range(4)] for row in kept])
    y = jnp.array(tile, dtype)
    _, mask = PRUNE(y.T if axis == 0 else y, axis)
    np.testing.assert_array_equal(mask.T if axis == 0 else mask, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_subnormals_rank_by_their_bits(dtype):
    """The choice compares integers, so a device that flushes subnormals chooses the same."""
    unsigned = np.dtype(f"u{oracles.FLOATS[dtype].itemsize}")
    y = np.array([[1, 3, 2, 4]], unsigned).view(oracles.FLOATS[dtype])
    np.testing.assert_array_equal(PRUNE(jnp.asarray(y), 1)[1], [[False, True, False, True]])


def test_groups_are_consecutive_along_the_axis():
    y = jnp.arange(1.0, 9.0)
    np.testing.assert_array_equal(PRUNE(y, 0)[0], [0, 0, 3, 4, 0, 0, 7, 8])


def test_an_axis_of_length_zero_has_no_groups():
    pruned, mask = prune24(jnp.zeros((3, 0)), 1)
    assert pruned.shape == mask.shape == (3, 0)


def test_the_same_under_vmap():
    y = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(np.float32)
    pruned, mask = jax.vmap(lambda y: PRUNE(y, 0))(jnp.asarray(y))
    np.testing.assert_array_equal(mask, oracles.prune_mask(y, 1))
    oracles.assert_bits(pruned, oracles.keep(y, oracles.prune_mask(y, 1)))


@pytest.mark.parametrize(
    "shape, dtype, axis, message",
    [
        (
            (4, 8),
            "float32",
            2,
            "prune24: axis 2 does not exist in shape (4, 8); use one from -2 to 1",
        ),
        (
            (4, 8),
            "float32",
            -3,
            "prune24: axis -3 does not exist in shape (4, 8); use one from -2 to 1",
        ),
        (
            (4, 6),
            "float32",
            1,
            "prune24: axis 1 of shape (4, 6) has length 6; pad it to a multiple of 4",
        ),
        (
            (6, 4),
            "bfloat16",
            -2,
            "prune24: axis -2 of shape (6, 4) has length 6; pad it to a multiple of 4",
        ),
        ((4,), "int32", 0, "prune24: dtype int32 has no magnitude order here; use a float dtype"),
        ((4,), "bool", 0, "prune24: dtype bool has no magnitude order here; use a float dtype"),
    ],
)
def test_errors(shape, dtype, axis, message):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        prune24(jnp.zeros(shape, dtype), axis)
    assert oracles.assert_one_line(error) == message
