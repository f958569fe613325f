"""The training loop: first steps, the switch, resume, signals, divergence, what a workdir holds."""

import json
import os
import signal

import jax
import numpy as np
import oracles
import pytest
from jaxprs import equations

from configs import base, quickstart
from s24jax import train as training
from s24jax.checkpoint import Checkpoints
from s24jax.errors import BrokenEnvironment, Diverged, InvalidInput, Unsupported
from s24jax.train import check, train
from s24jax.train_step import make_program
from s24jax.writer import read_metrics


def make_config(data_dir, **changes):
    """The smoke configuration without its twin: 6 steps, the switch after step 3."""
    config = quickstart.get_config("smoke")
    config.dense_twin = False
    config.data.data_dir = str(data_dir)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="module")
def straight(data_dir, tmp_path_factory):
    """A whole run with a twin, never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    summary = train(make_config(data_dir, dense_twin=True), workdir)
    return workdir, summary


def losses(workdir, run="main", kind="train"):
    records = read_metrics(workdir)
    return {r["step"]: r["loss"] for r in records if (r["kind"], r["run"]) == (kind, run)}


def without_times(workdir):
    records = read_metrics(workdir)
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def restored_state(workdir, config):
    like = jax.eval_shape(make_program(config).init)
    checkpoints = Checkpoints(workdir, read_only=True)
    restored = checkpoints.restore(like)
    checkpoints.close()
    return restored


def assert_same_bits(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


# ---- the first step


@pytest.fixture(scope="module")
def first_steps():
    """Loss, gradient norm and loss after one step on fixed tokens, in each mode."""
    config = quickstart.get_config("smoke")
    program = make_program(config)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 33), dtype=np.int32)
    found = {}
    for mode in ("dense", "sparse24"):
        state, metrics = program.train_step(program.init(), tokens, mode=mode)
        after = program.loss(state.params, tokens, mode=mode)
        found[mode] = [float(metrics["loss"]), float(metrics["grad_norm"]), float(after)]
    return found


# Loss, gradient norm and the loss after the step. A change here changes what everybody trains.
GOLDEN = {
    "dense": [5.946848, 1.297791, 5.786255],
    "sparse24": [5.933841, 1.279630, 5.776071],
}


@pytest.mark.parametrize("mode", GOLDEN)
def test_golden_first_step(first_steps, mode):
    np.testing.assert_allclose(first_steps[mode], GOLDEN[mode], rtol=1e-5)


@pytest.mark.parametrize("mode", GOLDEN)
def test_of_what_is_as_long_as_the_vocabulary_only_the_embedding_is_scattered(mode):
    """A scatter into the logits' gradient would have them written in float32 first."""
    program = make_program(quickstart.get_config("smoke"))
    tokens = jax.ShapeDtypeStruct((4, 33), np.int32)
    traced = program.train_step.trace(program.state, tokens, mode=mode)
    scatters = [e for e in equations(traced.jaxpr.jaxpr) if e.primitive.name.startswith("scatter")]
    shapes = [equation.outvars[0].aval.shape for equation in scatters]
    assert [shape for shape in shapes if 256 in shape] == [(256, 16)]


def test_accumulated_gradients_are_the_batchs(data_dir):
    """In dense mode the mean over equal parts is the mean over the batch."""
    tokens = np.random.default_rng(0).integers(0, 256, (4, 33), dtype=np.int32)
    results = []
    for accumulate in (1, 2):
        program = make_program(make_config(data_dir, accumulate=accumulate))
        state, metrics = program.train_step(program.init(), tokens, mode="dense")
        results.append((state.params, metrics))
    (whole, whole_metrics), (parts, parts_metrics) = results
    np.testing.assert_allclose(whole_metrics["loss"], parts_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(whole_metrics["grad_norm"], parts_metrics["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        # Adam's first step is the sign of the gradient times the rate: tiny gradients may differ.
        assert np.mean(np.abs(np.asarray(a) - np.asarray(b)) > 1e-5) < 0.01


# ---- a whole run


def test_the_switch_and_the_twin(straight):
    workdir, summary = straight
    records = read_metrics(workdir)
    modes = {r["step"]: r["mode"] for r in records if (r["kind"], r["run"]) == ("train", "main")}
    assert modes == dict.fromkeys((1, 2, 3), "dense") | dict.fromkeys((4, 5, 6), "sparse24")
    assert [r for r in records if r["kind"] == "switch"] == [
        {"kind": "switch", "run": "main", "step": 4, "mode": "sparse24"}
    ]
    twin = [r for r in records if (r["kind"], r["run"]) == ("train", "dense_twin")]
    assert {r["step"]: r["mode"] for r in twin} == dict.fromkeys((4, 5, 6), "dense")
    # Forked from the same state and on the same batch: the first losses differ by 2:4 alone.
    assert losses(workdir)[4] != losses(workdir, "dense_twin")[4]
    assert abs(losses(workdir)[4] - losses(workdir, "dense_twin")[4]) < 0.05
    assert summary["switch_step"] == 4
    assert summary["dense_twin"]["mode"] == "dense"


def test_the_twin_is_what_a_dense_run_gives(straight, data_dir, tmp_path):
    workdir, _ = straight
    config = make_config(data_dir, model={"ffn": "relu2"})
    train(config, tmp_path)
    dense = losses(tmp_path)
    assert {step: dense[step] for step in (4, 5, 6)} == losses(workdir, "dense_twin")
    assert {step: dense[step] for step in (1, 2, 3)} == {
        step: losses(workdir)[step] for step in (1, 2, 3)
    }


def test_what_a_workdir_holds(straight):
    workdir, summary = straight
    assert json.loads((workdir / "summary.json").read_text()) == summary
    names = {path.name for path in workdir.iterdir()}
    assert {
        "run.json", "metrics.jsonl", "summary.json", "samples.txt", "plots", "tensorboard",
        "checkpoints",
    } == names  # fmt: skip
    plots = {path.name for path in (workdir / "plots").iterdir()}
    assert plots == {"loss.png", "zero_share.png", "dropped_share.png", "gap.png"}
    assert "def " in (workdir / "samples.txt").read_text()
    record = json.loads((workdir / "run.json").read_text())
    ops = {"attention", "relu2_ffn", "matmul_sparsify24", "matmul24", "split_matmul24"}
    assert {c["op"] for c in record["implementations"]} >= ops
    assert record["data"]["windows"]["train"] > 0
    validation = losses(workdir, kind="validation")
    assert summary["validation_loss"] == validation[6]
    assert summary["best_validation_loss"] == min(validation.values())
    assert summary["bits_per_byte"] == pytest.approx(validation[6] / np.log(2))
    sparsity = [r for r in read_metrics(workdir) if r["kind"] == "sparsity" and r["run"] == "main"]
    assert [r["step"] for r in sparsity] == [1, 3, 6]
    assert len(sparsity[0]["zero_share"]) == 2
    assert summary["zero_share"] == pytest.approx(np.mean(sparsity[-1]["zero_share"]))


def test_a_finished_run_is_not_run_again(straight, data_dir):
    workdir, summary = straight
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(make_config(data_dir, dense_twin=True), workdir) == summary
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_dense_kind_has_no_sparsity_records(data_dir, tmp_path):
    summary = train(make_config(data_dir, model={"ffn": "swiglu"}), tmp_path)
    assert {r["kind"] for r in read_metrics(tmp_path)} == {"train", "validation"}
    assert summary["zero_share"] is None
    assert summary["mode"] == "dense"


# ---- stop and resume


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_stopped_run_resumes_exactly(straight, data_dir, tmp_path, monkeypatch, stop_at):
    """SIGTERM before and after the switch; then the same command: bits equal a straight run's."""
    workdir, summary = straight
    config = make_config(data_dir, dense_twin=True)
    advance = training._Run.advance

    def advance_and_signal(self, step):
        advance(self, step)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "advance", advance_and_signal)
        assert train(config, tmp_path) is None
    assert signal.getsignal(signal.SIGTERM) == handler
    assert restored_state(tmp_path, config).step == stop_at
    assert not (tmp_path / "summary.json").exists()
    resumed = train(config, tmp_path)
    assert_same_bits(restored_state(tmp_path, config).state, restored_state(workdir, config).state)
    assert without_times(tmp_path) == without_times(workdir)
    assert (tmp_path / "samples.txt").read_text() == (workdir / "samples.txt").read_text()
    rates = {"tokens_per_second", "tokens_per_second_before_switch"}
    for ours, theirs in ((resumed, summary), (resumed["dense_twin"], summary["dense_twin"])):
        nested = rates | {"dense_twin"}
        assert {k: v for k, v in ours.items() if k not in nested} == {
            k: v for k, v in theirs.items() if k not in nested
        }


def test_a_killed_run_resumes_from_its_last_checkpoint(straight, data_dir, tmp_path, monkeypatch):
    """Nothing is saved at the kill: step 5 is taken again, and its records are not doubled."""
    workdir, _ = straight
    config = make_config(data_dir, dense_twin=True)
    after_step = training._Run.after_step

    def killed(self, step):
        after_step(self, step)
        if step == 5:
            raise MemoryError("killed")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(training._Run, "after_step", killed)
        train(config, tmp_path)
    train(config, tmp_path)
    assert without_times(tmp_path) == without_times(workdir)


# ---- what goes wrong


def test_divergence_stops_with_step_checkpoint_and_advice(data_dir, tmp_path, monkeypatch):
    config = make_config(data_dir)
    advance = training._Run.advance

    def poisoned(self, step):
        if step == 5:
            main = self.states["main"]
            params = jax.tree.map(lambda p: p * np.nan, main.params)
            self.states["main"] = type(main)(main.step, params, main.optimizer, main.rng)
        advance(self, step)

    monkeypatch.setattr(training._Run, "advance", poisoned)
    with pytest.raises(Diverged) as error:
        train(config, tmp_path)
    message = str(error.value)
    assert message.startswith("the loss is nan at step 5 (mode sparse24); the last good state is ")
    assert "the checkpoint of step 3; try a lower optimizer.peak_learning_rate" in message
    assert "\n" not in message
    assert restored_state(tmp_path, config).step == 3
    records = [r for r in read_metrics(tmp_path) if r["kind"] == "train"]
    assert records[-1]["step"] == 5
    assert records[-1]["loss"] is None


def test_weights_spoilt_by_the_last_update_are_not_saved(data_dir, tmp_path, monkeypatch):
    """The loss of the step is finite, the validation after it is not."""
    config = make_config(data_dir)
    advance = training._Run.advance

    def spoil(self, step):
        advance(self, step)
        if step == 6:
            main = self.states["main"]
            params = jax.tree.map(lambda p: p * np.nan, main.params)
            self.states["main"] = type(main)(main.step, params, main.optimizer, main.rng)

    monkeypatch.setattr(training._Run, "advance", spoil)
    with pytest.raises(Diverged, match="the loss is nan at step 6 .mode sparse24.; .* of step 3"):
        train(config, tmp_path)
    assert restored_state(tmp_path, config).step == 3


def test_another_config_is_refused_before_anything_is_written(straight, data_dir):
    workdir, _ = straight
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(InvalidInput, match="belongs to another config: seed is 0 there, 1 here"):
        train(make_config(data_dir, dense_twin=True, seed=1), workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"accumulate": 3}, "batch_size=4 does not split into accumulate=3 equal parts"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"log_every": 0}, "log_every=0 must be at least 1"),
        (
            {"model": {"vocabulary": 100}},
            "model.vocabulary=100 does not hold the 256 values of a byte; make it 256",
        ),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0 must be at least 1"),
        (
            {"dense_twin": True, "model": {"ffn": "relu2"}},
            "dense_twin=True needs model.ffn=relu2_24, not 'relu2'; set dense_twin=False",
        ),
    ],
)
def test_numbers_that_do_not_fit(changes, words):
    config = base.smoke(base.get_config())
    config.update(changes)
    with pytest.raises(InvalidInput) as error:
        check(config)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": {"hidden": 66}}, InvalidInput, "hidden width F=66 is no multiple of 4; use 68"),
        (
            {"model": {"recipe": {"dense_multiple": 64}}},
            InvalidInput,
            "leaves no sparse feature; lower dense_share or dense_multiple",
        ),
        ({"model": {"width": 18}}, InvalidInput, "does not give 2 heads of an even width"),
        ({"model": {"ffn": "relu"}}, InvalidInput, "ffn kind 'relu' does not exist; use one of"),
        ({"model": {"implementation": "cuda"}}, Unsupported, "'cuda' cannot run"),
        ({"model": {"implementation": "x"}}, InvalidInput, "implementation 'x' does not exist"),
        ({"model": {"attention": "cudnn"}}, Unsupported, "needs an NVIDIA GPU, jax runs on cpu"),
        ({"data": {"source": "/no/such"}}, InvalidInput, "source '/no/such': no such folder"),
        ({"data": {"pattern": "*.nope"}}, InvalidInput, "matches '*.nope'"),
        ({"data": {"source": "tfds:lm1b"}}, BrokenEnvironment, "is not in data_dir"),
        ({"batch_size": 5000}, InvalidInput, "than one batch, batch_size 5000: lower one of them"),
        ({"sample": {"tokens": 300}}, InvalidInput, "do not fit the context of 32 bytes"),
        (
            {"optimizer": {"learning_rate_warmup_steps": 9}},
            InvalidInput,
            "learning_rate_warmup_steps=9 must lie in 0..5",
        ),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(data_dir, tmp_path, changes, kind, words):
    workdir = tmp_path / "run"
    with oracles.without_type_checks(), pytest.raises(kind) as error:
        train(make_config(data_dir, **changes), workdir)
    message = str(error.value)
    assert words in message
    assert "\n" not in message
    assert not workdir.exists()
