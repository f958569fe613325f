"""The paper's ablation, row by row, and the questions beside it.

    python -m experiments.sweep --sweep=configs/sweeps/ablation.py --workdir=runs/ablation
    python -m experiments.sweep --sweep=configs/sweeps/ablation.py:smoke --workdir=runs/smoke

Each row is configs/lm_100m.py on 105 million tokens with a few keys changed: same data order, same
seed, same tokens. The paper's seven rows are dense_swiglu, dense_relu2, full_recipe, no_warmup,
no_split, adjacent_groups (without token permutation) and no_mask_consistency. Two further seeds of
dense_relu2 and full_recipe tell a difference from noise.

Hardware: one Hopper GPU, some four minutes a row.
"""

from configs import lm_100m
from configs.sweeps import row, shared, sweep_of


def get_config(mode: str = ""):
    config = lm_100m.get_config()
    config.steps = 1600
    config = shared(config, mode)
    # Three matrices of 2/3 of the hidden width have the parameters of two.
    swiglu_hidden = 2 * config.model.hidden // 3
    return sweep_of(
        "ablation",
        config,
        row("dense_swiglu", model={"ffn": "swiglu", "hidden": swiglu_hidden}),
        row("dense_relu2", model={"ffn": "relu2"}),
        row("dense_relu2_seed1", model={"ffn": "relu2"}, seed=1),
        row("dense_relu2_seed2", model={"ffn": "relu2"}, seed=2),
        row("dense_gelu", model={"ffn": "gelu"}),
        row("full_recipe"),
        row("full_recipe_seed1", seed=1),
        row("full_recipe_seed2", seed=2),
        row("no_warmup", sparse24_warmup_steps=0),
        row("no_split", model={"recipe": {"dense_share": 0.0}}),
        row("adjacent_groups", model={"recipe": {"token_grouping": "adjacent"}}),
        row("random_groups", model={"recipe": {"token_grouping": "random"}}),
        row("no_mask_consistency", model={"recipe": {"mask_consistency": False}}),
        row("own_feature_mask", model={"recipe": {"shared_feature_mask": False}}),
        row("forward_only", model={"recipe": {"mask_consistency": False, "feature_wise": False}}),
        baseline="dense_relu2",
    )
