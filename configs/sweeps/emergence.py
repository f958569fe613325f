"""Where the zeros come from: learning rate, weight decay and initialization of a dense model.

    python -m experiments.sweep --sweep=configs/sweeps/emergence.py --workdir=runs/emergence

Each row is configs/lm_100m.py with Squared ReLU, dense, for 800 steps: what becomes sparse does so
by itself, and the metrics say what 2:4 would drop. The results' profiles are what
`python -m experiments.bench ffn --profile=FILE` makes operands from.

Hardware: one Hopper GPU, some 100 seconds a row.
"""

from configs import lm_100m
from configs.sweeps import row, shared, sweep_of


def get_config(mode: str = ""):
    config = lm_100m.get_config()
    config.steps = 800
    config.model.ffn = "relu2"
    config = shared(config, mode)
    return sweep_of(
        "emergence",
        config,
        row("as_lm_100m"),
        row("learning_rate_3e-4", optimizer={"peak_learning_rate": 3e-4}),
        row("learning_rate_3e-3", optimizer={"peak_learning_rate": 3e-3}),
        row("no_weight_decay", optimizer={"weight_decay": 0.0}),
        row("weight_decay_0.3", optimizer={"weight_decay": 0.3}),
        row("up_gain_0.5", model={"up_gain": 0.5}),
        row("up_gain_2", model={"up_gain": 2.0}),
        baseline="as_lm_100m",
    )
