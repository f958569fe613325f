"""The paper's ablation, row by row, and the questions beside it.

    python -m experiments.sweep --sweep=configs/sweeps/ablation.py --workdir=runs/ablation
    python -m experiments.sweep --sweep=configs/sweeps/ablation.py:smoke --workdir=runs/smoke

Each row is configs/lm_100m.py with a few keys changed: same data order, same seed, same tokens.
The paper's seven rows are dense_swiglu, dense_relu2, full_recipe, no_warmup, no_split,
adjacent_groups (without token permutation) and no_mask_consistency.
"""

from ml_collections import ConfigDict

from configs import lm_100m


def get_config(mode: str = ""):
    sweep = ConfigDict()
    sweep.name = "ablation"
    sweep.baseline = "dense_relu2"
    sweep.config = lm_100m.get_config(mode)
    # Three matrices of 2/3 of the hidden width have the parameters of two.
    swiglu_hidden = 2 * sweep.config.model.hidden // 3
    sweep.rows = (
        row("dense_swiglu", model={"ffn": "swiglu", "hidden": swiglu_hidden}),
        row("dense_relu2", model={"ffn": "relu2"}),
        row("dense_gelu", model={"ffn": "gelu"}),
        row("full_recipe"),
        row("no_warmup", sparse24_warmup_steps=0),
        row("no_split", model={"recipe": {"dense_share": 0.0}}),
        row("adjacent_groups", model={"recipe": {"token_grouping": "adjacent"}}),
        row("random_groups", model={"recipe": {"token_grouping": "random"}}),
        row("no_mask_consistency", model={"recipe": {"mask_consistency": False}}),
        row("own_feature_mask", model={"recipe": {"shared_feature_mask": False}}),
        row("forward_only", model={"recipe": {"mask_consistency": False, "feature_wise": False}}),
    )
    return sweep


def row(name: str, **changes) -> ConfigDict:
    """One run of the sweep: the keys of the shared configuration that it changes."""
    return ConfigDict({"name": name, "changes": changes})
