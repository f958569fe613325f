"""Which implementations can run where the suite runs, and which of them it must not go without.

S24JAX_REQUIRE names, with commas between, what the environment has to offer, so that a machine that
is meant for them cannot pass by skipping: the implementations "cuda" and "triton", which need a
Hopper GPU; "two-gpus"; and what compiles and lowers kernels without one, "nvcc" and "jax-triton".
The session fails at once where one is missing. Left to skip are cases that an implementation itself
refuses.
"""

import jax

from s24jax import cuda_library, device, nvcc, triton_bridge

REQUIRABLE = {
    "cuda": lambda: device.hopper_reason() or cuda_library.reason_against(),
    "triton": lambda: device.hopper_reason() or triton_bridge.reason_against(),
    "two-gpus": lambda: one_gpu_reason(),
    "nvcc": lambda: nvcc.reason_against(),
    "jax-triton": lambda: triton_bridge.reason_against(),
}


def one_gpu_reason() -> str | None:
    """Why nothing can run on two GPUs, or None where it can."""
    if device.hopper_reason():
        return device.hopper_reason()
    return None if jax.device_count() > 1 else "needs two GPUs, there is one"


def missing(required: str) -> str | None:
    """Why this environment lacks one of `required`, as S24JAX_REQUIRE has it; None if nothing."""
    for name in filter(None, required.split(",")):
        if name not in REQUIRABLE:
            known = ", ".join(REQUIRABLE)
            return f"S24JAX_REQUIRE names {name!r}, which does not exist; use names of {known}"
        reason = REQUIRABLE[name]()
        if reason:
            return f"S24JAX_REQUIRE names {name!r}, which cannot run here: {reason}"
    return None


def reason_to_skip(markers: set[str]) -> str | None:
    """Why a test with these markers has nothing to say here."""
    if "gpu" in markers and device.hopper_reason():
        return device.hopper_reason()
    if "two_gpus" in markers and one_gpu_reason():
        return one_gpu_reason()
    if "cpu_only" in markers and jax.default_backend() != "cpu":
        return f"holds on a CPU alone, jax runs on {jax.default_backend()}"
    return None
