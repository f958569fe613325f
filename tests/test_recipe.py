"""Recipe: the named parts and what each accepts."""

import dataclasses

import oracles
import pytest

from s24jax import Recipe, TokenGrouping
from s24jax.errors import InvalidInput


def test_the_defaults_are_the_full_recipe():
    """A public contract, which configurations spell out."""
    assert dataclasses.asdict(Recipe()) == {
        "token_wise": True,
        "mask_consistency": True,
        "feature_wise": True,
        "token_grouping": "strided",
        "grouping_seed": 0,
        "dense_share": 0.05,
        "dense_multiple": 128,
        "shared_feature_mask": True,
    }


def test_is_frozen_and_hashable():
    """It is static under jit."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().token_wise = False
    assert hash(Recipe(dense_multiple=8)) == hash(Recipe(dense_multiple=8))
    assert Recipe(dense_multiple=8) != Recipe(dense_multiple=16)


def test_grouping_carries_the_seed():
    recipe = Recipe(token_grouping="random", grouping_seed=5)
    assert recipe.grouping == TokenGrouping("random", 5)


def test_dense_features():
    assert Recipe().dense_features(3072) == 256
    assert Recipe(dense_multiple=8).dense_features(32) == 8
    assert Recipe(dense_share=0.0).dense_features(32) == 0
    with pytest.raises(InvalidInput, match="F=32 .* dense_multiple=128 leaves no sparse feature"):
        Recipe().dense_features(32)


@pytest.mark.parametrize(
    "token_wise, mask_consistency, saves_pruned",
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_what_the_backward_pass_starts_from(token_wise, mask_consistency, saves_pruned):
    recipe = Recipe(token_wise=token_wise, mask_consistency=mask_consistency)
    assert recipe.saves_pruned is saves_pruned


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"token_grouping": "blocked"},
            "token grouping 'blocked' does not exist; use one of strided, adjacent, random",
        ),
        ({"dense_share": 1.0}, "dense_share=1.0 is no share; use 0 <= share < 1"),
        ({"dense_share": -0.1}, "dense_share=-0.1 is no share; use 0 <= share < 1"),
        ({"dense_share": float("nan")}, "dense_share=nan is no share; use 0 <= share < 1"),
        ({"dense_multiple": 0}, "dense_multiple=0 must be at least 1"),
        ({"dense_multiple": -8}, "dense_multiple=-8 must be at least 1"),
    ],
)
def test_errors(fields, message):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        Recipe(**fields)
    assert oracles.assert_one_line(error) == message


def test_a_negative_seed_is_refused_early():
    """numpy would refuse it in the middle of a trace, without naming the field."""
    with pytest.raises(InvalidInput, match="grouping_seed=-1"):
        Recipe(token_grouping="random", grouping_seed=-1)


def test_unknown_part():
    with oracles.without_type_checks(), pytest.raises(TypeError, match="warmup"):
        Recipe(warmup=True)
