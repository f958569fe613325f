"""S24JAX_REQUIRE, and the markers that say where a test has something to say."""

import os
import pathlib
import subprocess
import sys

import implementations
import jax
import pytest

from s24jax import cuda_library, device, nvcc, triton_bridge

TESTS = pathlib.Path(__file__).parent


@pytest.fixture
def here(monkeypatch):
    """An environment that has everything, of which a test takes something away."""

    def lacks(module, function, reason):
        monkeypatch.setattr(module, function, lambda: reason)

    for module in (cuda_library, triton_bridge, nvcc):
        lacks(module, "reason_against", None)
    lacks(device, "hopper_reason", None)
    return lacks


@pytest.mark.parametrize("required", ["", "cuda", "triton", "nvcc", "jax-triton", "cuda,triton"])
def test_nothing_is_missing(here, required):
    assert implementations.missing(required) is None


def test_each_needs_its_own(here):
    here(cuda_library, "reason_against", "no library")
    assert implementations.missing("triton,nvcc") is None
    assert implementations.missing("triton,cuda") == (
        "S24JAX_REQUIRE names 'cuda', which cannot run here: no library"
    )
    here(triton_bridge, "reason_against", "no bridge")
    assert "'triton', which cannot run here: no bridge" in implementations.missing("triton")


def test_two_gpus(here, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert implementations.missing("two-gpus") == (
        "S24JAX_REQUIRE names 'two-gpus', which cannot run here: needs two GPUs, there is one"
    )
    assert implementations.reason_to_skip({"two_gpus"}) == "needs two GPUs, there is one"
    assert implementations.reason_to_skip({"gpu"}) is None
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert implementations.missing("two-gpus") is None
    assert implementations.reason_to_skip({"two_gpus"}) is None
    here(device, "hopper_reason", "a CPU")
    assert implementations.missing("two-gpus").endswith("cannot run here: a CPU")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_kernel_needs_a_hopper_gpu(here, name):
    here(device, "hopper_reason", "a CPU")
    assert implementations.missing(name).endswith("cannot run here: a CPU")
    assert implementations.missing("nvcc,jax-triton") is None


def test_an_unknown_name():
    assert implementations.missing("gpu") == (
        "S24JAX_REQUIRE names 'gpu', which does not exist; use names of "
        "cuda, triton, two-gpus, nvcc, jax-triton"
    )


def test_markers(here, monkeypatch):
    assert implementations.reason_to_skip({"gpu", "parametrize"}) is None
    here(device, "hopper_reason", "a CPU")
    assert implementations.reason_to_skip({"gpu"}) == "a CPU"
    assert implementations.reason_to_skip({"parametrize"}) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert implementations.reason_to_skip({"cpu_only"}) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert implementations.reason_to_skip({"cpu_only"}) == "holds on a CPU alone, jax runs on gpu"


@pytest.mark.cpu_only
def test_the_session_fails_at_once():
    """Before a test runs, and not by a skip."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(TESTS / "test_meter.py"),
    ]
    environment = os.environ | {"S24JAX_REQUIRE": "cuda"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "S24JAX_REQUIRE names 'cuda', which cannot run here: the default" in done.stderr
    assert "passed" not in done.stdout


@pytest.mark.gpu
def test_a_gpu_test_runs_on_a_gpu():
    assert jax.devices()[0].platform == "gpu"
