"""The operands of FFNs of a trained model, on its own validation text."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from s24jax.bench.ffn_operands import Case, Operands, some_layers
from s24jax.data import prepare, validation_batches
from s24jax.errors import InvalidInput
from s24jax.evaluate import restore_run
from s24jax.sparsity_metrics import SQUARED_RELU

TOKENS = 16384


def restore_relu2(workdir) -> tuple:
    """Config, program and state of a run with Squared ReLU, at its last checkpoint, on one device.

    Raises:
      InvalidInput: no run or checkpoint there, or a model without Squared ReLU.
      BrokenEnvironment: the checkpoint cannot be read.
    """
    config, program, state, _ = restore_run(workdir)
    if config.model.ffn not in SQUARED_RELU:
        raise InvalidInput(
            f"--from-workdir: the FFNs of {workdir} are {config.model.ffn}; use a run of "
            f"{' or '.join(SQUARED_RELU)}"
        )
    return config, program, state


def captured(workdir, *, tokens: int = TOKENS) -> Iterator[Case]:
    """X and weights of the first, the middle and the last layer at a run's last checkpoint.

    The gradient of the output is drawn at random: it decides no mask.

    Args:
      workdir: of the run.
      tokens: at most so many, of whole sequences of the run's validation batches.

    Raises:
      InvalidInput: no run or checkpoint there, or a model without Squared ReLU.
      BrokenEnvironment: the checkpoint cannot be read.
    """
    config, program, state = restore_relu2(workdir)
    sequences = max(1, tokens // config.sequence_length)
    batches = validation_batches(
        prepare(config.data, sequence_length=config.sequence_length),
        batch_size=config.batch_size,
        num_batches=min(config.validation_batches, math.ceil(sequences / config.batch_size)),
    )
    text = np.concatenate(batches)[:sequences]

    @jax.jit
    def inputs(params, text):
        """Of every layer's FFN, [layers, B, L, D]."""
        return program.model(params)(text[:, :-1], observe=lambda ffn, h_BLD: h_BLD)[1]

    x = inputs(state.params, jnp.asarray(text))
    layers, width = x.shape[0], x.shape[-1]
    ffn = program.model(state.params).blocks.ffn
    for layer in some_layers(layers):
        x_TD = x[layer].reshape(-1, width)
        x_TD = x_TD[: len(x_TD) // 4 * 4].astype(jnp.bfloat16)
        w_up, w_down = (w[...][layer].astype(jnp.bfloat16) for w in (ffn.w_up, ffn.w_down))
        dy3_TD = jax.random.normal(jax.random.key(layer), x_TD.shape).astype(jnp.bfloat16)
        source = f"layer {layer + 1} of {layers}, step {int(np.asarray(state.step))}"
        yield Case(source, Operands(x_TD, w_up, w_down, dy3_TD))
