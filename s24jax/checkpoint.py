"""Checkpoints of a run: train state, dense twin, data iterator (orbax). The one user of orbax."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from s24jax.errors import BrokenEnvironment, InvalidInput


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: Any
    twin: Any | None


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/STEP`.

    Keeps the last `keep` and the one with the lowest validation loss. Saves in the background: the
    state may be donated to the next step as soon as `save` returns. A checkpoint appears under its
    name only when it is complete, so an interrupted save leaves none.
    """

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 1, read_only: bool = False):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        best = preservation.BestN(
            get_metric_fn=_validation_loss,
            reverse=True,  # the lowest is the best
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        handlers = {
            "description": ocp.JsonCheckpointHandler(),
            "state": ocp.StandardCheckpointHandler(),
            "twin": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            best_fn=_validation_loss,  # without it orbax writes no metrics for a restart to read
            best_mode="min",
            preservation_policy=preservation.AnyPreservationPolicy(
                [preservation.LatestN(keep), best]
            ),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, iterator, *, twin=None, validation_loss=None) -> None:
        """Starts to save; a step that is saved already is left as it is.

        Args:
          step: optimizer steps taken.
          state: pytree of arrays.
          iterator: grain iterator of the training data, standing behind the last batch of `step`.
          twin: the dense twin's state, where there is one.
          validation_loss: ranks this checkpoint; None where none was measured at this step.

        Raises:
          BrokenEnvironment: this save or the one before it failed (a full disk, say).
        """
        if step in self._manager.all_steps():
            return
        items = {
            "description": ocp.args.JsonSave({"leaves": _leaves(state)}),
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave({"states": _states(iterator)}),
        }
        if twin is not None:
            items["twin"] = ocp.args.StandardSave(twin)
        metrics = None if validation_loss is None else {"validation_loss": float(validation_loss)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        except Exception as error:
            raise self._save_failed(error) from error

    def wait(self) -> None:
        """Returns when all that was saved is on disk; a BrokenEnvironment where that failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error

    def restore(self, like, *, iterator=None, step: int | None = None) -> Restored:
        """Reads a checkpoint onto the devices and shardings of `like`.

        Args:
          like: a state of the same structure, arrays or shapes.
          iterator: a grain iterator to set back; None reads no data state.
          step: which one; None is the last.

        Raises:
          InvalidInput: there is no such checkpoint, or it holds another kind of model.
          BrokenEnvironment: it cannot be read. Nothing is changed on disk.
        """
        steps = self.steps()
        if not steps:
            raise InvalidInput(f"no checkpoint in {self.folder}; train into this workdir first")
        if step is not None and step not in steps:
            raise InvalidInput(
                f"no checkpoint of step {step} in {self.folder}; "
                f"there are {', '.join(map(str, steps))}"
            )
        step = steps[-1] if step is None else step
        self._check_leaves(step, like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {"state": ocp.args.StandardRestore(abstract)}
        if iterator is not None:
            items["data"] = ocp.args.JsonRestore()
            if (self.folder / str(step) / "twin").exists():
                items["twin"] = ocp.args.StandardRestore(abstract)
        restored = self._read(step, **items)
        if iterator is not None:
            iterator.set_state(self._own_state(step, restored["data"]["states"]))
        return Restored(step, restored["state"], restored.get("twin"))

    def close(self) -> None:
        """Waits for a save that is under way and releases what the manager holds."""
        self.wait()
        self._manager.close()

    def _own_state(self, step: int, states: list):
        """This process's data state, of those that the processes had when they saved."""
        if len(states) == jax.process_count():
            return states[jax.process_index()]
        # Of packed windows all processes have read equally many, and stand at the same place.
        if all(state == states[0] for state in states):
            return states[0]
        raise InvalidInput(
            f"checkpoint {self.folder / str(step)} was saved by {len(states)} processes, each at a "
            f"place of its own in its documents; resume with as many, not {jax.process_count()}"
        )

    def _check_leaves(self, step: int, like) -> None:
        """A checkpoint of another model is a mistake of the user's, and told apart from damage."""
        description = self._read(step, description=ocp.args.JsonRestore())["description"]
        there, here = description["leaves"], _leaves(like)
        for name in here | there:
            if there.get(name) != here.get(name):
                raise InvalidInput(
                    f"checkpoint {self.folder / str(step)} holds another model: {name} is "
                    f"{there.get(name, 'absent')} there, {here.get(name, 'absent')} here; use the "
                    "config that it was trained with, or another workdir"
                )

    def _read(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # orbax, tensorstore and the file system each have their own errors for a damaged file.
        except Exception as error:
            earlier = [other for other in self.steps() if other < step]
            fallback = f"step {earlier[-1]}" if earlier else "the start"
            raise BrokenEnvironment(
                f"checkpoint {self.folder / str(step)} cannot be read ({_first_line(error)}); it "
                f"was left as it is; move that folder away to go on from {fallback}"
            ) from error

    def _save_failed(self, error: Exception) -> BrokenEnvironment:
        complete = self.steps()
        last = (
            f"the last good checkpoint is step {complete[-1]}" if complete else "there is none yet"
        )
        return BrokenEnvironment(
            f"cannot save to {self.folder} ({_first_line(error)}); {last}; free disk space or "
            "check the permissions, then run the same command to resume"
        )


def _validation_loss(metrics: dict[str, float]) -> float:
    return metrics["validation_loss"]


def _states(iterator) -> list:
    """The data state of each process."""
    state = iterator.get_state()
    if jax.process_count() == 1:
        return [state]
    own = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(own.size))
    padded = np.pad(own, (0, int(lengths.max()) - own.size))
    texts = multihost_utils.process_allgather(padded)
    return [
        json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)
    ]


def _leaves(tree) -> dict[str, str]:
    """Each leaf's path, type and shape; what a checkpoint and the program must agree on."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
