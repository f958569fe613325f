"""From which size on does 2:4 pay, and do small models become as sparse?

    python -m experiments.sweep --sweep=configs/sweeps/sizes.py --workdir=runs/sizes

Models of 30, 100 and 300 million parameters, each dense and 2:4, on 65 million tokens. Dense rows
come first: in a process in which 2:4 ran, dense steps are slower (experiments/009).

Hardware: one Hopper GPU, one to five minutes a row.
"""

from configs import lm_100m
from configs.sweeps import row, shapes_in, shared, sweep_of

SIZES = {
    "30m": {"layers": 9, "width": 512, "heads": 8, "hidden": 2048},
    "100m": {"layers": 12, "width": 768, "heads": 12, "hidden": 3072},
    "300m": {"layers": 24, "width": 1024, "heads": 16, "hidden": 4096},
}


def get_config(mode: str = ""):
    config = lm_100m.get_config()
    config.steps = 1000
    config = shared(config, mode)
    return sweep_of(
        "sizes",
        config,
        *(
            row(f"{size}_{kind}", model={**shape, "ffn": ffn})
            for kind, ffn in (("dense", "relu2"), ("2to4", "relu2_24"))
            for size, shape in shapes_in(mode, SIZES).items()
        ),
        baseline="100m_dense",
    )
