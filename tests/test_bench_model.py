"""The benches of whole models without a GPU: rows, arithmetic, errors, command lines."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from figures import assert_no_overlap
from processes import ROOT, bench, eight_devices

from configs import lm_100m
from s24jax.bench import estimate, model
from s24jax.bench.figure import bench_figure
from s24jax.bench.model import Batch
from s24jax.bench.rows import KEYS
from s24jax.bench.table import table
from s24jax.bench.timing import Result
from s24jax.data import prepare, validation_batches
from s24jax.errors import InvalidInput
from s24jax.evaluate import restore_run
from s24jax.mesh import AXES, one_device
from s24jax.train import train
from s24jax.train_step import make_program

# 2 layers, D 16, F 64, V 256, sequences of 32.
SMALL = lm_100m.get_config("smoke")
ADDED = (
    *("model", "layers", "vocabulary", "sequence_length", "remat", "tokens_per_s", "mfu"),
    *("peak_bytes", "ratio_to_xla_dense", "ratio_to_fused_dense"),
)
TRAFFIC = ("mesh", "received_gb", *(f"received_gb_{axis}" for axis in AXES))
products = pytest.mark.parametrize("product", model.PRODUCTS)


@pytest.fixture
def kernels(monkeypatch):
    """Our kernels played by the reference."""
    played = {name: (mode, "reference") for name, (mode, _) in model.IMPLEMENTATIONS.items()}
    monkeypatch.setattr(model, "IMPLEMENTATIONS", played)


@products
def test_rows(product, kernels):
    (rows,) = model.bench(product, [SMALL], [64], tuple(model.IMPLEMENTATIONS), 1)
    assert [row["implementation"] for row in rows] == ["cuda", "relu2_cuda", "xla_dense"]
    ms = {row["implementation"]: row["ms"] for row in rows}
    tokens = 2 if product == "decode" else 64
    for row in rows:
        assert tuple(row) == (*KEYS, *ADDED, *(TRAFFIC if product == "scaling" else ()))
        assert (row["bench"], row["product"], row["model"]) == (product, product, SMALL.name)
        assert (row["T"], row["D"], row["F"]) == (tokens, 16, 64)
        assert (row["layers"], row["vocabulary"], row["sequence_length"]) == (2, 256, 32)
        assert row["ms"] > 0 and row["note"] == ""
        assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ms"])
        assert row["mfu"] == pytest.approx(row["tflops"] / 989.4)
        assert row["ratio_to_xla_dense"] == pytest.approx(ms["xla_dense"] / row["ms"])
        assert row["ratio_to_fused_dense"] == pytest.approx(ms["relu2_cuda"] / row["ms"])
        assert row["peak_bytes"] > 4 * 256 * 16


def test_operations_by_hand():
    """Of 2 sequences of 32: a layer has 4*16*16 + 2*16*64 weights, the logits 16*256."""
    weights, logits = 4 * 16 * 16 + 2 * 16 * 64, 16 * 256
    batch = Batch(2, 32)

    def flops(product):
        return model.forward_flops(product, SMALL, batch)

    attention = 2 * 64 * 4 * 16 * 16  # layers, tokens, 4 * D * tokens looked at
    assert flops("step") == 64 * 2 * (2 * weights + logits) + attention
    assert flops("prefill") == 64 * 2 * 2 * weights + 2 * 2 * logits + attention
    assert flops("decode") == 2 * 2 * (2 * weights + logits) + 2 * 2 * 4 * 16 * 32


def test_a_step_trains():
    """The state goes from one call to the next, whoever makes it."""
    (side,) = model._sides(SMALL, Batch(2, 32), one_device(), ["xla_dense"]).values()
    sides = {"one": side, "other": side}
    makers, peaks = model._step_makers(SMALL, Batch(2, 32), sides)
    one, other = (make() for make in makers.values())
    losses = [float(contender.call()) for contender in (one, other) * 8]
    assert losses[-1] < losses[0]
    assert sorted(peaks) == ["one", "other"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A smoke run's workdir: six dense steps, batches of 4 sequences of 32."""
    config, workdir = lm_100m.get_config("smoke"), tmp_path_factory.mktemp("run") / "smoke"
    config.model.ffn = "relu2"
    config.data.data_dir = str(tmp_path_factory.mktemp("data"))
    train(config, workdir)
    return workdir


def test_a_trained_model_goes_on_from_its_last_step(run, kernels, monkeypatch):
    """On the run's validation text, one batch after the other; 2:4 though it trained dense."""
    losses = {}

    def two_calls(makers, rounds):
        for name, make in makers.items():
            call = make().call
            losses[name] = [float(call()), float(call())]
        return {name: Result(1e-3, 0.0) for name in makers}

    monkeypatch.setattr(model, "measure", two_calls)
    (rows,) = model.bench_run(run, [64], ("xla_dense", "cuda"), 1)
    config, program, state, _ = restore_run(run)
    texts = validation_batches(
        prepare(config.data, sequence_length=32), batch_size=2, num_batches=4
    )
    assert not (texts[0] == texts[1]).all()
    zeros = program.probe(state.params, texts[0])["zero_share"].mean()
    for row in rows:
        assert row["source"] == "trained, step 6" and row["T"] == 64
        assert row["zeros"] == pytest.approx(float(zeros), abs=1e-6)
    config.model.ffn = "relu2_24"
    config.batch_size = 2
    program = make_program(config, one_device())
    expected = []
    for text, mode in zip(texts, ("dense", "dense", "sparse24", "sparse24"), strict=True):
        state, metrics = program.train_step(state, text, mode=mode)
        expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["xla_dense"] + losses["cuda"], expected, rtol=1e-6)


def test_table_of_a_trained_model(run, kernels):
    (rows,) = model.bench_run(run, [64], ("cuda", "xla_dense"), 1)
    header, _, line = [line.split("|") for line in table(rows).splitlines() if line[:1] == "|"]
    found = {key.strip(): value.strip() for key, value in zip(header, line, strict=True)}
    assert found["product"] == "step lm_100m_smoke (trained, step 6)"
    assert found["zeros in Y2"] == f"{rows[0]['zeros']:.1%}"


@pytest.mark.parametrize(
    "tokens, words",
    [
        ([64, 33], "--tokens: 33 is no multiple of lm_100m_smoke's sequence length 32; use 32"),
        ([10**6 * 32], "--tokens: 32000000 are 1000000 sequences of 32, and the run's validation"),
    ],
)
def test_what_a_run_has_no_text_for(run, tokens, words):
    """Known before the first row is measured."""
    with pytest.raises(InvalidInput) as error:
        next(model.bench_run(run, tokens, ("xla_dense",), 1))
    assert str(error.value).startswith(words)


def test_what_is_no_number_has_no_time(kernels, monkeypatch):
    monkeypatch.setattr(model, "_not_finite", lambda out: float(out) * jnp.inf)
    (rows,) = model.bench("step", [SMALL], [64], ("cuda",), 1)
    assert rows[0]["ms"] is None and rows[0]["note"] == "wrong result: relative error inf"


def test_not_finite():
    assert model._not_finite(jnp.ones(3)) == 0
    assert model._not_finite(jnp.array([1, jnp.nan])) == model._not_finite(jnp.array(jnp.inf))
    assert model._not_finite(jnp.array(jnp.inf)) == float("inf")


@pytest.mark.parametrize("tokens, mend", [(48, 32), (16, 32), (100, 96)])
def test_tokens_that_are_no_sequences(tokens, mend):
    with pytest.raises(InvalidInput) as error:
        model.batch_of(SMALL, tokens)
    assert str(error.value) == (
        f"--tokens: {tokens} is no multiple of lm_100m_smoke's sequence length 32; use {mend}"
    )


@products
def test_table(product, kernels):
    (rows,) = model.bench(product, [SMALL], [64], ("cuda", "xla_dense"), 1)
    head, _, line = (line for line in table(rows).splitlines() if line.startswith("|"))
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells == [
        *("T, D, F", "product", "cuda", "xla_dense", "cuda : dense", "cuda : xla_dense"),
        "MFU of cuda",
        *(["GB that a device receives"] if product == "scaling" else []),
        "error of cuda",
    ]
    assert f"{product} lm_100m_smoke" in line


def test_each_width_with_each_number_of_tokens(kernels):
    configs = [model.at_width(SMALL, width) for width in (16, 32)]
    batches = list(model.bench("prefill", configs, [32, 64], ("xla_dense",), 1))
    assert [(row["T"], row["D"], row["F"]) for (row,) in batches] == [
        *((32, 16, 64), (64, 16, 64), (32, 32, 128), (64, 32, 128))
    ]


def test_a_width_keeps_the_heads_width():
    config = model.at_width(lm_100m.get_config(), 2048)
    assert (config.model.heads, config.model.hidden) == (32, 8192)
    assert lm_100m.get_config().model.width == 768
    with pytest.raises(InvalidInput) as error:
        model.at_width(lm_100m.get_config(), 1000)
    assert str(error.value) == (
        "--widths: 1000 does not give whole heads of lm_100m, 64 wide; use 960"
    )


def test_figure_over_widths_and_tokens():
    """Made-up times: 2:4 gains with the width, our dense model is 1.05 times as fast."""
    rows = []
    for config, tokens in itertools.product(
        (model.at_width(lm_100m.get_config(), width) for width in (768, 2048)), (16384, 65536)
    ):
        batch = model.batch_of(config, tokens)
        speed = {"cuda": config.model.width / 1000, "relu2_cuda": 1.05, "xla_dense": 1.0}
        results = {name: Result(tokens / 1e6 / s) for name, s in speed.items()}
        rows += model._rows("step", config, batch, results, {})
    figure = bench_figure(rows)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    for tokens in ("16,384", "65,536"):
        line = lines[f"2:4, our kernels, T {tokens}"]
        assert list(line.get_xdata()) == [768, 2048]
        np.testing.assert_allclose(line.get_ydata(), [0.768, 2.048])
        np.testing.assert_allclose(lines[f"dense, our kernels, T {tokens}"].get_ydata(), 1.05)
    assert figure.get_suptitle() == "How much faster is a training step?"
    assert axes.get_title(loc="left") == "lm_100m, 12 layers"
    assert_no_overlap(figure)
    with pytest.raises(InvalidInput, match="no row has a time beside xla_dense's; run the bench"):
        bench_figure([row for row in rows if row["implementation"] == "xla_dense"])


# ------------------------------------------------------------------------------------ the estimate


def test_an_estimate_by_hand():
    """Of 2 layers, D 4, F 16, V 8, on 4 GPUs, of which each has a million tokens of its own."""
    m = estimate.Model(2, 4, 16, 8, fsdp=2, tensor=1, dense_ffn=3e-6, sparse_ffn=2e-6)
    step = estimate.step_of(m, 4)
    tokens = 2**20
    layer = 2 * 4 * 4 * 4 + 4 * 4 * 2048
    rest = 3 * tokens * (2 * layer + 2 * 4 * 8)
    assert step.dense == pytest.approx(rest / 88e12 * 0.2440 + tokens * 2 * 3e-6)
    assert step.sparse == pytest.approx(rest / 88e12 * 0.2440 + tokens * 2 * 2e-6)
    weights, table = 2 * (4 * 4 * 4 + 2 * 4 * 16), 4 * 8
    # 64 microbatches; half of the layers' weights come twice, half of the table once, and half of
    # the gradients go, 2 bytes each.
    assert step.fsdp == pytest.approx(64 * (3 * weights + 2 * table) / 2 * 2 / 370e9)
    assert step.data == pytest.approx(2 * (weights + table) / 2 / 2 * 4 / 40e9)
    assert step.tensor == 0
    halves = estimate.step_of(m._replace(fsdp=1, tensor=2), 4)
    assert halves.tensor == pytest.approx(2 * (4 * 2 * (2 * tokens) * 4 * 2 / 2) / 370e9)
    logits = 3 * tokens * 2 * 4 * 8 / 88e12  # once more: twice the tokens, half the rest
    assert halves.dense == pytest.approx(step.dense + logits * 0.2440)
    assert halves.sparse == pytest.approx(step.sparse + logits * 0.2440)


def test_the_estimates_bytes_are_those_of_a_program():
    """Of the 1.5B model on two GPUs, one microbatch, as `bench scaling` recorded them."""
    _, *rows = json.loads((ROOT / "experiments/004_many_devices/scaling.json").read_text())
    (recorded,) = {row["received_gb"] for row in rows if row["mesh"] == "1x2x1"}
    step = estimate.step_of(estimate.MODELS["1.5B"]._replace(fsdp=2), 2)
    microbatches = estimate.BATCH // 2 // estimate.MICROBATCH
    assert step.fsdp * 370 / microbatches == pytest.approx(recorded, rel=1e-3)


def test_gains():
    free = estimate.Step(dense=2.0, sparse=1.0, fsdp=0.0, data=0.0, tensor=0.0)
    assert free.gain(overlap=True) == free.gain(overlap=False) == 2.0
    bound = free._replace(fsdp=2.5, data=0.5, tensor=1.0)
    assert bound.gain(overlap=True) == 1.0
    assert bound.gain(overlap=False) == pytest.approx(6 / 5)


def test_the_written_estimate_is_the_programs():
    finished = bench("estimate")
    assert finished.returncode == 0, finished.stderr
    written = (ROOT / "experiments/004_many_devices/README.md").read_text()
    assert finished.stdout == "\n".join(estimate.lines()) + "\n"
    assert finished.stdout in written


# ------------------------------------------------------------------------------- the command line


@pytest.mark.cpu_only
@products
def test_end_to_end(product, tmp_path):
    file = tmp_path / "rows.json"
    finished = bench(
        product,
        "--together",
        "--models=lm_100m:smoke",
        "--layers=1",
        "--tokens=64",
        "--rounds=1",
        f"--json={file}",
    )
    assert finished.returncode == 0, finished.stderr
    environment, *rows = json.loads(file.read_text())
    assert environment["jax"] == jax.__version__
    assert [row["implementation"] for row in rows if row["ms"]] == ["xla_dense"]
    assert {row["layers"] for row in rows} == {1}
    assert all("implementation 'cuda' cannot run" in row["note"] for row in rows if not row["ms"])


@pytest.mark.cpu_only
def test_from_a_workdir_end_to_end(run):
    finished = bench("step", f"--from-workdir={run}", "--tokens=64", "--rounds=1")
    assert finished.returncode == 0, finished.stderr
    assert "step lm_100m_smoke (trained, step 6)" in finished.stdout


@pytest.mark.cpu_only
def test_scaling_on_eight_devices(tmp_path):
    """By hand, float32: D 16, F 64, one layer, sequences of 32, on devices with 2 of them."""
    file = tmp_path / "rows.json"
    finished = eight_devices(
        *("-m", "experiments.bench", "scaling"),
        "--models=lm_100m:smoke",
        "--layers=1",
        "--tokens=64",
        "--implementations=xla_dense",
        "--meshes=8x1x1,1x8x1,2x2x2",
        "--rounds=1",
        f"--json={file}",
    )
    assert finished.returncode == 0, finished.stderr
    _, data, fsdp, all_three = json.loads(file.read_text())
    layer, tables, scales = 16 * 48 + 16 * 16, 2 * 256 * 16, 3 * 16
    weights = layer + 2 * 64 * 16 + tables
    assert [row["mesh"] for row in (data, fsdp, all_three)] == ["8x1x1", "1x8x1", "2x2x2"]
    assert [row["T"] for row in (data, fsdp, all_three)] == [512, 512, 256]
    total = 4 * 2 * 7 / 8 * (weights + scales + 1)  # and the loss
    assert data["received_gb_data"] * 1e9 == pytest.approx(total, rel=1e-3)
    assert data["received_gb"] == data["received_gb_data"]
    # A layer's weights come twice, the tables once, and all gradients go home.
    whole = 4 * 7 / 8 * (2 * (weights - tables) + tables + weights + 2 * (scales + 1))
    assert fsdp["received_gb_fsdp"] * 1e9 == pytest.approx(whole, rel=1e-3)
    # Outputs and inputs' gradients of attention and FFN, to each device those of its other half.
    assert all_three["received_gb_tensor"] * 1e9 == pytest.approx(4 * 64 * 16 * 4, rel=1e-3)


@pytest.mark.parametrize("flag", ["--meshes=2x2", "--meshes=8x1x1,"])
def test_what_is_no_mesh(flag):
    finished = bench("scaling", flag)
    assert finished.returncode == 1
    written = flag.partition("=")[2]
    assert finished.stderr.splitlines()[-1] == (
        f"error: --meshes: {written!r} is no DATAxFSDPxTENSOR; write 2x4x1,8x1x1"
    )


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--models=gpt", "--models: 'gpt' does not exist; use some of lm_100m, paper_1p5b"),
        (
            "--models=paper_1p5b:swiglu",
            "--models: 'paper_1p5b:swiglu' has FFNs of kind swiglu, which have no 2:4 form; use",
        ),
        ("--models=lm_100m:big", "lm_100m has no variant 'big'; write one of smoke after the"),
        (
            "--tokens=100",
            "--tokens: 100 is no multiple of lm_100m's sequence length 1024; use 1024",
        ),
        ("--tokens=1k", "--tokens: '1k' is no positive number; write N,N,..."),
        ("--widths=768,0", "--widths: '0' is no positive number; write N,N,..."),
        ("--implementations=cublas", "--implementations: 'cublas' does not exist; use some of"),
    ],
)
def test_errors(flag, words):
    finished = bench("step", flag)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert words in finished.stderr.splitlines()[-1]
