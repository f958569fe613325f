"""Several runs that differ in a few keys, one after the other, and a table of what came out."""

import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from s24jax import device
from s24jax.errors import Diverged, InvalidInput
from s24jax.results import (
    RESULTS,
    Row,
    make_row,
    read_results,
    record_row,
    recorded_row,
    repeats,
    with_twins,
)
from s24jax.results_plot import plot_results
from s24jax.schedules import ffn_mode
from s24jax.summary import cell
from s24jax.train import check, train
from s24jax.train_step import make_program
from s24jax.writer import write_bytes

COLUMNS = {
    "validation loss": ("validation_loss", "{:.4f}"),
    "evaluated dense": ("validation_loss_dense", "{:.4f}"),
    "zeros in Y2": ("zero_share", "{:.1%}"),
    "dropped token-wise": ("dropped_token_wise", "{:.2%}"),
    "dropped feature-wise": ("dropped_feature_wise", "{:.2%}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "parameters": ("parameters", "{:,}"),
}
_LOG = logging.getLogger(__name__)


def run_sweep(sweep, workdir, *, results=None, only: Sequence[str] = ()) -> list[Row] | None:
    """Runs every row that is not recorded yet; ends with a table and figures beside the record.

    Args:
      sweep: name; config, shared by the rows; rows, each with a name and the keys it changes;
        baseline, the row that the others are compared with (see configs/sweeps/).
      workdir: holds a folder for each row, with all that a run leaves behind.
      results: the file of finished rows (see `s24jax.results`), by default workdir/results.json;
        `table.md` and `plots` are in its `drawing_folder`. A row that is there is not run again.
      only: the names of some rows; by default all.

    Returns:
      The rows of the file; None where a signal stopped the sweep.

    Raises:
      InvalidInput: a row cannot work, or is in the file with another configuration, or the file
        has no good name; found before the first one starts.
    """
    workdir = pathlib.Path(workdir)
    results = pathlib.Path(results or workdir / RESULTS)
    drawing_folder(results)  # refuses a name before a row runs for nothing
    configs = row_configs(sweep)
    for name in only:
        if name not in configs:
            raise InvalidInput(
                f"sweep {sweep.name} has no row {name!r}; use some of {', '.join(configs)}"
            )
    chosen = [name for name in configs if not only or name in only]
    missing = [name for name in chosen if not recorded_row(results, name, configs[name])]
    ran_sparse = False
    for name in missing:
        sparse = ffn_mode(configs[name].steps, configs[name]) == "sparse24"
        if ran_sparse and not sparse and device.hopper_reason() is None:
            _LOG.warning(
                "row %s is dense, after rows of 2:4 in this process, which lower the GPU's clock: "
                "its tokens/s are too few; for its speed run it alone, with --rows=%s",
                name,
                name,
            )
        ran_sparse |= sparse
        row = _run_row(name, configs[name], workdir / name)
        if row is None:
            return None
        record_row(results, row, sweep=sweep.name, baseline=sweep.baseline, order=list(configs))
    draw(results)
    return read_results(results)["rows"]


def draw(results) -> list[pathlib.Path]:
    """Writes the table and the figures of a file of results into its `drawing_folder`; their
    paths."""
    folder, recorded = drawing_folder(results), read_results(results)
    path = folder / "table.md"
    write_bytes(path, table(recorded["rows"], recorded["baseline"]).encode())
    return [path, *plot_results(folder, recorded["rows"], baseline=recorded["baseline"])]


def drawing_folder(results) -> pathlib.Path:
    """Where table and figures of a file of results lie: beside one called results.json, and of
    FILE.json in the folder FILE, so that several files in one place keep each its own.

    Raises:
      InvalidInput: the file's name does not end in .json.
    """
    results = pathlib.Path(results)
    if results.suffix != ".json":
        raise InvalidInput(f"results {results} must end in .json; rename the file")
    return results.parent if results.name == RESULTS else results.with_suffix("")


def row_configs(sweep) -> dict:
    """Each row's whole configuration, checked.

    Raises:
      InvalidInput: a row's name occurs twice, it changes a key that does not exist, its values
        cannot work, or the baseline is no row.
    """
    configs = {}
    for row in sweep.rows:
        if row.name in configs:
            raise InvalidInput(f"sweep {sweep.name} has two rows {row.name!r}; rename one")
        config = sweep.config.copy_and_resolve_references().lock()
        try:
            config.update(row.changes)
        except (AttributeError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"row {row.name!r} of sweep {sweep.name} does not fit the configuration "
                f"({' '.join(str(error).split())}); see configs/base.py"
            ) from error
        config.name = f"{sweep.name}/{row.name}"
        check(config)
        make_program(config)
        configs[row.name] = config
    if sweep.baseline not in configs:
        raise InvalidInput(
            f"baseline {sweep.baseline!r} of sweep {sweep.name} is no row; "
            f"use one of {', '.join(configs)}"
        )
    return configs


def table(rows: Sequence[Row], baseline: str) -> str:
    """The rows, and their dense twins, as a Markdown table; losses in nats per token, the
    difference to the baseline's.

    Below it, where rows differ in nothing but their seed, the mean of their losses and the
    difference between the largest and the smallest.
    """
    rows = with_twins(rows)
    losses = {row["name"]: row["summary"]["validation_loss"] for row in rows}
    reference = losses.get(baseline)
    header = ["row", "minus baseline", *COLUMNS]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        summary = row["summary"]
        if "diverged" in summary:
            cells = ["-", f"diverged: {summary['diverged']}"] + ["-"] * (len(COLUMNS) - 1)
        else:
            gap = None if reference is None else summary["validation_loss"] - reference
            shown = (cell(summary[key], form) for key, form in COLUMNS.values())
            cells = [cell(gap, "{:+.4f}"), *shown]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    repeated = repeats(rows)
    if repeated:
        lines += [
            "",
            "| repeats | how many | mean loss | largest - smallest |",
            "|---|---:|---:|---:|",
        ]
    for name, values in repeated.items():
        spread = max(values) - min(values)
        lines.append(f"| {name} | {len(values)} | {np.mean(values):.4f} | {spread:.4f} |")
    return "\n".join(lines) + "\n"


def _run_row(name: str, config, workdir: pathlib.Path) -> Row | None:
    """A divergence is a result too."""
    try:
        summary = train(config, workdir)
    except Diverged as error:
        summary = {"validation_loss": None, "zero_share": None, "diverged": str(error)}
    return None if summary is None else make_row(name, config, workdir, summary)
