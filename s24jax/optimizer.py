"""AdamW with warm-up, cosine decay, clipping and a weight-decay mask (optax)."""

import jax
import optax

from s24jax.errors import InvalidInput
from s24jax.schedules import learning_rate_schedule


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
    """Clips the global gradient norm, then AdamW; weight decay on matrices alone.

    Args:
      config: the `optimizer` part of a configuration.
      steps: optimizer steps of the whole run.

    Raises:
      InvalidInput: the warm-up does not end before the run.
    """
    if not 0 <= config.learning_rate_warmup_steps < steps:
        raise InvalidInput(
            f"optimizer.learning_rate_warmup_steps={config.learning_rate_warmup_steps} must lie in "
            f"0..{steps - 1}, inside the run of {steps} steps"
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def decays(params):
    """Which parameters are decayed: all but the norms' scales.

    By name, not by rank: stacked layers give a scale a second axis.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "scale" not in jax.tree_util.keystr(path), params
    )
