"""Times the ops beside what users have today, on the same operand, each in a process of its own.

python -m experiments.bench gemm|sparsify|ffn [--json=FILE] [--table=FILE] [--figure=FILE.png|svg]
    [--shapes=TxDxF,...] [--products=NAME,...] [--implementations=NAME,...] [--rounds=N]
python -m experiments.bench ffn --from-workdir=DIR [as above, without --shapes]
python -m experiments.bench ffn --profile=FILE.json[:ROW] [as above]
python -m experiments.bench step|prefill|decode [--models=NAME,...] [--layers=N] [--widths=D,...]
    [--tokens=N,...] [--implementations=NAME,...] [--rounds=N] [--json=FILE] [--table=FILE]
    [--figure=FILE.png|svg]
python -m experiments.bench step --from-workdir=DIR [as above, without models, layers and widths]
python -m experiments.bench scaling [--meshes=DATAxFSDPxTENSOR,...] [as above, without --figure]
python -m experiments.bench gemm|sparsify|ffn|step|prefill|decode|scaling
    [--processes=N | --together] [as above]
python -m experiments.bench clock [--json=FILE] [--table=FILE]
python -m experiments.bench estimate
python -m experiments.bench gemm --tune [--shapes=TxDxF,...] [--rounds=N]
python -m experiments.bench draw --json=FILE [--table=FILE] [--figure=FILE.png|svg]

`gemm`: the four sparse products. `sparsify`: the passes that make their operands. `ffn`: the whole
feed-forward network and its parts, on synthetic operands, on those of a trained model, or on such
as have the active features of a recorded run (the results of `experiments.sweep`). `step`,
`prefill`, `decode`: whole models, in training and in inference, as configured or at other widths;
`step` also of a trained model, on its own text.
`scaling`: the step on meshes of all devices, with --tokens for each, and what passes between them.
Implementations run one after the other, each in a process of its own, since dense work is slower
where a living process ran 2:4; `clock` measures that. Of `--processes` in turns the median one
counts: XLA chooses kernels anew in each. `--together` times all in one process, in turns.
`estimate`: where 2:4's gain goes on many GPUs, by arithmetic.
`draw` makes table and figure anew from the rows of a file. `--tune` saves our kernel's fastest
schedules.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial, reduce
from types import ModuleType

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import lm_100m, paper_1p5b
from experiments import cli
from s24jax import device
from s24jax.bench import clock, estimate, ffn, gemm, model, sparsify
from s24jax.bench.captured import captured
from s24jax.bench.figure import check_format, save_bench_figure
from s24jax.bench.model_figure import MODEL_BENCHES
from s24jax.bench.profile import profiled
from s24jax.bench.rows import environment, median_rows, merged, read_rows, write_rows
from s24jax.bench.shapes import SHAPES, Shape, parse_counts, parse_names, parse_shapes
from s24jax.bench.table import table
from s24jax.bench.tune import tune
from s24jax.errors import BrokenEnvironment, InvalidInput
from s24jax.sparsity_metrics import SQUARED_RELU
from s24jax.writer import write_bytes

BENCHES = {"gemm": gemm, "sparsify": sparsify, "ffn": ffn}
BESIDE_TORCH = ("gemm", "sparsify")
MODELS = {"lm_100m": lm_100m.get_config, "paper_1p5b": paper_1p5b.get_config}
_TIMED = (*BENCHES, *model.PRODUCTS)
COMMANDS = (*_TIMED, "clock", "estimate", "draw")
# What each flag goes with; elsewhere it would say nothing.
_GOES_WITH = {
    "json": (*_TIMED, "clock", "draw"),
    "table": (*_TIMED, "clock", "draw"),
    "figure": (*BENCHES, *MODEL_BENCHES, "draw"),
    "shapes": tuple(BENCHES),
    "products": tuple(BENCHES),
    "implementations": _TIMED,
    "rounds": _TIMED,
    "processes": _TIMED,
    "together": _TIMED,
    "from-workdir": ("ffn", "step"),
    "profile": ("ffn",),
    "models": model.PRODUCTS,
    "layers": model.PRODUCTS,
    "widths": model.PRODUCTS,
    "tokens": model.PRODUCTS,
    "meshes": ("scaling",),
    "tune": ("gemm",),
}
# What the process of an implementation has its own of, or none.
_OF_THE_WHOLE = ("json", "table", "figure", "implementations", "processes", "together")
_EXCLUDES = {
    # What a run's workdir says itself.
    "from-workdir": ("profile", "shapes", "models", "layers", "widths"),
    # It prints what it saves, and times our kernel alone.
    "tune": ("json", "table", "figure", "products", "implementations", "processes", "together"),
    "together": ("processes",),
}

JSON = flags.DEFINE_string("json", None, "The file of the rows.")
TABLE = flags.DEFINE_string("table", None, "A Markdown file for the table.")
FIGURE = flags.DEFINE_string("figure", None, "A .png or .svg file for the figure.")
SHAPES_FLAG = flags.DEFINE_string("shapes", None, "TxDxF,... Default: four for a GPU.")
PRODUCTS = flags.DEFINE_string("products", None, "Some of the bench's products. Default: all.")
IMPLEMENTATIONS = flags.DEFINE_string("implementations", None, "Some of them. Default: all.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Samples of each implementation.", lower_bound=1)
PROCESSES = flags.DEFINE_integer("processes", 1, "Of each implementation.", lower_bound=1)
TOGETHER = flags.DEFINE_bool("together", False, "All implementations in one process, in turns.")
FROM_WORKDIR = flags.DEFINE_string("from-workdir", None, "A run whose model is measured.")
PROFILE = flags.DEFINE_string("profile", None, "Results whose features `ffn` imitates.")
MODELS_FLAG = flags.DEFINE_string("models", ",".join(MODELS), "Of step, prefill and decode.")
LAYERS = flags.DEFINE_integer("layers", None, "Of each model. Default: all.", lower_bound=1)
WIDTHS = flags.DEFINE_string("widths", None, "D,... of each model. Default: its own.")
TOKENS = flags.DEFINE_string("tokens", "16384", "N,... of a step or a prompt.")
MESHES = flags.DEFINE_string("meshes", None, "Of scaling. Default: all of powers of two.")
TUNE = flags.DEFINE_bool("tune", False, "Time the schedules of gemm's cuda and save the best.")


def main(arguments: list[str]) -> None:
    command = arguments[0] if arguments else ""
    if command not in COMMANDS:
        *others, last = COMMANDS
        raise InvalidInput(
            f"{command!r} is no bench; write {', '.join(others)} or {last} before the flags"
        )
    _check_flags(command)
    if FIGURE.value:
        check_format(FIGURE.value)
    if command in BESIDE_TORCH:
        # torch allocates on the same GPU, of which jax would take three quarters when it starts.
        # The others need them in one piece: in a pool that grows, a large model found none.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    written = " ".join(["python -m experiments.bench", *arguments])
    if TUNE.value:
        for line in tune(_shapes(), ROUNDS.value):
            print(line)
    elif command == "estimate":
        for line in estimate.lines():
            print(line)
    elif command == "draw":
        if not JSON.value:
            raise InvalidInput("draw: --json is not given; name the file of the rows")
        _show(read_rows(JSON.value))
    elif command == "clock":
        _show(_saved(written, clock.bench()))
    elif TOGETHER.value or (PROCESSES.value == len(_implementations(command)) == 1):
        _show(_run(command, written))
    else:
        _show(_run_apart(command, written))


def _check_flags(command: str) -> None:
    given = [name for name in _GOES_WITH if flags.FLAGS[name].present]
    for name in given:
        if command not in _GOES_WITH[name]:
            fitting = ", ".join(_GOES_WITH[name])
            raise InvalidInput(f"--{name} goes with {fitting}, not with {command}; leave it out")
    for flag, others in _EXCLUDES.items():
        for name in others:
            if {flag, name} <= set(given):
                raise InvalidInput(f"--{flag} and --{name} exclude each other; leave one out")


def _of_shapes(bench: ModuleType, implementations: tuple[str, ...]) -> Iterator[list[dict]]:
    products = _names("products", PRODUCTS.value, bench.PRODUCTS)
    if FROM_WORKDIR.value:
        cases = captured(FROM_WORKDIR.value)
        return ffn.bench_cases(cases, products, implementations, ROUNDS.value)
    if PROFILE.value:
        cases = profiled(PROFILE.value, _shapes())
        return ffn.bench_cases(cases, products, implementations, ROUNDS.value)
    return bench.bench(_shapes(), products, implementations, ROUNDS.value)


def _of_models(product: str, implementations: tuple[str, ...]) -> Iterator[list[dict]]:
    tokens = parse_counts("tokens", TOKENS.value)
    if FROM_WORKDIR.value:
        return model.bench_run(FROM_WORKDIR.value, tokens, implementations, ROUNDS.value)
    configs = [_config(name.strip()) for name in MODELS_FLAG.value.split(",")]
    if WIDTHS.value:
        widths = parse_counts("widths", WIDTHS.value)
        configs = [model.at_width(config, width) for config in configs for width in widths]
    meshes = model.meshes_of(MESHES.value) if product == "scaling" else None
    return model.bench(product, configs, tokens, implementations, ROUNDS.value, meshes)


def _config(written: str) -> ConfigDict:
    """The configuration of a name of --models, NAME or NAME:VARIANT."""
    name, _, variant = written.partition(":")
    if name not in MODELS:
        raise InvalidInput(f"--models: {name!r} does not exist; use some of {', '.join(MODELS)}")
    config = MODELS[name](variant)
    if config.model.ffn not in SQUARED_RELU:
        raise InvalidInput(
            f"--models: {written!r} has FFNs of kind {config.model.ffn}, which have no 2:4 form; "
            "use one with Squared ReLU"
        )
    if LAYERS.value:
        config.model.layers = LAYERS.value
    return config


def _run(command: str, written: str) -> list[dict]:
    """The rows of a bench, and a word on those that have none."""
    implementations = _implementations(command)
    if command in model.PRODUCTS:
        rows = _saved(written, _of_models(command, implementations))
    else:
        rows = _saved(written, _of_shapes(BENCHES[command], implementations))
    timed = {row["implementation"] for row in rows[1:] if row["ms"]}
    untimed = [name for name in implementations if name not in timed]
    if untimed and device.hopper_reason():
        print(f"no times of {', '.join(untimed)}: {device.hopper_reason()}", file=sys.stderr)
    return rows


def _saved(written: str, found_rows: Iterator[list[dict]]) -> list[dict]:
    """The rows, saved after each product: a run that is cut off leaves what it has."""
    rows = [environment(written)]
    for found in found_rows:
        rows += found
        if JSON.value:
            write_rows(JSON.value, rows)
    return rows


def _run_apart(command: str, written: str) -> list[dict]:
    """As `_run`, in processes of each implementation, while this one leaves the GPU alone."""
    found: dict[str, list[list[dict]]] = {name: [] for name in _implementations(command)}
    for name in [*found] * PROCESSES.value:
        found[name].append(_run_alone(command, name))
        rows = reduce(merged, (median_rows(runs) for runs in found.values() if runs))
        rows[0]["command"] = written
        if JSON.value:
            write_rows(JSON.value, rows)
    return rows


def _run_alone(command: str, name: str) -> list[dict]:
    """The rows of one implementation, from a process of its own."""
    given = [flags.FLAGS[flag] for flag in _GOES_WITH if flag not in _OF_THE_WHOLE]
    shared = [flag.serialize() for flag in given if flag.present]
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--implementations={name}", f"--json={folder}/rows.json"]
        run = [sys.executable, "-m", "experiments.bench", command, *shared, *own]
        ended = subprocess.run(run, stdout=subprocess.DEVNULL).returncode
        if ended < 0:
            raise BrokenEnvironment(
                f"{command}: the process of {name} was ended by signal {-ended}; run it alone, "
                f"with --implementations={name}"
            )
        if ended:
            sys.exit(ended)  # it has said why
        return read_rows(f"{folder}/rows.json")


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


def _implementations(command: str) -> tuple[str, ...]:
    known = tuple(BENCHES.get(command, model).IMPLEMENTATIONS)
    return _names("implementations", IMPLEMENTATIONS.value, known)


def _names(flag: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    return parse_names(flag, text, known) if text else known


if __name__ == "__main__":
    given = sys.argv[1:]
    if given and not given[0].startswith("-"):
        del sys.argv[1]  # the bench; what is left are flags
    cli.run(partial(main, given))
