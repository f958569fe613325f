"""Draws the figures of a run anew, or the table and the figures of a sweep's results.

python -m experiments.plot --workdir=DIR
python -m experiments.plot --results=FILE.json
"""

import pathlib

from absl import flags

from experiments import cli
from s24jax.errors import InvalidInput
from s24jax.plots import plot_run
from s24jax.results import RESULTS
from s24jax.sweep import draw

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run or sweep.")
RESULTS_FLAG = flags.DEFINE_string("results", None, "A sweep's file of finished rows.")


def main() -> None:
    workdir, results = WORKDIR.value, RESULTS_FLAG.value
    if (workdir is None) == (results is None):
        raise InvalidInput("name a run by --workdir, or results by --results")
    if workdir and (pathlib.Path(workdir) / RESULTS).exists():
        results = pathlib.Path(workdir) / RESULTS
    for path in draw(results) if results else plot_run(workdir):
        print(path)


if __name__ == "__main__":
    cli.run(main)
