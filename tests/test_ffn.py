"""ffn24: its value and its gradients for every recipe, and under jax's transformations.

The oracle is oracles.ffn, method.md's equations in numpy. Two kinds of data: in the *identity
probe* X and dY3 are identities, so that Y1 = W_up^T, dY2 = W_down^T, dW_down = Y2^T and dW_up =
dY1^T: every mask of the backward pass can be read off, bit for bit. The *full* data exercise the
products; their integers make Y1 and dY2 exact in any order of summation, so that masks cannot
depend on it either.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.extend import core
from jax.test_util import check_grads

from s24jax import Recipe, ffn, ffn24, numerics
from s24jax.errors import InvalidInput

T, D, F = 22, 8, 32  # T is no multiple of 4
DENSE = {"dense_multiple": 8, "dense_share": 0.2}  # 6.4 features, rounded up to 8
FLAGS = ("token_wise", "mask_consistency", "feature_wise", "shared_feature_mask")
RECIPES = [
    Recipe(**dict(zip(FLAGS, flags, strict=True)), token_grouping=kind, grouping_seed=1, **DENSE)
    for flags in itertools.product([True, False], repeat=len(FLAGS))
    for kind in ("strided", "adjacent", "random")
]
FULL = Recipe(**DENSE)
RESULTS = ("y3", "dx", "dw_up", "dw_down")


def name_of(recipe: Recipe) -> str:
    return "-".join([*(flag for flag in FLAGS if getattr(recipe, flag)), recipe.token_grouping])


every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
# One for each path through ffn.py: compressed or dense Y2 saved, weight gradients pruned or not.
PATHS = [
    Recipe(token_wise=token_wise, mask_consistency=token_wise, feature_wise=feature_wise, **DENSE)
    for token_wise in (True, False)
    for feature_wise in (True, False)
]
each_path = pytest.mark.parametrize("recipe", PATHS, ids=name_of)


@functools.cache
def full_data(dtype: str, tokens: int = T):
    """X, W_up, W_down, dY3 as integers; in bfloat16 wide enough for Y1 and Y2 to be rounded."""
    rng = np.random.default_rng(0)
    wide = 31 if dtype == "bfloat16" else 3

    def integers(bound, *shape):
        return rng.integers(-bound, bound + 1, shape).astype(oracles.FLOATS[dtype])

    return integers(wide, tokens, D), integers(3, F, D), integers(3, F, D), integers(3, tokens, D)


@functools.cache
def normal_data(tokens: int = T):
    rng = np.random.default_rng(1)
    return tuple(
        rng.normal(size=s).astype(np.float32) for s in ((tokens, D), (F, D), (F, D), (tokens, D))
    )


@functools.cache
def identity_probe(dtype: str):
    """Each feature has its own density, which pruning in fours changes by unequal amounts."""
    rng = np.random.default_rng(2)
    y1 = rng.integers(-2, 9, (T, F)) * (
        rng.random((T, F)) < rng.permutation(np.linspace(0.2, 1, F))
    )
    dy2 = rng.integers(-8, 9, (T, F)) * 0.5
    kind = oracles.FLOATS[dtype]
    return np.eye(T, dtype=kind), y1.T.astype(kind), dy2.T.astype(kind), np.eye(T, dtype=kind)


def expected(recipe: Recipe, data, **given) -> oracles.FFN:
    return oracles.ffn(*data, **dataclasses.asdict(recipe), **given)


def run(recipe: Recipe, x, w_up, w_down, dy3, *, wrap=lambda layer: layer):
    """Value and gradients, in the order of RESULTS."""
    y3, pull = jax.vjp(wrap(functools.partial(ffn24, recipe=recipe)), x, w_up, w_down)
    return y3, *pull(dy3)


# Uncompiled, `run` reuses jax's compilations of single operations from one recipe to the next: the
# quicker way as long as shapes stay the same. Where they do not, one compilation of the whole is.
RUN = jax.jit(run, static_argnums=0, static_argnames="wrap")


def on_device(data):
    return tuple(jnp.asarray(array) for array in data)


def assert_results(actual, wanted):
    for name, value in zip(RESULTS, actual, strict=True):
        oracles.assert_close(value, getattr(wanted, name), name)


# ------------------------------------------------------------------------- every recipe, every mask


@every_recipe
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_bit_for_bit(dtype, recipe):
    data = identity_probe(dtype)
    wanted = expected(recipe, data)
    y3, dx, dw_up, dw_down = run(recipe, *on_device(data))
    oracles.assert_bits(np.abs(np.asarray(dw_down).T), np.abs(wanted.y2_kept[:T]), "Y2 in dW_down")
    np.testing.assert_array_equal(
        np.asarray(dw_up, np.float32).T, wanted.dy1_kept[:T].astype(np.float32), "dY1 in dW_up"
    )
    oracles.assert_close(y3, wanted.y3, "y3")
    oracles.assert_close(dx, wanted.dx, "dx")


@every_recipe
@pytest.mark.parametrize("data", ["float32", "bfloat16", "normal"])
def test_value_and_gradients(data, recipe):
    data = normal_data() if data == "normal" else full_data(data)
    assert_results(run(recipe, *on_device(data)), expected(recipe, data))


@each_path
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_compiled(dtype, recipe):
    data = full_data(dtype)
    assert_results(RUN(recipe, *on_device(data)), expected(recipe, data))


@pytest.mark.parametrize("data", ["float32", "bfloat16", "normal", "probe"])
def test_the_data_tell_the_recipes_apart(data):
    """Else a flag that did nothing would pass the tests above."""
    load = {"normal": normal_data, "probe": lambda: identity_probe("float32")}
    data = load[data]() if data in load else full_data(data)

    def differ(a, b):
        return any(not np.array_equal(getattr(a, n), getattr(b, n)) for n in RESULTS)

    full = expected(FULL, data)
    for change in (
        {"token_wise": False},
        {"mask_consistency": False},
        {"feature_wise": False},
        {"shared_feature_mask": False},
        {"token_grouping": "adjacent"},
        {"token_grouping": "random"},
        {"token_grouping": "random", "grouping_seed": 1},
        {"dense_share": 0.0},
        {"dense_multiple": 16},
    ):
        assert differ(full, expected(dataclasses.replace(FULL, **change), data)), change
    random = dataclasses.replace(FULL, token_grouping="random")
    reseeded = dataclasses.replace(random, grouping_seed=1)
    assert differ(expected(random, data), expected(reseeded, data))


def test_the_data_tell_plausible_mistakes_apart():
    """What a wrong ffn24 might do instead, each seen to change the oracle's dense features."""
    x, w_up, w_down, _ = identity_probe("float32")
    y2 = oracles.relu2(w_up.T)
    before = np.count_nonzero(y2, axis=0)
    after = np.count_nonzero(oracles.keep(y2, oracles.prune_mask(y2, 1)), axis=0)
    right = oracles.densest(before, 8)
    assert set(right) != set(oracles.densest(after, 8)), "counts after pruning"
    assert set(right) != set(oracles.densest(-before, 8)), "the sparsest features"
    assert set(right) != set(oracles.densest(y2.sum(0).astype(int), 8)), "by magnitude"
    last = sorted(range(F), key=lambda f: (-before[f], -f))[:8]
    assert set(right) != set(last), "ties to the highest feature"


@pytest.mark.parametrize("share, multiple", [(0.0, 8), (0.05, 1), (0.5, 8), (0.8, 4)])
def test_sizes_of_the_split(share, multiple):
    recipe = Recipe(dense_share=share, dense_multiple=multiple)
    data = full_data("float32")
    assert_results(RUN(recipe, *on_device(data)), expected(recipe, data))


# ------------------------------------------------------------------------------- against autodiff


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(feature_wise=False),
        Recipe(feature_wise=False, token_wise=False),
        # The unpruned Y2 is saved and dX is dense: the gradient of the dense FFN.
        Recipe(feature_wise=False, mask_consistency=False),
    ],
    ids=name_of,
)
def test_gradients_are_autodiffs_where_nothing_is_pruned_feature_wise(recipe):
    *args, dy3 = on_device(normal_data())
    _, *gradients = run(recipe, *args, dy3)
    y1 = np.asarray(args[0] @ args[1].T)
    # A constant to jax, as under stop_gradient.
    mask = oracles.prune_mask(oracles.relu(y1), 1) if recipe.saves_pruned else np.True_

    def masked_dense(x, w_up, w_down):
        return jnp.where(mask, jnp.maximum(x @ w_up.T, 0) ** 2, 0) @ w_down

    for name, actual, wanted in zip(
        RESULTS[1:], gradients, jax.vjp(masked_dense, *args)[1](dy3), strict=True
    ):
        oracles.assert_close(actual, wanted, name)


def test_dx_is_the_forwards_derivative_in_the_full_recipe():
    """Feature-wise pruning touches the weight gradients only."""
    data = on_device(normal_data())
    _, dx, dw_up, dw_down = run(FULL, *data)
    _, dx_exact, dw_up_exact, dw_down_exact = run(Recipe(feature_wise=False), *data)
    oracles.assert_bits(dx, dx_exact)
    assert not np.allclose(dw_up, dw_up_exact) and not np.allclose(dw_down, dw_down_exact)


def test_check_grads_where_the_function_is_smooth():
    """Y1 far from zero and from ties: a small step changes no choice."""
    rng = np.random.default_rng(0)
    levels = np.stack(
        [rng.permutation([-2.0, -1.0, 0.6, 1.4, 2.2, 3.0, -3.0, 1.0]) for _ in range(8)], axis=1
    )
    w_up = jnp.asarray(levels, jnp.float32)  # [8, 8]; with X near the identity Y1 is near W_up^T
    x = jnp.eye(8) + 0.01 * jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    w_down = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
    recipe = Recipe(feature_wise=False)
    check_grads(
        # Compiled, because check_grads hands over numpy arrays and annotations say jax arrays.
        jax.jit(functools.partial(ffn24, recipe=recipe)),
        (x, w_up, w_down),
        order=1,
        modes=["rev"],
        eps=2e-3,
        rtol=1e-3,
        atol=1e-3,
    )


# -------------------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("consistent", [True, False])
def test_bfloat16_chooses_on_the_rounded_pre_activation(consistent):
    """Compiled, with W_down the identity so that Y3 is the pruned Y2: forward alone and forward
    with save must have chosen alike, and as the oracle does on the rounded Y1."""
    rng = np.random.default_rng(0)

    def sixtyfourths(low, high, *shape):  # Y1 is then exact in float32, and rounded in bfloat16
        return (rng.integers(low, high, shape) / 64).astype(oracles.FLOATS["bfloat16"])

    # Y1 varies by a few units in bfloat16's last place, so that many roundings tie.
    x, w_up, dy3 = (
        sixtyfourths(32, 97, 64, D),
        sixtyfourths(56, 73, F, D),
        sixtyfourths(-64, 65, 64, F),
    )
    recipe = Recipe(feature_wise=False, mask_consistency=consistent)
    x = np.concatenate([x, np.zeros((64, F - D), x.dtype)], axis=1)
    w_up = np.concatenate([w_up, np.zeros((F, F - D), x.dtype)], axis=1)
    data = x, w_up, np.eye(F, dtype=x.dtype), dy3
    y1 = np.asarray(numerics.dot(jnp.asarray(x), jnp.asarray(w_up), contract=(1, 1)))
    wanted = expected(recipe, data, y1=y1)
    exact = x.astype(np.float64) @ w_up.astype(np.float64).T
    assert np.any(oracles.prune_mask(np.maximum(exact, 0), 1) != wanted.token_mask), (
        "no group hangs on the rounding: this test could not fail"
    )
    forward_only = jax.jit(functools.partial(ffn24, recipe=recipe))(*on_device(data[:3]))
    with_save = RUN(recipe, *on_device(data))
    np.testing.assert_array_equal(np.asarray(forward_only) != 0, wanted.y3 != 0)
    oracles.assert_bits(forward_only, wanted.y3)
    oracles.assert_bits(with_save[0], forward_only)
    assert_results(with_save, wanted)


@each_path
def test_bfloat16_gradients_have_the_dtype_of_their_arguments(recipe):
    data = on_device(full_data("bfloat16"))
    assert {result.dtype for result in RUN(recipe, *data)} == {jnp.dtype(jnp.bfloat16)}


def jaxprs_in(part):
    """Every jaxpr inside a jaxpr, itself included."""
    part = getattr(part, "jaxpr", part)
    if isinstance(part, core.Jaxpr):
        yield part
        for equation in part.eqns:
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    yield from jaxprs_in(inner)


@each_path
def test_every_rounding_to_bfloat16_is_one_that_xla_may_not_remove(recipe):
    """Looked up in the program: XLA's CPU compiler keeps plain casts too, its GPU compiler may not,
    so that here no result would tell."""
    program = jax.make_jaxpr(functools.partial(run, recipe))(*on_device(full_data("bfloat16")))
    casts = []
    for jaxpr in jaxprs_in(program):
        made_by = {id(out): e.primitive.name for e in jaxpr.eqns for out in e.outvars}
        casts += [
            made_by.get(id(e.invars[0]))
            for e in jaxpr.eqns
            if e.primitive.name == "convert_element_type"
            and e.invars[0].aval.dtype == jnp.float32
            and e.outvars[0].aval.dtype == jnp.bfloat16
        ]
    assert len(casts) >= 8, "Y1, Y2, Y3, dY2, dY1, dX and two weight gradients"
    assert set(casts) == {"reduce_precision"}


# ------------------------------------------------------------------------------- sizes and shapes


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 11, 12])
def test_other_numbers_of_tokens(tokens):
    """Groups are formed over T padded with zeros to the next multiple of 4, not of 8 or 16."""
    data = full_data("float32", tokens)
    assert_results(RUN(FULL, *on_device(data)), expected(FULL, data))


@each_path
def test_no_tokens(recipe):
    """Nothing in, nothing out; the weights get a gradient of zeros."""
    _, w_up, w_down, _ = on_device(full_data("float32"))
    none = jnp.zeros((0, D))
    y3, dx, dw_up, dw_down = RUN(recipe, none, w_up, w_down, none)
    assert y3.shape == dx.shape == (0, D)
    for gradient in (dw_up, dw_down):
        np.testing.assert_array_equal(gradient, np.zeros((F, D)))


@pytest.mark.parametrize("leading", [(), (1,), (24,), (2, 12), (2, 3, 4), (4, 1, 6)])
def test_any_leading_axes_are_tokens_in_row_major_order(leading):
    tokens = math.prod(leading)
    x, w_up, w_down, dy3 = data = full_data("float32", tokens)
    wanted = expected(FULL, data)
    actual = RUN(FULL, *on_device((x.reshape(*leading, D), w_up, w_down, dy3.reshape(*leading, D))))
    assert actual[0].shape == actual[1].shape == (*leading, D)
    assert_results(
        (actual[0].reshape(tokens, D), actual[1].reshape(tokens, D), *actual[2:]), wanted
    )


def test_nan_stays_visible_and_in_its_token():
    x, w_up, w_down, _ = full_data("float32")
    x = x.copy()
    x[5, 2] = np.nan
    y3 = np.asarray(ffn24(jnp.asarray(x), jnp.asarray(w_up), jnp.asarray(w_down), recipe=FULL))
    assert np.isnan(y3[5]).all()
    assert np.isfinite(np.delete(y3, 5, axis=0)).all()


# ---------------------------------------------------------------------------- jax's transformations


@each_path
def test_vmap_equals_a_loop(recipe):
    """Each example has its own statistics, groups and weights."""
    rng = np.random.default_rng(3)
    batch = [
        jnp.asarray(rng.integers(-3, 4, (3, *s)), jnp.float32)
        for s in ((T, D), (F, D), (F, D), (T, D))
    ]
    mapped = jax.jit(jax.vmap(functools.partial(run, recipe)))(*batch)
    for i in range(3):
        one = tuple(np.asarray(array[i]) for array in batch)
        assert_results([result[i] for result in mapped], expected(recipe, one))


def test_vmap_over_activations_alone_sums_the_weights_gradients():
    rng = np.random.default_rng(3)
    _, w_up, w_down, _ = full_data("float32")
    x, dy3 = rng.integers(-3, 4, (2, 3, T, D)).astype(np.float32)
    y3, dx, dw_up, dw_down = RUN(
        FULL,
        *on_device((x, w_up, w_down, dy3)),
        wrap=functools.partial(jax.vmap, in_axes=(0, None, None)),
    )
    wanted = [expected(FULL, (x[i], w_up, w_down, dy3[i])) for i in range(3)]
    oracles.assert_close(y3, np.stack([w.y3 for w in wanted]))
    oracles.assert_close(dx, np.stack([w.dx for w in wanted]))
    oracles.assert_close(dw_up, sum(w.dw_up for w in wanted))
    oracles.assert_close(dw_down, sum(w.dw_down for w in wanted))


REMATS = {
    "everything": jax.checkpoint,
    "all but Y2": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(ffn.SAVED_Y2)
    ),
    "all but products": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable
    ),
}


@each_path
@pytest.mark.parametrize("remat", REMATS)
def test_remat_changes_no_result(remat, recipe):
    data = full_data("float32")
    assert_results(RUN(recipe, *on_device(data), wrap=REMATS[remat]), expected(recipe, data))


def products(recipe: Recipe, wrap) -> int:
    """Dense products in forward and backward together."""
    layer = wrap(functools.partial(ffn24, recipe=recipe, implementation="reference"))

    def loss(*args):
        return jnp.sum(layer(*args))

    return str(
        jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*on_device(full_data("float32")[:3]))
    ).count("dot_general[")


@each_path
def test_a_policy_that_saves_y2_recomputes_no_product(recipe):
    plain = products(recipe, lambda layer: layer)
    assert products(recipe, REMATS["all but Y2"]) == plain
    assert products(recipe, REMATS["everything"]) > plain


def test_scan_over_stacked_layers_equals_a_loop():
    rng = np.random.default_rng(4)
    w_up, w_down = (jnp.asarray(rng.normal(size=(3, F, D)) / 4, jnp.float32) for _ in range(2))
    x, dy3 = (jnp.asarray(rng.normal(size=(2, T // 2, D)), jnp.float32) for _ in range(2))

    def layer(x, weights):
        return x + ffn24(x, *weights, recipe=FULL), None

    def scanned(x, w_up, w_down):
        return jax.lax.scan(layer, x, (w_up, w_down))[0]

    def looped(x, w_up, w_down):
        for i in range(3):
            x, _ = layer(x, (w_up[i], w_down[i]))
        return x

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, *args):
        y3, pull = jax.vjp(model, *args)
        return y3, *pull(dy3)

    actual, wanted = (gradients(model, x, w_up, w_down) for model in (scanned, looped))
    for name, *pair in zip(RESULTS, actual, wanted, strict=True):
        oracles.assert_close(*pair, name)


def test_scan_in_bfloat16_equals_the_oracle_in_each_layer():
    """Every layer reads the same X, so that no rounding of one decides the masks of the next."""
    x, *weights, dy3 = full_data("bfloat16")
    w_up, w_down = (np.stack([w, w[::-1], -w]) for w in weights)

    @jax.jit
    def gradients(x, w_up, w_down, dy3):
        def scanned(w_up, w_down):
            return jax.lax.scan(lambda x, w: (x, ffn24(x, *w, recipe=FULL)), x, (w_up, w_down))[1]

        y3, pull = jax.vjp(scanned, w_up, w_down)
        return y3, *pull(jnp.stack([dy3] * 3))

    actual = gradients(*on_device((x, w_up, w_down, dy3)))
    for i in range(3):
        wanted = expected(FULL, (x, w_up[i], w_down[i], dy3))
        for result, name in zip(actual, ("y3", "dw_up", "dw_down"), strict=True):
            oracles.assert_close(result[i], getattr(wanted, name), name)


def test_scan_with_remat_in_a_compiled_step():
    """How the model uses it."""
    rng = np.random.default_rng(4)
    w_up, w_down = (jnp.asarray(rng.normal(size=(3, F, D)) / 4, jnp.float32) for _ in range(2))
    x = jnp.asarray(rng.normal(size=(2, T // 2, D)), jnp.float32)

    def loss(wrap, w_up, w_down):
        def layer(x, weights):
            return x + ffn24(x, *weights, recipe=FULL), None

        return jnp.sum(jax.lax.scan(wrap(layer), x, (w_up, w_down))[0] ** 2)

    plain, rematted = (
        jax.jit(jax.grad(functools.partial(loss, wrap), (0, 1)))(w_up, w_down)
        for wrap in (lambda layer: layer, REMATS["all but Y2"])
    )
    for actual, wanted in zip(rematted, plain, strict=True):
        oracles.assert_close(actual, wanted)


# ------------------------------------------------------------------ what the backward pass is given


def saved_arrays(recipe: Recipe, dtype: str, tokens: int):
    args = on_device(full_data(dtype, tokens)[:3])
    _, pull = jax.vjp(lambda *args: ffn24(*args, recipe=recipe), *args)
    return [leaf for leaf in jax.tree.leaves(pull) if leaf.ndim]


def shapes_of(arrays) -> list:
    return sorted((array.shape, array.dtype.name) for array in arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens, padded", [(T, 24), (24, 24)])
@pytest.mark.parametrize("feature_wise", [True, False])
def test_saved_are_x_the_weights_the_compressed_y2_and_counts(feature_wise, tokens, padded, dtype):
    recipe = dataclasses.replace(FULL, feature_wise=feature_wise)
    saved = saved_arrays(recipe, dtype, tokens)
    y2 = [((padded, F // 2), dtype), ((1, 1, 128), "uint32")]
    weights_and_x = [((padded, D), dtype), ((F, D), dtype), ((F, D), dtype)]
    assert shapes_of(saved) in (
        sorted(y2 + weights_and_x + [((F,), "int32")]),
        sorted(y2 + weights_and_x),  # counts may go where no split needs them
    )
    assert all(array.size < padded * F for array in saved), "a dense [T, F] array is saved"


@pytest.mark.parametrize("token_wise", [True, False])
def test_without_consistency_the_unpruned_y2_is_saved_once(token_wise):
    recipe = dataclasses.replace(FULL, token_wise=token_wise, mask_consistency=False)
    saved = saved_arrays(recipe, "bfloat16", 24)
    assert shapes_of(saved) == sorted(
        [
            ((24, F), "bfloat16"),
            ((24, D), "bfloat16"),
            ((F, D), "bfloat16"),
            ((F, D), "bfloat16"),
            ((F,), "int32"),
        ]
    )
    x, w_up, _ = (a.astype(np.float64) for a in full_data("bfloat16", 24)[:3])
    y2 = oracles.relu2(oracles.rounded(x @ w_up.T, oracles.FLOATS["bfloat16"]))
    oracles.assert_bits([array for array in saved if array.shape == (24, F)][0], y2)


def test_the_saved_y2_has_a_name_for_remat_policies():
    assert ffn.SAVED_Y2 == "ffn24_y2"
    args = on_device(full_data("bfloat16", 24)[:3])
    layer = REMATS["all but Y2"](functools.partial(ffn24, recipe=FULL))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        jax.ad_checkpoint.print_saved_residuals(layer, *args)
    kept = [
        line.split()[0]
        for line in printed.getvalue().splitlines()
        if "from the argument" not in line
    ]
    assert sorted(kept) == ["bf16[24,16]", "i32[32]", "u32[1,1,128]"]


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "shapes, dtypes, recipe, message",
    [
        (
            ((4, 8), (32, 6), (32, 6)),
            None,
            FULL,
            "ffn24: x (4, 8), w_up (32, 6), w_down (32, 6) do not fit; "
            "both weights must be [F, D] with D the last axis of x",
        ),
        (
            ((4, 8), (32, 8), (8, 32)),
            None,
            FULL,
            "ffn24: x (4, 8), w_up (32, 8), w_down (8, 32) do not fit; "
            "both weights must be [F, D] with D the last axis of x",
        ),
        (
            ((4, 8), (2, 32, 8), (2, 32, 8)),
            None,
            FULL,
            "ffn24: x (4, 8), w_up (2, 32, 8), w_down (2, 32, 8) do not fit; "
            "both weights must be [F, D] with D the last axis of x",
        ),
        (
            ((), (32, 8), (32, 8)),
            None,
            FULL,
            "ffn24: x (), w_up (32, 8), w_down (32, 8) do not fit; "
            "both weights must be [F, D] with D the last axis of x",
        ),
        (
            ((4, 8), (32, 8), (32, 8)),
            ("bfloat16", "float32", "float32"),
            FULL,
            "ffn24: x is bfloat16, w_up float32, w_down float32; cast them to one dtype",
        ),
        (
            ((4, 8), (32, 8), (32, 8)),
            ("float32", "float32", "bfloat16"),
            FULL,
            "ffn24: x is float32, w_up float32, w_down bfloat16; cast them to one dtype",
        ),
        (
            ((4, 8), (30, 8), (30, 8)),
            None,
            FULL,
            "ffn24: F=30 is no multiple of 4; pad the hidden width",
        ),
        (
            ((4, 8), (30, 8), (30, 8)),
            None,
            Recipe(token_wise=False, feature_wise=False),
            "ffn24: F=30 is no multiple of 4; pad the hidden width",
        ),
        (
            ((4, 8), (32, 8), (32, 8)),
            None,
            Recipe(),
            "dense_share=0.05 of F=32 rounded up to dense_multiple=128 leaves no sparse feature; "
            "lower dense_share or dense_multiple",
        ),
    ],
)
def test_errors(shapes, dtypes, recipe, message):
    """Raised by the forward pass already, also where only the backward pass would stumble."""
    arrays = [
        jnp.ones(shape, dtype)
        for shape, dtype in zip(shapes, dtypes or ["float32"] * 3, strict=True)
    ]
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        ffn24(*arrays, recipe=recipe)
    assert oracles.assert_one_line(error) == message


def test_a_forward_only_recipe_needs_no_split():
    x, w = jnp.ones((4, 8)), jnp.ones((32, 8))
    forward = jax.jit(functools.partial(ffn24, recipe=Recipe(feature_wise=False)))
    assert forward(x, w, w).shape == (4, 8)
