"""One optimizer step and one validation batch, compiled.

The FFN's mode is a static argument: a run compiles the dense and the 2:4 step once each, and the
training loop chooses between them.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from s24jax.model import Transformer
from s24jax.optimizer import make_optimizer
from s24jax.schedules import ffn_mode, learning_rate_schedule
from s24jax.sparsity_metrics import SQUARED_RELU, observe_ffn
from s24jax.typing import Array, FFNMode, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: optimizer steps taken, int32.
      params: the model's parameters (nnx.State), float32.
      optimizer: optax state.
      rng: key data for sampling, uint32.
    """

    # Any: jax also puts shapes and shardings in a pytree's leaves.
    step: Any
    params: Any
    optimizer: Any
    rng: Any


class Program(NamedTuple):
    """The compiled functions of one configuration.

    Attributes:
      init: () -> TrainState.
      train_step: (state, tokens [B, L+1], mode=) -> (state, metrics); donates `state`.
      loss: (params, tokens [B, L+1], mode=) -> mean loss in nats per token.
      probe: (params, tokens [B, L+1]) -> sparsity metrics, each [layers].
      model: (params) -> Transformer.
    """

    init: Any
    train_step: Any
    loss: Any
    probe: Any
    model: Any


def token_loss(model: Transformer, tokens: Int[Array, "B L1"], mode: FFNMode) -> Float[Array, ""]:
    """Mean cross-entropy of the next token, in nats: tokens[:, :-1] predict tokens[:, 1:]."""
    logits_BLV = model(tokens[:, :-1], mode=mode)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens[:, 1:]).mean()


def make_program(config) -> Program:
    """Builds the functions; nothing is compiled or put on a device before they are called."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    learning_rate = learning_rate_schedule(config.optimizer, config.steps)
    graph, _ = nnx.split(nnx.eval_shape(lambda: _new_model(config)))

    def model(params) -> Transformer:
        return nnx.merge(graph, params)

    def loss(params, tokens, mode):
        return token_loss(model(params), tokens, mode)

    def init() -> TrainState:
        params = nnx.state(_new_model(config))
        rng = jax.random.key_data(jax.random.key(config.seed))
        return TrainState(jnp.int32(0), params, optimizer.init(params), rng)

    def train_step(state, tokens, mode):
        def grads_of(params, tokens):
            return jax.value_and_grad(loss)(params, tokens, mode)

        if config.accumulate > 1:
            grads_of = optax.microbatching.microbatch(
                grads_of,
                argnums=1,
                microbatch_size=config.batch_size // config.accumulate,
                accumulator=optax.microbatching.AccumulationType.MEAN,
            )
        value, grads = grads_of(state.params, tokens)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    def probe(params, tokens):
        _, observed = model(params)(tokens[:, :-1], observe=observe_ffn)
        return observed

    return Program(
        init=jax.jit(init),
        train_step=jax.jit(train_step, static_argnames="mode", donate_argnums=0),
        loss=jax.jit(loss, static_argnames="mode"),
        probe=jax.jit(probe),
        model=model,
    )


def trace(program: Program, config) -> None:
    """Traces the step in each mode of the run, so that what cannot run is known before it starts.

    Raises:
      InvalidInput: F does not fit the recipe.
      Unsupported: a named implementation cannot run here.
    """
    shape = (config.batch_size, config.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    state = jax.eval_shape(program.init)
    for mode in dict.fromkeys((ffn_mode(1, config), ffn_mode(config.steps, config))):
        jax.eval_shape(partial(program.train_step, mode=mode), state, tokens)
    if config.model.ffn in SQUARED_RELU:
        jax.eval_shape(program.probe, state.params, tokens)


def _new_model(config) -> Transformer:
    return Transformer(config.model, rngs=nnx.Rngs(params=config.seed))
