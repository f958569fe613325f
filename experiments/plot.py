"""Draws the figures of a run, or of a sweep, anew.

python -m experiments.plot --workdir=DIR
"""

from absl import flags

from experiments import cli
from s24jax.plots import plot_run
from s24jax.sweep import is_sweep, plot_rows

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run or sweep.", required=True)


def main() -> None:
    workdir = WORKDIR.value
    for path in plot_rows(workdir) if is_sweep(workdir) else plot_run(workdir):
        print(path)


if __name__ == "__main__":
    cli.run(main)
