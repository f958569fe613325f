"""Every configuration: complete, of the shapes that it claims, and small in its smoke variant."""

import importlib
import math
import pathlib

import jax
import pytest

from configs import base
from s24jax.errors import InvalidInput
from s24jax.sweep import row_configs
from s24jax.train import check
from s24jax.train_step import make_program

ROOT = pathlib.Path(base.__file__).parent
RUNS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ("__init__", "base"))
SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.py") if path.stem != "__init__")


def load(name: str, mode: str = ""):
    return importlib.import_module(f"configs.{name}").get_config(mode)


def keys(config, prefix="") -> set[str]:
    found = set()
    for key, value in config.items():
        inner = hasattr(value, "items")
        found |= keys(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}"}
    return found


def parameters(config) -> int:
    state = jax.eval_shape(make_program(config).init)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))


def test_there_are_the_promised_ones():
    assert RUNS == ["lm_100m", "paper_1p5b", "quickstart"]
    assert SWEEPS == ["ablation", "emergence", "sizes", "wall_clock", "width"]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mode", ["", "smoke"])
def test_a_run_has_the_keys_of_base_and_fits_together(name, mode):
    config = load(name, mode)
    assert keys(config) == keys(base.get_config())
    check(config)
    make_program(config)
    assert (config.steps < 10) == (mode == "smoke")


def test_lm_100m_is_the_documented_model():
    config = load("lm_100m")
    shape = (config.model.layers, config.model.width, config.model.hidden, config.sequence_length)
    assert shape == (12, 768, 3072, 1024)
    assert config.batch_size * config.sequence_length == 65_536
    assert config.sparse24_warmup_steps == 300
    # Attention 4 D^2 and FFN 2 D F a layer, two norms a layer and one at the end, two byte tables.
    assert parameters(config) == 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 768) + 768 + 2 * 256 * 768


def test_paper_1p5b_has_the_papers_shapes():
    config = load("paper_1p5b")
    assert config.batch_size * config.sequence_length == 1 << 20
    relu2, swiglu = parameters(config), parameters(load("paper_1p5b", "swiglu"))
    assert 1.4e9 < relu2 < 1.6e9
    assert abs(swiglu / relu2 - 1) < 0.01
    assert load("paper_1p5b", "swiglu").model.ffn == "swiglu"


def test_quickstart_fits_a_laptop_and_forks_a_twin():
    config = load("quickstart")
    assert config.dense_twin
    assert (config.model.layers, config.model.width) == (4, 128)
    assert config.model.recipe.dense_multiple == 16
    assert 0 < config.sparse24_warmup_steps < config.steps


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweeps_rows_fit_together(name):
    sweep = load(f"sweeps.{name}", "smoke")
    assert sweep.baseline in row_configs(sweep)


def test_the_ablation_has_all_rows_and_equal_parameters():
    configs = row_configs(load("sweeps.ablation"))
    paper = {
        "dense_swiglu", "dense_relu2", "full_recipe", "no_warmup", "no_split", "adjacent_groups",
        "no_mask_consistency",
    }  # fmt: skip
    beside = {"dense_gelu", "forward_only", "random_groups", "own_feature_mask"}
    seeds = {f"{name}_seed{n}": n for name in ("dense_relu2", "full_recipe") for n in (1, 2)}
    assert paper | beside | set(seeds) == set(configs)
    sizes = [parameters(config) for config in configs.values()]
    assert max(sizes) - min(sizes) <= 0.001 * max(sizes)
    shared = [(c.steps, c.batch_size, c.data.to_dict()) for c in configs.values()]
    assert all(one == shared[0] for one in shared)
    assert {name: config.seed for name, config in configs.items() if config.seed} == seeds
    tokens = {c.steps * c.batch_size * c.sequence_length for c in configs.values()}
    assert min(tokens) >= 100e6
    recipes = {name: config.model.recipe for name, config in configs.items()}
    assert recipes["no_split"].dense_share == 0
    assert recipes["adjacent_groups"].token_grouping == "adjacent"
    assert recipes["full_recipe"].token_grouping == "strided"
    assert not recipes["no_mask_consistency"].mask_consistency
    assert recipes["no_mask_consistency"].feature_wise
    assert not (recipes["forward_only"].mask_consistency or recipes["forward_only"].feature_wise)
    assert configs["no_warmup"].sparse24_warmup_steps == 0


def test_the_sizes_are_what_they_are_called():
    configs = row_configs(load("sweeps.sizes"))
    for name, config in configs.items():
        size = float(name.partition("m_")[0]) * 1e6
        assert 0.85 * size < parameters(config) < 1.05 * size, name
        assert config.model.ffn == ("relu2" if name.endswith("dense") else "relu2_24")


def test_the_clock_runs_for_three_sides_of_each_model():
    configs = row_configs(load("sweeps.wall_clock"))
    assert len(configs) == 6
    for model in ("lm_100m", "wide"):
        xla, dense, sparse = (configs[f"{model}_{side}"] for side in ("xla", "dense", "2to4"))
        assert (xla.model.implementation, dense.model.implementation) == ("reference", "auto")
        assert (xla.model.ffn, dense.model.ffn, sparse.model.ffn) == ("relu2", "relu2", "relu2_24")
        assert parameters(xla) == parameters(dense) == parameters(sparse)
    assert parameters(sparse) > 3e8


@pytest.mark.parametrize("sweep", ["wall_clock", "sizes"])
def test_where_speed_counts_dense_rows_come_first(sweep):
    kinds = [config.model.ffn for config in row_configs(load(f"sweeps.{sweep}")).values()]
    assert kinds == sorted(kinds) and set(kinds) == {"relu2", "relu2_24"}


def test_the_width_run_forks_at_300_of_the_papers_shapes():
    rows = row_configs(load("sweeps.width"))
    paper = load("paper_1p5b").model
    assert rows["paper_1p5b"].model.to_dict() == paper.to_dict()
    assert rows["untied"].model.to_dict() == paper.to_dict() | {"tie_embedding": False}
    for config in rows.values():
        assert config.batch_size * config.sequence_length == 65_536
        assert (config.steps, config.sparse24_warmup_steps, config.dense_twin) == (400, 300, True)


def test_an_unknown_variant_is_refused():
    with pytest.raises(InvalidInput, match="quickstart has no variant 'smok'; write one of smoke"):
        load("quickstart", "smok")
    with pytest.raises(InvalidInput, match="one of smoke, swiglu after the colon"):
        load("paper_1p5b", "x")
