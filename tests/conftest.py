"""Shared by every test: platform, caches, hypothesis' settings, and what may be skipped where."""

import os
import pathlib
import tempfile

import hypothesis
import jax
import pytest

_CACHE = pathlib.Path(tempfile.gettempdir()) / "s24jax-test-compilations"
_SETTINGS = {
    # The suite means the same everywhere: on the CPU, whatever the machine has. JAX_PLATFORMS=cuda
    # runs it on a GPU, where sums have another order and what is bitwise on a CPU is not.
    "jax_platforms": "cpu",
    # What one test, or one process that a test starts, has compiled is there for the next.
    "jax_compilation_cache_dir": str(_CACHE),
    "jax_persistent_cache_min_compile_time_secs": "0.2",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name.upper(), _value)  # for the processes
    _value = os.environ[_name.upper()]
    jax.config.update(_name, float(_value) if _name.endswith("secs") else _value)

# Built once for all tests, processes and runs of the suite.
os.environ.setdefault("S24JAX_CACHE_DIR", str(_CACHE.with_name("s24jax-test-cuda-library")))

hypothesis.settings.register_profile(
    "s24jax",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=60,
)
hypothesis.settings.load_profile("s24jax")


# `implementations` is imported late: it imports s24jax, whose type checks are hooked in after this.


def pytest_sessionstart(session):
    from implementations import missing

    fault = missing(os.environ.get("S24JAX_REQUIRE", ""))
    if fault and not hasattr(session.config, "workerinput"):  # pytest-xdist's workers ask in vain
        raise pytest.UsageError(fault)


def pytest_runtest_setup(item):
    from implementations import reason_to_skip

    reason = reason_to_skip({mark.name for mark in item.iter_markers()})
    if reason:
        pytest.skip(reason)
