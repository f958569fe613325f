"""Learning rate and FFN mode, step by step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from s24jax.schedules import ffn_mode, learning_rate_schedule


def optimizer(**changes) -> ConfigDict:
    values = {"peak_learning_rate": 3e-3, "learning_rate_warmup_steps": 4, "final_share": 0.1}
    return ConfigDict(values | changes)


def expected(taken: int, config, steps: int) -> float:
    """The rate of the step after `taken` steps."""
    peak, warmup = config.peak_learning_rate, config.learning_rate_warmup_steps
    if taken < warmup:
        return peak * (taken + 1) / (warmup + 1)
    progress = min((taken - warmup) / (steps - warmup), 1)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_share + (1 - config.final_share) * cosine)


@pytest.mark.parametrize("final_share", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 4, 19])
def test_learning_rate_at_every_step(warmup, final_share):
    """Steps taken are counted on the device; past the end the rate stays."""
    config, steps = optimizer(learning_rate_warmup_steps=warmup, final_share=final_share), 20
    schedule = jax.jit(jax.vmap(learning_rate_schedule(config, steps)))
    rates = schedule(jnp.arange(steps + 3))
    np.testing.assert_allclose(
        rates, [expected(taken, config, steps) for taken in range(steps + 3)], rtol=2e-6, atol=1e-9
    )


def test_learning_rate_by_hand():
    schedule = learning_rate_schedule(optimizer(), 20)
    rates = {taken: float(schedule(taken)) for taken in (0, 1, 3, 4, 8, 12, 16, 19, 20)}
    assert rates == pytest.approx(
        {
            0: 0.0006,  # the first step does something
            1: 0.0012,
            3: 0.0024,
            4: 0.003,  # the peak
            8: 0.003 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
            12: 0.00165,  # halfway down
            16: 0.003 * (0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2),
            19: 0.003 * (0.1 + 0.9 * (1 - math.cos(math.pi / 16)) / 2),  # the last step
            20: 0.0003,
        },
        rel=2e-6,
    )


@pytest.mark.parametrize(
    "warmup, modes",
    [
        (2, ["dense", "dense", "dense", "sparse24", "sparse24"]),
        (1, ["dense", "dense", "sparse24", "sparse24", "sparse24"]),
        # Before the first step there is nothing to switch from but "dense".
        (0, ["dense", "sparse24", "sparse24", "sparse24", "sparse24"]),
        (4, ["dense"] * 5),
        (1000, ["dense"] * 5),
    ],
)
def test_the_switch_comes_after_the_warmup(warmup, modes):
    config = ConfigDict({"sparse24_warmup_steps": warmup, "model": {"ffn": "relu2_24"}})
    assert [ffn_mode(step, config) for step in range(5)] == modes


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_dense_kinds_stay_dense(kind, warmup):
    config = ConfigDict({"sparse24_warmup_steps": warmup, "model": {"ffn": kind}})
    assert {ffn_mode(step, config) for step in range(5)} == {"dense"}
