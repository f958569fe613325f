"""The one place that calls Triton: kernels inside jax programs, and kernels compiled by themselves.

Nothing of Triton is imported before it is asked for, so that s24jax works where it is missing. An
implementation in Triton asks `reason_against()` first.
"""

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from s24jax.mesh import vary_as
from s24jax.typing import Array

# jax-triton uses private parts of both jax and triton: these two versions go together, and with
# jax 0.10 and 0.11.
VERSIONS = {"triton": "3.6.0", "jax-triton": "0.3.1"}
STAGES = 1  # no kernel here has a loop whose loads could run ahead
COMPUTE_CAPABILITY = 90  # given, not asked of a device: a CPU can lower for the GPU then

_CACHE = "TRITON_CACHE_DIR"


def reason_against() -> str | None:
    """Why Triton kernels cannot run in this environment, and the mend; None where they can."""
    wanted = " ".join(f"'{name}=={version}'" for name, version in VERSIONS.items())
    for name, version in VERSIONS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed; python -m pip install {wanted}"
        if found.split(".")[:2] != version.split(".")[:2]:
            return f"{name} {found} is installed, not {version}; python -m pip install {wanted}"
    try:
        _jax_triton()
    except ImportError:
        plugin = f"'jax[cuda13]=={jax.__version__}'"
        return f"jax-triton finds no CUDA plugin of jax; python -m pip install {plugin}"
    return None


def call(
    kernel: Any,
    *arrays: Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    **constants: int,
) -> list[Array]:
    """Launches a Triton kernel, once for each member of the batch under `jax.vmap`.

    It has no derivative: call it inside a `jax.custom_vjp`.

    Args:
      kernel: a `triton.jit` function. Its parameters are the pointers of `arrays`, those of
        `out_shape`, then `constants` by name.
      arrays: the inputs; their buffers are aligned to 16 bytes, and the kernel is compiled so.
      out_shape: the outputs, not initialized.
      grid: the number of programs along up to three axes.
      constants: the kernel's `tl.constexpr` parameters.
    """

    # jax-triton has no batching rule of its own.
    @sequential_vmap
    def launch(*arrays):
        return _jax_triton().triton_call(
            *arrays,
            kernel=kernel,
            name=kernel.__name__,
            out_shape=list(out_shape),
            grid=grid,
            num_warps=num_warps,
            num_stages=STAGES,
            compute_capability=COMPUTE_CAPABILITY,
            **constants,
        )

    return vary_as(list(launch(*arrays)), *arrays)


def compile_ahead(kernel: Any, dtypes: Sequence[Any], *, num_warps: int, **constants: int) -> Any:
    """The kernel as `call` would compile it, with no GPU needed: `.asm` holds "ptx" and "cubin".

    Args:
      dtypes: of the arrays behind the kernel's pointers, inputs first.
    """
    _restore_cache(os.environ.get(_CACHE))  # jax_triton may have been imported by others
    import triton
    from triton._utils import canonicalize_ptr_dtype

    pointers = [canonicalize_ptr_dtype(jnp.dtype(dtype), is_const=False) for dtype in dtypes]
    signature = dict(zip(kernel.arg_names, pointers, strict=False))
    signature |= {name: "constexpr" for name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, aligned),
        target=triton.backends.compiler.GPUTarget("cuda", COMPUTE_CAPABILITY, 32),
        options={"num_warps": num_warps, "num_stages": STAGES},
    )


def _jax_triton():
    """jax_triton. Its import empties TRITON_CACHE_DIR, which breaks a later `triton.compile`."""
    before = os.environ.get(_CACHE)
    try:
        import jax_triton
    finally:
        _restore_cache(before)
    return jax_triton


def _restore_cache(directory: str | None) -> None:
    if directory:
        os.environ[_CACHE] = directory
    else:
        os.environ.pop(_CACHE, None)
