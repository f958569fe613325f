"""Seconds to a loss: dense by XLA, dense on our kernels, and 2:4.

    python -m experiments.sweep --sweep=configs/sweeps/wall_clock.py --workdir=runs/wall_clock

Two models: configs/lm_100m.py (D 768), and one of 300 million parameters that is wide instead of
deep (6 layers, D 2048, the width of the paper's model). Each trains on 65 million tokens.

Dense rows come first: in a process in which 2:4 ran, dense steps are slower (experiments/009).

Hardware: one Hopper GPU, two to four minutes a row. Where our kernels cannot run, the rows are
alike; the record says which implementation each op got.
"""

from configs import lm_100m
from configs.sweeps import row, shapes_in, shared, sweep_of

SHAPES = {
    "lm_100m": {},
    "wide": {"layers": 6, "width": 2048, "heads": 16, "hidden": 8192},
}
SIDES = {
    "xla": {"ffn": "relu2", "implementation": "reference"},
    "dense": {"ffn": "relu2"},
    "2to4": {"ffn": "relu2_24"},
}


def get_config(mode: str = ""):
    config = lm_100m.get_config()
    config.steps = 1000
    config = shared(config, mode)
    return sweep_of(
        "wall_clock",
        config,
        *(
            row(f"{name}_{side}", model={**shape, **changes})
            for side, changes in SIDES.items()
            for name, shape in shapes_in(mode, SHAPES).items()
        ),
        baseline="lm_100m_xla",
    )
