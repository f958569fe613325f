"""Sweeps: all rows, resume, divergence as a result, errors before the first row."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from configs.sweeps import ablation
from s24jax import sweep as sweeping
from s24jax.errors import Diverged, InvalidInput
from s24jax.sweep import run_sweep, table

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole ablation in its smoke variant, through the command line."""
    workdir = tmp_path_factory.mktemp("sweeps") / "ablation"
    command = [
        sys.executable, "-m", "experiments.sweep",
        "--sweep=configs/sweeps/ablation.py:smoke", f"--workdir={workdir}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_the_ablation_gives_all_rows(finished):
    workdir, out = finished
    names = [row.name for row in ablation.get_config("smoke").rows]
    lines = (workdir / "table.md").read_text().splitlines()
    assert [re.match(r"\| (\w+) \|", line).group(1) for line in lines[2:]] == names
    assert out.startswith((workdir / "table.md").read_text())
    assert (workdir / "plots" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for name in names:
        summary = json.loads((workdir / name / "summary.json").read_text())
        assert f"| {summary['validation_loss']:.4f} |" in lines[2 + names.index(name)]


def test_rows_start_alike(finished):
    """Same seed, same data: all Squared-ReLU rows that start dense have one first loss."""
    workdir, _ = finished
    first = {}
    for path in workdir.glob("*/metrics.jsonl"):
        records = map(json.loads, path.read_text().splitlines())
        first[path.parent.name] = next(r["loss"] for r in records if r["kind"] == "train")
    squared = {name for name in first if name not in ("dense_swiglu", "dense_gelu", "no_warmup")}
    assert len({first[name] for name in squared}) == 1
    assert first["no_warmup"] != first["full_recipe"]  # it starts pruned


def test_a_finished_sweep_trains_nothing(finished, monkeypatch):
    workdir, _ = finished
    monkeypatch.setattr("s24jax.train._Run", None)
    rows = run_sweep(ablation.get_config("smoke"), workdir)
    assert table(rows, "dense_relu2") == (workdir / "table.md").read_text()


def test_plot_draws_a_sweep(finished):
    workdir, _ = finished
    assert sweeping.is_sweep(workdir)
    assert sweeping.plot_rows(workdir) == [workdir / "plots" / "sweep.png"]


def two_rows(**changes) -> ConfigDict:
    sweep = ablation.get_config("smoke")
    sweep.rows = (
        ablation.row("dense_relu2", model={"ffn": "relu2"}),
        ablation.row("other", **changes),
    )
    return sweep


def test_a_divergence_is_a_row_and_not_tried_again(tmp_path, monkeypatch):
    tried = []

    def train(config, workdir):
        tried.append(config.name)
        workdir.mkdir(parents=True, exist_ok=True)
        if config.name.endswith("other"):
            raise Diverged("the loss is nan at step 4")
        return {key: 1.0 for key, _ in sweeping.COLUMNS.values()} | {"parameters": 10}

    monkeypatch.setattr(sweeping, "train", train)
    monkeypatch.setattr(sweeping, "plot_rows", lambda workdir: None)
    for _ in range(2):
        rows = run_sweep(two_rows(), tmp_path)
    assert tried == ["ablation/dense_relu2", "ablation/other", "ablation/dense_relu2"]
    assert rows[1]["validation_loss"] is None
    line = (tmp_path / "table.md").read_text().splitlines()[3]
    assert line.startswith("| other | - | diverged: the loss is nan at step 4 | - |")
    assert line.count("|") == (tmp_path / "table.md").read_text().splitlines()[0].count("|")


def test_a_signal_stops_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "train", lambda config, workdir: None)
    assert run_sweep(two_rows(), tmp_path) is None
    assert not (tmp_path / "table.md").exists()


def test_the_difference_is_to_the_baseline():
    row = {key: 0.5 for key, _ in sweeping.COLUMNS.values()} | {"parameters": 1234}
    rows = [
        {**row, "name": "base", "validation_loss": 2.0},
        {**row, "name": "other", "validation_loss": 1.9, "tokens_per_second": None},
    ]
    base, other = table(rows, "base").splitlines()[2:]
    assert base == "| base | +0.0000 | 2.0000 | 0.5000 | 50.0% | 50.00% | 50.00% | 0 | 1,234 |"
    assert other == "| other | -0.1000 | 1.9000 | 0.5000 | 50.0% | 50.00% | 50.00% | - | 1,234 |"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(rows=(s.rows[0], s.rows[0])), "two rows 'dense_relu2'; rename one"),
        (lambda s: s.update(baseline="x"), "baseline 'x' of sweep ablation is no row; use one of"),
        (
            lambda s: s.update(rows=(s.rows[0], ablation.row("bad", nope=1))),
            "row 'bad' of sweep ablation does not fit the configuration",
        ),
        (
            lambda s: s.update(rows=(s.rows[0], ablation.row("bad", model={"hidden": 3}))),
            "hidden width F=3 is no multiple of 4",
        ),
    ],
)
def test_errors_before_the_first_row(tmp_path, change, words):
    sweep = two_rows()
    change(sweep)
    with pytest.raises(InvalidInput) as error:
        run_sweep(sweep, tmp_path / "sweep")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()
