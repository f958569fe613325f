"""What users have today, through torch: dense cuBLAS and cuSPARSELt, on jax's own arrays.

torch is no dependency of s24jax: it is imported here alone, and only when a peer is asked for. The
arrays go over without a copy. Both allocators share the device, so jax's must not have taken all of
it beforehand (XLA_PYTHON_CLIENT_PREALLOCATE=false before jax starts).
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from s24jax.bench import cusparselt
from s24jax.bench.products import Problem, relative_error
from s24jax.bench.timing import Contender, interleave
from s24jax.compressed import Compressed24
from s24jax.errors import BrokenEnvironment, Unsupported

# Of torch._cslt_sparse_mm; an older torch has other names for split-K.
ARGUMENTS = {"alg_id", "split_k", "split_k_mode"}
LAYOUT_ROUNDS = 3  # in which dense A's faster layout is found


def dense(problem: Problem) -> Contender:
    """`torch.matmul`, which is cuBLAS: A as jax holds it, or copied to the other major order.

    Raises:
      BrokenEnvironment, Unsupported: there is no torch, or no GPU.
    """
    torch = _load()
    a, b = torch.from_dlpack(problem.a_dense), torch.from_dlpack(problem.b)
    a = a if problem.a.axis == 1 else a.t()
    layouts = {"as stored": a, "copied to the other major order": a.t().contiguous().t()}
    contenders = {
        name: _contender(
            torch,
            partial(torch.matmul, layout, b),
            partial(relative_error, oracle=problem.oracle),
            note=f"A {name}, the faster of two layouts",
        )
        for name, layout in layouts.items()
    }
    seconds = interleave(contenders, LAYOUT_ROUNDS)
    return contenders[min(seconds, key=seconds.get)]


def sparse(problem: Problem) -> Contender:
    """cuSPARSELt's product with its fastest right algorithm; A is compressed beforehand.

    Raises:
      BrokenEnvironment, Unsupported: there is no torch, no GPU, or no (right) cuSPARSELt.
    """
    torch = _load_cusparselt()
    rows = torch.from_dlpack(_rows(problem.a))
    compressed = torch._cslt_compress(rows)
    torch.cuda.synchronize()  # jax may write to the rows' memory as soon as nobody holds them
    b = torch.from_dlpack(_in_group_order(problem.a, problem.b))
    layouts = {"row-major": b, "column-major": b.t().contiguous().t()}

    def make(algorithm: cusparselt.Algorithm) -> Contender:
        layout, *settings = algorithm
        arguments = dict(zip(algorithm._fields[1:], settings, strict=True))
        return _contender(
            torch,
            partial(torch._cslt_sparse_mm, compressed, layouts[layout], **arguments),
            partial(relative_error, oracle=problem.oracle),
        )

    screening = cusparselt.search(list(layouts), make)
    return make(screening.best)._replace(note=screening.note())


def compress(a: Compressed24) -> Contender:
    """cuSPARSELt's compression alone, of a matrix that is squared and pruned already.

    Raises:
      BrokenEnvironment, Unsupported: there is no torch, no GPU, or no cuSPARSELt.
    """
    torch = _load_cusparselt()
    call = partial(torch._cslt_compress, torch.from_dlpack(_rows(a)))
    return _contender(torch, call, note="compression alone: its input is squared and pruned")


def _load() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise BrokenEnvironment("torch is not installed; pip install torch, with CUDA")
    if jax.default_backend() != "gpu":
        raise Unsupported(f"torch: needs an NVIDIA GPU, jax runs on {jax.default_backend()}")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise BrokenEnvironment(f"torch {torch.__version__} sees no GPU; install one with CUDA")
    return torch


def _load_cusparselt() -> Any:
    torch = _load()
    if not torch.backends.cusparselt.is_available():
        raise BrokenEnvironment(f"torch {torch.__version__} has no cuSPARSELt; install one with it")
    schema = torch.ops.aten._cslt_sparse_mm.default._schema
    if not {argument.name for argument in schema.arguments} >= ARGUMENTS:
        raise BrokenEnvironment(
            f"torch {torch.__version__} cannot set split-K; install 2.7 or newer"
        )
    return torch


def _contender(
    torch: Any, call: Callable[[], Any], error: Callable | None = None, note: str = ""
) -> Contender:
    def wait(_):
        torch.cuda.synchronize()

    def error_of(out) -> float:
        wait(out)
        return float(error(jnp.from_dlpack(out)))

    def spoil(out):
        out.fill_(float("nan"))

    return Contender(call, error and error_of, wait, spoil, note)


@jax.jit
def _rows(a: Compressed24) -> jax.Array:
    """[M, K], the groups of four side by side, as cuSPARSELt wants them."""
    return a.dense_rows()


@jax.jit
def _in_group_order(a: Compressed24, b: jax.Array) -> jax.Array:
    """B's rows in the order of A's columns in `_rows`."""
    return b[a.grouping.order(b.shape[0])]
