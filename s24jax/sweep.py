"""Several runs that differ in a few keys, one after the other, and a table of what came out."""

import pathlib

from s24jax.errors import Diverged, InvalidInput
from s24jax.summary import cell
from s24jax.sweep_plot import plot_sweep
from s24jax.train import check, train
from s24jax.train_step import make_program
from s24jax.writer import read_json, write_bytes, write_json

COLUMNS = {
    "validation loss": ("validation_loss", "{:.4f}"),
    "evaluated dense": ("validation_loss_dense", "{:.4f}"),
    "zeros in Y2": ("zero_share", "{:.1%}"),
    "dropped token-wise": ("dropped_token_wise", "{:.2%}"),
    "dropped feature-wise": ("dropped_feature_wise", "{:.2%}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "parameters": ("parameters", "{:,}"),
}


def run_sweep(sweep, workdir) -> list[dict] | None:
    """Runs every row that is not finished yet; ends with `table.md` and `plots/sweep.png`.

    Args:
      sweep: name; config, shared by the rows; rows, each with a name and the keys it changes;
        baseline, the row that the others are compared with (see configs/sweeps/).
      workdir: holds a folder for each row, `sweep.json`, `table.md` and `plots`.

    Returns:
      Each row's summary, with its name, workdir and, where it diverged, the reason; None where a
      signal stopped the sweep.

    Raises:
      InvalidInput: a row cannot work; found before the first one starts.
    """
    workdir = pathlib.Path(workdir)
    configs = row_configs(sweep)
    rows = []
    for name, config in configs.items():
        row = _run_row(config, workdir / name)
        if row is None:
            return None
        rows.append({**row, "name": name, "workdir": str(workdir / name)})
        write_json(workdir / "sweep.json", {"baseline": sweep.baseline, "rows": rows})
    write_bytes(workdir / "table.md", table(rows, sweep.baseline).encode())
    plot_rows(workdir)
    return rows


def is_sweep(workdir) -> bool:
    """Whether a sweep has run in `workdir`."""
    return (pathlib.Path(workdir) / "sweep.json").exists()


def plot_rows(workdir) -> list[pathlib.Path]:
    """Draws the rows that are finished so far."""
    sweep = read_json(pathlib.Path(workdir) / "sweep.json")
    return [plot_sweep(workdir, sweep["rows"], baseline=sweep["baseline"])]


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
        # A twin trains beside a 2:4 run; in a sweep the dense run is a row of its own.
        config.dense_twin = False
        check(config)
        make_program(config)
        configs[row.name] = config
    if sweep.baseline not in configs:
        raise InvalidInput(
            f"baseline {sweep.baseline!r} of sweep {sweep.name} is no row; "
            f"use one of {', '.join(configs)}"
        )
    return configs


def table(rows: list[dict], baseline: str) -> str:
    """The rows as a Markdown table; losses in nats per token, the difference to the baseline's."""
    reference = next(row["validation_loss"] for row in rows if row["name"] == baseline)
    header = ["row", "minus baseline", *COLUMNS]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        if row["validation_loss"] is None:
            cells = ["-", f"diverged: {row['diverged']}"] + ["-"] * (len(COLUMNS) - 1)
        else:
            gap = "-" if reference is None else f"{row['validation_loss'] - reference:+.4f}"
            cells = [gap] + [cell(row[key], form) for key, form in COLUMNS.values()]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    return "\n".join(lines) + "\n"


def _run_row(config, workdir: pathlib.Path) -> dict | None:
    """The row's summary. A divergence is a result; it is written down and not tried again."""
    failure = workdir / "diverged.json"
    if failure.exists():
        return read_json(failure)
    try:
        return train(config, workdir)
    except Diverged as error:
        row = {"validation_loss": None, "zero_share": None, "diverged": str(error)}
        write_json(failure, row)
        return row
