"""The bench of the whole FFN without a GPU: operands, passes, rows, table, figure, command line.

Our kernels are played by the reference.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from figures import assert_no_overlap, make_row
from processes import bench

from configs import quickstart
from s24jax.bench import captured as captured_module
from s24jax.bench import ffn, ffn_parts
from s24jax.bench.captured import captured
from s24jax.bench.figure import bench_figure
from s24jax.bench.operands import DENSE, SPARSE
from s24jax.bench.profile import profiled
from s24jax.bench.rows import KEYS, read_rows, write_rows
from s24jax.bench.shapes import SHAPES, Shape
from s24jax.bench.table import table
from s24jax.bench.timing import Result
from s24jax.data import prepare, validation_batches
from s24jax.errors import InvalidInput, Unsupported
from s24jax.evaluate import restore_run
from s24jax.ops.relu2_ffn import relu2_ffn
from s24jax.train import train
from s24jax.writer import write_json

SMALL = Shape(64, 32, 128)
ADDED = ("pass", "ratio_to_xla_dense", "ratio_to_fused_dense", "saved_bytes", "peak_bytes")
OPS = (
    *("ffn24", "sparsify24", "matmul24", "matmul_sparsify24", "matmul_feature_wise24"),
    *("feature_wise24", "split_features", "split_matmul24"),
)


@pytest.fixture
def kernels(monkeypatch):
    """Every op of the bench by its reference, whatever is asked for."""

    def played(op):
        return lambda *args, implementation, **how: op(*args, implementation="reference", **how)

    for module, name in itertools.product((ffn, ffn_parts), OPS):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, played(getattr(module, name)))
    monkeypatch.setattr(ffn, "relu2_ffn", played(relu2_ffn))
    monkeypatch.setattr(ffn_parts, "_dense_contender", ffn_parts._contender)
    monkeypatch.setattr(
        ffn_parts.relu2_cuda, "y2_of", lambda x, w: jnp.square(jax.nn.relu(x @ w.T))
    )
    monkeypatch.setattr(
        ffn_parts.relu2_cuda, "dy1_of", lambda dy3, w, y2: 2 * jnp.sqrt(y2) * (dy3 @ w.T)
    )


def test_the_zeros_lie_as_in_a_trained_model():
    """One feature in 20 is active in 39 % of the tokens, the others in 8.5 %."""
    operands = ffn.make_operands(Shape(4096, 256, 400))
    active = np.mean(np.asarray(operands.x_TD @ operands.w_up_FD.T) > 0, axis=0)
    assert np.sum(active > 0.25) == 20
    assert np.mean(active[active > 0.25]) == pytest.approx(DENSE, abs=0.02)
    assert np.mean(active[active < 0.25]) == pytest.approx(SPARSE, abs=0.005)
    assert {array.dtype.name for array in operands} == {"bfloat16"}


def test_the_recipe_keeps_as_many_features_dense_as_the_other_benches():
    assert ffn.recipe_of(SHAPES[0]).dense_features(8192) == 512
    assert ffn.recipe_of(SMALL).dense_features(128) == 32


def test_rows_of_each_pass_and_part(kernels):
    names = ("cuda", "unfused", "relu2_cuda", "xla_dense")
    batches = list(ffn.bench([SMALL], ffn.PRODUCTS, names, 1))
    assert [(rows[0]["product"], rows[0]["pass"]) for rows in batches] == [
        *(("ffn", name) for name in ("forward", "backward", "both")),
        *(("up", "forward"), ("y3", "forward"), ("split", "backward"), ("mid", "backward")),
        *((name, "backward") for name in ("dx", "dw_down", "dw_up")),
    ]
    products = [2, 4, 6, 1, 1, 0, 1, 1, 1, 1]
    for rows, factor in zip(batches, products, strict=True):
        by_name = {row["implementation"]: row for row in rows}
        for row in rows:
            assert tuple(row) == (*KEYS, *ADDED, "source", "zeros")
            assert (row["source"], row["zeros"]) == ("synthetic", pytest.approx(0.9, abs=0.02))
            assert row["ms"] > 0 and row["note"] == ""
            flops = factor * 2 * 64 * 32 * 128
            if factor:
                assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9)
            for key, other in (("xla_dense", "xla_dense"), ("fused_dense", "relu2_cuda")):
                theirs = by_name.get(other)
                expected = theirs and pytest.approx(theirs["ms"] / row["ms"])
                assert row[f"ratio_to_{key}"] == expected
            whole = row["product"] == "ffn"
            assert (row["rel_error"] is not None, row["saved_bytes"] is not None) == (whole, whole)
            if whole:
                assert row["rel_error"] < 1e-2 and row["peak_bytes"] > 64 * 128
    assert [*by_name] == ["cuda", "xla_dense"]  # of dw_up; the fused dense FFN leaves it to XLA
    saved = {row["implementation"]: row["saved_bytes"] for row in batches[0]}
    y2_values, metadata, counts = 64 * 64 * 2, 2 * 128 * 4, 128 * 4
    for name in ("cuda", "unfused"):
        assert saved[name] == pytest.approx(y2_values + metadata + counts, abs=8)
    assert saved["xla_dense"] >= 2 * 64 * 128 * 2


def test_the_hidden_activation_is_saved_where_it_has_the_shape_of_a_weight():
    """T = D: Y2 [T, F] and W_up [F, D] are told apart by their number alone."""
    shape = Shape(32, 32, 128)
    (rows, *_) = ffn.bench([shape], ["ffn"], ["xla_dense"], rounds=1)
    assert rows[0]["saved_bytes"] >= 2 * shape.T * shape.F


def test_the_unfused_form_is_the_same_ffn(kernels):
    """Gradients agree but for the rounding of products."""
    operands, recipe = ffn.make_operands(SMALL), ffn.recipe_of(SMALL)
    *inputs, dy3 = operands

    def gradients(function):
        return jax.jit(lambda *inputs: jax.vjp(function, *inputs)[1](dy3))(*inputs)

    unfused = gradients(functools.partial(ffn.unfused_ffn24, recipe))
    fused = gradients(functools.partial(ffn.ffn24, recipe=recipe, implementation="cuda"))
    for ours, theirs in zip(unfused, fused, strict=True):
        assert ffn.relative_error(ours, theirs.astype(jnp.float32)) < 1e-2


def test_the_oracle_is_the_method():
    """As numpy has it, from the same rounded Y1."""
    operands, recipe = ffn.make_operands(SMALL), ffn.recipe_of(SMALL)
    x, w_up, w_down, dy3 = map(np.asarray, operands)
    y1 = np.asarray(operands.x_TD @ operands.w_up_FD.T)
    expected = oracles.ffn(x, w_up, w_down, dy3, y1=y1, **dataclasses.asdict(recipe))
    found = ffn._oracle(False, operands)
    assert found["both"] == (found["forward"], found["backward"])
    for name, ours in zip(
        ("y3", "dx", "dw_up", "dw_down"), (found["forward"], *found["backward"]), strict=True
    ):
        theirs = getattr(expected, name).astype(np.float32)
        assert ours.dtype == jnp.float32
        assert ffn.relative_error(ours, theirs) < 5e-3, name


def test_a_wrong_gradient_has_no_time(kernels, monkeypatch):
    right = ffn.matmul24

    def forgets_dx(a, b, **how):
        return right(a.with_values(a.values * 0), b, **how)

    monkeypatch.setattr(ffn, "matmul24", forgets_dx)
    (_, backward, _) = ffn.bench([SMALL], ("ffn",), ("unfused", "xla_dense"), 1)
    wrong, dense = backward
    assert wrong["ms"] is None and wrong["note"].startswith("wrong result: relative error 1")
    assert dense["ms"] > 0


@pytest.mark.cpu_only
def test_parts_of_the_dense_ffn_say_why_they_cannot_run():
    (rows,) = ffn.bench([SMALL], ("up",), ("relu2_cuda",), 1)
    assert rows[0]["ms"] is None
    assert rows[0]["note"].startswith("relu2_ffn: implementation 'cuda' cannot run (cuda: the ")


# ----------------------------------------------------------------------------- of a trained model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A smoke run's workdir: 2 layers, D 16, F 64, batches of 4 sequences of 32."""
    config, workdir = quickstart.get_config("smoke"), tmp_path_factory.mktemp("run") / "smoke"
    config.data.data_dir = str(tmp_path_factory.mktemp("data"))
    train(config, workdir)
    return workdir


def test_captured_operands_are_those_of_the_model(run):
    """Y2 of a captured layer has the zeros that the run's own probe counts."""
    cases = list(captured(run))
    assert [case.source for case in cases] == ["layer 1 of 2, step 6", "layer 2 of 2, step 6"]
    config, program, state, _ = restore_run(run)
    weights = program.model(state.params).blocks.ffn
    for layer, (_, operands) in enumerate(cases):
        assert operands.shape == (128, 16, 64)
        assert {array.dtype.name for array in operands} == {"bfloat16"}
        np.testing.assert_array_equal(
            operands.w_up_FD, weights.w_up[...][layer].astype(jnp.bfloat16)
        )
        np.testing.assert_array_equal(
            operands.w_down_FD, weights.w_down[...][layer].astype(jnp.bfloat16)
        )
    (text,) = validation_batches(
        prepare(config.data, sequence_length=32), batch_size=4, num_batches=1
    )
    probed = program.probe(state.params, jnp.asarray(text))["zero_share"]
    zeros = [float(ffn.zero_share(case.operands)) for case in cases]
    np.testing.assert_allclose(zeros, probed, atol=5e-3)  # in bfloat16


def test_captured_tokens_are_whole_sequences(run):
    assert [case.operands.shape.T for case in captured(run, tokens=70)] == [64, 64]


def test_captured_operands_of_another_ffn(run, monkeypatch):
    config, *rest = restore_run(run)
    config = config.copy_and_resolve_references()
    config.model.ffn = "gelu"
    monkeypatch.setattr(captured_module, "restore_run", lambda workdir: (config, *rest))
    with pytest.raises(InvalidInput) as error:
        next(captured(run))
    assert str(error.value) == (
        f"--from-workdir: the FFNs of {run} are gelu; use a run of relu2 or relu2_24"
    )


def test_lines_of_one_shape_are_told_apart(run):
    rows = []
    for found in ffn.bench_cases(captured(run), ("up",), ("xla_dense",), 1):
        rows += found
    lines = [line for line in table(rows).splitlines() if "up forward" in line]
    assert ["layer 1 of 2, step 6" in line for line in lines] == [True, False]


# ---------------------------------------------------------------------------- of a recorded run


@pytest.fixture
def results(tmp_path):
    """Two rows of made-up runs, the second without Squared ReLU; its file."""
    path = tmp_path / "results.json"
    rows = [make_row("relu2"), make_row("gelu", sparsity=False)]
    write_json(path, {"name": "sweep", "baseline": "relu2", "rows": rows})
    return path


def test_profiled_operands_are_as_active_as_the_runs_features(results):
    """Of 256 features four each are as active as one of the 64 parts says, in random order."""
    (profile,) = make_row("relu2")["curves"]["main"]["density_profile"]["profile"]
    cases = list(profiled(str(results), [Shape(8192, 64, 256)]))
    assert [case.source for case in cases] == [
        f"relu2, layer {layer} of 5, step 240" for layer in (1, 3, 5)
    ]
    for layer, (_, operands) in zip((0, 2, 4), cases, strict=True):
        assert operands.shape == (8192, 64, 256)
        active = np.mean(np.asarray(operands.x_TD @ operands.w_up_FD.T) > 0, axis=0)
        expected = np.repeat(profile[layer], 4)
        np.testing.assert_allclose(np.sort(active)[::-1], expected, atol=0.04)
        assert 1 - ffn.zero_share(operands) == pytest.approx(np.mean(expected), abs=0.003)
        assert not np.all(np.diff(active) <= 0)


def test_features_that_are_never_active_have_finite_weights():
    operands = ffn.make_operands(Shape(64, 32, 128), jnp.zeros(128))
    assert all(bool(jnp.all(jnp.isfinite(array))) for array in operands)
    assert ffn.zero_share(operands) == 1


def test_a_row_of_the_results(results):
    recorded = json.loads(results.read_text())
    recorded["rows"].append(make_row("2:4") | {"name": "other"})
    write_json(results, recorded)
    shapes = [Shape(64, 32, 128)]
    (first, *_) = profiled(f"{results}:other", shapes)
    assert first.source == "other, layer 1 of 5, step 240"
    for written in (str(results), f"{results}:gelu"):
        with pytest.raises(InvalidInput) as error:
            next(profiled(written, shapes))
        assert str(error.value) == (
            f"--profile: {written} names no row with a profile; "
            f"write {results}:ROW with one of relu2, other"
        )
    recorded["rows"] = [make_row("gelu", sparsity=False)]
    write_json(results, recorded)
    with pytest.raises(InvalidInput) as error:
        next(profiled(str(results), shapes))
    assert str(error.value) == (
        f"--profile: no row of {results} has Squared ReLU; use another file"
    )


# ------------------------------------------------------------------------------- table and figure


@pytest.fixture
def rows():
    """Of a made-up run."""
    speed = {"cuda": 900, "unfused": 800, "relu2_cuda": 750, "xla_dense": 600}
    found = []
    for shape in SHAPES:
        for name, products in ffn.PASSES.items():
            flops = products * 2 * shape.T * shape.D * shape.F
            results = {n: Result(flops / 1e12 / s, 3e-3) for n, s in speed.items()}
            found += ffn._rows(shape, "ffn", name, results, products)
        results = {"cuda": Result(4e-5), "xla_dense": Result(note="there is none")}
        found += ffn._rows(shape, "split", "backward", results, 0)
    return found


def test_table(rows):
    lines = table(rows).splitlines()
    head, _, *body = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    )
    assert head == [
        *("T, D, F", "product", "cuda", "unfused", "relu2_cuda", "xla_dense", "cuda : dense"),
        *("cuda : xla_dense", "cuda : relu2_cuda", "error of cuda"),
    ]
    assert [cells[1] for cells in body[:4]] == [
        *("ffn forward", "ffn backward", "ffn both", "split backward")
    ]
    assert body[2][-4:] == ["1.20", "1.50", "1.20", "3.0e-03"]
    assert (
        "Geometric means (of how many): cuda : unfused 1.125 (4), cuda : relu2_cuda 1.200 (4), "
        "cuda : xla_dense 1.500 (4)"
    ) in lines


def test_a_part_without_products_has_a_time(rows):
    line = next(line for line in table(rows).splitlines() if "split backward" in line)
    assert "(0.040)" in line


def test_figure(rows):
    figure = bench_figure(rows)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["forward", "backward", "forward and backward"]
    assert [bar.get_height() for bar in figure.axes[0].patches[:4]] == pytest.approx([900] * 4)
    assert_no_overlap(figure)


def test_rows_go_round_through_json(rows, tmp_path):
    write_rows(tmp_path / "rows.json", rows)
    assert read_rows(tmp_path / "rows.json") == rows


@pytest.mark.cpu_only
def test_end_to_end(tmp_path):
    file = tmp_path / "ffn.json"
    finished = bench("ffn", "--together", "--shapes=64x32x128", "--rounds=1", f"--json={file}")
    assert finished.returncode == 0, finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("no times of cuda, unfused, relu2_cuda: the default device is a CPU")
    _, *rows = json.loads(file.read_text())
    timed = {(row["product"], row["pass"], row["implementation"]) for row in rows if row["ms"]}
    assert timed == {
        *(("ffn", name, how) for name in ffn.PASSES for how in ("xla_dense", "reference")),
        *((part, name, "xla_dense") for part, name in ffn.PARTS.items() if part != "split"),
    }
    assert all(row["note"] for row in rows if not row["ms"])


@pytest.mark.cpu_only
def test_the_whole_raises_where_a_kernel_is_missing():
    with pytest.raises(Unsupported):
        jax.eval_shape(ffn._ffns(ffn.recipe_of(SMALL))["cuda"], *ffn.make_operands(SMALL)[:3])
