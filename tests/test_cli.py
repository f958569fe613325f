"""Every command line as a user runs it: a process of its own, its output, its errors."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py:smoke"
OPS = (  # of the full recipe and the dense steps before it
    *("matmul_sparsify24", "matmul24", "split_features", "matmul_feature_wise24"),
    *("split_matmul24", "relu2_ffn"),
)
NO_HOPPER = "the default device is a CPU; needs an NVIDIA GPU of compute capability 9.0 (Hopper)"


def start(*arguments, prefix=(), **options) -> subprocess.Popen:
    """A command line of the checkout, as `PREFIX python -m ARGUMENTS`."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def succeed(*arguments, **options) -> str:
    status, out, err = run(*arguments, **options)
    assert status == 0, err
    return out


def fail(*arguments, **options) -> str:
    """The one line of error that the command line ends with, behind its log if any."""
    status, out, err = run(*arguments, **options)
    assert status != 0
    assert out == ""
    assert "Traceback" not in err
    *log, last = err.splitlines()
    assert last.startswith("error: "), err
    assert all(line.endswith(")") for line in log), err  # "op: implementation (reason)"
    return last.removeprefix("error: ")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return f"--config.data.data_dir={tmp_path_factory.mktemp('datasets')}"


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    out = succeed("experiments.train", QUICKSTART, data_dir, f"--workdir={workdir}")
    return workdir, out


def test_train_prints_the_closing_table(trained):
    workdir, out = trained
    lines = out.splitlines()
    assert lines[0] == "| quickstart_smoke, step 6 | 2:4 | dense twin |"
    summary = json.loads((workdir / "summary.json").read_text())
    loss, twin = summary["validation_loss"], summary["dense_twin"]["validation_loss"]
    assert f"| validation loss (nats/token) | {loss:.4f} | {twin:.4f} |" in lines
    assert f"plots: {workdir}/plots   sample: {workdir}/samples.txt" == lines[-1]


def test_train_says_what_ran(trained, tmp_path, data_dir):
    """The log names each op's implementation once, and the switch."""
    status, _, err = run("experiments.train", QUICKSTART, data_dir, f"--workdir={tmp_path}")
    assert status == 0
    for op in OPS:
        (line,) = (line for line in err.splitlines() if line.startswith(f"{op}: "))
        assert line.startswith(f"{op}: reference (") and f"cuda: {NO_HOPPER}" in line
    assert "attention: xla (cudnn: needs an NVIDIA GPU, jax runs on cpu)" in err
    assert "step 4: switch to 2:4" in err


def test_evaluate(trained):
    workdir, _ = trained
    summary = json.loads((workdir / "summary.json").read_text())
    own = json.loads(succeed("experiments.evaluate", f"--workdir={workdir}"))
    assert (own["step"], own["mode"]) == (6, "sparse24")
    assert own["loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert own["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-6)
    assert own["tokens"] == 4 * 32
    dense = json.loads(succeed("experiments.evaluate", f"--workdir={workdir}", "--mode=dense"))
    assert dense["loss"] == pytest.approx(summary["validation_loss_dense"], rel=1e-6)
    earlier = json.loads(succeed("experiments.evaluate", f"--workdir={workdir}", "--step=3"))
    assert (earlier["step"], earlier["mode"]) == (3, "dense")


def test_sample(trained):
    workdir, _ = trained
    arguments = ("experiments.sample", f"--workdir={workdir}", "--prompt=def f", "--tokens=8")
    text = succeed(*arguments)
    assert text.startswith("def f")
    assert succeed(*arguments) == text
    greedy = {succeed(*arguments, "--temperature=0", f"--seed={seed}") for seed in (1, 2)}
    assert len(greedy) == 1


def test_plot_draws_anew(trained):
    workdir, _ = trained
    figure = workdir / "plots" / "loss.png"
    figure.unlink()
    out = succeed("experiments.plot", f"--workdir={workdir}")
    assert str(figure) in out.splitlines()
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_sigterm_saves_and_resumes(data_dir, tmp_path):
    """A real signal to a real process: status 0, then the same command goes on to the end."""
    arguments = ("experiments.train", QUICKSTART, data_dir, "--config.steps=400")
    arguments += ("--config.checkpoint_every=1000", f"--workdir={tmp_path}")
    process = start(*arguments)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size > 5000):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (0, "")
    assert "is saved; the same command resumes" in err
    (saved,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 0 < saved < 400
    _, _, err = run(*arguments)
    assert "step 1/400" not in err
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [r["step"] for r in steps if (r["kind"], r["run"]) == ("train", "main")]
    assert steps == list(range(1, 401))


# ---- what a user gets wrong: one line that names the value and the mend


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.nope=1"], "--config.nope=1: the configuration has no key 'nope'"),
        (["--config.model.recipe.x=1"], "the configuration has no key 'x'"),
        (["--config.steps=many"], "flag --config.steps=many: invalid literal for int()"),
        (["--nope=1"], "Unknown command line flag 'nope'"),
        (["stray"], "'stray' is no flag; write --flag=value"),
        (["--config.model.hidden=66"], "hidden width F=66 is no multiple of 4; use 68"),
    ],
)
def test_train_errors(data_dir, tmp_path, arguments, words):
    workdir = tmp_path / "run"
    message = fail("experiments.train", QUICKSTART, data_dir, f"--workdir={workdir}", *arguments)
    assert words in message
    assert not workdir.exists()


def test_a_config_that_is_not_there():
    message = fail("experiments.train", "--config=configs/nope.py", "--workdir=unused")
    assert "No such file or directory: 'configs/nope.py'; name a file of configs/" in message
    message = fail("experiments.train", "--config=configs/quickstart.py:smok", "--workdir=unused")
    assert "quickstart has no variant 'smok'; write one of smoke" in message
    assert "Flag --config must have a value" in fail("experiments.train", "--workdir=unused")
    assert "Flag --workdir must have a value" in fail("experiments.train", QUICKSTART)


def test_another_runs_workdir(trained, data_dir):
    workdir, _ = trained
    message = fail(
        "experiments.train", QUICKSTART, data_dir, f"--workdir={workdir}", "--config.seed=3"
    )
    assert f"{workdir} belongs to another config: seed is 0 there, 3 here" in message


def test_a_full_disk_while_saving(trained, data_dir, tmp_path):
    """A limit on the size of files stands for the disk: the checkpoint does not fit."""

    limit = ("bash", "-c", 'ulimit -f 32 && exec "$@"', "bash")  # KiB; python ignores the signal
    arguments = ("experiments.train", QUICKSTART, data_dir, f"--workdir={tmp_path / 'run'}")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    status, out, err = run(*arguments, prefix=limit, env=environment)
    assert (status, out) == (1, "")
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: cannot save to {tmp_path / 'run' / 'checkpoints'} (")
    assert "there is none yet; free disk space or check the permissions" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiments.evaluate"], "no run.json in {empty}; name the workdir of a run"),
        (["experiments.sample", "--prompt=x"], "no run.json in {empty}; name the workdir of a run"),
        (["experiments.plot"], "metrics.jsonl does not exist"),
    ],
)
def test_a_workdir_without_a_run(tmp_path, arguments, words):
    message = fail(*arguments, f"--workdir={tmp_path}")
    assert words.format(empty=tmp_path) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--workdir=a", "--results=b"]])
def test_plot_wants_one_of_two(arguments):
    message = fail("experiments.plot", *arguments)
    assert message == "name a run by --workdir, or results by --results"


def test_errors_on_a_finished_run(trained):
    workdir = f"--workdir={trained[0]}"
    assert "no checkpoint of step 5" in fail("experiments.evaluate", workdir, "--step=5")
    assert "--mode=fast" in fail("experiments.evaluate", workdir, "--mode=fast")
    assert "do not fit the context of 32" in fail("experiments.sample", workdir, "--prompt=x")
    assert "the prompt is empty" in fail("experiments.sample", workdir, "--prompt=")
    assert "temperature -1.0 is negative" in fail(
        "experiments.sample", workdir, "--prompt=x", "--tokens=2", "--temperature=-1"
    )


def test_sparse24_of_a_dense_kind(data_dir, tmp_path):
    workdir = f"--workdir={tmp_path}"
    succeed("experiments.train", QUICKSTART, data_dir, workdir, "--config.model.ffn=gelu",
            "--config.dense_twin=False")  # fmt: skip
    message = fail("experiments.evaluate", workdir, "--mode=sparse24")
    assert message == (
        "--mode=sparse24 needs model.ffn=relu2_24, this run has 'gelu'; use --mode=dense"
    )


def test_doctor():
    out = succeed("s24jax.doctor")
    assert "  cpu: cpu" in out.splitlines()
    for op in (*OPS, "sparsify24", "feature_wise24"):
        against_all = "triton: {0}; cuda: {0}" if op == "sparsify24" else "cuda: {0}"
        assert f"  {op:21} auto       reference ({against_all.format(NO_HOPPER)})" in out
        assert f"  {op:21} reference  reference (named by the caller)" in out
        assert f"{op}: implementation 'cuda' cannot run (cuda: {NO_HOPPER}); use 'auto'" in out
    import jax

    assert f"  jax                  {jax.__version__}" in out
