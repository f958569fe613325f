"""Several processes as one run: two of four simulated devices each, over loopback."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from processes import ROOT, assert_same_curves, curves, eight_devices, forget_the_end, simulated

from s24jax import distributed
from s24jax.errors import BrokenEnvironment, InvalidInput
from s24jax.mesh import check_model

pytestmark = pytest.mark.cpu_only
# A process of its own is a process too: the mesh spans both of them.
RUN = ("--config.mesh.fsdp=4", "--config.batch_size=8", "--config.model.recipe.feature_wise=False")
ENDLESS = ("--config.steps=100000", "--config.checkpoint_every=20")


def start(workdir, *flags, devices: int = 4) -> subprocess.Popen:
    command = ["-m", "experiments.train", "--config=configs/lm_100m.py:smoke"]
    return subprocess.Popen(
        [sys.executable, *command, f"--workdir={workdir}", *RUN, *flags],
        cwd=ROOT,
        env=os.environ | simulated(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(workdir, *flags) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = (f"--coordinator=localhost:{port}", "--processes=2")
    return [start(workdir, *several, f"--process={i}", *flags) for i in range(2)]


def ended(processes, within: float = 200) -> list[tuple[int, str]]:
    """Exit status and output of each."""
    try:
        outputs = [process.communicate(timeout=within)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, outputs, strict=True)]


def wait_for(path, processes) -> None:
    patience = time.monotonic() + 200
    while not path.exists():
        faults = [process.communicate()[0] for process in processes if process.poll() is not None]
        assert not faults, faults
        assert time.monotonic() < patience, f"no {path}"
        time.sleep(0.1)


def saved(workdir) -> set[int]:
    return {int(folder.name) for folder in (workdir / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A finished run of two processes, and what they printed."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    results = ended(start_two(workdir))
    assert [status for status, _ in results] == [0, 0], results
    return workdir, [text for _, text in results]


def test_one_process_writes(straight):
    workdir, (first, second) = straight
    assert "step 6/6" in first and "| validation loss" in first
    assert "2 processes: SIGTERM to one of them saves and stops all" in first
    assert "no sample, since the weights lie on several hosts" in first
    assert "sample:" not in first and not (workdir / "samples.txt").exists()
    assert "step 6/6" not in second and "| validation loss" not in second
    assert [step for (step,) in curves(workdir, "train", "step")] == [1, 2, 3, 4, 5, 6]
    assert (workdir / "summary.json").exists() and (workdir / "plots").exists()


def test_two_processes_train_as_one_does_and_one_goes_on_for_them(straight, tmp_path):
    """Of the two's checkpoint of step 3, the one process takes its data up where they stood."""
    workdir, _ = straight
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    shutil.copytree(workdir, resumed)
    forget_the_end(resumed)
    for folder in (alone, resumed):
        ((status, text),) = ended([start(folder, devices=8)])
        assert status == 0, text
        assert_same_curves(folder, workdir)


def test_two_processes_go_on_for_one(straight, tmp_path):
    workdir, _ = straight
    resumed = tmp_path / "resumed"
    ((status, text),) = ended([start(resumed, devices=8)])
    assert status == 0, text
    forget_the_end(resumed)
    results = ended(start_two(resumed))
    assert [status for status, _ in results] == [0, 0], results
    assert_same_curves(resumed, workdir)


def test_a_dead_process_ends_the_other_and_a_signal_saves_once_on_all(tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(workdir, *ENDLESS)
    wait_for(workdir / "checkpoints" / "40", processes)
    processes[1].kill()
    died = time.monotonic()
    (status, text), _ = ended(processes)
    assert status not in (0, None)
    assert time.monotonic() - died < 60
    # jax's heartbeat, an error that the step raises, or, rarely, gloo's own thread, which aborts
    # when the ranks left alive are no longer at the same sum.
    ends = ("another task died", "process 0 lost the others after step", "gloo::EnforceNotMet")
    assert any(end in text for end in ends), text
    last = max(saved(workdir))

    processes = start_two(workdir, *ENDLESS)
    wait_for(workdir / "checkpoints" / str(last + 20), processes)
    processes[1].send_signal(signal.SIGTERM)
    results = ended(processes)
    assert [status for status, _ in results] == [0, 0], results
    (stopped,) = re.findall(r"stopped by a signal; step (\d+) is saved", results[0][1])
    assert "stopped by a signal" not in results[1][1]
    assert max(saved(workdir)) == int(stopped)
    steps = [step for (step,) in curves(workdir, "train", "step")]
    assert steps == list(range(1, int(stopped) + 1)), "it went on from the last checkpoint"
    data = json.loads((workdir / "checkpoints" / stopped / "data" / "metadata").read_text())
    assert len(data["states"]) == 2


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--coordinator=localhost:1"], "--coordinator, --processes and --process belong together"),
        (
            ["--coordinator=localhost:1", "--processes=2", "--process=2"],
            "--process=2 is none of --processes=2",
        ),
        (["--cluster"], "--cluster: no cluster that jax knows is around"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, flags, words):
    ((status, text),) = ended([start(tmp_path / "run", *flags)])
    assert status == 1
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "run").exists()


def test_the_others_do_not_come(monkeypatch):
    def initialize(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier\ntimed out")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(BrokenEnvironment) as error:
        distributed.join("host:1", 2, 0)
    assert str(error.value) == (
        "the processes of this run did not find each other at host:1 (DEADLINE_EXCEEDED: Barrier "
        "timed out); start all of them, with the same --coordinator"
    )


def test_what_a_lost_process_says():
    error = distributed.lost_the_others(RuntimeError("Connection\nreset"), 7)
    assert str(error) == (
        "process 0 lost the others after step 7 (Connection reset); run the same command on all of "
        "them to go on from the last checkpoint"
    )


def test_a_tensor_group_stays_in_a_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sizes = {"data": 1, "fsdp": 1, "tensor": 8}
    with pytest.raises(InvalidInput) as error:
        check_model(sizes, None, 8)
    assert str(error.value).startswith(
        "2 processes cannot each have sequences of its own on a mesh with data * fsdp = 1; make"
    )


def test_the_program_is_the_same_in_every_process():
    """Sets have another order in each: with it, devices would ask each other for different sums."""
    source = (
        "from mesh_cases import config_of; from s24jax.train_step import make_program; import jax;"
        "c = config_of((2, 2, 2), {}); p = make_program(c);"
        "t = jax.ShapeDtypeStruct((c.batch_size, c.sequence_length + 1), 'int32');"
        "print(p.train_step.lower(p.state, t, mode='sparse24').as_text());"
        "print(p.probe.lower(p.state.params, t).as_text())"
    )
    finished = [eight_devices("-c", source, PYTHONHASHSEED=str(seed)) for seed in range(3)]
    assert all(process.returncode == 0 for process in finished), finished[0].stderr
    texts = {process.stdout for process in finished}
    assert len(texts) == 1 and "all_reduce" in texts.pop()
