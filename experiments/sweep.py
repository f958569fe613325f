"""Trains every row of a sweep that is not recorded yet; ends with table.md and figures.

python -m experiments.sweep --sweep=configs/sweeps/X.py --workdir=DIR [--sweep.config.a.b=v]
    [--results=FILE.json] [--rows=NAME,...]

Each finished row is recorded at once in DIR/results.json, or in FILE, which may lie in another
folder and fill up over several machines and days. Table and figures are written beside a file
called results.json, and those of another FILE.json into the folder FILE. With --rows several
processes share the work, each on a GPU of its own.
"""

import pathlib

from absl import flags

from experiments import cli
from s24jax.results import RESULTS
from s24jax.sweep import drawing_folder, run_sweep, table

SWEEP = cli.define_config("sweep", "The sweep's configuration.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The sweep's folder; made, or resumed.", required=True
)

RESULTS_FLAG = flags.DEFINE_string("results", None, "The file of finished rows.")
ROWS = flags.DEFINE_list("rows", [], "Some of the rows. Default: all.")


def main() -> None:
    sweep = cli.load_config(SWEEP)
    results = pathlib.Path(RESULTS_FLAG.value or pathlib.Path(WORKDIR.value) / RESULTS)
    rows = run_sweep(sweep, WORKDIR.value, results=results, only=ROWS.value)
    if rows:
        print(table(rows, sweep.baseline), end="")
        folder = drawing_folder(results)
        print(f"table: {folder / 'table.md'}   figures: {folder / 'plots'}")


if __name__ == "__main__":
    cli.run(main)
