"""Trains one configuration, or goes on with it.

python -m experiments.train --config=configs/X.py --workdir=DIR [--config.a.b=v]
    [--cluster | --coordinator=HOST:PORT --processes=N --process=I]

On several hosts the same command runs on each: with --cluster under Slurm, Kubernetes or Open MPI,
else with the address of process 0, their number, and which one this is.
"""

import pathlib

from absl import flags

from experiments import cli
from s24jax import distributed
from s24jax.summary import closing_table
from s24jax.train import train

CONFIG = cli.define_config("config", "The run's configuration.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; made, or resumed.", required=True)

CLUSTER = flags.DEFINE_bool("cluster", False, "One of several processes, as Slurm or MPI tell.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many there are.", lower_bound=1)
PROCESS = flags.DEFINE_integer("process", None, "Which one this is.", lower_bound=0)


def main() -> None:
    several = (COORDINATOR.value, PROCESSES.value, PROCESS.value)
    if CLUSTER.value or several != (None, None, None):
        distributed.join(*several)
    summary = train(cli.load_config(CONFIG), WORKDIR.value)
    if summary and distributed.is_first():
        print(closing_table(summary))
        sample = pathlib.Path(WORKDIR.value) / "samples.txt"
        print(f"plots: {WORKDIR.value}/plots" + (f"   sample: {sample}" if sample.exists() else ""))


if __name__ == "__main__":
    cli.run(main)
