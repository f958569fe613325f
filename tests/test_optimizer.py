"""AdamW against its equations in float64, and what is decayed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import base
from s24jax.errors import InvalidInput
from s24jax.model import Transformer
from s24jax.optimizer import decays, make_optimizer

STEPS = 10


def optimizer_config(**changes) -> ConfigDict:
    """Values far apart from each other, so that none stands in for another."""
    values = {
        "peak_learning_rate": 0.02,
        "learning_rate_warmup_steps": 3,
        "final_share": 0.1,
        "b1": 0.8,
        "b2": 0.95,
        "epsilon": 1e-2,
        "weight_decay": 0.3,
        "clip_norm": 1.0,
    }
    return ConfigDict(values | changes)


class AdamW:
    """Loshchilov and Hutter 2019, algorithm 2, after clipping; in float64."""

    def __init__(self, config, params, decayed):
        self.config, self.decayed, self.taken = config, decayed, 0
        self.params = {name: np.asarray(value, np.float64) for name, value in params.items()}
        self.m = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.params.items()}

    def rate(self) -> float:
        """Of the step to come; see test_schedules."""
        peak, warmup = self.config.peak_learning_rate, self.config.learning_rate_warmup_steps
        if self.taken < warmup:
            return peak * (self.taken + 1) / (warmup + 1)
        cosine = (1 + math.cos(math.pi * (self.taken - warmup) / (STEPS - warmup))) / 2
        return peak * (self.config.final_share + (1 - self.config.final_share) * cosine)

    def step(self, grads):
        c, rate = self.config, self.rate()
        grads = {name: np.asarray(grad, np.float64) for name, grad in grads.items()}
        norm = math.sqrt(sum((grad**2).sum() for grad in grads.values()))
        clip = min(1.0, c.clip_norm / norm)
        self.taken += 1
        for name, grad in grads.items():
            grad = grad * clip
            self.m[name] = c.b1 * self.m[name] + (1 - c.b1) * grad
            self.v[name] = c.b2 * self.v[name] + (1 - c.b2) * grad**2
            m = self.m[name] / (1 - c.b1**self.taken)
            v = self.v[name] / (1 - c.b2**self.taken)
            update = m / (np.sqrt(v) + c.epsilon)
            if name in self.decayed:
                update = update + c.weight_decay * self.params[name]
            self.params[name] = self.params[name] - rate * update


def apply(optimizer, params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state


@pytest.mark.parametrize("size", [30.0, 0.1])
def test_steps_against_the_equations(size):
    """Six steps: the rate warms up and decays, the moments' bias fades. Gradients of norm 30 are
    clipped together, by their global norm; those of norm 0.1 are left alone."""
    rng = np.random.default_rng(0)
    shapes = {"matrix": (3, 4), "scale": (2, 4), "table": (5,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    config = optimizer_config()
    expected = AdamW(config, params, decayed={"matrix", "table"})
    optimizer = make_optimizer(config, STEPS)
    state = optimizer.init(params)
    step = jax.jit(functools.partial(apply, optimizer))
    for _ in range(6):
        grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        grads["table"] *= 10  # the parameters differ in size: clipping each alone would show
        norm = math.sqrt(sum((grad**2).sum() for grad in grads.values()))
        grads = {name: np.float32(size / norm * grad) for name, grad in grads.items()}
        before = dict(expected.params)
        params, state = step(params, state, grads)
        expected.step(grads)
        for name, value in params.items():
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(value, expected.params[name], rtol=2e-6, atol=1e-6)
            assert np.abs(expected.params[name] - before[name]).max() > 1e-4, "the step is felt"


@pytest.mark.parametrize("kind, tied", [("relu2_24", True), ("swiglu", False)])
def test_norm_scales_alone_are_not_decayed(kind, tied):
    """On a model's own parameters: without a gradient a step is the decay alone."""
    model = base.get_config().model.lock()
    model.update(
        {
            "layers": 2,
            "width": 8,
            "heads": 2,
            "hidden": 16,
            "vocabulary": 5,
            "ffn": kind,
            "tie_embedding": tied,
            "dtype": "float32",
            "recipe": {"dense_multiple": 4},
        }
    )
    params = nnx.eval_shape(lambda: nnx.state(Transformer(model, rngs=nnx.Rngs(params=0))))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.7, leaf.dtype), params)
    config = optimizer_config(learning_rate_warmup_steps=0)
    optimizer = make_optimizer(config, STEPS)
    no_gradient = jax.tree.map(jnp.zeros_like, params)
    after, _ = jax.jit(functools.partial(apply, optimizer))(
        params, optimizer.init(params), no_gradient
    )
    kept, decayed = set(), set()
    flags = jax.tree.leaves(decays(params))
    for (path, old), new, flag in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(after), flags, strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if flag:
            decayed.add(name)
            np.testing.assert_allclose(new, old * (1 - 0.02 * 0.3), rtol=1e-6, err_msg=name)
        else:
            kept.add(name)
            oracles.assert_bits(new, old, name)
    assert kept == {"blocks/attention_norm/scale", "blocks/ffn_norm/scale", "norm/scale"}
    assert decayed == {
        "embedding/embedding",
        "blocks/attention/qkv/kernel",
        "blocks/attention/out/kernel",
        "blocks/ffn/w_up",
        "blocks/ffn/w_down",
        *([] if tied else ["unembedding/kernel"]),
        *(["blocks/ffn/w_gate"] if kind == "swiglu" else []),
    }


@pytest.mark.parametrize("warmup, steps", [(10, 10), (11, 10), (-1, 10), (1, 1)])
def test_a_warmup_that_does_not_end_raises(warmup, steps):
    with pytest.raises(InvalidInput) as error:
        make_optimizer(optimizer_config(learning_rate_warmup_steps=warmup), steps)
    assert oracles.assert_one_line(error) == (
        f"optimizer.learning_rate_warmup_steps={warmup} must lie in 0..{steps - 1}, "
        f"inside the run of {steps} steps"
    )


@pytest.mark.parametrize("warmup, steps", [(9, 10), (0, 10), (0, 1)])
def test_the_shortest_and_the_longest_warmup(warmup, steps):
    optimizer = make_optimizer(optimizer_config(learning_rate_warmup_steps=warmup), steps)
    params = {"w": jnp.ones(3)}
    after, _ = apply(optimizer, params, optimizer.init(params), {"w": jnp.ones(3)})
    assert np.isfinite(after["w"]).all() and (after["w"] < 1).all()
