"""What changes over the steps of a run: the learning rate, and the FFN's mode."""

import optax

from s24jax.typing import FFNMode


def learning_rate_schedule(config, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak_learning_rate`, cosine decay to `final_share` of it.

    Args:
      config: the `optimizer` part of a configuration.
      steps: optimizer steps of the whole run.
    """
    return optax.warmup_cosine_decay_schedule(
        # Not 0: the first step of a run should do something.
        init_value=config.peak_learning_rate / (config.learning_rate_warmup_steps + 1),
        peak_value=config.peak_learning_rate,
        warmup_steps=config.learning_rate_warmup_steps,
        decay_steps=steps,
        end_value=config.final_share * config.peak_learning_rate,
    )


def ffn_mode(step: int, config) -> FFNMode:
    """The FFN's mode in optimizer step `step` (the first is 1): dense warm-up, then 2:4.

    Args:
      config: a whole configuration; only FFNs of kind relu2_24 ever leave mode "dense".
    """
    sparse = config.model.ffn == "relu2_24" and step > config.sparse24_warmup_steps
    return "sparse24" if sparse else "dense"
