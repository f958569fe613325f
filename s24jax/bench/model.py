"""The benches of whole models: a training step, and inference by prefill and by decode.

Implementations:
    cuda        FFNs 2:4 on our kernels
    relu2_cuda  FFNs dense on our kernels
    xla_dense   FFNs dense, by XLA
All else is the same: parameters, tokens, attention, optimizer. Weights and tokens are random, so
that half of Y2 is zero, not nine tenths as after some hundred steps. A step can also go on from a
trained model, on its own text.

Products:
    step        forward, backward and optimizer on one batch
    prefill     a prompt into an empty cache; the logits of its last token
    decode      one token for each sequence, after such a prompt
    scaling     a step on a mesh of devices, each with as many tokens
"""

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from s24jax.bench.captured import restore_relu2
from s24jax.bench.rows import Row, add_ratios, make_rows
from s24jax.bench.shapes import Shape
from s24jax.bench.timing import Contender, measure, peak_bytes
from s24jax.bench.traffic import received_bytes
from s24jax.data import prepare, validation_batches
from s24jax.errors import InvalidInput
from s24jax.mesh import AXES, DATA, FSDP, make_mesh, one_device
from s24jax.train_step import Program, TrainState, make_program
from s24jax.typing import Array, FFNMode, Int
from s24jax.workdir import read_config

PRODUCTS = ("step", "prefill", "decode", "scaling")
TRAINING = ("step", "scaling")
# What each implementation is to the model: its FFNs' mode, and the implementation of their ops.
IMPLEMENTATIONS: Mapping[str, tuple[FFNMode, str]] = {
    "cuda": ("sparse24", "cuda"),
    "relu2_cuda": ("dense", "cuda"),
    "xla_dense": ("dense", "reference"),
}
# Dense bfloat16 products of an H100 or H200 (SXM), by its data sheet, to which MFU refers.
PEAK_FLOPS = 989.4e12
# Of a run's text, so that a bench does not train on one batch alone.
BATCHES = 8
_LOG = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Sequences of one length."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class _Side(NamedTuple):
    """One implementation of a model."""

    program: Program
    mode: FFNMode


def bench(
    product: str,
    configs: Sequence[ml_collections.ConfigDict],
    tokens: Sequence[int],
    implementations: Sequence[str],
    rounds: int,
    meshes: Sequence[Mesh] | None = None,
) -> Iterator[list[Row]]:
    """The rows of a product for each configuration, number of tokens and mesh.

    Args:
      product: of PRODUCTS.
      configs: whose sequence length and model count.
      tokens: of a step or a prompt, in all sequences; decode continues each of them by one. Each
        number is a batch of its own.
      implementations: some of IMPLEMENTATIONS.
      rounds: samples of each.
      meshes: of the product "scaling", whose `tokens` are those of each device with sequences of
        its own; all else runs on one device.

    Raises:
      InvalidInput: one of `tokens` is no multiple of a sequence length, or a model does not fit a
        mesh.
    """
    batches = [(config, batch_of(config, n)) for config in configs for n in tokens]
    for (config, batch), mesh in itertools.product(batches, meshes or [one_device()]):
        batch = batch._replace(sequences=batch.sequences * mesh.shape[DATA] * mesh.shape[FSDP])
        _LOG.info("%s of %s: %d x %d tokens", product, config.name, *batch)
        # A call of its own, after which nothing holds this model: the next needs its memory.
        yield _bench(product, config, batch, mesh, implementations, rounds)


def bench_run(
    workdir, tokens: Sequence[int], implementations: Sequence[str], rounds: int
) -> Iterator[list[Row]]:
    """The rows of a training step that goes on from a run's last checkpoint, on one device.

    The batches are the run's validation text, up to BATCHES of them in turn; each call trains the
    state of the one before, as the run's schedule goes on. Rows say which step that is, and how
    many zeros Y2 has before the first call, the mean over layers.

    Args:
      workdir: of the run.
      tokens, implementations, rounds: see `bench`.

    Raises:
      InvalidInput: no run or checkpoint there, a model without Squared ReLU; one of `tokens` is no
        multiple of the run's sequence length, or more than its validation text has.
      BrokenEnvironment: the checkpoint cannot be read.
    """
    config = read_config(workdir)
    for batch in [batch_of(config, n) for n in tokens]:
        # A call of its own, as in `bench`.
        yield _bench_run(workdir, batch, implementations, rounds)


def _bench_run(workdir, batch: Batch, implementations, rounds: int) -> list[Row]:
    config, program, state = restore_relu2(workdir)
    texts = [program.place(text) for text in _validation_text(config, batch)]
    zeros = float(program.probe(state.params, texts[0])["zero_share"].mean())
    source = f"trained, step {int(state.step)}"
    # A model that trained dense has the parameters of one that switches.
    config.model.ffn = "relu2_24"
    what = f"step of {config.name}, {source}, {zeros:.1%} zeros"
    _LOG.info("%s: %d x %d tokens", what, *batch)
    sides = _sides(config, batch, one_device(), implementations)
    makers, peaks = _makers_from(state, texts, sides)
    del state
    rows = _rows("step", config, batch, measure(makers, rounds), peaks)
    return [row | {"source": source, "zeros": zeros} for row in rows]


def _validation_text(config, batch: Batch) -> list[np.ndarray]:
    corpus = prepare(config.data, sequence_length=config.sequence_length)
    available = len(corpus.validation)
    if available < batch.sequences:
        raise InvalidInput(
            f"--tokens: {batch.tokens} are {batch.sequences} sequences of {batch.length}, and the "
            f"run's validation text has {available}; use at most {available * batch.length}"
        )
    return validation_batches(corpus, batch_size=batch.sequences, num_batches=BATCHES)


def _bench(
    product: str, config, batch: Batch, mesh: Mesh, implementations, rounds: int
) -> list[Row]:
    sides = _sides(config, batch, mesh, implementations)
    makers, peaks = _MAKERS[product](config, batch, sides)
    results = measure(makers, rounds)
    rows = _rows(product, config, batch, results, peaks, mesh.size)
    return _with_traffic(rows, batch, mesh, sides) if product == "scaling" else rows


def at_width(config: ml_collections.ConfigDict, width: int) -> ml_collections.ConfigDict:
    """The configuration with D = `width`, F = 4 D and heads of its own width.

    Raises:
      InvalidInput: `width` is no multiple of the width of a head.
    """
    head = config.model.width // config.model.heads
    if width % head:
        raise InvalidInput(
            f"--widths: {width} does not give whole heads of {config.name}, {head} wide; "
            f"use {max(1, width // head) * head}"
        )
    config = config.copy_and_resolve_references()
    config.model.width, config.model.hidden = width, 4 * width
    config.model.heads = width // head
    return config


def meshes_of(written: str | None) -> list[Mesh]:
    """The meshes of --meshes, "DATAxFSDPxTENSOR,..."; by default all whose sizes are powers of two.

    Raises:
      InvalidInput: one is no mesh, or does not fit the devices.
    """
    if written is None:
        powers = [2**i for i in range(jax.device_count().bit_length())]
        found = itertools.product(powers, repeat=len(AXES))
        shapes = [shape for shape in found if math.prod(shape) == jax.device_count()]
    elif re.fullmatch(r"(\d+x\d+x\d+)(,\d+x\d+x\d+)*", written):
        shapes = [map(int, shape.split("x")) for shape in written.split(",")]
    else:
        raise InvalidInput(f"--meshes: {written!r} is no DATAxFSDPxTENSOR; write 2x4x1,8x1x1")
    return [make_mesh(dict(zip(AXES, shape, strict=True))) for shape in shapes]


def batch_of(config: ml_collections.ConfigDict, tokens: int) -> Batch:
    """So many tokens in sequences of the configuration's length."""
    length = config.sequence_length
    if tokens < length or tokens % length:
        raise InvalidInput(
            f"--tokens: {tokens} is no multiple of {config.name}'s sequence length {length}; "
            f"use {max(1, tokens // length) * length}"
        )
    return Batch(tokens // length, length)


def forward_flops(product: str, config: ml_collections.ConfigDict, batch: Batch) -> int:
    """Of a dense forward pass: 2 for each weight of a product and token, 4 * D for each token that
    another one looks at.

    A token of a prompt or a batch looks at half of its sequence on average; logits are those of
    every token in a step, of the last one of each sequence in prefill and decode. A backward pass
    has twice as many. Source: Kaplan et al. 2020, arXiv 2001.08361, table 1.
    """
    m = config.model
    tokens = batch.sequences if product == "decode" else batch.tokens
    context = batch.length if product == "decode" else batch.length // 2
    logits = batch.tokens if product in TRAINING else batch.sequences
    layer = 2 * (4 * m.width**2 + 2 * m.width * m.hidden) + 4 * m.width * context
    return tokens * m.layers * layer + logits * 2 * m.width * m.vocabulary


def _sides(config, batch: Batch, mesh: Mesh, implementations: Sequence[str]) -> dict[str, _Side]:
    sides = {}
    for name in implementations:
        mode, implementation = IMPLEMENTATIONS[name]
        own = config.copy_and_resolve_references()
        own.accumulate, own.batch_size = 1, batch.sequences
        own.model.implementation = implementation
        sides[name] = _Side(make_program(own, mesh), mode)
    return sides


def _random_tokens(config, batch: Batch, *, more: int = 0) -> Int[Array, "B L"]:
    shape = (batch.sequences, batch.length + more)
    return jax.random.randint(jax.random.key(0), shape, 0, config.model.vocabulary)


# ------------------------------------------------------------------------------------- contenders

Makers = tuple[dict[str, Callable[[], Contender]], dict[str, int]]


def _step_makers(config, batch: Batch, sides: dict[str, _Side]) -> Makers:
    first = next(iter(sides.values())).program
    tokens = first.place(np.asarray(_random_tokens(config, batch, more=1)))
    return _makers_from(first.init(), [tokens], sides)


def _makers_from(state: TrainState, batches: Sequence[Array], sides: dict[str, _Side]) -> Makers:
    # One state for all: only one fits. A step takes it, and leaves the next.
    holder, peaks, in_turn = [state], {}, itertools.cycle(batches)

    def make(name: str) -> Contender:
        program, mode = sides[name]
        step = program.train_step.lower(holder[0], batches[0], mode=mode).compile()
        peaks[name] = peak_bytes(step)

        def call() -> Array:
            holder[0], metrics = step(holder[0], next(in_turn))
            return metrics["loss"]

        return Contender(call, _not_finite)

    return {name: partial(make, name) for name in sides}, peaks


def _prefill_makers(config, batch: Batch, sides: dict[str, _Side]) -> Makers:
    def empty(model):
        return model.empty_cache(*batch)

    return _inference_makers(_random_tokens(config, batch), sides, empty)


def _decode_makers(config, batch: Batch, sides: dict[str, _Side]) -> Makers:
    def filled(model):
        """As after a prompt: what is in the cache does not matter to the time."""
        cache = model.empty_cache(batch.sequences, batch.length + 1)
        return cache._replace(length=jnp.int32(batch.length))

    return _inference_makers(_random_tokens(config, Batch(batch.sequences, 1)), sides, filled)


def _inference_makers(tokens: Array, sides: dict[str, _Side], make_cache: Callable) -> Makers:
    first = next(iter(sides.values())).program
    params, peaks = jax.jit(lambda: first.init().params)(), {}
    cache = jax.jit(lambda params: make_cache(first.model(params)))(params)

    def make(name: str) -> Contender:
        program, mode = sides[name]

        def extend(params, tokens, cache):
            return program.model(params).extend(tokens, cache, mode=mode)[0]

        compiled = jax.jit(extend).lower(params, tokens, cache).compile()
        peaks[name] = peak_bytes(compiled)
        return Contender(partial(compiled, params, tokens, cache), _not_finite)

    return {name: partial(make, name) for name in sides}, peaks


_MAKERS = {
    "step": _step_makers,
    "prefill": _prefill_makers,
    "decode": _decode_makers,
    "scaling": _step_makers,
}


def _not_finite(out: Array) -> float:
    """No error, but of what is no number: results of two implementations may differ in a mask."""
    return 0.0 if bool(jnp.all(jnp.isfinite(out))) else jnp.inf


# ------------------------------------------------------------------------------------------- rows


def _rows(
    product: str, config, batch: Batch, results, peaks: dict[str, int], devices: int = 1
) -> list[Row]:
    tokens = batch.sequences if product == "decode" else batch.tokens
    flops = forward_flops(product, config, batch) * (3 if product in TRAINING else 1)
    shape = Shape(tokens, config.model.width, config.model.hidden)
    rows = make_rows(product, product, shape, results, flops=flops)
    for row in rows:
        row |= {
            "model": config.name,
            "layers": config.model.layers,
            "vocabulary": config.model.vocabulary,
            "sequence_length": batch.length,
            "remat": config.model.remat,
            "tokens_per_s": 1e3 * tokens / row["ms"] if row["ms"] else None,
            "mfu": row["tflops"] * 1e12 / PEAK_FLOPS / devices if row["ms"] else None,
            "peak_bytes": peaks.get(row["implementation"]),
        }
    return add_ratios(rows)


def _with_traffic(rows: list[Row], batch: Batch, mesh: Mesh, sides: dict[str, _Side]) -> list[Row]:
    tokens = jax.ShapeDtypeStruct((batch.sequences, batch.length + 1), jnp.int32)

    def received(row: Row) -> dict[str, float | None]:
        if row["ms"] is None:  # there may be no program
            return dict.fromkeys(("received_gb", *(f"received_gb_{axis}" for axis in AXES)))
        program, mode = sides[row["implementation"]]
        traced = program.train_step.trace(program.state, tokens, mode=mode)
        found = received_bytes(traced.jaxpr.jaxpr, mesh.shape)
        gigabytes = {f"received_gb_{axis}": found[axis] / 1e9 for axis in AXES}
        return {"received_gb": sum(gigabytes.values())} | gigabytes

    named = "x".join(str(mesh.shape[axis]) for axis in AXES)
    return [row | {"mesh": named} | received(row) for row in rows]
