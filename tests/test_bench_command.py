"""The command line of the benches of ops: flags, runs from end to end, errors."""

import json

import jax
import pytest
from processes import bench, python

from s24jax.bench import gemm
from s24jax.bench.rows import KEYS, read_rows
from s24jax.bench.shapes import SHAPES, Shape, Size, parse_names, parse_shapes
from s24jax.errors import InvalidInput

SMALL = Shape(64, 32, 128)


# -------------------------------------------------------------------------------------- the flags


def test_shapes_of_a_flag():
    assert parse_shapes("64x32x128, 16384x2048x8192") == [SMALL, SHAPES[0]]
    assert str(SHAPES[0]) == "16384x2048x8192"
    assert Size(2, 3, 5).flops == 60


@pytest.mark.parametrize(
    "text, words",
    [
        ("64x32", "--shapes: '64x32' is no shape; write TxDxF, as 16384x2048x8192"),
        ("64x32x128,", "--shapes: '' is no shape"),
        ("64x0x128", "--shapes: '64x0x128' is no shape"),
        ("64x-3x128", "--shapes: '64x-3x128' is no shape"),
        ("66x32x128", "--shapes: T=66 of '66x32x128' is no multiple of 4; use 68"),
        ("64x32x130", "--shapes: F=130 of '64x32x130' is no multiple of 4; use 132"),
    ],
)
def test_shapes_that_are_none(text, words):
    with pytest.raises(InvalidInput) as error:
        parse_shapes(text)
    assert words in str(error.value)


def test_names_of_a_flag():
    assert parse_names("products", "dx, y3", gemm.PRODUCTS) == ("y3", "dx")
    with pytest.raises(InvalidInput) as error:
        parse_names("products", "y3,y4", gemm.PRODUCTS)
    expected = "--products: 'y4' does not exist; use some of y3, dx, dw_down, dw_up"
    assert str(error.value) == expected


# ------------------------------------------------------------------------------- the command line


def succeed(*arguments) -> str:
    finished = bench(*arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def fail(*arguments) -> str:
    finished = bench(*arguments)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "Traceback" not in finished.stderr
    return finished.stderr.splitlines()[-1].removeprefix("error: ")


@pytest.mark.cpu_only
def test_gemm_end_to_end(tmp_path):
    files = {kind: tmp_path / f"gemm.{kind}" for kind in ("json", "md", "png")}
    finished = bench(
        "gemm",
        "--together",
        "--shapes=64x32x128",
        "--rounds=1",
        f"--json={files['json']}",
        f"--table={files['md']}",
        f"--figure={files['png']}",
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.splitlines()[-1].startswith(
        "no times of cuda, cublas, cusparselt, cuda_split: the default device is a CPU; needs"
    )
    assert finished.stdout == files["md"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    environment, *rows = json.loads(files["json"].read_text())
    assert environment["bench"] == "environment"
    assert environment["device"] == "cpu: cpu"
    assert environment["jax"] == jax.__version__
    assert environment["command"].startswith("python -m experiments.bench gemm --together --shap")
    assert {"commit", "python", "torch"} <= set(environment)
    assert len(rows) == 2 * 5 + 2 * 6
    for row in rows:
        assert tuple(row) == KEYS
        assert (row["bench"], row["T"], row["D"], row["F"]) == ("gemm", 64, 32, 128)
        if row["implementation"] in ("xla_dense", "reference"):
            assert row["ms"] > 0 and row["tflops"] > 0 and row["rel_error"] < 5e-3
            assert row["note"] == ""
        else:
            assert row["ms"] is None and row["rel_error"] is None
            assert row["note"]
        if row["implementation"] == "cuda":
            assert "'cuda' cannot run" in row["note"]


@pytest.mark.cpu_only
def test_sparsify_end_to_end(tmp_path):
    """And `draw`, which makes the same table and figure of the rows."""
    file, figure = tmp_path / "rows.json", tmp_path / "bench.svg"
    shared = ("--shapes=64x32x128", "--rounds=1", "--together")  # quicker here than apart
    out = succeed("sparsify", *shared, f"--json={file}")
    rows = read_rows(file)[1:]
    times = {(row["product"], row["implementation"]): row["ms"] for row in rows}
    timed = [name for name, ms in times.items() if ms]
    assert timed == [
        ("copy", "xla"),
        ("sparsify24", "reference"),
        ("feature_wise24", "reference"),
        ("split_features", "reference"),
    ]
    assert {name for product, name in times if product == "sparsify24"} == {
        *("cuda", "triton", "reference", "cusparselt_compress")
    }
    errors = {row["product"]: row["rel_error"] for row in rows if row["ms"]}
    assert errors["sparsify24"] < 5e-3
    assert (errors["copy"], errors["feature_wise24"], errors["split_features"]) == (None, 0.0, 0.0)
    assert succeed("draw", f"--json={file}", f"--figure={figure}") == out
    assert b"<svg" in figure.read_bytes()


@pytest.mark.cpu_only
def test_implementations_apart(tmp_path):
    """As in one process, but for times; and each really has a process of its own."""
    shared = ("ffn", "--shapes=64x32x128", "--products=ffn", "--rounds=1")
    together, apart = tmp_path / "together.json", tmp_path / "apart.json"
    both = "--implementations=xla_dense,reference"
    succeed(*shared, both, "--together", f"--json={together}")
    finished = bench(*shared, both, f"--json={apart}", f"--table={tmp_path}/apart.md")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == (tmp_path / "apart.md").read_text()
    assert finished.stderr.count("ffn: forward of 64x32x128\n") == 2  # each process says so
    environment, *rows = read_rows(apart)
    assert environment["command"].startswith("python -m experiments.bench ffn --shapes=64x32x128")
    assert f" {both} " in environment["command"]
    assert environment | {"command": ""} == read_rows(together)[0] | {"command": ""}
    varying = {"ms", "tflops", *(key for key in rows[0] if key.startswith("ratio_to"))}
    for row, expected in zip(rows, read_rows(together)[1:], strict=True):
        assert list(row) == list(expected)
        assert {k: v for k, v in row.items() if k not in varying} == {
            k: v for k, v in expected.items() if k not in varying
        }
    for dense, sparse in zip(rows[::2], rows[1::2], strict=True):
        assert (dense["implementation"], sparse["implementation"]) == ("xla_dense", "reference")
        assert sparse["ratio_to_xla_dense"] == pytest.approx(dense["ms"] / sparse["ms"])
        assert sparse["ratio_to_dense"] == sparse["ratio_to_xla_dense"]
        assert dense["ratio_to_dense"] == 1


def test_processes_take_turns(tmp_path):
    """And the median of each implementation is compared."""
    code = f"""
from absl import flags
from experiments import bench
from s24jax.bench.rows import KEYS, RATIOS
flags.FLAGS(["bench", "--implementations=cuda,xla_dense", "--processes=3", "--json={tmp_path}/x"])
times = iter([1.0, 20.0, 3.0, 40.0, 2.0, 30.0])
def run_alone(command, name):
    print(command, name)
    row = dict.fromkeys([*KEYS, *RATIOS]) | dict(bench="gemm", implementation=name, ms=next(times))
    return [dict(bench="environment", command="alone"), row]
bench._run_alone = run_alone
rows = bench._run_apart("gemm", "as written")
assert rows == bench.read_rows("{tmp_path}/x")
print(rows[0]["command"], [(row["ms"], row["ratio_to_xla_dense"]) for row in rows[1:]])
"""
    finished = python("-c", code)
    assert finished.returncode == 0, finished.stderr
    turns = ["gemm cuda", "gemm xla_dense"] * 3
    assert finished.stdout.splitlines() == [*turns, "as written [(2.0, 15.0), (30.0, 1.0)]"]


@pytest.mark.cpu_only
def test_what_a_process_apart_refuses_is_said_once():
    finished = bench("ffn", "--shapes=64x32")
    assert (finished.returncode, finished.stdout) == (1, "")
    expected = "error: --shapes: '64x32' is no shape; write TxDxF, as 16384x2048x8192\n"
    assert finished.stderr == expected


@pytest.mark.cpu_only
def test_a_process_apart_that_is_killed():
    """And this one leaves the GPU alone, whose memory the others need."""
    code = """
import subprocess
from absl import flags
from jax._src.xla_bridge import backends_are_initialized
from experiments import bench
flags.FLAGS(["bench", "--shapes=64x32x128", "--implementations=cuda,reference"])
killed = ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
run = subprocess.run
subprocess.run = lambda command, **options: run([command[0], *killed], **options)
try:
    bench.main(["ffn"])
except bench.BrokenEnvironment as error:
    print(error)
assert not backends_are_initialized()
"""
    finished = python("-c", code)
    expected = (
        "ffn: the process of cuda was ended by signal 9; run it alone, with "
        "--implementations=cuda\n"
    )
    assert (finished.returncode, finished.stdout) == (0, expected), finished.stderr


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "command, flag, preallocates",
    [
        ("gemm", "shapes=64x32x128", "false"),
        ("ffn", "shapes=64x32x128", None),
        ("step", "layers=1", None),
    ],
)
def test_only_beside_torch_jax_takes_memory_bit_by_bit(command, flag, preallocates):
    code = f"""
import os
from absl import flags
from experiments import bench
flags.FLAGS(["bench", "--{flag}"])
bench._run = bench._run_apart = lambda command, written: []
bench._show = lambda rows: print(os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"))
bench.main(["{command}"])
"""
    finished = python("-c", code)
    assert (finished.returncode, finished.stdout) == (0, f"{preallocates}\n"), finished.stderr


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["gem"],
            "'gem' is no bench; write gemm, sparsify, ffn, step, prefill, decode, scaling, "
            "clock, estimate or draw before the flags",
        ),
        (["gemm"], "--shapes: 16384x2048x8192 and more are for a GPU; pass small ones"),
        (["gemm", "--shapes=64x32"], "'64x32' is no shape; write TxDxF"),
        (["sparsify", "--shapes=64x32x128", "--products=y3"], "--products: 'y3' does not exist"),
        (["gemm", "--tune", "--shapes=64x32x128"], "tune: the default device is a CPU; needs"),
        (["clock"], "clock: the default device is a CPU; needs an NVIDIA GPU of compute capabil"),
        (["clock", "--rounds=1"], "step, prefill, decode, scaling, not with clock; leave it out"),
        (["sparsify", "--tune"], "--tune goes with gemm, not with sparsify; leave it out"),
        (["gemm", "--figure=x.pdf"], "--figure: 'x.pdf' ends on no known format"),
        (["gemm", "--from-workdir=x"], "--from-workdir goes with ffn, step, not with gemm; leave"),
        (["gemm", "--profile=x"], "--profile goes with ffn, not with gemm; leave it out"),
        (["gemm", "--widths=64"], "--widths goes with step, prefill, decode, scaling, not with ge"),
        (["gemm", "--tune", "--together"], "--tune and --together exclude each other; leave one"),
        (["gemm", "--tune", "--json=x"], "--tune and --json exclude each other; leave one out"),
        (
            ["gemm", "--together", "--processes=2"],
            "--together and --processes exclude each other; leave one out",
        ),
        (["estimate", "--together"], "decode, scaling, not with estimate; leave it out"),
        (["step", "--meshes=8x1x1"], "--meshes goes with scaling, not with step; leave it out"),
        (["step", "--shapes=64x32x128"], "--shapes goes with gemm, sparsify, ffn, not with step"),
        (["scaling", "--figure=x.png"], "ffn, step, prefill, decode, draw, not with scaling; le"),
        (["estimate", "--json=x"], "scaling, clock, draw, not with estimate; leave it out"),
        (
            ["ffn", "--from-workdir=x", "--shapes=64x32x128"],
            "--from-workdir and --shapes exclude each other; leave one out",
        ),
        (["ffn", "--profile=x.json", "--shapes=64x32x128"], "x.json does not exist"),
        (
            ["ffn", "--profile=x", "--from-workdir=x"],
            "--from-workdir and --profile exclude each other; leave one out",
        ),
        (["ffn", "--from-workdir=x"], "no run.json in x; name the workdir of a run"),
        (["step", "--from-workdir=x"], "no run.json in x; name the workdir of a run"),
        (
            ["step", "--from-workdir=x", "--models=lm_100m"],
            "--from-workdir and --models exclude each other; leave one out",
        ),
        (
            ["step", "--from-workdir=x", "--layers=1"],
            "--from-workdir and --layers exclude each other; leave one out",
        ),
        (
            ["step", "--from-workdir=x", "--widths=64"],
            "--from-workdir and --widths exclude each other; leave one out",
        ),
        (["draw"], "draw: --json is not given; name the file of the rows"),
        (["gemm", "stray"], "'stray' is no flag; write --flag=value"),
    ],
)
def test_errors(arguments, words):
    assert words in fail(*arguments)
