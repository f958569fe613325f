"""Validation loss of a state, and of a finished run from its workdir."""

import math

import numpy as np

from s24jax.checkpoint import Checkpoints
from s24jax.data import prepare, validation_batches
from s24jax.errors import InvalidInput
from s24jax.mesh import one_device
from s24jax.schedules import ffn_mode
from s24jax.train_step import Program, make_program
from s24jax.typing import FFNMode
from s24jax.workdir import read_config


def bits_per_byte(loss: float) -> float:
    """Nats per byte-level token to bits per byte."""
    return loss / math.log(2)


def mean_loss(program: Program, params, batches: list[np.ndarray], mode: FFNMode) -> float:
    """Mean loss over equal-sized batches, of which each process has its part; nats per token."""
    losses = [program.loss(params, program.place(tokens), mode=mode) for tokens in batches]
    return float(np.mean(losses))


def restore_run(workdir, *, step: int | None = None) -> tuple:
    """A finished or interrupted run's config, program, state and that state's own mode.

    On one device, whatever the run had: a forward pass is the same on any mesh.

    Raises:
      InvalidInput: no run or no such checkpoint in `workdir`.
      BrokenEnvironment: the checkpoint cannot be read.
    """
    config = read_config(workdir)
    program = make_program(config, one_device())
    checkpoints = Checkpoints(workdir, read_only=True)
    step, state, _ = checkpoints.restore(program.state, step=step)
    checkpoints.close()
    return config, program, state, ffn_mode(step, config)


def choose_mode(requested: str | None, own: FFNMode, config) -> FFNMode:
    """The mode that a command line asked for; the checkpoint's own where it asked for none."""
    if requested == "sparse24" and config.model.ffn != "relu2_24":
        raise InvalidInput(
            f"--mode=sparse24 needs model.ffn=relu2_24, this run has "
            f"{config.model.ffn!r}; use --mode=dense"
        )
    return requested or own


def evaluate(workdir, *, mode: FFNMode | None = None, step: int | None = None) -> dict:
    """Validation loss of a checkpoint.

    Args:
      workdir: of the run.
      mode: "dense" or "sparse24"; None is the mode of the checkpoint's step.
      step: which checkpoint; None is the last.

    Returns:
      step, mode, loss (nats per token), bits_per_byte, tokens (how many were predicted).
    """
    config, program, state, own_mode = restore_run(workdir, step=step)
    mode = choose_mode(mode, own_mode, config)
    batches = validation_batches(
        prepare(config.data, sequence_length=config.sequence_length),
        batch_size=config.batch_size,
        num_batches=config.validation_batches,
    )
    loss = mean_loss(program, state.params, batches, mode)
    return {
        "step": int(state.step),
        "mode": mode,
        "loss": loss,
        "bits_per_byte": bits_per_byte(loss),
        "tokens": len(batches) * config.batch_size * config.sequence_length,
    }
