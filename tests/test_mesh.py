"""Many devices: eight simulated ones against a single one that applies the recipe part by part."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from mesh_cases import CASES, LOOPS, config_of
from processes import assert_same_curves, eight_devices, forget_the_end

from configs import lm_100m
from s24jax import mesh as meshes
from s24jax.errors import InvalidInput
from s24jax.mesh import check_model, make_mesh, specs, vary_alike, varying
from s24jax.train_step import make_program

pytestmark = pytest.mark.cpu_only
NAMES = [f"{name} {mesh}" for name, (_, _, found) in CASES.items() for mesh in found]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("mesh") / "results.json"
    finished = eight_devices("tests/mesh_worker.py", path)
    assert finished.returncode == 0, finished.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_computes_what_one_device_finds_part_by_part(results, name):
    found = results["cases"][name]
    mesh, oracle = found["mesh"], found["oracle"]
    assert found["start"] == 0
    assert mesh["loss"] == pytest.approx(oracle["loss"], rel=1e-6)
    assert mesh["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=1e-5)
    assert mesh["validation"] == pytest.approx(oracle["validation"], rel=1e-6)
    assert found["moved"] > 1e-3
    # Adam divides by the gradient's own size: where it is next to nothing, rounding shows.
    assert found["moved_apart"] < 1e-4
    if not name.startswith("swiglu"):  # whose probe is nothing that a run asks for
        assert mesh["zeros"] == pytest.approx(oracle["zeros"], abs=1e-4)


@pytest.mark.parametrize("mesh", CASES["token-wise"][2])
def test_without_feature_wise_pruning_a_mesh_computes_what_one_device_does(results, mesh):
    """Groups of features lie in one part of F, so that nothing depends on the parts."""
    found, plain = results["cases"][f"token-wise {mesh}"]["mesh"], results["plain"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    assert found["validation"] == pytest.approx(plain["validation"], rel=1e-6)


def test_every_weight_is_cut(results):
    """Two parts along D, two along F or of the heads; scales are whole."""
    for path, pieces in results["cases"]["full recipe (2, 2, 2)"]["mesh"]["pieces"].items():
        expected = 1 if "scale" in path else 2 if "embedding" in path else 4
        assert pieces == expected, path


def test_2to4_exchanges_what_dense_training_does(results):
    """No tokens are gathered: of D 16, F 64, 8 heads, 2 sequences of 10 tokens a device."""
    dense, sparse = (results["collectives"][mode] for mode in ("dense", "sparse24"))
    assert sparse == dense
    kinds = {kind: {} for kind in ("all-gather", "reduce-scatter", "all-reduce")}
    for written, count in sparse.items():
        kind, shape = written.split()
        kinds[kind][tuple(map(int, re.findall(r"\d+", shape.partition("[")[2])))] = count
    # A layer's weights are gathered for its forward pass and again for its backward pass.
    weights = {(16, 24): 2, (8, 16): 2, (32, 16): 4, (16, 256): 1, (256, 16): 1}
    assert kinds["all-gather"] == weights
    # Each weight's gradient returns to where its part lies.
    parts = {(8, 24): 1, (8, 8): 1, (32, 8): 2, (8, 256): 1, (256, 8): 1}
    assert kinds["reduce-scatter"] == parts
    # What is summed over the tensor group: the outputs of attention and FFN, and the gradients of
    # their inputs, the FFN's as [B * L, D]; the rest has no axis of tokens.
    sums = {shape: n for shape, n in kinds["all-reduce"].items() if 10 in shape or 20 in shape}
    assert sums == {(2, 10, 16): 3, (20, 16): 1}


def test_sums_of_a_tensor_group_travel_once(results):
    """Of two layers, in the forward pass and, of gradients, in the backward pass; what is computed
    again in the backward pass is summed again only where nothing is kept."""
    for remat, expected in ("save_y2", 2 * 4), ("full", 2 * 5):
        sums = [
            n for s, n in results["collectives"][remat].items() if "10,16]" in s or "80,16]" in s
        ]
        assert sum(sums) == expected


def test_layers_are_a_loop_where_their_weights_are_cut_along_d(results):
    assert results["loops"] == {str(mesh): loops for mesh, loops in LOOPS.items()}


def test_no_gathered_weight_is_kept_for_the_backward_pass(results):
    """Of what the scan over layers stacks; the last two of a weight's axes are D and its other."""
    for shapes in results["stacked"].values():
        assert [2, 2, 10, 16] in shapes, "the tokens' activations"
        for weight in ([16, 24], [24, 16], [16, 8], [8, 16], [32, 16], [16, 32]):
            assert [2, *weight] not in shapes


def test_every_parameter_has_a_rule_or_is_small():
    for ffn in ("relu2_24", "swiglu"):
        config = lm_100m.get_config()
        config.model.ffn = ffn
        state = make_program(config).state
        parts = jax.tree_util.tree_leaves_with_path(specs(sizes(2, 2, 2), state))
        for (path, spec), leaf in zip(parts, jax.tree.leaves(state), strict=True):
            if leaf.size > 12 * 768:
                assert meshes.FSDP in spec, path
                assert (meshes.TENSOR in spec) != ("embedding" in jax.tree_util.keystr(path)), path
            else:
                assert not any(spec), path


def train(workdir, devices: str):
    """A run of six steps whose result does not depend on the mesh, on as many devices."""
    sizes = {"1": "--config.mesh.data=1", "8": "--config.mesh.fsdp=4"}  # data 2 beside it
    flags = {} if devices == "8" else {"XLA_FLAGS": ""}
    finished = eight_devices(
        "-m",
        "experiments.train",
        "--config=configs/lm_100m.py:smoke",
        f"--workdir={workdir}",
        sizes[devices],
        "--config.batch_size=8",
        "--config.model.recipe.feature_wise=False",
        **flags,
    )
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.mark.parametrize("first, second", [("1", "8"), ("8", "1")])
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, first, second):
    """As if it was killed after the checkpoint of step 3: the rest is as on the first devices."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(straight, first)
    shutil.copytree(straight, resumed)
    forget_the_end(resumed)
    train(resumed, second)
    assert_same_curves(resumed, straight)
    assert (resumed / "checkpoints" / "6").exists()


def test_a_run_is_evaluated_and_sampled_on_any_number_of_devices(tmp_path):
    train(tmp_path / "run", "8")
    found = set()
    for flags in ({}, {"XLA_FLAGS": ""}):
        for command, *more in (["evaluate"], ["sample", "--prompt=def", "--tokens=8"]):
            arguments = [f"--workdir={tmp_path}/run", *more]
            finished = eight_devices("-m", f"experiments.{command}", *arguments, **flags)
            assert finished.returncode == 0, finished.stderr
            found.add(finished.stdout)
    assert len(found) == 2


def test_outside_a_mesh_nothing_varies():
    x, y = jnp.ones(3), jnp.zeros((2, 2))
    assert not varying(x)
    assert [a is b for a, b in zip(vary_alike(x, y), (x, y), strict=True)] == [True, True]
    assert not meshes.in_parts({"a": x})
    assert meshes.tensor_sum(x) is x


# -------------------------------------------------------------------------------------- errors


def sizes(data, fsdp, tensor):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_sizes_of_one_device():
    for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, 1)):
        assert dict(make_mesh(sizes(*shape)).shape) == sizes(1, 1, 1)


@pytest.mark.parametrize(
    "shape, words",
    [
        ((2, 1, 1), "mesh (data 2, fsdp 1, tensor 1) does not fit 1 devices; use -1 for one axis"),
        ((-1, 3, 1), "mesh (data -1, fsdp 3, tensor 1) does not fit 1 devices; make them divide"),
        ((-1, -1, 1), "mesh (data -1, fsdp -1, tensor 1): sizes are 1 or more, or -1 for one"),
        ((0, 1, 1), "mesh (data 0, fsdp 1, tensor 1): sizes are 1 or more, or -1 for one of them"),
    ],
)
def test_sizes_that_do_not_fit(shape, words):
    with pytest.raises(InvalidInput) as error:
        make_mesh(sizes(*shape))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "shape, changes, words",
    [
        ((2, 2, 1), {"batch_size": 6}, "6 sequences at a time do not split over 4 devices"),
        ((1, 3, 1), {"batch_size": 9}, "model.width=16 does not split into mesh.fsdp=3 equal"),
        (
            (1, 1, 8),
            {"model.hidden": 48},
            "model.hidden=48 does not split into mesh.tensor=8 parts",
        ),
        ((1, 1, 3), {}, "model.heads=8 do not split over mesh.tensor=3 devices; make it"),
    ],
)
def test_models_that_do_not_fit(shape, changes, words):
    config = config_of((1, 1, 1), changes)
    with pytest.raises(InvalidInput) as error:
        check_model(sizes(*shape), config.model, config.batch_size)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)
