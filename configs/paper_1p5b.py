"""The shapes and the optimizer of the paper's 1.5-billion-parameter model (arXiv 2503.16672).

    python -m experiments.train --config=configs/paper_1p5b.py --workdir=runs/paper_1p5b
    python -m experiments.train --config=configs/paper_1p5b.py:swiglu --workdir=runs/paper_swiglu

Hardware: the paper's 1M tokens a step for 60,000 steps are a cluster's work; on one GPU lower
`steps` and `batch_size`, or raise `accumulate`. Tokens are bytes, so that 256 of the 131,072 rows
of the embedding are used: the shapes and the cost are the paper's, the text and the loss are not.
To train rather than to measure, add --config.model.tie_embedding=False: with a shared embedding all
the rows that are used move together, away from those that are not, and the model hardly learns.
F 5504 is 5461 of the paper's equal-parameter SwiGLU, rounded up for alignment.
"""

from configs import base


def get_config(mode: str = ""):
    config = base.get_config()
    config.name = "paper_1p5b"
    config.steps = 60_000
    config.batch_size = 256
    config.accumulate = 64
    config.sequence_length = 4096
    config.sparse24_warmup_steps = 1000

    config.model.layers = 25
    config.model.width = 2048
    config.model.heads = 16
    config.model.hidden = 8192
    config.model.vocabulary = 131_072
    config.model.tie_embedding = True
    config.model.remat = "save_y2"

    config.optimizer.peak_learning_rate = 3e-3
    config.optimizer.learning_rate_warmup_steps = 5000
    config.optimizer.weight_decay = 0.033

    config.validate_every = 1000
    config.checkpoint_every = 1000
    return base.vary(config, mode, swiglu=swiglu)


def swiglu(config):
    """The dense twin of equal parameters: 3 * 5504 * D rather than 2 * 8192 * D in each FFN."""
    config.name += "_swiglu"
    config.model.ffn = "swiglu"
    config.model.hidden = 5504
    return config
