"""Validation loss of a run's checkpoint, in the mode of its step or in another.

python -m experiments.evaluate --workdir=DIR [--mode=dense|sparse24] [--step=N]
"""

import json

from absl import flags

from experiments import cli
from s24jax.evaluate import evaluate

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
MODE = flags.DEFINE_enum("mode", None, ["dense", "sparse24"], "Default: that of the step.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint. Default: the last.")


def main() -> None:
    print(json.dumps(evaluate(WORKDIR.value, mode=MODE.value, step=STEP.value), indent=2))


if __name__ == "__main__":
    cli.run(main)
