"""What a bench leaves behind: flat rows, one for each product, shape and implementation, as JSON.

    bench, product, T, D, F, M, N, K, implementation   what was timed; M, N, K of matrix products
    ms                     of one call, the median; null where `note` says why there is none
    tflops                 2*M*N*K / time: a sparse product is credited with the zeros it skips
    gbps                   the fewest bytes that must be moved / time, in GB/s
    ratio_to_dense         time of the faster dense product / time
    ratio_to_cusparselt    time of cuSPARSELt / time
    rel_error              ||out - oracle|| / ||oracle||, the oracle in float32
    note

Rows of bench "ffn" have in addition

    pass                   forward, backward, or both in one program
    ratio_to_xla_dense     time of the dense FFN as XLA compiles it / time
    ratio_to_fused_dense   time of our own dense FFN / time
    saved_bytes            between forward and backward, X and weights not counted; of the whole FFN
    peak_bytes             arguments, results and temporaries of the pass; of the whole FFN
    source                 of the operands: "synthetic", or a layer of a trained model
    zeros                  share of zeros in Y2 before pruning

and rows of benches of whole models ("step", "prefill", "decode", "scaling"), whose T is the tokens
of a call,

    model, layers, vocabulary, sequence_length, remat
    tokens_per_s
    mfu                    dense operations of the model / time, of the GPU's peak by its data sheet
    ratio_to_xla_dense, ratio_to_fused_dense, peak_bytes   as above

those of "step" of a trained model besides

    source                 the step of the run that the bench goes on from
    zeros                  as above, the mean over layers

those of "scaling" besides, where mfu is that of each device,

    mesh                   sizes of data x fsdp x tensor
    received_gb            what each device receives from others, see `s24jax.bench.traffic`
    received_gb_data, received_gb_fsdp, received_gb_tensor     over which axis

and those of "clock"

    mhz, watts             of the GPU, the product running
    idle_mhz, idle_watts   idle, right after it

The first row is the environment: bench is "environment", the other keys are the device, the commit,
the command and a version for each package.
"""

import importlib.metadata
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from s24jax.bench.shapes import Shape, Size
from s24jax.bench.timing import Result
from s24jax.errors import InvalidInput
from s24jax.workdir import devices, git_commit, versions
from s24jax.writer import read_json, write_json

KEYS = (
    "bench",
    "product",
    "T",
    "D",
    "F",
    "M",
    "N",
    "K",
    "implementation",
    "ms",
    "tflops",
    "gbps",
    "ratio_to_dense",
    "ratio_to_cusparselt",
    "rel_error",
    "note",
)
ENVIRONMENT = "environment"
DENSE = ("xla_dense", "cublas", "relu2_cuda")
CUSPARSELT = ("cusparselt", "cusparselt_compress")
# To the fastest of these; the last two are those of FFNs and of whole models alone.
RATIOS: Mapping[str, tuple[str, ...]] = {
    "ratio_to_dense": DENSE,
    "ratio_to_cusparselt": CUSPARSELT,
    "ratio_to_xla_dense": ("xla_dense",),
    "ratio_to_fused_dense": ("relu2_cuda",),
}
# What rows that are compared have in common.
CASE = ("bench", "product", "pass", "source", "model", "layers", "mesh", "T", "D", "F")
PEER_PACKAGES = ("torch", "triton", "jax-triton", "nvidia-cublas", "nvidia-cusparselt-cu13")

Row = dict[str, Any]


def make_rows(
    bench: str,
    product: str,
    shape: Shape,
    results: dict[str, Result],
    *,
    nbytes: Mapping[str, int] = MappingProxyType({}),
    size: Size | None = None,
    flops: int | None = None,
) -> list[Row]:
    """The rows of one product at one shape.

    Args:
      bench: "gemm", "sparsify", "ffn", "clock", or one of whole models.
      product: its name.
      shape: of the FFN.
      results: of each implementation.
      nbytes: the fewest bytes that each implementation must move, where that is its rate.
      size: of a matrix product.
      flops: of several of them, dense.
    """
    flops = size.flops if size else flops
    what = {"bench": bench, "product": product, **shape._asdict()}
    what |= size._asdict() if size else dict.fromkeys(Size._fields)
    rows = []
    for implementation, result in results.items():
        seconds = result.seconds
        values = {
            "ms": 1e3 * seconds if seconds else None,
            "tflops": _ratio(flops / 1e12, seconds) if flops else None,
            "gbps": _ratio(nbytes.get(implementation, 0) / 1e9, seconds),
            "ratio_to_dense": None,
            "ratio_to_cusparselt": None,
            "rel_error": result.rel_error,
            "note": result.note,
        }
        rows.append(what | {"implementation": implementation} | values)
    return _compared(rows)


def add_ratios(rows: list[Row]) -> list[Row]:
    """The rows of one product with how much faster each is than dense FFNs, XLA's and our own."""
    return _compared([row | dict.fromkeys(RATIOS) for row in rows])


def merged(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """The rows of two runs of a bench, of different implementations, compared with each other.

    Args:
      rows, others: each with its environment, of which the first is kept.
    """
    cases: dict[tuple, list[Row]] = {}
    for row in [*rows[1:], *others[1:]]:
        cases.setdefault(tuple(row.get(key) for key in CASE), []).append(row)
    return [rows[0], *itertools.chain(*map(_compared, cases.values()))]


def median_rows(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Of each row the one with the median time, the shorter of two.

    Args:
      runs: of the same bench and implementation, each with its environment, of which the first is
        kept.
    """
    first, *_ = runs
    return [first[0], *(_median_row(rows) for rows in zip(*(r[1:] for r in runs), strict=True))]


def _median_row(rows: Sequence[Row]) -> Row:
    """A row without a time has a reason, which counts before any time."""
    ranked = sorted(rows, key=lambda row: row["ms"] or 0.0)
    return ranked[0] if not ranked[0]["ms"] else ranked[(len(ranked) - 1) // 2]


def _compared(rows: list[Row]) -> list[Row]:
    """The rows of one product, with those ratios of their times that they have a place for."""
    fastest = {}
    for key, names in RATIOS.items():
        times = [row["ms"] for row in rows if row["implementation"] in names]
        fastest[key] = min((ms for ms in times if ms), default=None)
    return [
        row | {key: _ratio(fastest[key], row["ms"]) for key in RATIOS if key in row} for row in rows
    ]


def environment(command: str) -> Row:
    """What the numbers depend on: the device, the code and its packages, and the command."""
    row = {
        "bench": ENVIRONMENT,
        "device": devices()[0],
        "commit": git_commit(),
        "command": command,
    }
    return row | versions() | {name: _version(name) for name in PEER_PACKAGES}


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes a list of flat rows; raises BrokenEnvironment where the disk does not take them."""
    write_json(path, list(rows))


def read_rows(path: str | Path) -> list[Row]:
    """The rows of `write_rows`.

    Raises:
      InvalidInput: there is no such file, or it holds something else.
      BrokenEnvironment: it is no JSON.
    """
    rows = read_json(path)
    wanted = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not wanted or not all(row.get("bench") == ENVIRONMENT or {*KEYS} <= {*row} for row in rows):
        raise InvalidInput(f"{path} holds no rows of a bench; name a file that --json has written")
    return rows


def _ratio(amount: float | None, seconds: float | None) -> float | None:
    return amount / seconds if amount and seconds else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
