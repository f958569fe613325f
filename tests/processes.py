"""Processes of their own, also on simulated devices, and what tests read off runs' workdirs."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from s24jax.writer import read_metrics

ROOT = pathlib.Path(__file__).parents[1]


def simulated(devices: int) -> dict[str, str]:
    """The environment of a process with so many devices: their number is fixed when jax starts."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def python(*command, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """Python in the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def bench(*arguments) -> subprocess.CompletedProcess:
    return python("-m", "experiments.bench", *arguments)


def eight_devices(*command, **environment) -> subprocess.CompletedProcess:
    """Python on eight devices, which finds the modules of the tests."""
    environment = simulated(8) | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"} | environment
    return python(*command, timeout=800, **environment)


def forget_the_end(workdir: pathlib.Path) -> None:
    """A run of six steps as if it was killed after the checkpoint of step 3."""
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "summary.json").unlink()


def curves(workdir: pathlib.Path, kind: str, *keys: str) -> list[list[float]]:
    return [[r[key] for key in keys] for r in read_metrics(workdir) if r["kind"] == kind]


def assert_same_curves(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """Of two runs of six steps, but for the order of sums."""
    for kind, keys in (("train", ("loss", "grad_norm")), ("validation", ("loss", "loss_dense"))):
        here, there = (curves(folder, kind, *keys) for folder in (workdir, expected))
        assert len(here) == {"train": 6, "validation": 2}[kind]
        for a, b in zip(here, there, strict=True):
            assert a == pytest.approx(b, rel=2e-6), kind
