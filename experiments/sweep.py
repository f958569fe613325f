"""Trains every row of a sweep, or goes on with it; ends with table.md and a figure.

python -m experiments.sweep --sweep=configs/sweeps/X.py --workdir=DIR [--sweep.config.a.b=v]
"""

from absl import flags

from experiments import cli
from s24jax.sweep import run_sweep, table

SWEEP = cli.define_config("sweep", "The sweep's configuration.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The sweep's folder; made, or resumed.", required=True
)


def main() -> None:
    sweep = cli.load_config(SWEEP)
    rows = run_sweep(sweep, WORKDIR.value)
    if rows:
        print(table(rows, sweep.baseline), end="")
        print(f"table: {WORKDIR.value}/table.md   figure: {WORKDIR.value}/plots/sweep.png")


if __name__ == "__main__":
    cli.run(main)
