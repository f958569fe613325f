"""The doctor's report; as a command line in test_cli.py."""

from typing import get_args

import pytest

from s24jax import cuda_library, device, doctor, nvcc, triton_bridge
from s24jax.typing import Implementation


def gpu_path() -> dict[str, str]:
    """The lines of the report's GPU path, by what they are about."""
    lines = doctor.report().splitlines()
    first = lines.index("GPU path") + 1
    return {line[2:17].strip(): line[18:] for line in lines[first : first + 3]}


def resolutions() -> dict[tuple[str, str], str]:
    """The lines of the report's ops, by op and name of an implementation."""
    lines = doctor.report().splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("ops, "))
    return {tuple(line.split()[:2]): line[35:] for line in lines[first + 1 :]}


@pytest.fixture(autouse=True)
def nothing_is_there_yet(monkeypatch):
    monkeypatch.delenv(cuda_library.PREBUILT, raising=False)
    monkeypatch.setattr(cuda_library, "_loaded", [])
    monkeypatch.setattr(cuda_library, "_built", lambda compiler: None)
    monkeypatch.setattr(cuda_library, "build", lambda force=False: pytest.fail("it was built"))


def test_what_of_the_gpu_path_is_missing(monkeypatch):
    monkeypatch.setattr(cuda_library, "SOURCES", cuda_library.SOURCES / "none")
    monkeypatch.setattr(device, "hopper_reason", lambda: "a CPU")
    monkeypatch.setattr(triton_bridge, "reason_against", lambda: "no Triton")
    found = gpu_path()
    assert found["device"] == "a CPU"
    assert found["CUDA library"].startswith("none: there are no CUDA sources in ")
    assert found["Triton"] == "no Triton"


def test_on_a_hopper_gpu_it_builds_and_runs_nothing(monkeypatch):
    """It asks which implementation would run, and why."""
    monkeypatch.setattr(nvcc, "reason_against", lambda: None)
    monkeypatch.setattr(device, "hopper_reason", lambda: None)
    monkeypatch.setattr(triton_bridge, "reason_against", lambda: None)
    assert gpu_path() == {
        "device": "Hopper",
        "CUDA library": "not built yet; the first use does it, or python -m s24jax.build",
        "Triton": "ready",
    }
    found = resolutions()
    ops = (
        *("matmul_sparsify24", "matmul_feature_wise24", "relu2_ffn", "sparsify24", "matmul24"),
        *("split_features", "feature_wise24", "split_matmul24"),
    )
    assert list(found) == [(op, name) for op in ops for name in get_args(Implementation)]
    for op in ops:
        fastest = "triton" if op == "sparsify24" else "cuda"
        assert found[op, "auto"] == f"{fastest} (the preferred implementation)"
        assert found[op, "cuda"] == "cuda (named by the caller)"
        assert found[op, "reference"] == "reference (named by the caller)"
    assert found["matmul24", "triton"].startswith("no: matmul24: implementation 'triton' cannot")
