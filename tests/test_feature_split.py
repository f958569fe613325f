"""How many features are dense. Which ones is an op: see test_ops.py."""

import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s24jax.errors import InvalidInput
from s24jax.feature_split import dense_feature_count


@pytest.mark.parametrize(
    "features, share, multiple, expected",
    [
        (3072, 0.05, 128, 256),  # 153.6
        (8192, 0.05, 128, 512),  # 409.6
        (2560, 0.05, 128, 128),  # exactly one tile
        (3200, 0.07, 32, 224),  # exactly seven; 224.00000000000003 in floating point
        (1000, 0.1, 100, 100),
        (300, 0.07, 1, 21),  # 21.000000000000004 in floating point
        (32, 0.05, 8, 8),
        (32, 0.25, 8, 8),
        (32, 0.26, 8, 16),
        (32, 0.0, 8, 0),
        (512, 0.05, 16, 32),
        (32, 1e-05, 8, 8),  # written with an exponent, and still rounded up
    ],
)
def test_dense_features_are_rounded_up(features, share, multiple, expected):
    assert dense_feature_count(features, share=share, multiple=multiple) == expected


@given(st.integers(4, 20000), st.integers(0, 99), st.sampled_from([1, 8, 16, 64, 128]))
def test_dense_feature_count_against_the_oracle(features, percent, multiple):
    share = percent / 100
    expected = oracles.dense_feature_count(features, share, multiple)
    if expected < features:
        assert dense_feature_count(features, share=share, multiple=multiple) == expected
    else:
        with pytest.raises(InvalidInput):
            dense_feature_count(features, share=share, multiple=multiple)


@pytest.mark.parametrize("features, multiple", [(128, 128), (64, 128), (4, 4)])
def test_a_split_without_sparse_features_raises(features, multiple):
    with pytest.raises(InvalidInput) as error:
        dense_feature_count(features, share=0.05, multiple=multiple)
    assert oracles.assert_one_line(error) == (
        f"dense_share=0.05 of F={features} rounded up to dense_multiple={multiple} leaves "
        "no sparse feature; lower dense_share or dense_multiple"
    )
