"""Compressed24: what is stored, and that it comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given

from s24jax import Compressed24, TokenGrouping, compress24
from s24jax.compressed import compress24_by
from s24jax.errors import InvalidInput

DTYPES = list(oracles.FLOATS)
GROUPINGS = {
    "none": None,
    "adjacent": TokenGrouping("adjacent"),
    "strided": TokenGrouping("strided"),
    "random": TokenGrouping("random", 3),
}
# K = 12: three groups, so a padding nibble, and a stride (3) that is not its own inverse.
SHAPE = {0: (12, 3), 1: (3, 12)}


def _store(y, axis, grouping=None):
    stored = compress24(y, axis, grouping=grouping)
    return stored, stored.indices(), stored.decompress()


# One compilation for each dtype, axis and grouping, not one for each example.
STORE = jax.jit(_store, static_argnums=(1, 2))


def groups_of(name: str, length: int) -> list[list[int]]:
    grouping = GROUPINGS[name]
    if grouping is None:
        return oracles.consecutive(length)
    return oracles.token_groups(grouping.kind, grouping.seed, length)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits_against_the_oracle(dtype, axis, grouping):
    groups = groups_of(grouping, 12)

    @given(oracles.bit_patterns(dtype, SHAPE[axis]))
    def check(y):
        expected = oracles.compress(y, axis, groups)
        stored, indices, dense = STORE(jnp.asarray(y), axis, GROUPINGS[grouping])
        indices = np.asarray(indices)
        np.testing.assert_array_equal(indices, expected.indices)
        np.testing.assert_array_equal(stored.metadata, expected.metadata)
        oracles.assert_bits(stored.values, expected.values)
        assert indices.max() <= 3 and np.all(indices[..., 0] < indices[..., 1]), "legal"
        pruned = oracles.keep(y, oracles.prune_mask(y, axis, groups))
        oracles.assert_bits(dense, pruned)
        # `pruned` is 2:4 data and comes back with all its bits, a zero's sign excepted: where a
        # group had kept a -0.0, the second time a +0.0 before it may be kept instead.
        again = STORE(dense, axis, GROUPINGS[grouping])[2]
        oracles.assert_bits(
            *(np.where(a == 0, np.zeros_like(a), a) for a in (np.asarray(again), pruned))
        )

    check()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_dropped_negative_zero_comes_back_positive_and_a_kept_one_stays(axis):
    y = np.array([[-0.0, -0.0, -0.0, -0.0], [-0.0, 5.0, -0.0, 7.0]], np.float32)
    expected = np.array([[-0.0, -0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 7.0]], np.float32)
    y, expected = (y.T, expected.T) if axis == 0 else (y, expected)
    oracles.assert_bits(STORE(jnp.asarray(y), axis)[2], expected)


GOLDEN_TILE = [[1, 2, 3, 4], [4, 3, 2, 1], [0, 0, 0, 0], [-5, 1, 5, 1]]
GOLDEN_VALUES = [[3, 4], [4, 3], [0, 0], [-5, 5]]
GOLDEN_INDICES = [[[2, 3]], [[0, 1]], [[0, 1]], [[0, 2]]]
GOLDEN_NIBBLES = [0xE, 0x4, 0x4, 0x8]  # i0 | i1 << 2


def metadata_block(nibbles: dict[tuple[int, int], int]) -> np.ndarray:
    """One block of metadata: (word, lowest bit) -> nibble, the padding 0x4 everywhere else."""
    words = np.full((1, 1, 128), 0x44444444, np.uint32)
    for (word, bit), nibble in nibbles.items():
        words[0, 0, word] = int(words[0, 0, word]) & ~(0xF << bit) | nibble << bit
    return words


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_golden_tile(axis):
    tile = jnp.array(GOLDEN_TILE, jnp.float32)
    stored, indices, _ = STORE(tile if axis % 2 else tile.T, axis)
    assert stored.axis == axis % 2
    assert stored.shape == (4, 4)
    np.testing.assert_array_equal(stored.values, GOLDEN_VALUES)
    np.testing.assert_array_equal(indices, GOLDEN_INDICES)
    # rows 0 to 3 are the low halves of words 0, 4, 8 and 12
    expected = metadata_block({(4 * row, 0): n for row, n in enumerate(GOLDEN_NIBBLES)})
    np.testing.assert_array_equal(stored.metadata, expected)
    assert stored.metadata.dtype == jnp.uint32


def test_golden_word_of_four_groups():
    y = jnp.array([[9, 8, 0, 0, 0, 9, 0, 8, 9, 0, 0, 8, 0, 9, 8, 0]], jnp.bfloat16)
    stored, _, _ = STORE(y, 1)
    # groups (0,1) (1,3) (0,3) (1,2) are the nibbles 4, D, C, 9
    assert stored.metadata[0, 0, 0] == 0x44449CD4


@pytest.mark.parametrize(
    "row, group, block, word, bit",
    [
        (0, 0, (0, 0), 0, 0),
        (0, 3, (0, 0), 0, 12),
        (0, 4, (0, 0), 1, 0),
        (0, 15, (0, 0), 3, 12),
        (0, 16, (0, 1), 0, 0),
        (7, 0, (0, 0), 28, 0),
        (8, 0, (0, 0), 0, 16),
        (15, 15, (0, 0), 31, 28),
        (16, 0, (0, 0), 32, 0),
        (63, 31, (0, 1), 127, 28),
        (64, 0, (1, 0), 0, 0),
        (69, 22, (1, 1), 21, 8),
    ],
)
def test_golden_place_of_one_group(row, group, block, word, bit):
    """One group in an else empty matrix, against places worked out by hand from the PTX ISA."""
    y = np.zeros((70, 128), np.float32)
    y[row, 4 * group + 2 : 4 * group + 4] = 1  # positions 2 and 3: nibble 0xE
    stored, _, _ = STORE(jnp.asarray(y), 1)
    expected = np.full((2, 2, 128), 0x44444444, np.uint32)
    expected[(*block, word)] += (0xE - 0x4) << bit
    np.testing.assert_array_equal(stored.metadata, expected)


def test_golden_strided_groups():
    y = jnp.arange(1.0, 9.0).reshape(8, 1)  # groups {0,2,4,6} and {1,3,5,7}
    stored, _, dense = STORE(y, 0, TokenGrouping("strided"))
    np.testing.assert_array_equal(stored.values, [[5, 7, 6, 8]])
    np.testing.assert_array_equal(stored.metadata, metadata_block({(0, 0): 0xE, (0, 4): 0xE}))
    np.testing.assert_array_equal(dense[:, 0], [0, 0, 0, 0, 5, 6, 7, 8])


@pytest.mark.parametrize("axis", [0, 1])
def test_the_choice_may_come_from_another_matrix(axis):
    rng = np.random.default_rng(0)
    y, by = rng.normal(size=(2, 8, 12)).astype(np.float32)
    grouping = TokenGrouping("strided")
    groups = oracles.token_groups("strided", 0, y.shape[axis])
    expected = oracles.compress(y, axis, groups, choose_by=by)

    @jax.jit
    def both(y, by):
        chosen = compress24_by(y, by, axis, grouping=grouping)
        gathered = compress24(by, axis, grouping=grouping).gather(y)
        return [(stored.values, stored.indices()) for stored in (chosen, gathered)]

    for values, indices in both(jnp.asarray(y), jnp.asarray(by)):
        np.testing.assert_array_equal(indices, expected.indices)
        oracles.assert_bits(values, expected.values)


def test_with_values_keeps_the_positions():
    stored = compress24(jnp.array([[1.0, 0, 2, 0]]), 1)
    np.testing.assert_array_equal(
        stored.with_values(jnp.array([[7.0, 8.0]])).decompress(), [[7, 0, 8, 0]]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_stored(dtype):
    y = jnp.zeros((64, 128), dtype)
    stored = STORE(y, 0)[0]
    assert stored.dtype == dtype
    assert stored.nbytes / y.nbytes == (0.53125 if dtype == "float32" else 0.5625)


def test_is_a_pytree_of_two_arrays_with_everything_else_static():
    stored, _, _ = STORE(jnp.ones((8, 12)), 0, TokenGrouping("strided"))
    assert [leaf.shape for leaf in jax.tree.leaves(stored)] == [(12, 4), (1, 1, 128)]
    through = jax.jit(lambda stored: stored)(stored)
    assert (through.axis, through.shape, through.grouping) == (0, (8, 12), stored.grouping)
    oracles.assert_bits(through.values, stored.values)
    oracles.assert_bits(through.metadata, stored.metadata)
    other, _, _ = STORE(jnp.ones((8, 12)), 0)
    assert jax.tree.structure(stored) != jax.tree.structure(other)


def test_pytree_may_hold_what_is_no_array():
    """jax rebuilds pytrees around shapes, axes and sentinels: eval_shape, vmap of an argument."""
    shapes = jax.eval_shape(lambda: compress24(jnp.ones((8, 12)), 1))
    assert shapes.values.shape == (8, 6)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes).metadata == (1, 1, 128)


def test_vmap_out_of_and_into_a_function():
    y = np.random.default_rng(0).normal(size=(3, 8, 12)).astype(np.float32)
    stored, _, _ = jax.vmap(lambda y: STORE(y, 1))(jnp.asarray(y))
    assert stored.values.shape == (3, 8, 6)
    dense = jax.vmap(jax.jit(Compressed24.decompress))(stored)
    oracles.assert_bits(dense, oracles.keep(y, oracles.prune_mask(y, 2)))


@pytest.mark.parametrize("axis, shape", [(0, (0, 8)), (1, (8, 0)), (1, (0, 8)), (0, (8, 0))])
def test_empty_matrices(axis, shape):
    _, indices, dense = STORE(jnp.zeros(shape), axis)
    assert indices.shape == (shape[1 - axis], shape[axis] // 4, 2)
    assert dense.shape == shape


@pytest.mark.parametrize(
    "shape, dtype, axis, message",
    [
        ((8,), "float32", 0, "compress24: shape (8,) is no matrix; reshape it to two axes"),
        (
            (2, 4, 8),
            "float32",
            1,
            "compress24: shape (2, 4, 8) is no matrix; reshape it to two axes",
        ),
        (
            (4, 8),
            "float32",
            2,
            "compress24: axis 2 does not exist in shape (4, 8); use one from -2 to 1",
        ),
        (
            (6, 8),
            "bfloat16",
            0,
            "compress24: axis 0 of shape (6, 8) has length 6; pad it to a multiple of 4",
        ),
        (
            (4, 8),
            "int8",
            1,
            "compress24: dtype int8 has no magnitude order here; use a float dtype",
        ),
    ],
)
def test_errors(shape, dtype, axis, message):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        compress24(jnp.zeros(shape, dtype), axis)
    assert oracles.assert_one_line(error) == message
