"""Trains one configuration, or goes on with it.

python -m experiments.train --config=configs/X.py --workdir=DIR [--config.a.b=v]
"""

from absl import flags

from experiments import cli
from s24jax.summary import closing_table
from s24jax.train import train

CONFIG = cli.define_config("config", "The run's configuration.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; made, or resumed.", required=True)


def main() -> None:
    summary = train(cli.load_config(CONFIG), WORKDIR.value)
    if summary:
        print(closing_table(summary))
        print(f"plots: {WORKDIR.value}/plots   sample: {WORKDIR.value}/samples.txt")


if __name__ == "__main__":
    cli.run(main)
