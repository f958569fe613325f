"""The whole method in three minutes on a laptop: a byte-level model of Python source code.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores. Expected: see README.md, "Quickstart".
"""

from configs import base


def get_config(mode: str = ""):
    config = base.get_config()
    config.name = "quickstart"
    config.steps = 300
    config.batch_size = 16
    config.sequence_length = 128
    config.sparse24_warmup_steps = 150
    config.dense_twin = True

    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 4
    config.model.hidden = 512
    config.model.dtype = "float32"
    config.model.recipe.dense_multiple = 16

    config.optimizer.peak_learning_rate = 6e-3
    config.optimizer.learning_rate_warmup_steps = 30

    config.probe_every = 20
    config.validate_every = 50
    config.checkpoint_every = 150
    config.sample.tokens = 120
    return base.vary(config, mode)
