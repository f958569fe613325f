"""relu2, its gradient from the output, and the rounding and products they rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from s24jax import numerics
from s24jax.activation import relu2, relu2_gradient

DTYPES = list(oracles.FLOATS)


def values(dtype: str) -> np.ndarray:
    """Signs, zeros and magnitudes whose squares are normal numbers in every dtype.

    Results below the smallest normal number are left out: XLA's reduce_precision flushes them to
    zero and numpy does not.
    """
    magnitudes = np.concatenate([[1.0, 1.5, 3.0, 17.0, 0.1, 1 / 3], 2.0 ** np.arange(-6, 7) * 1.37])
    return np.concatenate([magnitudes, -magnitudes, [0.0, -0.0]]).astype(oracles.FLOATS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_relu2_is_the_square_rounded_once(dtype, compiled):
    y1 = values(dtype)
    y2 = (jax.jit(relu2) if compiled else relu2)(jnp.asarray(y1))
    oracles.assert_bits(y2, oracles.relu2(y1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu2_of_special_values(dtype):
    y1 = jnp.array([np.nan, np.inf, -np.inf, -0.0, -1.0], dtype)
    y2 = np.asarray(relu2(y1)).astype(np.float64)
    np.testing.assert_array_equal(y2, [np.nan, np.inf, 0.0, 0.0, 0.0])
    assert not np.signbit(y2[2:]).any(), "the result is never -0.0"


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5)])
def test_relu2_takes_any_shape(shape):
    assert relu2(jnp.full(shape, 3.0)).shape == shape
    np.testing.assert_array_equal(relu2(jnp.full(shape, 3.0)), np.full(shape, 9.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_twice_the_root_times_the_incoming_gradient(dtype):
    y2 = oracles.relu2(values(dtype))
    dy2 = np.linspace(-2, 3, y2.size).astype(y2.dtype)
    dy1 = relu2_gradient(jnp.asarray(y2), jnp.asarray(dy2))
    oracles.assert_bits(np.abs(np.asarray(dy1)), np.abs(oracles.relu2_gradient(y2, dy2)))
    assert np.all(np.asarray(dy1)[y2 == 0] == 0)
    assert np.all(np.sign(np.asarray(dy1, np.float32))[y2 > 0] == np.sign(dy2[y2 > 0]))


def test_gradient_agrees_with_autodiff_of_relu2():
    y1 = jnp.asarray(values("float32"))
    dy2 = jnp.linspace(-2.0, 3.0, y1.size)
    y2, pull = jax.vjp(relu2, y1)
    oracles.assert_close(relu2_gradient(y2, dy2), pull(dy2)[0])


def test_gradient_agrees_with_a_finite_difference():
    y1 = np.array([0.5, 1.25, 4.0, -1.0], np.float64)
    step = 1e-6
    slope = (np.maximum(y1 + step, 0) ** 2 - np.maximum(y1 - step, 0) ** 2) / (2 * step)
    dy1 = relu2_gradient(relu2(jnp.asarray(y1, jnp.float32)), jnp.ones(4))
    np.testing.assert_allclose(dy1, slope, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_to_survives_compilation(dtype):
    """XLA may drop a cast down and up again; the 2:4 choice must see the rounded value."""
    x = np.linspace(1.0, 2.0, 999, dtype=np.float32)
    there_and_back = jax.jit(lambda x: numerics.round_to(x, jnp.dtype(dtype)).astype(jnp.float32))
    expected = x.astype(oracles.FLOATS[dtype]).astype(np.float32)
    assert np.any(expected != x)
    oracles.assert_bits(there_and_back(x), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_to_sends_ties_to_even(dtype):
    ulp = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    x = jnp.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp * 0.51])
    expected = np.array([1.0, 1 + 2 * ulp, 1 + ulp], np.float32)
    np.testing.assert_array_equal(
        np.asarray(numerics.round_to(x, jnp.dtype(dtype)), np.float32), expected
    )


@pytest.mark.parametrize("contract", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_contracts_the_named_axes(contract, dtype):
    rng = np.random.default_rng(0)
    a, b = (
        rng.integers(-8, 9, shape).astype(oracles.FLOATS[dtype])
        for shape in ((6, 5) if contract[0] else (5, 6), (7, 5) if contract[1] else (5, 7))
    )
    expected = oracles.product(a if contract[0] else a.T, b.T if contract[1] else b)
    # Small integers are exact in every order of summation, so the one rounding is all that is left.
    oracles.assert_bits(numerics.dot(jnp.asarray(a), jnp.asarray(b), contract=contract), expected)


def test_dot_accumulates_in_float32_and_rounds_to_the_dtype_asked_for():
    """A bfloat16 running sum of ones stops at 256, and 261 is no bfloat16 number."""
    a, b = jnp.ones((1, 261), jnp.bfloat16), jnp.ones((261, 1), jnp.bfloat16)
    wide = numerics.dot(a, b, contract=(1, 0), dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    assert float(wide[0, 0]) == 261.0
    narrow = numerics.dot(a, b, contract=(1, 0))
    assert narrow.dtype == jnp.bfloat16
    assert float(narrow[0, 0]) == 260.0


def test_autodiff_of_relu2_keeps_the_input_alone():
    """Dense training would otherwise hold a float32 copy of every hidden activation."""
    y1 = jnp.linspace(-2, 2, 64, dtype=jnp.bfloat16).reshape(8, 8)
    _, pullback = jax.vjp(relu2, y1)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == y1.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
    assert jnp.array_equal(kept[0], y1)
