"""Text from a run's checkpoint.

python -m experiments.sample --workdir=DIR --prompt=TEXT [--tokens=N] [--mode=dense|sparse24]
"""

from absl import flags

from experiments import cli
from s24jax.sample import sample

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "The text to go on from.", required=True)
TOKENS = flags.DEFINE_integer("tokens", 64, "Bytes to add.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest byte each time.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draw.")
MODE = flags.DEFINE_enum("mode", None, ["dense", "sparse24"], "Default: that of the step.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint. Default: the last.")


def main() -> None:
    print(
        sample(
            WORKDIR.value,
            PROMPT.value,
            tokens=TOKENS.value,
            temperature=TEMPERATURE.value,
            seed=SEED.value,
            mode=MODE.value,
            step=STEP.value,
        )
    )


if __name__ == "__main__":
    cli.run(main)
