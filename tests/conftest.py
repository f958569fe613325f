"""Shared by every test: the platform, one compilation cache, hypothesis' settings."""

import os
import pathlib
import tempfile

import hypothesis
import jax

# A suite that means the same everywhere: on the CPU, whatever the machine has. JAX_PLATFORMS=cuda
# runs it on a GPU, where sums have another order and what is bitwise on a CPU is not.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

# The command lines that tests start as processes compile once, not once each.
_cache = pathlib.Path(tempfile.gettempdir()) / "s24jax-test-compilations"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

hypothesis.settings.register_profile(
    "s24jax",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=60,
)
hypothesis.settings.load_profile("s24jax")
