"""The shapes of the paper's 1.5-billion-parameter model: 2:4 beside dense, from one state on.

    python -m experiments.sweep --sweep=configs/sweeps/width.py --workdir=runs/width

Each row is configs/paper_1p5b.py with 65,536 tokens a step, dense for 300 steps; then a dense twin
goes on beside the 2:4 model for 100 steps, on the same batches, which tells losses apart, not
speeds (experiments/009). The first row shares its embedding with the output, as the paper's does:
with bytes in 256 of 131,072 rows it hardly learns. The second does not share it.

Hardware: two Hopper GPUs with 80 GB, of which jax must take nearly all
(XLA_PYTHON_CLIENT_MEM_FRACTION=0.95): two states are 37 and 43 GB. Eight minutes a row; on one GPU
it takes twice as long, with --sweep.config.accumulate=4.
"""

from configs import paper_1p5b
from configs.sweeps import row, shared, sweep_of


def get_config(mode: str = ""):
    config = paper_1p5b.get_config()
    config.steps = 400
    config.batch_size = 16
    config.accumulate = 2
    config.sparse24_warmup_steps = 300
    config.dense_twin = True
    config.optimizer.peak_learning_rate = 1e-3
    config.optimizer.learning_rate_warmup_steps = 100
    config.validation_batches = 2
    config.validate_every = 100
    config = shared(config, mode)
    return sweep_of(
        "width",
        config,
        row("paper_1p5b"),
        row("untied", model={"tie_embedding": False}, validate_every=20),
        baseline="paper_1p5b",
    )
