"""The kinds of error that s24jax raises on purpose.

Each carries one line: what is wrong, the value, the mend. The command lines print that line and
exit with a status other than 0; every other exception is a defect and keeps its traceback.
"""


class InvalidInput(ValueError):
    """The user's mistake: a value that cannot work, and what would."""


class Unsupported(NotImplementedError):
    """A named implementation that cannot do this case."""


class BrokenEnvironment(RuntimeError):
    """Something around the program is missing or damaged: a package, a disk, a checkpoint."""


class Diverged(RuntimeError):
    """Training gave a loss that is not finite."""


EXPECTED = (InvalidInput, Unsupported, BrokenEnvironment, Diverged)
