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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from s24jax.mesh import (
    SEQUENCES,
    TENSOR,
    check_model,
    gather,
    make_mesh,
    mean_gradients,
    mean_over_devices,
    on_mesh,
    shardings,
    specs,
)
from s24jax.model import Transformer, check_hidden
from s24jax.optimizer import make_optimizer
from s24jax.recipe import Recipe
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
      state: shapes, types and places of a TrainState.
      init: () -> TrainState.
      train_step: (state, tokens [B, L+1], mode=) -> (state, metrics); donates `state`.
      loss: (params, tokens [B, L+1], mode=) -> mean loss in nats per token.
      probe: (params, tokens [B, L+1]) -> sparsity metrics, each [layers], but density_profile
        [layers, bins].
      model: (params) -> Transformer.
      place: this process's tokens [B / processes, L+1] -> all tokens [B, L+1], each device with its
        sequences.
    """

    state: Any
    init: Any
    train_step: Any
    loss: Any
    probe: Any
    model: Any
    place: Any


def token_loss(model: Transformer, tokens: Int[Array, "B L1"], mode: FFNMode) -> Float[Array, ""]:
    """Mean cross-entropy of the next token, in nats: tokens[:, :-1] predict tokens[:, 1:]."""
    logits_BLV = model(tokens[:, :-1], mode=mode)
    # Not optax's form for integer labels: the gradient of its lookup is a scatter, for which XLA
    # writes all logits in float32 first, 8.6 GB of 16,384 tokens and V 131,072. One-hot labels are
    # a comparison, which it does where it reads the logits.
    labels_BLV = jax.nn.one_hot(tokens[:, 1:], logits_BLV.shape[-1])
    return optax.softmax_cross_entropy(logits_BLV, labels_BLV).mean()


def make_program(config, mesh: Mesh | None = None) -> Program:
    """Builds the functions; nothing is compiled or put on a device before they are called.

    Args:
      config: a whole configuration.
      mesh: where they run; by default the configuration's own.

    Raises:
      InvalidInput: the model's sizes cannot work or do not fit the devices, or it names something
        that does not exist.
      Unsupported: a named implementation cannot run here.
    """
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check_model(mesh.shape, config.model, config.batch_size // max(1, config.accumulate))
    if config.model.ffn in SQUARED_RELU:
        check_hidden(config.model.hidden // mesh.shape[TENSOR], Recipe(**config.model.recipe))
    optimizer = make_optimizer(config.optimizer, config.steps)
    learning_rate = learning_rate_schedule(config.optimizer, config.steps)
    graph, _ = nnx.split(nnx.eval_shape(lambda: _new_model(config)))
    dtype = jnp.dtype(config.model.dtype)

    def model(params) -> Transformer:
        return nnx.merge(graph, gather(params, dtype))

    def loss(params, tokens, mode):
        return token_loss(model(params), tokens, mode)

    def init() -> TrainState:
        params = nnx.state(_new_model(config))
        rng = jax.random.key_data(jax.random.key(config.seed))
        return TrainState(jnp.int32(0), params, optimizer.init(params), rng)

    def loss_and_grads(params, tokens, mode):
        def grads_of(params, tokens):
            return jax.value_and_grad(loss)(params, tokens, mode)

        if config.accumulate > 1:
            grads_of = optax.microbatching.microbatch(
                grads_of,
                argnums=1,
                microbatch_size=tokens.shape[0] // config.accumulate,
                accumulator=optax.microbatching.AccumulationType.MEAN,
            )
        return mean_gradients(grads_of, params, tokens)

    def train_step(state, tokens, mode):
        results = P(), specs(mesh.shape, state.params)
        grads_of = on_mesh(mesh, partial(loss_and_grads, mode=mode), state.params, results)
        value, grads = grads_of(state.params, tokens)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    def mean_loss(params, tokens, mode):
        def local(params, tokens):
            return mean_over_devices(loss(params, tokens, mode))

        return on_mesh(mesh, local, params, P())(params, tokens)

    def probe(params, tokens):
        def local(params, tokens):
            _, observed = model(params)(tokens[:, :-1], observe=observe_ffn)
            return mean_over_devices(observed)

        return on_mesh(mesh, local, params, P())(params, tokens)

    shapes = jax.eval_shape(init)
    placed, everywhere = shardings(mesh, shapes), NamedSharding(mesh, P())

    def place(tokens):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, SEQUENCES), tokens)

    return Program(
        state=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            placed,
        ),
        init=jax.jit(init, out_shardings=placed),
        train_step=jax.jit(
            train_step,
            static_argnames="mode",
            donate_argnums=0,
            out_shardings=(placed, everywhere),
        ),
        loss=jax.jit(mean_loss, static_argnames="mode", out_shardings=everywhere),
        probe=jax.jit(probe, out_shardings=everywhere),
        model=model,
        place=place,
    )


def trace(program: Program, config) -> None:
    """Traces the step in each mode of the run, so that what cannot run is known before it starts.

    Raises:
      InvalidInput: F does not fit the recipe.
      Unsupported: a named implementation cannot run here.
    """
    shape = (config.batch_size, config.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    state = program.state
    for mode in dict.fromkeys((ffn_mode(1, config), ffn_mode(config.steps, config))):
        jax.eval_shape(partial(program.train_step, mode=mode), state, tokens)
    if config.model.ffn in SQUARED_RELU:
        jax.eval_shape(program.probe, state.params, tokens)


def _new_model(config) -> Transformer:
    return Transformer(config.model, rngs=nnx.Rngs(params=config.seed))
