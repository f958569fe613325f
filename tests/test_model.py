"""The transformer against a transcription of it in numpy, and what its docstrings promise."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from jaxprs import equations
from ml_collections import ConfigDict

from configs import base
from s24jax.attention import rotate
from s24jax.errors import InvalidInput, Unsupported
from s24jax.model import FFN, Cache, Transformer
from s24jax.recipe import Recipe
from s24jax.sparsity_metrics import observe_ffn
from s24jax.train_step import token_loss

KINDS = ("swiglu", "gelu", "relu2", "relu2_24")
MODES = ("dense", "sparse24")
SIZES = {
    "layers": 3,
    "width": 16,
    "heads": 2,
    "hidden": 40,
    "vocabulary": 11,
    "ffn": "relu2_24",
    "implementation": "auto",
    "attention": "auto",
    "tie_embedding": True,
    "remat": "none",
    "dtype": "float32",
    "rope_theta": 50.0,
}
RECIPE = {
    "token_wise": True,
    "mask_consistency": True,
    "feature_wise": True,
    "token_grouping": "strided",
    "grouping_seed": 0,
    "dense_share": 0.05,
    "dense_multiple": 8,
    "shared_feature_mask": True,
}
BATCH, LENGTH = 2, 7  # 14 tokens: no multiple of 4
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
FAINT = 3  # a token of so small an embedding that the norm's epsilon shows


# ---------------------------------------------------------------------- the model, transcribed


class Trace(NamedTuple):
    """Results of `transformer`.

    Attributes:
      logits: [B, L, V].
      ffn_inputs: [layers, B, L, D].
      margin: the smallest relative distance between a kept and a dropped value, exact ties left
        out: how much rounding the choice of 2 in 4 stands.
      ties: groups whose second and third largest are equal.
    """

    logits: np.ndarray
    ffn_inputs: np.ndarray
    margin: float
    ties: int


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, position, theta):
    """One head's channels at one position: pair (c, c + C/2) as a complex number, multiplied."""
    half = len(x) // 2
    frequency = np.array([theta ** (-2 * c / len(x)) for c in range(half)])
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequency)
    return np.concatenate([turned.real, turned.imag])


def attention(x, w_qkv, w_out, heads, theta):
    """x [B, L, D]; the columns of w_qkv are, head after head, its queries, keys and values."""
    batch, length, width = x.shape
    channels = width // heads
    mixed = np.zeros_like(x)
    for b, h in itertools.product(range(batch), range(heads)):
        w_q, w_k, w_v = (
            w_qkv[:, (3 * h + part) * channels : (3 * h + part + 1) * channels] for part in range(3)
        )
        q = np.stack([turn(x[b, t] @ w_q, t, theta) for t in range(length)])
        k = np.stack([turn(x[b, t] @ w_k, t, theta) for t in range(length)])
        v = x[b] @ w_v
        for t in range(length):
            score = np.array([q[t] @ k[s] for s in range(t + 1)]) / math.sqrt(channels)
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            mixed[b, t, h * channels : (h + 1) * channels] = weight @ v[: t + 1]
    return mixed @ w_out


def prune(y1):
    """relu(Y1)^2 [T, F] with the two largest of 4 features kept, ties lowest; margin and ties."""
    y1 = np.maximum(y1, 0)
    kept, margin, ties = np.zeros_like(y1), math.inf, 0
    for t, start in itertools.product(range(y1.shape[0]), range(0, y1.shape[1], 4)):
        group = y1[t, start : start + 4].tolist()
        order = sorted(range(4), key=lambda i: (-group[i], i))
        second, third = group[order[1]], group[order[2]]
        ties += second == third > 0
        if second > third:
            margin = min(margin, 1 - third / second)
        for i in order[:2]:
            kept[t, start + i] = group[i] ** 2
    return kept, margin, ties


def gelu(y):
    return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def ffn(x, kind, mode, weights):
    """x [T, D]; returns the output, and the margin and the ties of the choice."""
    y1 = x @ weights["w_up"].T
    margin, ties = math.inf, 0
    if kind == "swiglu":
        gate = x @ weights["w_gate"].T
        y2 = gate / (1 + np.exp(-gate)) * y1
    elif kind == "gelu":
        y2 = gelu(y1)
    elif mode == "sparse24":
        y2, margin, ties = prune(y1)
    else:
        y2 = np.maximum(y1, 0) ** 2
    return y2 @ weights["w_down"], margin, ties


def transformer(params: dict, tokens, config, mode: str) -> Trace:
    """The model in float64 from its parameters, by their paths."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    tokens = np.asarray(tokens)
    batch, length = tokens.shape
    table = params["embedding/embedding"]
    x = table[tokens] * math.sqrt(config.width)
    inputs, margins, ties = [], [], 0
    for layer in range(config.layers):
        p = {
            name.removeprefix("blocks/"): value[layer]
            for name, value in params.items()
            if name.startswith("blocks/")
        }
        normed = rms_norm(x, p["attention_norm/scale"])
        kernels = p["attention/qkv/kernel"], p["attention/out/kernel"]
        x = x + attention(normed, *kernels, config.heads, config.rope_theta)
        inputs.append(rms_norm(x, p["ffn_norm/scale"]))
        weights = {name: p[f"ffn/{name}"] for name in ("w_up", "w_down")}
        if config.ffn == "swiglu":
            weights["w_gate"] = p["ffn/w_gate"]
        y3, margin, tied = ffn(inputs[-1].reshape(-1, config.width), config.ffn, mode, weights)
        x = x + y3.reshape(batch, length, -1)
        margins.append(margin)
        ties += tied
    x = rms_norm(x, params["norm/scale"])
    tied = config.tie_embedding
    out = table.T / math.sqrt(config.width) if tied else params["unembedding/kernel"]
    return Trace(x @ out, np.stack(inputs), min(margins), ties)


def cross_entropy(logits, tokens):
    """Mean loss, in nats, of logits [B, L, V] that predict the next of tokens [B, L + 1]."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], axis=-1).mean()


# ------------------------------------------------------------------------------ the model itself


class Program(NamedTuple):
    """A configuration's model, compiled at most once for each mode.

    Attributes:
      config: the `model` part.
      params: nnx.State with a known draw in float32, and the same `by_name`.
      model: params -> Transformer.
      forward: (params, tokens, mode) -> logits.
      loss: (params, tokens [B, L + 1], mode), not compiled.
      loss_and_grads: of it.
      extend: (params, tokens, cache, mode) -> logits, cache.
    """

    config: Any
    params: Any
    by_name: dict
    model: Any
    forward: Any
    loss: Any
    loss_and_grads: Any
    extend: Any


def settings(**changes) -> ConfigDict:
    """A `model` configuration; what is a field of `Recipe` goes to its recipe."""
    recipe = {key: changes.pop(key, value) for key, value in RECIPE.items()}
    config = base.get_config().model.lock()
    config.update({**SIZES, **changes, "recipe": recipe})
    return config


def build(**changes) -> Transformer:
    """Shapes and dtypes; draws no parameters."""
    return nnx.eval_shape(lambda: Transformer(settings(**changes), rngs=nnx.Rngs(params=0)))


def name_of(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def named(tree) -> dict:
    return {name_of(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def draw(name: str, shape: tuple[int, ...], special: bool) -> np.ndarray:
    """A parameter that depends on its name and shape alone; scales differ from 1.

    `special`: features that tie exactly, and the faint token.
    """
    normal = np.random.default_rng([20, *name.encode()]).normal(size=shape)
    if name.endswith("scale"):
        return (1 + 0.3 * normal).astype(np.float32)
    fan_in = shape[-1] if name.endswith(("w_up", "w_gate", "embedding")) else shape[-2]
    values = normal / math.sqrt(fan_in)
    if special and name == "embedding/embedding":
        values[FAINT] *= 1e-3
    if special and name.endswith("w_up"):
        # One channel each, so that equal features are equal in any order of summation.
        values[..., :6, :] = 0
        values[..., :4, 5] = values[..., 4:6, 7] = 1
    return values.astype(np.float32)


@functools.cache
def program(*, special: bool = False, **changes) -> Program:
    abstract_model = build(**changes)
    graph, abstract = nnx.split(abstract_model)
    params = jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(draw(name_of(path), leaf.shape, special)), abstract
    )

    def model(params):
        return nnx.merge(graph, params)

    def loss(params, tokens, mode):
        return token_loss(model(params), tokens, mode)

    return Program(
        abstract_model.config,
        params,
        named(params),
        model,
        jax.jit(
            lambda params, tokens, mode: model(params)(tokens, mode=mode), static_argnames="mode"
        ),
        loss,
        jax.jit(jax.value_and_grad(loss), static_argnames="mode", compiler_options=QUICK),
        jax.jit(
            lambda params, tokens, cache, mode: model(params).extend(tokens, cache, mode=mode),
            static_argnames="mode",
            compiler_options=QUICK,
        ),
    )


def tokens(length: int = LENGTH) -> jax.Array:
    drawn = np.random.default_rng(4).integers(0, SIZES["vocabulary"], (BATCH, length))
    drawn[0, 0] = FAINT
    return jnp.asarray(drawn, jnp.int32)


def assert_near(actual, expected, bound=1e-5, what=""):
    """Every element within `bound` of the largest magnitude that is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    worst = np.abs(actual - expected).max()
    assert worst <= bound * np.abs(expected).max(), f"{what}: off by {worst:.3g}"


def scans(function, *args) -> list:
    found = equations(jax.make_jaxpr(function)(*args).jaxpr)
    return [equation for equation in found if equation.primitive.name == "scan"]


def outputs(equation) -> list[tuple]:
    return sorted((var.aval.shape, var.aval.dtype.name) for var in equation.outvars)


# --------------------------------------------------------------------------------- forward pass


CASES = [
    *(({"ffn": kind, "tie_embedding": True}, "dense") for kind in KINDS),
    ({"ffn": "swiglu", "tie_embedding": False}, "dense"),
    ({"ffn": "relu2_24", "tie_embedding": True}, "sparse24"),
    ({"ffn": "relu2_24", "tie_embedding": False}, "sparse24"),
]


@pytest.mark.parametrize("changes, mode", CASES)
def test_logits_against_the_transcription(changes, mode):
    p = program(special=True, **changes)
    logits = p.forward(p.params, tokens(), mode)
    expected = transformer(p.by_name, tokens(), p.config, mode)
    if mode == "sparse24":
        assert expected.ties > 10, "ties must be there to be broken"
        assert expected.margin > 3e-5, "no other choice may hang on rounding; draw other weights"
        dense = transformer(p.by_name, tokens(), p.config, "dense")
        assert np.abs(dense.logits - expected.logits).max() > 0.1, "the pruning must be felt"
    assert logits.dtype == jnp.float32
    assert_near(logits, expected.logits)


def test_the_faint_token_shows_the_epsilon():
    """Without it no comparison above could tell one epsilon from another."""
    p = program(special=True)
    faint = p.by_name["embedding/embedding"][FAINT] * math.sqrt(SIZES["width"])
    assert 1e-7 < (faint.astype(np.float64) ** 2).mean() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_ffn_alone_takes_any_leading_axes(kind):
    recipe = Recipe(dense_multiple=8)
    module = FFN(16, 40, kind, recipe=recipe, rngs=nnx.Rngs(params=3))
    weights = {
        name: np.asarray(getattr(module, name)[...], np.float64)
        for name in ("w_up", "w_down", "w_gate")
        if hasattr(module, name)
    }
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 5, 16)), jnp.float32)
    x_TD = np.asarray(x, np.float64).reshape(-1, 16)
    for mode in MODES if kind == "relu2_24" else MODES[:1]:
        call = jax.jit(functools.partial(module, mode=mode))
        expected, _, _ = ffn(x_TD, kind, mode, weights)
        assert_near(call(x), expected.reshape(x.shape), what=mode)
        assert_near(call(x[0, 0, 0]), expected[0], what=f"{mode}, one token")
    assert_near(module.pre_activation(x).reshape(15, 40), x_TD @ weights["w_up"].T)


def test_mode_defaults_to_dense():
    """The same program, equation for equation."""
    p = program()
    model, cache = p.model(p.params), p.model(p.params).empty_cache(BATCH, LENGTH)
    for call, args in ((model, (tokens(),)), (model.extend, (tokens(), cache))):
        default, dense, sparse = (
            str(jax.make_jaxpr(functools.partial(call, **mode))(*args))
            for mode in ({}, {"mode": "dense"}, {"mode": "sparse24"})
        )
        assert default == dense != sparse


def test_dense_relu2_24_is_relu2_bit_for_bit():
    with_recipe, plain = program(), program(ffn="relu2")
    text = tokens(LENGTH + 1)
    oracles.assert_bits(
        with_recipe.forward(with_recipe.params, tokens(), "dense"),
        plain.forward(plain.params, tokens(), "dense"),
    )
    loss, grads = with_recipe.loss_and_grads(with_recipe.params, text, "dense")
    plain_loss, plain_grads = plain.loss_and_grads(plain.params, text, "dense")
    oracles.assert_bits(loss, plain_loss)
    grads, plain_grads = named(grads), named(plain_grads)
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        oracles.assert_bits(grad, plain_grads[name], name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changed", [1, 4, LENGTH - 1])
def test_no_token_sees_a_later_one(mode, changed):
    """Exact: rows of a product do not mix, and a masked weight is exp of -huge, which is 0."""
    p = program(special=True)
    other = tokens().at[0, changed].set((tokens()[0, changed] + 1) % SIZES["vocabulary"])
    before = np.asarray(p.forward(p.params, tokens(), mode))
    after = np.asarray(p.forward(p.params, other, mode))
    oracles.assert_bits(after[0, :changed], before[0, :changed], "earlier tokens")
    oracles.assert_bits(after[1], before[1], "the other sequence")
    assert (np.abs(after - before)[0, changed:].max(axis=-1) > 1e-3).all(), "later tokens must see"


def test_the_recipe_and_the_implementation_reach_the_ffn():
    p = program(token_wise=False, feature_wise=False)
    dense, sparse = (p.forward(p.params, tokens(), mode) for mode in MODES)
    assert_near(sparse, dense, what="a recipe without pruning is dense")
    ffns = p.model(p.params).blocks.ffn
    assert ffns.recipe == Recipe(token_wise=False, feature_wise=False, dense_multiple=8)
    if jax.default_backend() == "cpu":
        named_p = program(implementation="cuda")
        for mode, op in zip(MODES, ("relu2_ffn", "matmul_sparsify24"), strict=True):
            with pytest.raises(Unsupported, match=f"{op}: implementation 'cuda' cannot run"):
                jax.eval_shape(
                    functools.partial(named_p.forward, mode=mode), named_p.params, tokens()
                )


# ------------------------------------------------------------------------------ rotary positions


def heads_of(seed, length, channels=8):
    return np.random.default_rng(seed).normal(size=(2, length, 3, channels)).astype(np.float32)


def test_rotate_against_complex_numbers():
    x, positions = heads_of(0, 6), np.array([0, 1, 2, 7, 100, 4095], np.int32)
    expected = np.zeros(x.shape)
    for b, t, h in np.ndindex(*x.shape[:3]):
        expected[b, t, h] = turn(x[b, t, h].astype(np.float64), int(positions[t]), 10000.0)
    actual = rotate(jnp.asarray(x), jnp.asarray(positions), 10000.0)
    # The angle itself is rounded to float32: 4095 radians to 2e-4.
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    np.testing.assert_allclose(actual[:, :4], expected[:, :4], atol=5e-6)
    oracles.assert_bits(actual[:, 0], x[:, 0], "position 0 turns nothing")


def test_rotate_keeps_the_norm_of_every_pair():
    x = heads_of(1, 5)
    turned = np.asarray(rotate(jnp.asarray(x), jnp.arange(5), 50.0))
    pairs, turned_pairs = (y.reshape(*y.shape[:-1], 2, 4) for y in (x, turned))
    np.testing.assert_allclose(
        np.linalg.norm(turned_pairs, axis=-2), np.linalg.norm(pairs, axis=-2), rtol=1e-6
    )


def test_scores_depend_on_relative_positions_alone():
    q, k = heads_of(2, 1), heads_of(3, 1)

    def score(at_q, at_k):
        turned = (rotate(jnp.asarray(x), jnp.array([at]), 50.0) for x, at in ((q, at_q), (k, at_k)))
        return np.einsum("blhc,blhc->bh", *map(np.asarray, turned))

    np.testing.assert_allclose(score(9, 2), score(7, 0), atol=2e-5)
    np.testing.assert_allclose(score(2, 9), score(0, 7), atol=2e-5)
    assert np.abs(score(9, 2) - score(2, 9)).min() > 1e-3, "the sign of the distance counts"
    assert np.abs(score(9, 2) - score(9, 3)).min() > 1e-3


def test_rotate_computes_in_float32():
    """Positions beyond 256 have no bfloat16 of their own."""
    x = jnp.asarray(heads_of(4, 3), jnp.bfloat16)
    positions = jnp.array([257, 1001, 4095])
    expected = rotate(x.astype(jnp.float32), positions, 10000.0).astype(jnp.bfloat16)
    oracles.assert_bits(rotate(x, positions, 10000.0), expected)


# -------------------------------------------------------------------------------- backward pass


@pytest.mark.parametrize(
    "changes, mode",
    [
        ({"ffn": "swiglu", "tie_embedding": False}, "dense"),
        ({"ffn": "gelu"}, "dense"),
        ({}, "dense"),
        ({"feature_wise": False}, "sparse24"),
    ],
)
def test_gradients_against_finite_differences(changes, mode):
    """Of the transcription, parameter by parameter and in each layer; 2:4 without feature-wise
    pruning is the derivative of its own forward pass."""
    p = program(**changes)
    text = tokens(LENGTH + 1)
    loss, grads = p.loss_and_grads(p.params, text, mode)
    grads = named(grads)
    trace = transformer(p.by_name, text[:, :-1], p.config, mode)
    assert trace.margin > 3e-5, "a choice may not change with the step; draw other weights"
    np.testing.assert_allclose(loss, cross_entropy(trace.logits, text), rtol=1e-6)
    rng, step = np.random.default_rng(5), 1e-5
    for name, value in p.by_name.items():
        for layer in range(SIZES["layers"]) if name.startswith("blocks/") else [...]:
            direction = np.zeros(value.shape)
            direction[layer] = rng.normal(size=value[layer].shape)
            losses = [
                cross_entropy(
                    transformer(
                        p.by_name | {name: value + sign * step * direction},
                        text[:, :-1],
                        p.config,
                        mode,
                    ).logits,
                    text,
                )
                for sign in (1, -1)
            ]
            expected = (losses[0] - losses[1]) / (2 * step)
            scale = np.linalg.norm(grads[name][layer])
            assert abs((grads[name] * direction).sum() - expected) < 1e-4 * scale, (name, layer)


@pytest.mark.parametrize(
    "changes, mode",
    [
        ({"ffn": "swiglu", "tie_embedding": False}, "dense"),
        ({"ffn": "gelu"}, "dense"),
        ({"ffn": "relu2"}, "dense"),
        *(({}, mode) for mode in MODES),
    ],
)
def test_every_parameter_of_every_layer_gets_a_gradient(changes, mode):
    p = program(**changes)
    loss, grads = p.loss_and_grads(p.params, tokens(LENGTH + 1), mode)
    assert loss.dtype == jnp.float32
    for name, grad in named(grads).items():
        assert grad.dtype == np.float32, name
        assert np.isfinite(grad).all(), name
        for layer in range(SIZES["layers"]) if name.startswith("blocks/") else [...]:
            assert np.abs(grad[layer]).max() > 1e-6, (name, layer)


def test_the_full_recipe_changes_the_weight_gradients():
    """Feature-wise pruning touches the FFN's weights of the last layer and nothing after it."""
    full, forward_only = program(), program(feature_wise=False)
    text = tokens(LENGTH + 1)
    loss, grads = full.loss_and_grads(full.params, text, "sparse24")
    other_loss, other = forward_only.loss_and_grads(forward_only.params, text, "sparse24")
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    grads, other = named(grads), named(other)
    for name, grad in grads.items():
        if name in ("blocks/ffn/w_up", "blocks/ffn/w_down"):
            assert np.abs(grad - other[name])[-1].max() > 1e-2 * np.abs(grad[-1]).max(), name
        else:
            assert_near(grad, other[name], what=f"{name}: dX is not pruned further")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("remat", ["full", "save_y2"])
def test_remat_changes_nothing_but_memory(remat, mode):
    none, some = program(), program(remat=remat)
    text = tokens(LENGTH + 1)
    loss, grads = none.loss_and_grads(none.params, text, mode)
    some_loss, some_grads = some.loss_and_grads(some.params, text, mode)
    np.testing.assert_allclose(some_loss, loss, rtol=1e-6)
    some_grads = named(some_grads)
    for name, grad in named(grads).items():
        assert_near(some_grads[name], grad, bound=2e-6, what=name)


def saved(mode, **changes):
    """What the forward scan of a gradient leaves for the backward one, stacked over the layers."""
    p = program(**changes)
    loss = functools.partial(p.loss, tokens=tokens(LENGTH + 1), mode=mode)
    forward, backward = scans(jax.grad(loss), p.params)
    assert backward.params["reverse"] and not forward.params["reverse"]
    carry = ((BATCH, LENGTH, SIZES["width"]), SIZES["dtype"])
    stacked = outputs(forward)
    stacked.remove(carry)
    return stacked


def test_what_remat_saves():
    """Shapes tell "save_y2" from "full", which give the same gradients."""
    layers, hidden, width = SIZES["layers"], SIZES["hidden"], SIZES["width"]
    residual = ((layers, BATCH, LENGTH, width), "float32")
    padded = 16  # tokens
    y2 = [
        ((layers, 1, 1, 128), "uint32"),
        ((layers, padded, hidden // 2), "float32"),
        ((layers, hidden), "int32"),
    ]
    assert saved("dense", remat="full") == [residual]
    assert saved("sparse24", remat="full") == [residual]
    y1 = ((layers, BATCH * LENGTH, hidden), "float32")
    assert saved("dense", remat="save_y2") == sorted([residual, y1])
    assert saved("sparse24", remat="save_y2") == sorted([residual, *y2])
    everything = saved("sparse24", remat="none")
    assert set(y2) < set(everything)
    for shape, _ in everything:
        assert hidden not in shape or shape == (layers, hidden), "Y1 and Y2 are not saved dense"
    assert len(everything) > len(y2) + 1


# -------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("mode", MODES)
def test_layers_are_traced_once(mode):
    """One layer in a scan, and nothing of it outside: the rest is as long for 3 layers as for 5."""
    lengths = {}
    for layers in (3, 5):
        p = program(layers=layers)
        function = functools.partial(p.forward, tokens=tokens(), mode=mode)
        (scan,) = scans(function, p.params)
        assert scan.params["length"] == layers
        found = list(equations(jax.make_jaxpr(function)(p.params).jaxpr))
        lengths[layers] = len(found)
        inside = list(equations(scan.params["jaxpr"].jaxpr))
        names = [equation.primitive.name for equation in inside]
        assert names.count("dot_general") == 6  # qkv, scores, mix, out, up, down
        outside = [e.primitive.name for e in found].count("dot_general") - 6
        assert outside == 1, "the unembedding"
    assert lengths[3] == lengths[5]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("remat", ["none", "save_y2", "full"])
def test_layers_are_no_loop_in_training(remat, mode):
    """Forward and backward; without a loop nothing is copied into stacks."""
    p = program(remat=remat)
    gradients = jax.jit(jax.grad(p.loss), static_argnums=2)
    assert "stablehlo.while" not in gradients.lower(p.params, tokens(), mode).as_text()


def test_observed_layers_are_a_loop():
    """Written out, XLA for a GPU computes the metrics of many layers at once: 34 GB instead of 3
    for the 1.5B model, 32,768 tokens."""
    p = program()
    observed = jax.jit(lambda params: p.model(params)(tokens(), observe=observe_ffn)[1])
    assert "stablehlo.while" in observed.lower(p.params).as_text()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_saved_without_a_gradient(mode):
    """The scan over layers hands on the residual stream, `extend`'s the cache as well. XLA holds
    no more for many layers than for few, but for their weights."""
    p = program()
    stream = ((BATCH, LENGTH, SIZES["width"]), "float32")
    (scan,) = scans(lambda params: p.forward(params, tokens(), mode), p.params)
    assert outputs(scan) == [stream]

    cache = p.model(p.params).empty_cache(BATCH, 9)
    (scan,) = scans(lambda params: p.model(params).extend(tokens(), cache, mode=mode), p.params)
    assert outputs(scan) == sorted([stream, *((cache.keys.shape, "float32") for _ in range(2))])

    temporary, weights = {}, {}
    for layers in (3, 12):
        p = program(layers=layers)
        compiled = p.forward.lower(p.params, tokens(512), mode).compile()
        temporary[layers] = compiled.memory_analysis().temp_size_in_bytes
        weights[layers] = sum(leaf.nbytes for leaf in jax.tree.leaves(p.params))
    one_activation = 4 * BATCH * 512 * SIZES["width"]  # the smallest that a layer could save
    assert weights[12] - weights[3] < 9 * one_activation
    assert temporary[12] - temporary[3] <= weights[12] - weights[3]


@pytest.mark.parametrize("changes, mode", [({}, "dense"), ({"remat": "full"}, "sparse24")])
def test_observe_sees_every_layer(changes, mode):
    p = program(**changes)

    def observe(ffn, h):
        return {"h": h, "w_down": ffn.w_down[...], "y1": ffn.pre_activation(h)}

    logits, observed = jax.jit(
        lambda params: p.model(params)(tokens(), mode=mode, observe=observe)
    )(p.params)
    assert_near(logits, p.forward(p.params, tokens(), mode), bound=1e-6)
    expected = transformer(p.by_name, tokens(), p.config, mode)
    assert_near(observed["h"], expected.ffn_inputs)
    np.testing.assert_array_equal(observed["w_down"], p.by_name["blocks/ffn/w_down"])
    y1 = np.einsum("lbtd,lfd->lbtf", expected.ffn_inputs, p.by_name["blocks/ffn/w_up"])
    assert_near(observed["y1"], y1)


# -------------------------------------------------------------------------------------- extend


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunks", [(3, 1, 1, 1, 1), (1, 3, 2, 1)])
def test_extend_gives_the_full_forward_pass(chunks, mode):
    p = program(special=True)
    room = LENGTH + 4
    model = p.model(p.params)
    cache = model.empty_cache(BATCH, room)
    assert cache.keys.shape == cache.values.shape == (SIZES["layers"], BATCH, room, 2, 8)
    assert cache.length.dtype == jnp.int32 and cache.length == 0
    # Only `length` says what is valid.
    cache = Cache(jnp.full_like(cache.keys, 30.0), jnp.full_like(cache.values, -7.0), cache.length)
    full = np.asarray(p.forward(p.params, tokens(), mode))
    assert np.abs(full[0] - full[1]).max() > 0.1, "sequences that could be mixed up"
    end = 0
    for chunk in chunks:
        start, end = end, end + chunk
        before = cache
        logits, cache = p.extend(p.params, tokens()[:, start:end], cache, mode)
        assert logits.dtype == jnp.float32
        assert_near(logits, full[:, end - 1], what=f"after {end} tokens")
        assert cache.length.dtype == jnp.int32 and cache.length == end
        for new, old in ((cache.keys, before.keys), (cache.values, before.values)):
            assert new.dtype == old.dtype
            np.testing.assert_array_equal(new[:, :, :start], old[:, :, :start])
            np.testing.assert_array_equal(new[:, :, end:], old[:, :, end:])
            assert (new[:, :, start:end] != old[:, :, start:end]).any(axis=(0, 1, 3, 4)).all()


def test_decoding_compiles_once():
    p = program(vocabulary=7)
    cache = p.model(p.params).empty_cache(1, 4)
    for _ in range(4):
        logits, cache = p.extend(p.params, jnp.zeros((1, 1), jnp.int32), cache, "sparse24")
    assert p.extend._cache_size() == 1
    assert logits.shape == (1, 7)


# ----------------------------------------------------------------------- parameters and dtypes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_number_of_parameters(kind, tied):
    p = program(ffn=kind, tie_embedding=tied)
    layers, width, hidden, vocabulary = (
        SIZES[key] for key in ("layers", "width", "hidden", "vocabulary")
    )
    per_layer = 4 * width**2 + (3 if kind == "swiglu" else 2) * hidden * width + 2 * width
    expected = (1 if tied else 2) * vocabulary * width + layers * per_layer + width
    assert sum(value.size for value in p.by_name.values()) == expected
    shapes = {name: value.shape for name, value in p.by_name.items()}
    for weight in ("w_up", "w_down", *(["w_gate"] if kind == "swiglu" else [])):
        assert shapes[f"blocks/ffn/{weight}"] == (layers, hidden, width), "feature-major"


def test_the_first_draw():
    """Rows of the embedding about 1 long; products keep the scale, and what writes to the residual
    stream is smaller by sqrt(2 * layers); every layer has its own."""

    sizes = settings(width=64, hidden=256, vocabulary=300, ffn="swiglu", tie_embedding=False)

    def first(key):
        return nnx.state(Transformer(sizes, rngs=nnx.Rngs(params=key)))

    first = jax.jit(first, compiler_options=QUICK)
    params, other = (named(first(jax.random.key(seed))) for seed in (0, 1))
    gain = (2 * SIZES["layers"]) ** -0.5
    deviation = {
        "embedding/embedding": 64**-0.5,
        "unembedding/kernel": 64**-0.5,
        "blocks/attention/qkv/kernel": 64**-0.5,
        "blocks/attention/out/kernel": gain * 64**-0.5,
        "blocks/ffn/w_up": 64**-0.5,
        "blocks/ffn/w_gate": 64**-0.5,
        "blocks/ffn/w_down": gain * 256**-0.5,
    }
    matrices = {name for name in params if not name.endswith("scale")}
    assert matrices == deviation.keys()
    for name, value in params.items():
        assert value.dtype == np.float32, name
        if name not in matrices:
            np.testing.assert_array_equal(value, 1.0, err_msg=name)
            continue
        assert not np.array_equal(value, other[name]), name
        layers = value if name.startswith("blocks/") else value[None]
        for layer in layers:
            np.testing.assert_allclose(layer.std(), deviation[name], rtol=0.05, err_msg=name)
            assert abs(layer.mean()) < 0.05 * layer.std(), name
        for one, two in itertools.combinations(layers, 2):
            assert abs((one * two).mean()) < 0.05 * deviation[name] ** 2, f"{name}: layers alike"
    weights = [params[f"blocks/ffn/{name}"] for name in ("w_up", "w_gate", "w_down")]
    for one, two in itertools.combinations(weights, 2):
        assert abs((one * two).mean()) < 0.05 * one.std() * two.std()


def test_an_ffn_alone_has_no_gain():
    module = FFN(64, 256, "relu2", rngs=nnx.Rngs(params=0))
    np.testing.assert_allclose(module.w_down[...].std(), 256**-0.5, rtol=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode):
    """Parameters, gradients and logits in float32, all between in bfloat16."""
    p = program(dtype="bfloat16", tie_embedding=False)
    drawn = nnx.state(build(dtype="bfloat16", tie_embedding=False))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(drawn)} == {"float32"}
    logits, (h, y1) = jax.jit(
        lambda params: p.model(params)(
            tokens(), mode=mode, observe=lambda ffn, h: (h, ffn.pre_activation(h))
        ),
        compiler_options=QUICK,
    )(p.params)
    assert logits.dtype == jnp.float32
    assert h.dtype == y1.dtype == jnp.bfloat16
    function = functools.partial(p.forward, tokens=tokens(), mode=mode)
    (scan,) = scans(function, p.params)
    assert outputs(scan) == [((BATCH, LENGTH, SIZES["width"]), "bfloat16")], "the residual stream"
    kinds = [
        {var.aval.dtype.name for var in equation.invars}
        for equation in equations(jax.make_jaxpr(function)(p.params).jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    # Attention weights may stay in float32 for the product with the values.
    assert len(kinds) == 7 and kinds.count({"bfloat16"}) >= 6

    expected = transformer(p.by_name, tokens(), p.config, mode)
    assert_near(logits, expected.logits, bound=0.05)
    loss = functools.partial(p.loss, tokens=tokens(LENGTH + 1), mode=mode)
    loss, grads = jax.eval_shape(jax.value_and_grad(loss), p.params)
    assert loss.dtype == jnp.float32
    assert {grad.dtype.name for grad in jax.tree.leaves(grads)} == {"float32"}

    cache = p.model(p.params).empty_cache(BATCH, LENGTH)
    last, cache = p.extend(p.params, tokens(), cache, mode)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    assert_near(last, logits[:, -1], bound=0.02)


def test_gradients_of_frequent_tokens_are_summed_in_float32():
    """A sum of ones in bfloat16 stops at 256."""
    p = program(dtype="bfloat16", tie_embedding=False)
    often = jnp.zeros((4, 1000), jnp.int32)
    grads = jax.grad(lambda params: p.model(params)._embed(often).astype(jnp.float32).sum())(
        p.params
    )
    row = grads["embedding"]["embedding"][...][0]
    np.testing.assert_allclose(row, often.size * math.sqrt(SIZES["width"]), rtol=0.01)


def test_the_configuration_is_copied_and_locked():
    config = settings()
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0)))
    config.width = 999
    assert model.config.width == SIZES["width"]
    with pytest.raises(AttributeError):
        model.config.depth = 1


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "changes, value, mend",
    [
        ({"ffn": "geglu"}, "'geglu'", "swiglu, gelu, relu2, relu2_24"),
        ({"width": 18, "heads": 4}, "width=18", "2 * model.heads"),
        ({"width": 12, "heads": 4}, "width=12", "2 * model.heads"),  # heads of width 3
        ({"hidden": 42}, "F=42", "use 44"),
        ({"dense_multiple": 128}, "dense_multiple=128", "lower dense_share or dense_multiple"),
        ({"dense_share": 0.9}, "dense_share=0.9 of F=40", "lower dense_share or dense_multiple"),
        ({"token_grouping": "near"}, "'near'", "strided, adjacent, random"),
        ({"remat": "some"}, "model.remat='some'", "none, full, save_y2"),
        ({"dtype": "float16"}, "model.dtype='float16'", "float32 or bfloat16"),
        ({"ffn": "gelu", "implementation": "fast"}, "'fast'", "use 'auto' or one of reference"),
        (
            {"attention": "flash"},
            "attention: implementation 'flash'",
            "'auto' or one of cudnn, xla",
        ),
    ],
)
def test_what_cannot_work_says_so(changes, value, mend):
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        build(**changes)
    message = oracles.assert_one_line(error)
    assert value in message and mend in message


def test_what_a_kind_and_a_recipe_do_not_need_is_not_asked_of_them():
    program(ffn="relu2", hidden=42, dense_multiple=128)
    program(feature_wise=False, dense_multiple=128)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_kinds_without_squared_relu_have_no_kernels(kind):
    for name in ("triton", "cuda"):
        with pytest.raises(Unsupported) as error:
            build(ffn=kind, implementation=name)
        message = oracles.assert_one_line(error)
        assert f"ffn {kind}" in message and f"'{name}'" in message
        assert "use 'auto'" in message
    for name in ("auto", "reference"):
        FFN(8, 16, kind, implementation=name, rngs=nnx.Rngs(params=0))


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_relu2_is_an_op_whose_implementation_can_be_named(name):
    module = FFN(8, 16, "relu2", implementation=name, rngs=nnx.Rngs(params=0))
    with pytest.raises(Unsupported) as error:
        module(jnp.ones((4, 8)))
    message = oracles.assert_one_line(error)
    assert message.startswith(f"relu2_ffn: implementation '{name}' cannot run")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN can run")
def test_cudnn_attention_needs_a_gpu():
    with pytest.raises(Unsupported) as error:
        build(attention="cudnn")
    message = oracles.assert_one_line(error)
    assert "attention: implementation 'cudnn'" in message and "needs an NVIDIA GPU" in message
    p = program(attention="xla")
    logits = p.forward(p.params, tokens(), "dense")
    default = program()
    oracles.assert_bits(logits, default.forward(default.params, tokens(), "dense"))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_dense_kinds_have_no_mode_sparse24(kind):
    p = program(ffn=kind)
    model = p.model(p.params)
    calls = (
        lambda: model(tokens(), mode="sparse24"),
        lambda: model.extend(tokens(), model.empty_cache(BATCH, LENGTH), mode="sparse24"),
    )
    for call in calls:
        with pytest.raises(InvalidInput) as error:
            jax.eval_shape(call)
        message = oracles.assert_one_line(error)
        assert repr(kind) in message and "use mode 'dense'" in message


def test_an_unknown_mode_raises():
    module = FFN(8, 16, "relu2_24", recipe=Recipe(dense_multiple=4), rngs=nnx.Rngs(params=0))
    with oracles.without_type_checks(), pytest.raises(InvalidInput) as error:
        module(jnp.ones((4, 8)), "sparse")
    assert "'sparse'" in oracles.assert_one_line(error)


@pytest.mark.parametrize("name", ["layers", "heads"])
def test_none_of_what_there_must_be_raises(name):
    with pytest.raises(InvalidInput) as error:
        build(**{name: 0})
    assert str(error.value) == f"model.{name}=0 must be at least 1"
