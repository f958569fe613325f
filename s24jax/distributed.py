"""Several processes, on one host or many, as one run: jax's multi-controller runtime.

Every process runs the same program on the devices of its host; the mesh has all of them. Process 0
writes what a run leaves behind, besides the checkpoints, which all write together; so the workdir
and the corpora lie on a file system that all see.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from s24jax.errors import BrokenEnvironment, InvalidInput

# A process that has not been heard of for so long is taken for dead, and ends the others.
HEARTBEAT_S, JOIN_S, LEAVE_S = 30, 120, 20

Result = TypeVar("Result")


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several, before jax starts.

    Args:
      coordinator: "host:port" of process 0; None takes all three from Slurm, Kubernetes or Open
        MPI.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      InvalidInput: some of the three are missing or wrong, or no such cluster is around.
      BrokenEnvironment: the others did not come.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise InvalidInput(
            "--coordinator, --processes and --process belong together; write all three, or "
            "--cluster alone"
        )
    if processes is not None and not 0 <= process < processes:
        raise InvalidInput(f"--process={process} is none of --processes={processes}")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=LEAVE_S,
        )
    except ValueError as error:
        raise InvalidInput(
            f"--cluster: no cluster that jax knows is around ({_line(error)}); "
            "write --coordinator, --processes and --process"
        ) from error
    except RuntimeError as error:
        raise BrokenEnvironment(
            f"the processes of this run did not find each other at {coordinator} ({_line(error)}); "
            "start all of them, with the same --coordinator"
        ) from error


def what_holds() -> str:
    """What a user should know when several processes start: jax ends those that miss one by itself,
    without a word of ours."""
    return (
        f"{jax.process_count()} processes: SIGTERM to one of them saves and stops all; "
        "one that dies ends the others within a minute; the same command on all of them resumes"
    )


def is_first() -> bool:
    """Whether this process writes what the run leaves behind."""
    return jax.process_index() == 0


def first_alone(function: Callable[[], Result], name: str) -> Result:
    """Calls `function` in process 0, and then, when that is through, in the others.

    For what finds its result on disk where another process has put it.
    """
    if is_first():
        result = function()
        wait(name)
        return result
    wait(name)
    return function()


def wait(name: str) -> None:
    """Returns when all processes have come here."""
    multihost_utils.sync_global_devices(name)


def stop_requested(step: int) -> bool:
    """Whether some process has been told to stop (SIGTERM), and all agree on this step for it."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def own_rows(batch: np.ndarray) -> np.ndarray:
    """This process's part of a batch that all processes have."""
    return np.split(batch, jax.process_count())[jax.process_index()]


def lost_the_others(error: Exception, step: int) -> BrokenEnvironment:
    """What to say where a step failed because a process of the run is gone."""
    return BrokenEnvironment(
        f"process {jax.process_index()} lost the others after step {step} ({_line(error)}); "
        "run the same command on all of them to go on from the last checkpoint"
    )


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:200]
