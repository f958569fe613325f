"""What a run leaves behind: metrics and JSON files.

A workdir holds `metrics.jsonl` (one JSON object a line, always with kind, run and step) and the
same numbers as TensorBoard events. A killed run loses no line of `metrics.jsonl`; at most its last
line is torn, and readers and resumed runs drop a torn line. On disk every file is strict JSON:
NaN and infinities become null.
"""

import contextlib
import errno
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from s24jax.errors import BrokenEnvironment, InvalidInput

METRICS = "metrics.jsonl"
# A flush of the events waits for the disk, and TensorBoard itself reloads only every 30 s.
_EVENTS_FLUSH_S = 10.0


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an OSError raised inside into a one-line BrokenEnvironment that names path."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space" if full else "make it writable"
        raise BrokenEnvironment(
            f"{path} cannot be written ({error.strerror}): {mend}, or choose another workdir"
        ) from error


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all: a temporary file beside it, fsync, then a rename.

    Raises:
      BrokenEnvironment: the disk is full or not writable; a file already at path is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes value as strict JSON, atomically: indent 2, keys in their order, NaN and inf as null.

    Raises:
      BrokenEnvironment: the disk is full or not writable; a file already at path is left as it was.
    """
    write_bytes(path, (to_json(value, indent=2) + "\n").encode())


def to_json(value: Any, *, indent: int | None = None) -> str:
    """value as strict JSON, keys in their order, NaN and inf as null."""
    return json.dumps(_strict(_plain(value)), indent=indent, allow_nan=False)


def read_json(path: str | Path) -> Any:
    """Reads one JSON file.

    Raises:
      InvalidInput: there is no such file.
      BrokenEnvironment: the file is not JSON, or cannot be read.
    """
    data = _read(path, "pass the workdir of a run that has written it")
    try:
        return json.loads(data)
    except ValueError as error:
        raise BrokenEnvironment(
            f"{path} is not JSON ({error}): restore it, or let the run write it again"
        ) from error


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in the order written; null comes back as None.

    A torn last line (the run was killed while writing it) is left out.

    Raises:
      InvalidInput: workdir has no metrics.jsonl.
      BrokenEnvironment: a line before the last is damaged, or the file cannot be read.
    """
    return [record for record, _ in _metric_lines(Path(workdir) / METRICS)]


class MetricWriter:
    """Appends records to metrics.jsonl and their numbers to TensorBoard.

    Args:
      workdir: the run's folder, made where missing.
      resume_step: N keeps what is on disk up to and including step N and drops the rest, so that
        the stream of a resumed run equals a straight run's; -1 drops everything. None keeps every
        record.

    Raises (constructor, `write` and `close`):
      BrokenEnvironment: the disk is full or not writable, or metrics.jsonl is damaged.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int | None = None):
        self._path = Path(workdir) / METRICS
        self._events_path = Path(workdir) / "tensorboard" / _event_file_name()
        self._file = self._events = None
        try:
            self._open(resume_step)
        except BrokenEnvironment:
            with contextlib.suppress(BrokenEnvironment):
                self.close()
            raise

    def _open(self, resume_step: int | None) -> None:
        with writing(self._events_path):
            self._events_path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            _truncate(self._path, resume_step)
        with writing(self._path):
            # Unbuffered: a line is on its way to the disk when write returns, and a line that did
            # not fit on a full disk is not tried again by close.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close
        with writing(self._events_path):
            # tensorboardX's SummaryWriter writes from a thread and, when a full disk kills that
            # thread, hangs the training loop on a full queue. The record format needs no thread.
            self._events = RecordWriter(str(self._events_path))
        self._write_event(file_version="brain.Event:2")
        if resume_step is not None:
            # Makes TensorBoard forget what earlier files hold from this step on.
            self._write_event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._flush_events()

    def write(self, kind: str, *, run: str, step: int, **values: Any) -> None:
        """Appends one record.

        TensorBoard tags: `run/kind/name` for a number; `run/kind/name/layer_00`, ... and
        `run/kind/name/mean` for one number per layer. Strings, None and lists of lists go to
        metrics.jsonl only.

        Args:
          kind: train, validation, sparsity or switch.
          run: main or dense_twin.
          step: the training step that the values belong to.
          **values: Python, NumPy or JAX scalars, strings, None, lists, or arrays of one or two
            dimensions.
        """
        values = {name: _plain(value) for name, value in values.items()}
        record = {"kind": kind, "run": run, "step": int(step), **_strict(values)}
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        with writing(self._path):
            while line:
                line = line[self._file.write(line) :]
        scalars = [s for name in values for s in _scalars(f"{run}/{kind}/{name}", values[name])]
        if scalars:
            self._write_event(step=int(step), summary=Summary(value=scalars))
        if time.monotonic() >= self._next_flush:
            self._flush_events()

    def close(self) -> None:
        """Flushes and closes both files; a second call does nothing."""
        files, self._file, self._events = (self._file, self._events), None, None
        with writing(self._events_path):
            for file in filter(None, files):
                file.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except BrokenEnvironment:
            # What went wrong first says more.
            if error is None:
                raise

    def _write_event(self, **fields: Any) -> None:
        with writing(self._events_path):
            self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def _flush_events(self) -> None:
        with writing(self._events_path):
            self._events.flush()
        self._next_flush = time.monotonic() + _EVENTS_FLUSH_S


class NoWriter:
    """Takes what a `MetricWriter` takes, and leaves nothing: of several processes one writes."""

    def write(self, kind: str, *, run: str, step: int, **values: Any) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _plain(value: Any) -> Any:
    """value in Python's own types, arrays as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, jax.Array):
        # An explicit transfer: the training loop forbids implicit ones.
        value = jax.device_get(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _strict(value: Any) -> Any:
    """A plain value with None for NaN and infinities, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(tag: str, value: Any) -> list[Summary.Value]:
    """TensorBoard's values of one plain value."""
    if value is None or isinstance(value, str):
        return []
    if not isinstance(value, list):
        return [Summary.Value(tag=tag, simple_value=value)]
    if value and isinstance(value[0], list):
        return []
    layers = {f"layer_{layer:02d}": number for layer, number in enumerate(value)}
    if value:
        layers["mean"] = sum(value) / len(value)
    return [Summary.Value(tag=f"{tag}/{name}", simple_value=x) for name, x in layers.items()]


def _event_file_name() -> str:
    # TensorBoard reads the files of a folder in the order of their names. Whole seconds alone would
    # let a run that resumes within one second overwrite the file before it.
    seconds, rest = divmod(time.time_ns(), 10**9)
    return f"events.out.tfevents.{seconds}.{rest:09d}.{socket.gethostname()}"


def _read(path: str | Path, mend: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InvalidInput(f"{path} does not exist: {mend}") from error
    except OSError as error:
        raise BrokenEnvironment(
            f"{path} cannot be read ({error.strerror}): make it a readable file"
        ) from error


def _metric_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each record with the line it came from, without a torn last line."""
    data = _read(path, "pass the workdir of a run that has logged at least one step")
    lines = data.rstrip(b"\n").split(b"\n") if data.strip() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"kind", "run", "step"} <= record.keys():
                raise ValueError("not an object with kind, run and step")
        except ValueError as error:
            if number == len(lines):
                return
            raise BrokenEnvironment(
                f"{path}, line {number} is damaged ({error}): restore the file, or delete that line"
            ) from error
        yield record, line


def _truncate(path: Path, last_step: int | None) -> None:
    """Drops the records after last_step (none where it is None) and a torn last line."""
    kept = [
        line
        for record, line in _metric_lines(path)
        if last_step is None or record["step"] <= last_step
    ]
    write_bytes(path, b"".join(line + b"\n" for line in kept))
