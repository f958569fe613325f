import contextlib
import errno
import json
import math
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from s24jax import writer
from s24jax.errors import BrokenEnvironment, InvalidInput
from s24jax.writer import MetricWriter, read_json, read_metrics, write_json


def read_events(workdir):
    """The events of all files in TensorBoard's order, by the TFRecord framing alone."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def read_scalars(workdir):
    return {
        (value.tag, event.step): value.simple_value
        for event in read_events(workdir)
        for value in event.summary.value
    }


def write_steps(log, steps):
    for step in steps:
        log.write("train", run="main", step=step, mode="dense", loss=5.0 / (1 + step))
        if step % 2 == 0:
            log.write("sparsity", run="main", step=step, zero_share=[0.5, 0.01 * step])
            log.write("validation", run="dense_twin", step=step, loss=float("nan"))


def test_every_kind_of_value_reads_back_as_json(tmp_path):
    with MetricWriter(tmp_path / "new" / "run") as log:
        log.write(
            "train",
            run="main",
            step=3,
            mode="dense",
            loss=jnp.float32(2.5),
            grad_norm=np.float64(0.1),
            tokens=np.int64(7),
            rate=None,
            layers=jnp.array([0.5, 1.5], jnp.bfloat16),
            mixed=[1, np.float32(0.25), jnp.float32(4)],
            flag=True,
            empty=[],
        )
    assert read_metrics(tmp_path / "new" / "run") == [
        {"kind": "train", "run": "main", "step": 3, "mode": "dense", "loss": 2.5, "grad_norm": 0.1}
        | {
            "tokens": 7,
            "rate": None,
            "layers": [0.5, 1.5],
            "mixed": [1, 0.25, 4.0],
            "flag": True,
            "empty": [],
        }
    ]


def test_tensorboard_gets_numbers_layers_and_their_mean(tmp_path):
    with MetricWriter(tmp_path) as log:
        log.write("train", run="main", step=4, mode="dense", loss=2.5, rate=None)
        log.write("sparsity", run="main", step=5, zero_share=np.array([0.25, 0.75, 0.125]))
        log.write("switch", run="main", step=6, mode="sparse24")
        log.write("train", run="dense_twin", step=7, loss=float("inf"))
    scalars = read_scalars(tmp_path)
    assert scalars == {
        ("main/train/loss", 4): 2.5,
        ("main/sparsity/zero_share/layer_00", 5): 0.25,
        ("main/sparsity/zero_share/layer_01", 5): 0.75,
        ("main/sparsity/zero_share/layer_02", 5): 0.125,
        ("main/sparsity/zero_share/mean", 5): 0.375,
        ("dense_twin/train/loss", 7): math.inf,
    }
    assert read_events(tmp_path)[0].file_version == "brain.Event:2"


def test_numbers_that_are_not_finite_are_strict_json_null(tmp_path):
    with MetricWriter(tmp_path) as log:
        bad = [np.nan, np.float32(np.inf), 1.0]
        log.write("train", run="main", step=1, loss=jnp.nan, norm=-math.inf, layers=bad)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"kind": "train", "run": "main", "step": 1, "loss": null, "norm": null, '
        '"layers": [null, null, 1.0]}\n'
    )


def test_a_line_is_on_disk_before_the_next_and_events_after_a_while(tmp_path, monkeypatch):
    with MetricWriter(tmp_path) as log:
        log.write("train", run="main", step=1, loss=1.0)
        assert [r["step"] for r in read_metrics(tmp_path)] == [1]
        assert read_scalars(tmp_path) == {}
        later = writer.time.monotonic() + 11
        monkeypatch.setattr(writer.time, "monotonic", lambda: later)
        log.write("train", run="main", step=2, loss=2.0)
        assert read_scalars(tmp_path) == {("main/train/loss", 1): 1.0, ("main/train/loss", 2): 2.0}


@pytest.mark.parametrize(
    "torn", [b"", b'{"kind": "train", "ru', b'{"kind": "tr\n', b"\x00\x00\xff"]
)
def test_resumed_stream_equals_a_straight_one(tmp_path, torn):
    with MetricWriter(tmp_path / "straight") as log:
        write_steps(log, range(10))
    with MetricWriter(tmp_path / "killed") as log:
        write_steps(log, range(7))
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:
        file.write(torn)
    with MetricWriter(tmp_path / "killed", resume_step=4) as log:
        write_steps(log, range(5, 10))
    straight, killed = [(tmp_path / run / "metrics.jsonl") for run in ("straight", "killed")]
    assert killed.read_bytes() == straight.read_bytes()
    starts = [e for e in read_events(killed.parent) if e.session_log.status == SessionLog.START]
    assert [event.step for event in starts] == [5]
    assert len(list((killed.parent / "tensorboard").iterdir())) == 2
    assert [p.name for p in killed.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_opening_again_without_resume_keeps_all_but_a_torn_line(tmp_path):
    with MetricWriter(tmp_path) as log:
        write_steps(log, [1, 3])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "run": "main", "step": 5')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]
    with MetricWriter(tmp_path) as log:
        write_steps(log, [5])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3, 5]
    with MetricWriter(tmp_path, resume_step=-1):
        pass
    assert read_metrics(tmp_path) == []


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    line = '{"kind": "train", "run": "main", "step": 1, "loss": 1.0}'
    (tmp_path / "metrics.jsonl").write_text(line)
    with MetricWriter(tmp_path, resume_step=1) as log:
        log.write("train", run="main", step=2, loss=0.5)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("damage", ['{"kind": "train"', '{"kind": "train", "run": "main"}', "[1]"])
def test_damage_in_the_middle_names_file_and_line(tmp_path, damage):
    good = '{"kind": "train", "run": "main", "step": 1}'
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{damage}\n{good}\n")
    for read in (read_metrics, lambda workdir: MetricWriter(workdir, resume_step=0)):
        with pytest.raises(BrokenEnvironment) as error:
            read(tmp_path)
        message = str(error.value)
        assert f"{tmp_path}/metrics.jsonl, line 2 is damaged (" in message
        assert message.endswith("): restore the file, or delete that line") and "\n" not in message


def test_missing_metrics_say_what_to_pass(tmp_path):
    with pytest.raises(InvalidInput) as error:
        read_metrics(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/metrics.jsonl does not exist: "
        "pass the workdir of a run that has logged at least one step"
    )


def test_json_keeps_its_order_and_is_strict(tmp_path):
    path = tmp_path / "deep" / "run.json"
    write_json(path, {"b": np.float32(0.5), "a": [float("nan"), jnp.int32(2)], "c": {"x": (1,)}})
    assert path.read_text() == (
        '{\n  "b": 0.5,\n  "a": [\n    null,\n    2\n  ],\n'
        '  "c": {\n    "x": [\n      1\n    ]\n  }\n}\n'
    )
    assert read_json(path) == {"b": 0.5, "a": [None, 2], "c": {"x": [1]}}


def test_json_is_replaced_whole_under_an_open_reader(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, "old")
    with open(path) as reader:
        write_json(path, "new")
        assert reader.read() == '"old"\n'
    assert read_json(path) == "new"


def test_read_json_errors_are_one_line(tmp_path):
    path = tmp_path / "run.json"
    with pytest.raises(InvalidInput) as error:
        read_json(path)
    missing = f"{path} does not exist: pass the workdir of a run that has written it"
    assert str(error.value) == missing
    path.write_text('{"a": 1,\n "b"')
    with pytest.raises(BrokenEnvironment) as error:
        read_json(path)
    message = str(error.value)
    assert message.startswith(f"{path} is not JSON (") and "line 2" in message
    assert message.endswith("): restore it, or let the run write it again")
    with pytest.raises(BrokenEnvironment) as error:
        read_json(tmp_path)
    expected = f"{tmp_path} cannot be read (Is a directory): make it a readable file"
    assert str(error.value) == expected


def full(path):
    mend = "free some space, or choose another workdir"
    return f"{path} cannot be written (No space left on device): {mend}"


def test_a_full_disk_leaves_the_old_json(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, 1)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "fsync", no_space)
    with pytest.raises(BrokenEnvironment) as error:
        write_json(path, 2)
    assert str(error.value) == full(path)
    assert read_json(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_stops_the_metrics(tmp_path):
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(BrokenEnvironment) as error,
        MetricWriter(tmp_path) as log,
    ):
        log._file.close()
        log._file = stack.enter_context(open("/dev/full", "ab", buffering=0))
        log.write("train", run="main", step=1, loss=1.0)
    assert str(error.value) == full(tmp_path / "metrics.jsonl")


def test_a_full_disk_stops_the_events(tmp_path):
    log = MetricWriter(tmp_path)
    log._events.close()
    log._events = RecordWriter("/dev/full")
    log.write("train", run="main", step=1, loss=1.0)
    with pytest.raises(BrokenEnvironment) as error:
        log.close()
    assert str(error.value) == full(log._events_path)
    log.close()


def test_the_first_error_is_the_one_that_shows(tmp_path):
    with pytest.raises(KeyError, match="first"), MetricWriter(tmp_path) as log:
        log._events.close()
        log._events = RecordWriter("/dev/full")
        log.write("train", run="main", step=1, loss=1.0)
        raise KeyError("first")


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BrokenEnvironment, match=r"Not a directory\): make it writable, or choose"):
        MetricWriter(tmp_path / "file")


def test_metrics_are_strict_for_any_reader(tmp_path):
    with MetricWriter(tmp_path) as log:
        write_steps(log, range(4))

    def refuse(constant):
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
