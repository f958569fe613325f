"""Sweeps: all rows, resume, divergence as a result, errors before the first row."""

import json
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict
from processes import ROOT, python

from configs.sweeps import ablation, width
from configs.sweeps import row as sweep_row
from s24jax import sweep as sweeping
from s24jax.errors import InvalidInput
from s24jax.results import read_results, repeats
from s24jax.sweep import draw, run_sweep, table
from s24jax.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole ablation in its smoke variant, through the command line."""
    workdir = tmp_path_factory.mktemp("sweeps") / "ablation"
    command = "-m", "experiments.sweep", "--sweep=configs/sweeps/ablation.py:smoke"
    done = python(*command, f"--workdir={workdir}", timeout=500)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_the_ablation_gives_all_rows(finished):
    workdir, out = finished
    names = [row.name for row in ablation.get_config("smoke").rows]
    lines = (workdir / "table.md").read_text().splitlines()
    rows, repeats = lines[2 : 2 + len(names)], lines[2 + len(names) :]
    assert [re.match(r"\| (\w+) \|", line).group(1) for line in rows] == names
    assert [line[:22] for line in repeats[3:]] == [
        "| dense_relu2 | 3 | 5.",
        "| full_recipe | 3 | 5.",
    ]
    assert out.startswith((workdir / "table.md").read_text())
    figures = ["profile.png", "seconds.png", "sparsity.png", "sweep.png"]
    assert sorted(path.name for path in (workdir / "plots").iterdir()) == figures
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
    others = {"dense_swiglu", "dense_gelu", "no_warmup"}
    squared = {name for name in first if name not in others and "_seed" not in name}
    assert len({first[name] for name in squared}) == 1
    assert first["no_warmup"] != first["full_recipe"]  # it starts pruned
    for seed in ("_seed1", "_seed2"):
        assert first[f"dense_relu2{seed}"] == first[f"full_recipe{seed}"] != first["full_recipe"]


def test_every_row_is_recorded(finished):
    workdir, _ = finished
    results = read_results(workdir / "results.json")
    assert (results["name"], results["baseline"]) == ("ablation", "dense_relu2")
    assert [row["name"] for row in results["rows"]] == [
        row.name for row in ablation.get_config("smoke").rows
    ]
    for row in results["rows"]:
        summary = json.loads((workdir / row["name"] / "summary.json").read_text())
        record = json.loads((workdir / row["name"] / "run.json").read_text())
        assert row["summary"] == summary
        assert row["config"] == record["config"]
        assert row["environment"]["commit"] == record["git_commit"]
        assert row["environment"]["implementations"] == record["implementations"]
        assert row["curves"]["main"]["validation"]["step"] == [3, 6]
        assert ("sparsity" in row["curves"]["main"]) == (
            "relu2" in record["config"]["model"]["ffn"]
        )
    assert str(workdir) not in (workdir / "results.json").read_text()


def test_a_recorded_row_is_not_run_again(finished, tmp_path, monkeypatch):
    """Nor is its workdir needed: the record may have come from another machine."""
    workdir, _ = finished
    monkeypatch.setattr("s24jax.train._Run", None)
    sweep = ablation.get_config("smoke")
    rows = run_sweep(sweep, tmp_path / "runs", results=workdir / "results.json")
    assert table(rows, "dense_relu2") == (workdir / "table.md").read_text()
    assert not (tmp_path / "runs").exists()


def test_results_are_drawn_anew(finished, tmp_path):
    workdir, _ = finished
    (tmp_path / "results.json").write_bytes((workdir / "results.json").read_bytes())
    names = ["table.md", *(f"plots/{n}.png" for n in ("sweep", "seconds", "sparsity", "profile"))]
    for argument in (f"--workdir={tmp_path}", f"--results={tmp_path}/results.json"):
        done = python("-m", "experiments.plot", argument)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [str(tmp_path / name) for name in names]
    assert (tmp_path / "table.md").read_bytes() == (workdir / "table.md").read_bytes()


def test_files_of_results_in_one_folder_keep_each_its_own(finished, tmp_path):
    workdir, _ = finished
    for name in ("results.json", "again.json"):
        (tmp_path / name).write_bytes((workdir / "results.json").read_bytes())
    beside = draw(tmp_path / "results.json")
    apart = draw(tmp_path / "again.json")
    assert beside[0] == tmp_path / "table.md"
    assert [path.relative_to(tmp_path / "again") for path in apart] == [
        path.relative_to(tmp_path) for path in beside
    ]


def test_a_file_of_results_is_called_json(tmp_path):
    with pytest.raises(InvalidInput) as error:
        run_sweep(ablation.get_config("smoke"), tmp_path / "runs", results=tmp_path / "again")
    assert str(error.value) == f"results {tmp_path}/again must end in .json; rename the file"
    assert not (tmp_path / "runs").exists()


def test_processes_share_a_sweep(tmp_path):
    """Two at once, each with rows of its own, into one file of another folder."""
    results = tmp_path / "kept" / "results.json"
    commands = [
        [
            sys.executable, "-m", "experiments.sweep",
            "--sweep=configs/sweeps/ablation.py:smoke", f"--workdir={tmp_path}/runs",
            f"--results={results}", f"--rows={rows}",
        ]
        for rows in ("no_split,dense_relu2,no_split", "full_recipe")
    ]  # fmt: skip
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for command in commands
    ]
    for process in processes:
        out, _ = process.communicate(timeout=500)
        assert process.returncode == 0, out
    rows = read_results(results)["rows"]
    assert [row["name"] for row in rows] == ["dense_relu2", "full_recipe", "no_split"]
    assert (results.parent / "table.md").exists() and (results.parent / "plots/sweep.png").exists()


def test_a_row_may_have_a_dense_twin(tmp_path):
    """It stands in the row's record, and in a line of its own of the table."""
    (row,) = run_sweep(width.get_config("smoke"), tmp_path, only=["paper_1p5b"])
    twin, main = row["curves"]["dense_twin"], row["curves"]["main"]
    assert main["train"]["step"] == [1, 2, 3, 4, 5, 6] and twin["train"]["step"] == [4, 5, 6]
    assert row["summary"]["dense_twin"]["validation_loss"] == pytest.approx(
        twin["validation"]["loss"][-1], rel=1e-5
    )
    table = (tmp_path / "table.md").read_text()
    losses = [run["validation_loss"] for run in (row["summary"], row["summary"]["dense_twin"])]
    for name, loss in zip(("paper_1p5b", "paper_1p5b, dense twin"), losses, strict=True):
        assert f"| {name} | {loss - losses[0]:+.4f} | {loss:.4f} |" in table


def two_rows(**changes) -> ConfigDict:
    sweep = ablation.get_config("smoke")
    sweep.rows = (
        sweep_row("dense_relu2", model={"ffn": "relu2"}),
        sweep_row("other", **changes),
    )
    return sweep


def test_a_divergence_is_a_row_and_not_tried_again(tmp_path, monkeypatch):
    """The second row's loss is no number from the first step on, the first row's stays one."""
    tried = []

    def counted(config, workdir):
        tried.append(workdir.name)
        return train(config, workdir)

    monkeypatch.setattr(sweeping, "train", counted)
    sweep = two_rows(optimizer={"peak_learning_rate": 1e38}, model={"up_gain": 1e30})
    for _ in range(2):
        rows = run_sweep(sweep, tmp_path)
    assert tried == ["dense_relu2", "other"]
    assert rows[1]["summary"]["validation_loss"] is None
    assert rows[1]["summary"]["diverged"].startswith("the loss is nan at step ")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[3].startswith("| other | - | diverged: the loss is nan at step ")
    assert lines[3].count("|") == lines[0].count("|")


def test_a_signal_stops_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "train", lambda config, workdir: None)
    assert run_sweep(two_rows(), tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("dense_first", [True, False])
def test_a_dense_row_after_one_of_2to4_has_a_warning(
    dense_first, hopper, tmp_path, monkeypatch, caplog
):
    """Where 2:4 lowers the clock; the rows themselves are made up."""
    monkeypatch.setattr(sweeping.device, "hopper_reason", lambda: None if hopper else "no")
    monkeypatch.setattr(sweeping, "_run_row", lambda name, *_: made_up(name, 1.0))
    monkeypatch.setattr(sweeping, "draw", lambda results: None)
    sweep = two_rows()
    if not dense_first:
        sweep.rows = sweep.rows[::-1]
    run_sweep(sweep, tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name == "s24jax.sweep"]
    expected = "row dense_relu2 is dense, after rows of 2:4 in this process, which lower the GPU's"
    assert [line[: len(expected)] for line in said] == [expected] * (hopper and not dense_first)
    assert all(line.endswith("run it alone, with --rows=dense_relu2") for line in said)


def made_up(name: str, loss: float | None, **config) -> dict:
    summary = {key: 0.5 for key, _ in sweeping.COLUMNS.values()}
    summary |= {"parameters": 1234, "validation_loss": loss}
    return {"name": name, "config": {"name": name, "seed": 0, **config}, "summary": summary}


def test_the_difference_is_to_the_baseline():
    other = made_up("other", 1.9, lr=1)
    other["summary"]["tokens_per_second"] = None
    base, other_line = table([made_up("base", 2.0), other], "base").splitlines()[2:]
    assert base == "| base | +0.0000 | 2.0000 | 0.5000 | 50.0% | 50.00% | 50.00% | 0 | 1,234 |"
    assert other_line == (
        "| other | -0.1000 | 1.9000 | 0.5000 | 50.0% | 50.00% | 50.00% | - | 1,234 |"
    )
    (alone,) = table([other], "base").splitlines()[2:]
    assert alone.startswith("| other | - | 1.9000 |")


def test_rows_that_differ_in_their_seed_are_repeats():
    rows = [
        made_up("base", 2.0),
        made_up("base_1", 2.02, seed=1),
        made_up("other", 1.0, lr=1),
        made_up("base_2", 2.01, seed=2),
    ]
    rows.append(made_up("base_3", None, seed=3))
    rows[-1]["summary"] = {"validation_loss": None, "zero_share": None, "diverged": "nan"}
    assert repeats(rows) == {"base": [2.0, 2.02, 2.01]}
    assert table(rows, "base").splitlines()[-3:] == [
        "| repeats | how many | mean loss | largest - smallest |",
        "|---|---:|---:|---:|",
        "| base | 3 | 2.0100 | 0.0200 |",
    ]


def test_some_rows_that_do_not_exist(tmp_path):
    with pytest.raises(InvalidInput) as error:
        run_sweep(two_rows(), tmp_path, only=["othr"])
    assert str(error.value) == "sweep ablation has no row 'othr'; use some of dense_relu2, other"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(rows=(s.rows[0], s.rows[0])), "two rows 'dense_relu2'; rename one"),
        (lambda s: s.update(baseline="x"), "baseline 'x' of sweep ablation is no row; use one of"),
        (
            lambda s: s.update(rows=(s.rows[0], sweep_row("bad", nope=1))),
            "row 'bad' of sweep ablation does not fit the configuration",
        ),
        (
            lambda s: s.update(rows=(s.rows[0], sweep_row("bad", model={"hidden": 3}))),
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
