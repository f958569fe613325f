"""TokenGrouping: which tokens share a group."""

import numpy as np
import oracles
import pytest

from s24jax import TokenGrouping
from s24jax.errors import InvalidInput


@pytest.mark.parametrize("tokens", [0, 4, 8, 12, 24, 64])
@pytest.mark.parametrize(
    "kind, seed", [("strided", 0), ("adjacent", 0), ("random", 0), ("random", 7)]
)
def test_order_lists_the_groups_in_fours(kind, seed, tokens):
    order = TokenGrouping(kind, seed).order(tokens)
    groups = oracles.token_groups(kind, seed, tokens)
    np.testing.assert_array_equal(
        np.asarray(order).reshape(-1, 4), np.array(groups, int).reshape(-1, 4)
    )
    assert sorted(order.tolist()) == list(range(tokens)), "every token is in one group"


def test_golden_orders():
    strided = TokenGrouping("strided").order(12).tolist()
    assert strided == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert TokenGrouping("adjacent").order(8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_strided_is_the_default():
    assert TokenGrouping() == TokenGrouping("strided", 0)


def test_a_seed_draws_one_permutation():
    first, again, other = (TokenGrouping("random", seed).order(64).tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_is_hashable_and_compares_by_value():
    """It is static under jit: equal groupings must not compile anew."""
    assert len({TokenGrouping("random", seed) for seed in (1, 1, 2)}) == 2


@pytest.mark.parametrize("kind", ["strided", "adjacent", "random"])
def test_tokens_must_be_a_multiple_of_four(kind):
    with pytest.raises(InvalidInput) as error:
        TokenGrouping(kind).order(22)
    assert oracles.assert_one_line(error) == (
        "22 tokens do not form groups of 4; pad to a multiple of 4"
    )


@pytest.mark.parametrize("kind", ["Strided", "stride", "", None])
def test_unknown_kind(kind):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        TokenGrouping(kind)
    assert oracles.assert_one_line(error) == (
        f"token grouping {kind!r} does not exist; use one of strided, adjacent, random"
    )
