"""The benches of whole models: a training step, and inference by prefill and by decode.

Implementations:
    cuda        FFNs 2:4 on our kernels
    relu2_cuda  FFNs dense on our kernels
    xla_dense   FFNs dense, by XLA
All else is the same: parameters, random tokens, attention, optimizer. The weights are random, so
that half of Y2 is zero, not nine tenths as after some hundred steps.

Products:
    step        forward, backward and optimizer on one batch
    prefill     a prompt into an empty cache; the logits of its last token
    decode      one token for each sequence, after such a prompt
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from s24jax.bench.rows import Row, add_ratios, make_rows
from s24jax.bench.shapes import Shape
from s24jax.bench.timing import Contender, measure, peak_bytes
from s24jax.errors import InvalidInput
from s24jax.mesh import one_device
from s24jax.train_step import Program, make_program
from s24jax.typing import Array, FFNMode, Int

PRODUCTS = ("step", "prefill", "decode")
# What each implementation is to the model: its FFNs' mode, and the implementation of their ops.
IMPLEMENTATIONS: Mapping[str, tuple[FFNMode, str]] = {
    "cuda": ("sparse24", "cuda"),
    "relu2_cuda": ("dense", "cuda"),
    "xla_dense": ("dense", "reference"),
}
# Dense bfloat16 products of an H100 or H200 (SXM), by its data sheet, to which MFU refers.
PEAK_FLOPS = 989.4e12
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
) -> Iterator[list[Row]]:
    """The rows of a product for each configuration and number of tokens.

    Args:
      product: of PRODUCTS.
      configs: whose sequence length and model count.
      tokens: of a step or a prompt, in all sequences; decode continues each of them by one. Each
        number is a batch of its own.
      implementations: some of IMPLEMENTATIONS.
      rounds: samples of each.

    Raises:
      InvalidInput: one of `tokens` is no multiple of a sequence length.
    """
    for config, batch in [(c, batch_of(c, t)) for c in configs for t in tokens]:
        _LOG.info("%s of %s: %d x %d tokens", product, config.name, *batch)
        # A call of its own, after which nothing holds this model: the next needs its memory.
        yield _bench(product, config, batch, implementations, rounds)


def _bench(product: str, config, batch: Batch, implementations, rounds: int) -> list[Row]:
    sides = {name: _side(config, name) for name in implementations}
    makers, peaks = _MAKERS[product](config, batch, sides)
    results = measure(makers, rounds)
    return _rows(product, config, batch, results, peaks)


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
    logits = batch.tokens if product == "step" else batch.sequences
    layer = 2 * (4 * m.width**2 + 2 * m.width * m.hidden) + 4 * m.width * context
    return tokens * m.layers * layer + logits * 2 * m.width * m.vocabulary


def _side(config: ml_collections.ConfigDict, name: str) -> _Side:
    mode, implementation = IMPLEMENTATIONS[name]
    config = config.copy_and_resolve_references()
    config.accumulate = 1
    config.model.implementation = implementation
    return _Side(make_program(config, one_device()), mode)


def _random_tokens(config, batch: Batch, *, more: int = 0) -> Int[Array, "B L"]:
    shape = (batch.sequences, batch.length + more)
    return jax.random.randint(jax.random.key(0), shape, 0, config.model.vocabulary)


# ------------------------------------------------------------------------------------- contenders

Makers = tuple[dict[str, Callable[[], Contender]], dict[str, int]]


def _step_makers(config, batch: Batch, sides: dict[str, _Side]) -> Makers:
    tokens = _random_tokens(config, batch, more=1)
    # One state for all: only one fits. A step takes it, and leaves the next.
    holder, peaks = [next(iter(sides.values())).program.init()], {}

    def make(name: str) -> Contender:
        program, mode = sides[name]
        step = program.train_step.lower(holder[0], tokens, mode=mode).compile()
        peaks[name] = peak_bytes(step)

        def call() -> Array:
            holder[0], metrics = step(holder[0], tokens)
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


_MAKERS = {"step": _step_makers, "prefill": _prefill_makers, "decode": _decode_makers}


def _not_finite(out: Array) -> float:
    """No error, but of what is no number: results of two implementations may differ in a mask."""
    return 0.0 if bool(jnp.all(jnp.isfinite(out))) else jnp.inf


# ------------------------------------------------------------------------------------------- rows


def _rows(product: str, config, batch: Batch, results, peaks: dict[str, int]) -> list[Row]:
    tokens = batch.sequences if product == "decode" else batch.tokens
    flops = forward_flops(product, config, batch) * (3 if product == "step" else 1)
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
            "mfu": row["tflops"] * 1e12 / PEAK_FLOPS if row["ms"] else None,
            "peak_bytes": peaks.get(row["implementation"]),
        }
    return add_ratios(rows)
