"""A byte-level model of about 100 million parameters on Python source code.

    python -m experiments.train --config=configs/lm_100m.py --workdir=runs/lm_100m

Hardware: one Hopper GPU. The switch to 2:4 comes at step 300, when about 90 % of Y2 is zero.
Any other text: --config.data.source=FOLDER --config.data.pattern='**/*.txt'.
"""

from configs import base


def get_config(mode: str = ""):
    config = base.get_config()
    config.name = "lm_100m"
    config.steps = 2000
    return base.vary(config, mode)
