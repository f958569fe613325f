"""Shared by every test: one compilation cache, errors for warnings (pyproject), fixed seeds."""

import os
import pathlib
import tempfile

# Before jax is imported: tests compare with a CPU oracle unless a GPU run asks for the GPU, and the
# command lines that tests start as subprocesses compile once, not once each.
_cache = pathlib.Path(tempfile.gettempdir()) / "s24jax-test-compilations"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis  # noqa: E402

hypothesis.settings.register_profile(
    "s24jax",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=60,
)
hypothesis.settings.load_profile("s24jax")
