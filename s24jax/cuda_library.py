"""The one adapter of the CUDA library: the handlers of `ffi/`, behind XLA's foreign functions.

The library is compiled on first use, against the installed jax, into a cache. For jaxlib refuses
a handler that was built with newer headers, at a time when this takes the whole backend down. What
`S24JAX_CUDA_LIBRARY` names is loaded instead, if it was built for this jaxlib.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jaxlib
import numpy as np

from s24jax import nvcc
from s24jax.errors import BrokenEnvironment
from s24jax.mesh import vary_as

TARGETS = (
    "s24jax_feature_wise24",
    "s24jax_matmul24",
    "s24jax_matmul_feature_wise24",
    "s24jax_matmul_sparsify24",
    "s24jax_relu2_ffn_dy1",
    "s24jax_relu2_ffn_y2",
    "s24jax_sparsify24",
    "s24jax_split_features",
)
# In a checkout and where a wheel puts it alike.
SOURCES = pathlib.Path(__file__).parents[1] / "ffi"
PREBUILT = "S24JAX_CUDA_LIBRARY"
CACHE = "S24JAX_CACHE_DIR"

_log = logging.getLogger(__name__)
_loading = threading.Lock()
_loaded: list[ctypes.CDLL] = []  # none or one; held for as long as XLA may call into it


def call(
    target: str,
    result_shape_dtypes,
    *args,
    **attributes,
) -> Any:
    """Calls a handler of the library, which is built and registered first where it is not yet.

    Under `jax.vmap` it is called for one member of the batch after the other.

    Args:
      target: a member of `TARGETS`.
      result_shape_dtypes: of the results, as in `jax.ffi.ffi_call`.
      *args: the operands.
      **attributes: the handler's attributes. Python's numbers arrive as int32, float and bool, the
        types to declare in the handler; an int beyond 32 bits is an OverflowError.

    Raises:
      BrokenEnvironment: the library cannot be built or loaded.
    """
    _register()
    function = jax.ffi.ffi_call(target, result_shape_dtypes, vmap_method="sequential")
    results = function(*args, **{name: _attribute(value) for name, value in attributes.items()})
    # In a scan XLA lets a kernel write straight into the stack of what the backward pass needs,
    # and runs it once more for whoever else uses the result (jaxlib 0.11.2, not 0.10.2; see pull
    # request 45799 of openxla/xla). Behind a barrier for all it runs once, and XLA copies.
    return vary_as(jax.lax.optimization_barrier(results), *args)


def reason_against() -> str | None:
    """Why no library can be had here; None where one is named, built, or can be built."""
    if os.environ.get(PREBUILT) or _loaded:
        return None
    reason = _reason_against_building()
    return None if reason is None or _built(None) else reason


def build(force: bool = False) -> pathlib.Path:
    """The library for this jaxlib, these sources and this nvcc; compiled where the cache lacks it.

    Processes that start together compile it once. The compiler's output is beside the library, in
    `log_of(library)`.

    Args:
      force: compile it even if it is there.

    Raises:
      BrokenEnvironment: there is no compiler, or it failed, or the cache cannot be written.
    """
    compiler = _compiler()
    library = _built(compiler)
    if library and not force:
        return library
    reason = _reason_against_building()
    if reason:
        raise BrokenEnvironment(f"the CUDA library cannot be built: {reason}")
    library = _path(compiler)
    try:
        with _lock(library.parent):
            if force or not library.exists():
                _compile(compiler, library)
    except OSError as error:
        raise BrokenEnvironment(
            f"the CUDA library cannot be written to {library.parent} ({error}); name a folder with "
            f"{CACHE}"
        ) from error
    return library


def log_of(library: pathlib.Path) -> pathlib.Path:
    """Where `build` leaves what the compiler printed."""
    return library.with_suffix(".log")


def state() -> str:
    """What `call` would load, in words."""
    prebuilt = os.environ.get(PREBUILT)
    if prebuilt:
        return f"{prebuilt}, named by {PREBUILT}"
    reason = reason_against()
    if reason:
        return f"none: {reason}"
    built = _built(_compiler())
    return str(built or "not built yet; the first use does it, or python -m s24jax.build")


def _register() -> None:
    """Loads the library and tells XLA its handlers, once in a process."""
    with _loading:
        if not _loaded:
            prebuilt = os.environ.get(PREBUILT)
            library = _load(pathlib.Path(prebuilt).absolute() if prebuilt else build())
            for target in TARGETS:
                handler = jax.ffi.pycapsule(library[target])
                jax.ffi.register_ffi_target(target, handler, platform="CUDA")
            _loaded.append(library)


def _load(path: pathlib.Path) -> ctypes.CDLL:
    """The library at `path`, when it is whole and for this jaxlib."""
    mend = f"build it again with python -m s24jax.build --force, or unset {PREBUILT}"
    if not path.exists():
        raise BrokenEnvironment(f"the CUDA library {path} does not exist; {mend}")
    try:
        library = ctypes.CDLL(str(path))
        built_for = library.s24jax_built_for
        for target in TARGETS:
            library[target]
    except (OSError, AttributeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise BrokenEnvironment(f"the CUDA library {path} is broken ({reason}); {mend}") from error
    built_for.restype = ctypes.c_char_p
    if built_for().decode() != jaxlib.__version__:
        raise BrokenEnvironment(
            f"the CUDA library {path} was built for jaxlib {built_for().decode()}, this is "
            f"{jaxlib.__version__}; {mend}"
        )
    return library


def _compile(compiler: pathlib.Path, library: pathlib.Path) -> None:
    # A warning, for else who has not configured logging would see the program stand still.
    _log.warning("building the CUDA library (takes about half a minute, once)")
    with tempfile.TemporaryDirectory() as folder:
        stamp = pathlib.Path(folder, "built_for.cpp")
        stamp.write_text(_stamp())
        nvcc.compile_library(compiler, [*_sources(".cu"), stamp], library, log_of(library))
    if library != _path(compiler):  # it is named by sources that it is not made of
        library.unlink()
        raise BrokenEnvironment(f"{SOURCES} changed while it was compiled; try again")


def _stamp() -> str:
    """C++ that lets a library tell which jaxlib it was built for."""
    return f'extern "C" const char* s24jax_built_for() {{ return "{jaxlib.__version__}"; }}\n'


def _sources(*suffixes: str) -> list[pathlib.Path]:
    return sorted(path for path in SOURCES.glob("*") if path.suffix in suffixes)


def _reason_against_building() -> str | None:
    if not _sources(".cu"):
        return f"there are no CUDA sources in {SOURCES}; install s24jax again"
    return nvcc.reason_against()


def _compiler() -> pathlib.Path | None:
    return None if nvcc.reason_against() else nvcc.find()


def _built(compiler: pathlib.Path | None) -> pathlib.Path | None:
    """The library that is in the cache; without a compiler that of any compiler will do."""
    path = _path(compiler)
    return next(iter(sorted(path.parent.glob(path.name))), None)


def _path(compiler: pathlib.Path | None) -> pathlib.Path:
    """The place in the cache, named by all that a library depends on; "*" for no compiler."""
    named = os.environ.get(CACHE)
    usual = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "s24jax")
    cache = (pathlib.Path(named) if named else usual).expanduser().absolute()
    key = hashlib.sha256()
    for variable in nvcc.FLAG_VARIABLES:
        key.update(repr(os.environ.get(variable)).encode())
    key.update(repr((nvcc.FLAGS, _stamp())).encode())
    for path in _sources(".cu", ".cuh"):
        key.update(repr((path.name, path.read_bytes())).encode())
    by = nvcc.version(compiler) if compiler else "*"
    return cache / f"{key.hexdigest()[:16]}-nvcc{by}.so"


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """Holds others that build off; the kernel lets go of it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _attribute(value):
    """XLA decodes an attribute only in the very type that the handler declares."""
    for python, numpy in ((bool, np.bool_), (int, np.int32), (float, np.float32)):
        if isinstance(value, python):
            return numpy(value)
    return value
