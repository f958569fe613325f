"""Times the ops beside what users have today, on the same operand in the same process.

python -m experiments.bench gemm|sparsify|ffn [--json=FILE] [--table=FILE] [--figure=FILE.png|svg]
    [--shapes=TxDxF,...] [--products=NAME,...] [--implementations=NAME,...] [--rounds=N]
python -m experiments.bench gemm --tune [--shapes=TxDxF,...] [--rounds=N]
python -m experiments.bench draw --json=FILE [--table=FILE] [--figure=FILE.png|svg]

`gemm`: the four sparse products. `sparsify`: the passes that make their operands. `ffn`: the whole
feed-forward network and its parts. `draw` makes table and figure anew from the rows of a file.
`--tune` saves our kernel's fastest schedules.
"""

import os
import sys
from functools import partial
from types import ModuleType

# torch allocates on the same GPU, and jax would take most of it when it starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from absl import flags

from experiments import cli
from s24jax import device
from s24jax.bench import ffn, gemm, sparsify
from s24jax.bench.figure import check_format, save_bench_figure
from s24jax.bench.rows import environment, read_rows, write_rows
from s24jax.bench.shapes import SHAPES, Shape, parse_names, parse_shapes
from s24jax.bench.table import table
from s24jax.bench.tune import tune
from s24jax.errors import InvalidInput
from s24jax.writer import write_bytes

BENCHES = {"gemm": gemm, "sparsify": sparsify, "ffn": ffn}

JSON = flags.DEFINE_string("json", None, "The file of the rows.")
TABLE = flags.DEFINE_string("table", None, "A Markdown file for the table.")
FIGURE = flags.DEFINE_string("figure", None, "A .png or .svg file for the figure.")
SHAPES_FLAG = flags.DEFINE_string("shapes", None, "TxDxF,... Default: four for a GPU.")
PRODUCTS = flags.DEFINE_string("products", None, "Some of the bench's products. Default: all.")
IMPLEMENTATIONS = flags.DEFINE_string("implementations", None, "Some of them. Default: all.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Samples of each implementation.", lower_bound=1)
TUNE = flags.DEFINE_bool("tune", False, "Time the schedules of gemm's cuda and save the best.")


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else ""
    if command not in (*BENCHES, "draw"):
        raise InvalidInput(
            f"{command!r} is no bench; write gemm, sparsify, ffn or draw before the flags"
        )
    if FIGURE.value:
        check_format(FIGURE.value)
    if TUNE.value:
        if command != "gemm":
            raise InvalidInput(f"--tune goes with gemm, not with {command}; leave it out")
        for line in tune(_shapes(), ROUNDS.value):
            print(line)
    elif command == "draw":
        if not JSON.value:
            raise InvalidInput("draw: --json is not given; name the file of the rows")
        _show(read_rows(JSON.value))
    else:
        _show(_run(BENCHES[command], " ".join(["python -m experiments.bench", *arguments])))


def _run(bench: ModuleType, written: str) -> list[dict]:
    """The rows of a bench, saved after each product: a run that is cut off leaves what it has."""
    products = _names("products", PRODUCTS.value, bench.PRODUCTS)
    implementations = _names("implementations", IMPLEMENTATIONS.value, bench.IMPLEMENTATIONS)
    shapes = _shapes()
    if device.hopper_reason():
        print(f"columns stay empty: {device.hopper_reason()}", file=sys.stderr)
    rows = [environment(written)]
    for found in bench.bench(shapes, products, implementations, ROUNDS.value):
        rows += found
        if JSON.value:
            write_rows(JSON.value, rows)
    return rows


def _show(rows: list[dict]) -> None:
    print(table(rows), end="")
    if TABLE.value:
        write_bytes(TABLE.value, table(rows).encode())
    if FIGURE.value:
        save_bench_figure(FIGURE.value, rows)


def _shapes() -> list[Shape]:
    if SHAPES_FLAG.value:
        return parse_shapes(SHAPES_FLAG.value)
    if jax.default_backend() != "gpu":
        raise InvalidInput(
            f"--shapes: {SHAPES[0]} and more are for a GPU; pass small ones, 64x32x128"
        )
    return list(SHAPES)


def _names(flag: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    return parse_names(flag, text, known) if text else known


if __name__ == "__main__":
    given = sys.argv[1:]
    if given and not given[0].startswith("-"):
        del sys.argv[1]  # the bench; what is left are flags
    cli.run(partial(main, given))
