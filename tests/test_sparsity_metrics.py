"""Sparsity metrics against loops over groups of four."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs import base
from s24jax.model import FFN, Transformer
from s24jax.recipe import Recipe
from s24jax.sparsity_metrics import SQUARED_RELU, observe_ffn, sparsity

GROUPINGS = ("strided", "adjacent", "random")
# At level 0 it compiles in a fraction of the time, and nearly every test has a shape of its own.
SPARSITY = jax.jit(
    sparsity, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
)


def measure(y1, recipe: Recipe) -> dict[str, float]:
    """What `sparsity` documents, in float64, one group at a time."""
    y1 = np.asarray(y1)
    tokens, features = y1.shape
    y1 = np.concatenate([y1, np.zeros((-tokens % 4, features), y1.dtype)])
    y2 = oracles.relu2(y1).astype(np.float64)
    fires = [sum(y2[t, f] != 0 for t in range(tokens)) for f in range(features)]

    token_wise = np.zeros_like(y2)
    for t, start in itertools.product(range(len(y1)), range(0, features, 4)):
        group = [max(float(y1[t, f]), 0.0) for f in range(start, start + 4)]
        for i in oracles.two_of_four(group):
            token_wise[t, start + i] = y2[t, start + i]

    dense = oracles.dense_feature_count(features, recipe.dense_share, recipe.dense_multiple)
    dense = oracles.densest(fires, dense)
    sparse = [f for f in range(features) if f not in dense]
    feature_wise = token_wise.copy()
    groups = oracles.token_groups(recipe.token_grouping, recipe.grouping_seed, len(y1))
    for f, group in itertools.product(sparse, groups):
        kept = oracles.two_of_four([token_wise[t, f] for t in group])
        for i in set(range(4)) - set(kept):
            feature_wise[group[i], f] = 0

    def lost(after, weigh):
        total = weigh(y2).sum()
        return float(1 - weigh(after).sum() / total) if total else 0.0

    def density(of):
        return sum(fires[f] for f in of) / (tokens * len(of)) if of else 0.0

    return {
        "zero_share": float(np.mean(y2[:tokens] == 0)),
        "dropped_token_wise": lost(token_wise, lambda y: y != 0),
        "dropped_token_wise_energy": lost(token_wise, np.square),
        "dropped_feature_wise": lost(feature_wise, lambda y: y != 0),
        "dropped_feature_wise_energy": lost(feature_wise, np.square),
        "dense_feature_density": density(dense),
        "sparse_feature_density": density(sparse),
        "inactive_features": sum(count == 0 for count in fires) / features,
        "inactive_blocks": inactive_blocks(y2[:tokens], fires),
        "density_profile": profile(sorted(fires, reverse=True), tokens),
    }


def inactive_blocks(y2, fires) -> float:
    """Blocks that begin at every 128th token and every 32nd feature, the densest first."""
    # Equally dense features: the lower index comes first.
    order = sorted(range(y2.shape[1]), key=lambda f: (-fires[f], f))
    blocks = [
        any(
            y2[t, f] != 0
            for t in range(top, min(top + 128, len(y2)))
            for f in order[left : left + 32]
        )
        for top in range(0, len(y2), 128)
        for left in range(0, len(order), 32)
    ]
    return blocks.count(False) / len(blocks)


def profile(fires, tokens) -> list[float]:
    """Means over parts: feature i lies in part floor(i * parts / features)."""
    parts = [[] for _ in range(min(64, len(fires)))]
    for i, count in enumerate(fires):
        parts[i * len(parts) // len(fires)].append(count / tokens)
    return [sum(part) / len(part) for part in parts]


def assert_measures(y1, recipe: Recipe) -> dict[str, float]:
    """Compares every metric; returns what the loops say."""
    actual, expected = SPARSITY(jnp.asarray(y1), recipe), measure(y1, recipe)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == np.shape(expected[name]) and value.dtype == jnp.float32, name
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    return expected


def firing_together(tokens: int, features: int, seed: int = 0) -> np.ndarray:
    """Pre-activations as trained models have them: runs of neighbouring tokens fire the same
    features, a few features fire often, some never."""
    rng = np.random.default_rng(seed)
    bias = np.linspace(1.0, -1.5, features)[rng.permutation(features)]
    run = np.repeat(rng.normal(size=(-(-tokens // 5), features)), 5, axis=0)[:tokens]
    y1 = run + 0.3 * rng.normal(size=(tokens, features)) + bias
    y1[:, rng.permutation(features)[:3]] = -1
    return y1.astype(np.float32)


# ------------------------------------------------------------------------------- against loops


@pytest.mark.parametrize("share, multiple", [(0.0, 8), (0.05, 4), (0.3, 8)])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_activations_that_fire_together(grouping, share, multiple):
    recipe = Recipe(
        token_grouping=grouping, grouping_seed=3, dense_share=share, dense_multiple=multiple
    )
    found = assert_measures(firing_together(64, 24), recipe)
    assert found["dropped_token_wise"] > 0.05
    assert found["dropped_feature_wise"] > found["dropped_token_wise"] + 0.01
    assert found["inactive_features"] == 3 / 24
    if share == 0:
        assert found["dense_feature_density"] == 0
    else:
        assert found["dense_feature_density"] > 1.5 * found["sparse_feature_density"]


def test_blocks_and_profile_of_many_tokens_and_features():
    """Two and a half tiles of tokens, three and a bit of features, more features than parts."""
    y1 = firing_together(300, 104)
    y1[:130, 40:] = -1  # most of the first tile is silent
    found = assert_measures(y1, Recipe(dense_multiple=8))
    assert 0 < found["inactive_blocks"] < 1
    assert len(found["density_profile"]) == 64
    mean = np.mean([np.mean(y1[:, f] > 0) for f in range(104)])
    assert abs(mean - (1 - found["zero_share"])) < 1e-9
    assert found["density_profile"] == sorted(found["density_profile"], reverse=True)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 14, 31])
def test_tokens_that_do_not_fill_the_last_group(tokens):
    """The padding counts nowhere, and `ffn24`'s groups are formed over the padded tokens."""
    y1 = np.random.default_rng(tokens).normal(size=(tokens, 16)).astype(np.float32)
    assert_measures(y1, Recipe(dense_multiple=4))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_of_random_groups(seed):
    y1 = firing_together(32, 16)
    recipe = Recipe(token_grouping="random", grouping_seed=seed, dense_multiple=4)
    found = assert_measures(y1, recipe)
    other = measure(y1, Recipe(token_grouping="random", grouping_seed=1 - seed, dense_multiple=4))
    assert found["dropped_feature_wise"] != other["dropped_feature_wise"], "seeds that differ"


@given(
    hnp.arrays(np.int8, (12, 8), elements=st.integers(-2, 3)),
    st.sampled_from(GROUPINGS),
    st.sampled_from([0.0, 0.05]),
)
def test_any_activations(y1, grouping, share):
    """Small integers: ties among values and among counts everywhere."""
    recipe = Recipe(token_grouping=grouping, dense_share=share, dense_multiple=4)
    assert_measures(y1.astype(np.float32), recipe)
    found = SPARSITY(jnp.float32(y1), recipe)
    assert all(value.min() >= 0 and value.max() <= 1 for value in found.values()), found
    assert found["dropped_feature_wise"] >= found["dropped_token_wise"]
    assert found["dropped_feature_wise_energy"] >= found["dropped_token_wise_energy"]
    if share:
        assert found["dense_feature_density"] >= found["sparse_feature_density"]


@pytest.mark.parametrize("y1", [np.zeros((8, 8), np.float32), np.full((7, 8), -2, np.float32)])
def test_nothing_fires(y1):
    found = assert_measures(y1, Recipe(dense_multiple=4))
    assert found["zero_share"] == found["inactive_features"] == found["inactive_blocks"] == 1
    assert found.pop("density_profile") == [0.0] * 8
    assert sum(found.values()) == 3, "nothing is lost where nothing was"


def test_everything_fires():
    """Half is dropped in groups of 4 features; the pattern that is left fits groups of 4 tokens
    only in the dense features."""
    found = assert_measures(np.ones((16, 8), np.float32), Recipe(dense_multiple=4))
    assert found == {
        "zero_share": 0.0,
        "dropped_token_wise": 0.5,  # features 2, 3, 6, 7
        "dropped_token_wise_energy": 0.5,
        "dropped_feature_wise": 0.625,  # 0 and 1 are dense, 4 and 5 lose half
        "dropped_feature_wise_energy": 0.625,
        "dense_feature_density": 1.0,
        "sparse_feature_density": 1.0,
        "inactive_features": 0.0,
        "inactive_blocks": 0.0,
        "density_profile": [1.0] * 8,
    }


@pytest.mark.parametrize("grouping, dropped", [("adjacent", 0.5), ("strided", 0.0)])
def test_neighbours_that_fire_together_need_strided_groups(grouping, dropped):
    y1 = -np.ones((16, 8), np.float32)
    y1[4:8, 1] = [4, 3, 2, 1]
    recipe = Recipe(token_grouping=grouping, dense_share=0.0)
    found = assert_measures(y1, recipe)
    assert found["dropped_feature_wise"] == dropped
    assert found["dropped_feature_wise_energy"] == pytest.approx((2**4 + 1) / 354 * 2 * dropped)
    assert found["dropped_token_wise"] == 0


def test_dense_features_are_chosen_before_pruning():
    """Feature 3 fires in every token and loses to 0 and 1 in each; it is dense all the same."""
    y1 = -np.ones((16, 8), np.float32)
    y1[:, 3] = 1
    y1[:12, :2] = 2
    found = assert_measures(y1, Recipe(dense_share=0.1, dense_multiple=1))
    assert found["dense_feature_density"] == 1.0
    assert found["sparse_feature_density"] == 24 / (16 * 7)


@pytest.mark.parametrize(
    "off",
    [
        {"token_wise": False},
        {"mask_consistency": False},
        {"feature_wise": False},
        {"shared_feature_mask": False},
        {"token_wise": False, "mask_consistency": False, "feature_wise": False},
    ],
)
def test_parts_of_the_recipe_that_are_off_count_as_on(off):
    y1 = jnp.asarray(firing_together(30, 16))
    found, full = (SPARSITY(y1, Recipe(dense_multiple=4, **parts)) for parts in (off, {}))
    assert full["dropped_feature_wise"] > full["dropped_token_wise"] > 0
    for name, value in full.items():
        oracles.assert_bits(found[name], value, name)


# ---------------------------------------------------------------------------- of an FFN, a model


@pytest.mark.parametrize("kind", SQUARED_RELU)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_observe_ffn(kind, dtype):
    """Of Y1 as the FFN rounds it: integers up to 2,000, which bfloat16 makes tie."""
    recipe = Recipe(dense_multiple=4, token_grouping="adjacent")
    module = FFN(8, 16, kind, recipe=recipe, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(params=0))
    rng = np.random.default_rng(1)
    w_up, x = rng.integers(-15, 16, (16, 8)), rng.integers(-15, 16, (2, 7, 8))
    module.w_up[...] = jnp.asarray(w_up, jnp.float32)
    y1 = (x.reshape(14, 8) @ w_up.T).astype(np.float32).astype(oracles.FLOATS[dtype])
    if dtype == "bfloat16":
        assert (y1.astype(np.float32) != x.reshape(14, 8) @ w_up.T).any()
    found = jax.jit(functools.partial(observe_ffn, module))(jnp.asarray(x, dtype))
    for name, value in measure(y1, recipe).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_of_every_layer_of_a_model():
    recipe = {"dense_multiple": 4, "token_wise": False}
    config = base.get_config().model.lock()
    config.update(
        {
            "layers": 3,
            "width": 8,
            "heads": 2,
            "hidden": 16,
            "vocabulary": 5,
            "ffn": "relu2",
            "tie_embedding": True,
            "dtype": "float32",
            "recipe": recipe,
        }
    )

    @jax.jit
    def probe():
        model = Transformer(config, rngs=nnx.Rngs(params=2))
        tokens = jnp.arange(14).reshape(2, 7) % 5
        _, observed = model(tokens, observe=lambda ffn, h: (observe_ffn(ffn, h), h))
        return observed, model.blocks.ffn.w_up[...]

    (found, h), w_up = probe()
    layers = [
        measure(h_TD.astype(np.float64) @ w.astype(np.float64).T, Recipe(**recipe))
        for h_TD, w in zip(np.asarray(h).reshape(3, 14, 8), np.asarray(w_up), strict=True)
    ]
    for name, values in found.items():
        expected = [layer[name] for layer in layers]
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len({layer["dropped_feature_wise_energy"] for layer in layers}) == 3


def test_kinds_that_have_these_metrics():
    assert set(SQUARED_RELU) == {"relu2", "relu2_24"}
