"""The kernels on a GPU: the contract of the reference, bit for bit where it is one.

    S24JAX_REQUIRE=cuda,triton JAX_PLATFORMS=cuda pytest -m gpu tests/test_gpu.py

test_ops.py runs the small cases of every implementation; here are the sizes at which a kernel has
more than one tile, and tiles that it does not fill, and what only a kernel can get wrong: memory
that it does not write, runs that differ, graphs, races. Results are compared on the device.
"""

import contextlib
import faulthandler
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import gpu_cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from gpu_cases import ADJACENT, BFLOAT16, DRAWS, STRIDED, integers, normal, random_24
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import lm_100m
from s24jax import numerics, nvcc
from s24jax.compressed import Compressed24
from s24jax.ffn import ffn24
from s24jax.mesh import AXES, TENSOR, make_mesh, one_device
from s24jax.ops import dispatch
from s24jax.ops.feature_wise24 import feature_wise24
from s24jax.ops.matmul24 import cuda as matmul24_cuda
from s24jax.ops.matmul24 import matmul24, tuning
from s24jax.ops.matmul24.tuning import Schedule
from s24jax.ops.matmul_feature_wise24 import matmul_feature_wise24
from s24jax.ops.matmul_sparsify24 import matmul_sparsify24
from s24jax.ops.relu2_ffn import relu2_ffn
from s24jax.ops.sparsify24 import sparsify24
from s24jax.ops.sparsify24 import triton as sparsify24_triton
from s24jax.ops.split_features import split_features
from s24jax.ops.split_matmul24 import split_matmul24
from s24jax.recipe import Recipe
from s24jax.train_step import make_program

pytestmark = pytest.mark.gpu

TESTS = pathlib.Path(__file__).parent
ENDLESS_S = 150
# Products of XLA's are the oracle here: what library function they take does not matter.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
groupings = pytest.mark.parametrize("grouping", [STRIDED, ADJACENT], ids=lambda g: g.kind)
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@pytest.fixture(scope="module")
def terminal(pytestconfig):
    """stderr as it was before pytest captured it."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        descriptor = os.dup(2)
    with open(descriptor, "w") as stream:
        yield stream


@pytest.fixture(autouse=True)
def no_endless_kernel(terminal):
    """A barrier at which a kernel waits in vain would hold the GPU, and pytest, for ever."""
    faulthandler.dump_traceback_later(ENDLESS_S, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


# ------------------------------------------------------------------------------------- comparisons


def _bits(x):
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def _differing_leaf(actual, expected):
    differ = _bits(actual) != _bits(expected)
    if jnp.issubdtype(actual.dtype, jnp.floating):  # every NaN is the same
        differ &= ~(jnp.isnan(actual) & jnp.isnan(expected))
    return jnp.sum(differ, dtype=jnp.int32)


differing = jax.jit(lambda actual, expected: jax.tree.map(_differing_leaf, actual, expected))


def assert_same(actual, expected):
    """The same bits. Metadata speak first: a wrong mask makes every value wrong."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    counts = jax.tree.leaves_with_path(jax.device_get(differing(actual, expected)))
    found = {jax.tree_util.keystr(path): int(count) for path, count in counts if count}
    masks = {path: count for path, count in found.items() if "metadata" in path}
    assert not masks, f"masks differ: {found}"
    assert not found, f"elements that differ: {found}"


@jax.jit
def relative_error(actual, expected):
    """||actual - expected|| / ||expected||, in float32."""
    difference = actual.astype(jnp.float32) - expected
    return jnp.sqrt(jnp.sum(jnp.square(difference)) / jnp.sum(jnp.square(expected)))


# -------------------------------------------------------------------------------------- sparsify24

SPARSIFY = {
    name: jax.jit(functools.partial(sparsify24, implementation=name))
    for name in ("reference", "cuda", "triton")
}
# What may be in a pre-activation. Of the numbers whose squares are no normal ones only those whose
# squares are far below them: the others are in a test of their own.
SPECIAL = [0x0000, 0x8000, 0x3F80, 0xBF80, 0x4000, 0x7F80, 0xFF80, 0x7F7F, 0x2000, 0x2001]
SPECIAL += [0x7FC0, 0xFFC0, 0x7F81, 0xFFFF]  # NaN: quiet, negative, signalling, all bits
SPECIAL += [0x0001, 0x007F, 0x807F, 0x0080, 0x1000]  # subnormal, or its square is 0


@functools.cache
def pre_activations(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y1 = normal(rng, shape)
    return {
        "normal": y1,
        "mostly zeros": np.where(rng.random(shape, np.float32) < 0.1, y1, y1.dtype.type(0)),
        "ties": integers(rng, shape),
        "special": rng.choice(np.array(SPECIAL, np.uint16), shape).view(BFLOAT16),
        "empty": -np.abs(y1),
        "full": np.abs(y1) + y1.dtype.type(0.5),
    }


@pytest.fixture(params=["cuda", "triton"])
def sparsify(request):
    """An implementation of sparsify24, compiled."""
    if request.param == "triton":
        reason = sparsify24_triton.reason_against(jnp.zeros((64, 64), jnp.bfloat16))
        if reason:
            pytest.skip(reason)
    return SPARSIFY[request.param]


@pytest.mark.parametrize(
    "shape", [(16, 16), (64, 64), (130, 272), (1000, 1008), (4096, 8192)], ids=str
)
def test_sparsify24_is_the_reference(sparsify, shape):
    for name, y1 in pre_activations(shape).items():
        y1 = jnp.asarray(y1)
        try:
            assert_same(sparsify(y1), SPARSIFY["reference"](y1))
        except AssertionError as error:
            raise AssertionError(f"of {name}") from error


def test_sparsify24_of_squares_that_are_no_normal_numbers(sparsify):
    """They are zero, and chosen by what was squared: `numerics.round_to`."""
    bits = np.random.default_rng(0).integers(0x1C00, 0x2010, (64, 256), np.uint16)
    y1 = bits.view(BFLOAT16)
    square = oracles.relu2(y1)
    square = np.where(square.astype(np.float32) < 2.0**-126, square.dtype.type(0), square)
    expected = oracles.compress(square, 1, choose_by=y1)
    y2, counts = jax.device_get(sparsify(jnp.asarray(y1)))
    np.testing.assert_array_equal(y2.metadata, expected.metadata)
    oracles.assert_bits(y2.values, expected.values)
    np.testing.assert_array_equal(counts, np.sum(square != 0, axis=0))


# ---------------------------------------------------------------------------------- split_features

SPLIT_FEATURES = {
    name: jax.jit(functools.partial(split_features, implementation=name), static_argnums=1)
    for name in ("reference", "cuda")
}


@pytest.mark.parametrize(
    "features, dense", [(16, 5), (1000, 0), (1000, 1000), (8192, 512), (57344, 2944)]
)
@pytest.mark.parametrize("most", [3, 100, 2**31 - 1], ids=["few counts", "ties", "any counts"])
def test_split_features_is_the_reference(features, dense, most):
    rng = np.random.default_rng(0)
    counts = jnp.asarray(rng.integers(0, most, features, np.int32, endpoint=True))
    assert_same(*(SPLIT_FEATURES[name](counts, dense) for name in ("cuda", "reference")))


# ---------------------------------------------------------------------------------- feature_wise24

FEATURE_WISE = {
    name: jax.jit(
        functools.partial(feature_wise24, shared_mask=True, implementation=name),
        static_argnames="grouping",
    )
    for name in ("reference", "cuda")
}


def y2_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Mostly zeros, with many ties, some numbers that round, and a few that are none."""
    small = rng.integers(1, 4, shape).astype(BFLOAT16)
    values = np.where(rng.random(shape, np.float32) < 0.5, small, np.abs(normal(rng, shape)))
    values[rng.random(shape, np.float32) < 0.6] = 0
    values[rng.random(shape, np.float32) < 0.01] = np.nan
    values[rng.random(shape, np.float32) < 0.01] = np.inf
    return values


@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "permuted"])
@pytest.mark.parametrize(
    "tokens, features, dense, grouping",
    [
        (64, 64, 0, STRIDED),
        (64, 64, 16, ADJACENT),
        (144, 272, 40, STRIDED),
        (144, 272, 0, ADJACENT),
        (1040, 272, 100, STRIDED),
        (1040, 64, 0, ADJACENT),
        (4096, 2048, 128, STRIDED),
        (4096, 2048, 0, ADJACENT),
        (144, 272, 271, ADJACENT),
        (20, 48, 16, STRIDED),
    ],
    ids=lambda v: getattr(v, "kind", str(v)),
)
def test_feature_wise24_is_the_reference(tokens, features, dense, grouping, ascending):
    rng = np.random.default_rng(0)
    y2 = random_24(rng, tokens, features, y2_values)
    dy1 = y2.with_values(jnp.asarray(-y2_values(rng, y2.values.shape)))  # -0.0 among them
    split = gpu_cases.random_split(rng, features, dense, ascending=ascending)
    actual, expected = (
        FEATURE_WISE[name](y2, dy1, split, grouping=grouping) for name in ("cuda", "reference")
    )
    assert_same(actual, expected)


# ---------------------------------------------------------------------------------------- matmul24

MATMUL = jax.jit(matmul24_cuda.matmul24, static_argnames=("schedule", "out_dtype"))


@functools.partial(jax.jit, compiler_options=UNTUNED)
def oracle(a: Compressed24, b):
    """The product in float32, and XLA's dense one of the bfloat16 operands in float32."""
    dense = a.decompress()
    dense = dense if a.axis == 1 else dense.T
    exact = jnp.dot(*(x.astype(jnp.float32) for x in (dense, b)), precision="highest")
    return exact, numerics.dot(dense, b, contract=(1, 0), dtype=jnp.float32)


def check_product(draw, a: Compressed24, b, **how):
    """Of integers exactly; else no further off than the dense product. As bfloat16 and float32."""
    exact, dense = oracle(a, b)
    for dtype in (jnp.float32, jnp.bfloat16):
        actual = MATMUL(a, b, out_dtype=dtype, **how)
        if draw is integers:
            assert_same(actual, exact.astype(dtype))
        else:
            error = float(relative_error(actual, exact))
            error_of_dense = float(relative_error(dense.astype(dtype), exact))
            assert error <= 1.1 * error_of_dense + 1e-6, dtype


@draws
@pytest.mark.parametrize(
    "m, k, n, axis, grouping",
    [
        (64, 64, 64, 0, STRIDED),
        (64, 64, 64, 1, ADJACENT),
        (8, 16, 8, 1, STRIDED),
        (300, 208, 200, 1, STRIDED),
        (300, 208, 200, 0, ADJACENT),
        (1000, 1008, 520, 0, STRIDED),
        (1000, 1008, 520, 1, ADJACENT),
        (4096, 2048, 1024, 0, STRIDED),
        (4096, 2048, 1024, 1, ADJACENT),
    ],
    ids=lambda v: getattr(v, "kind", str(v)),
)
def test_matmul24(m, k, n, axis, grouping, draw):
    rng = np.random.default_rng(0)
    a = random_24(rng, m, k, draw, axis=axis, grouping=grouping)
    check_product(draw, a, jnp.asarray(draw(rng, (k, n))))


@draws
@pytest.mark.parametrize("m, k, n", gpu_cases.CUT_PRODUCTS)
def test_matmul24_in_every_way(m, k, n, draw):
    rng = np.random.default_rng(0)
    a = random_24(rng, m, k, draw, grouping=STRIDED)
    b = jnp.asarray(draw(rng, (k, n)))
    for schedule in tuning.VARIANTS:
        check_product(draw, a, b, schedule=schedule)


@draws
@pytest.mark.parametrize("n", [8, 72, 136, 184, 192, 200, 248, 256, 440])
def test_matmul24_of_every_width(n, draw):
    """Of the last tile of columns: one to four times 64, full or not."""
    rng = np.random.default_rng(0)
    a = random_24(rng, 300, 208, draw, grouping=STRIDED)
    b = jnp.asarray(draw(rng, (208, n)))
    for tile in range(len(tuning.TILES)):
        check_product(draw, a, b, schedule=Schedule(tile, 8))


@groupings
@pytest.mark.parametrize("axis", [0, 1])
def test_matmul24_by_the_identity_is_decompress(axis, grouping):
    rng = np.random.default_rng(0)
    a = random_24(rng, 300, 208, normal, axis=axis, grouping=grouping)
    actual = MATMUL(a, jnp.eye(208, dtype=jnp.bfloat16))
    dense = jax.jit(Compressed24.decompress)(a)
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(dense if axis == 1 else dense.T))


# Lists for three tiles of 512 rows, the last of which is not full; five blocks of 128, likewise.
LISTS = {
    "full": [list(range(5))] * 3,
    "out of order": [[4, 1, 0, 2, 3]] * 3,
    "of different lengths": [[0, 3, 4], [2], [1, 2, 3, 4]],
    "some empty": [[], [1, 4], []],
    "all empty": [[]] * 3,
}


@groupings
@pytest.mark.parametrize(
    "lists, draw",
    [
        (name, draw)
        for name in LISTS
        for draw in DRAWS
        if (name, draw) != ("out of order", "normal")
    ],
)
def test_matmul24_skips_what_no_list_names(lists, draw, grouping):
    """As if A were zero there, and to the bit: zeros change no sum, but its order does."""
    lists, draw = LISTS[lists], DRAWS[draw]
    rng = np.random.default_rng(0)
    a = random_24(rng, 1100, 528, draw, grouping=grouping)
    b = jnp.asarray(draw(rng, (528, 264)))
    values = np.zeros_like(a.values)
    for tile, blocks in enumerate(lists):
        for block in blocks:
            part = np.s_[512 * tile : 512 * (tile + 1), 64 * block : 64 * (block + 1)]
            values[part] = np.asarray(a.values)[part]
    expected = MATMUL(a.with_values(jnp.asarray(values)), b, schedule=Schedule(0, 8))
    assert_same(MATMUL(a, b, k_blocks=gpu_cases.block_lists(lists, blocks=5)), expected)


# ---------------------------------------------------------------------------------- split_matmul24

SPLIT_MATMUL = {
    name: jax.jit(functools.partial(split_matmul24, implementation=name), compiler_options=UNTUNED)
    for name in ("reference", "cuda")
}


@draws
@pytest.mark.parametrize(
    "dense, grouping",
    [(0, STRIDED), (200, STRIDED), (200, ADJACENT), (976, STRIDED)],
    ids=lambda v: getattr(v, "kind", str(v)),
)
def test_split_matmul24_is_the_reference(dense, grouping, draw):
    """Of 1040 features of 1008 tokens, to within a rounding; of integers exactly."""
    rng = np.random.default_rng(0)
    split = gpu_cases.random_split(rng, 1040, dense)
    operand = gpu_cases.random_operand(rng, 1008, split, draw, grouping)
    b = jnp.asarray(draw(rng, (1008, 264)))
    actual, expected = (SPLIT_MATMUL[name](operand, b, split) for name in ("cuda", "reference"))
    if draw is integers:
        assert_same(actual, expected)
    else:
        oracles.assert_close(actual, expected)


# ------------------------------------------------------------------------ dense products, epilogues

SMALLEST = (4, 8, 16)
FUSED_SHAPES = [SMALLEST, (128, 64, 256), (260, 72, 272), (1000, 136, 1008), (4096, 512, 2048)]
# On 132 multiprocessors one wave of wide tiles, and six tiles that are cut into narrow ones.
FUSED_SHAPES += [(2292, 72, 2032)]
fused_shapes = pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
MATMUL_SPARSIFY = {
    name: jax.jit(
        functools.partial(matmul_sparsify24, implementation=name), compiler_options=UNTUNED
    )
    for name in ("reference", "cuda")
}
MATMUL_FEATURE_WISE = {
    name: jax.jit(
        functools.partial(matmul_feature_wise24, shared_mask=True, implementation=name),
        static_argnames="grouping",
        compiler_options=UNTUNED,
    )
    for name in ("reference", "cuda")
}


@fused_shapes
def test_matmul_sparsify24_is_the_reference(shape):
    """Of integers, whose products are exact: the same Y1, and so the same bits."""
    rng = np.random.default_rng(0)
    tokens, width, features = shape
    x, w_up = (jnp.asarray(integers(rng, (rows, width))) for rows in (tokens, features))
    assert_same(*(MATMUL_SPARSIFY[name](x, w_up) for name in ("cuda", "reference")))


def test_matmul_sparsify24_of_what_is_no_number():
    """A token with a NaN is NaN in every feature, one with an infinity in some."""
    rng = np.random.default_rng(0)
    x = integers(rng, (260, 72))
    x[7, 3], x[200, 5], x[259, 71] = np.nan, np.inf, -np.inf
    w_up = jnp.asarray(integers(rng, (272, 72)))
    actual, expected = (
        MATMUL_SPARSIFY[name](jnp.asarray(x), w_up) for name in ("cuda", "reference")
    )
    assert np.isnan(np.asarray(actual[0].values, np.float32)).any()
    assert_same(actual, expected)


def test_matmul_sparsify24_of_values_that_round():
    """The order of a sum may decide between neighbours; hardly ever more than that."""
    rng = np.random.default_rng(0)
    x, w_up = jnp.asarray(normal(rng, (1000, 136))), jnp.asarray(normal(rng, (1008, 136)))
    (y2, counts), (expected, expected_counts) = (
        MATMUL_SPARSIFY[name](x, w_up) for name in ("cuda", "reference")
    )
    assert np.mean(np.asarray(y2.metadata) != np.asarray(expected.metadata)) < 1e-2
    assert np.abs(np.asarray(counts) - np.asarray(expected_counts)).max() <= 1
    assert relative_error(y2.decompress(), expected.decompress().astype(jnp.float32)) < 2e-2


@fused_shapes
@groupings
def test_matmul_feature_wise24_is_the_reference(shape, grouping):
    """Of integers, and of a Y2 of squares, whose roots are exact."""
    rng = np.random.default_rng(0)
    tokens, width, features = shape
    dy3, w_down = (jnp.asarray(integers(rng, (rows, width))) for rows in (tokens, features))
    y2 = random_24(rng, tokens, features, integers)
    y2 = y2.with_values(y2.values * y2.values)
    split = gpu_cases.random_split(rng, features, features // 8)
    actual, expected = (
        MATMUL_FEATURE_WISE[name](dy3, w_down, y2, split, grouping=grouping)
        for name in ("cuda", "reference")
    )
    assert_same(actual, expected)


def test_matmul_feature_wise24_of_values_that_round():
    """Masks are Y2's alone."""
    rng = np.random.default_rng(0)
    dy3, w_down = jnp.asarray(normal(rng, (1000, 136))), jnp.asarray(normal(rng, (1008, 136)))
    y2 = random_24(rng, 1000, 1008, y2_values)
    y2 = y2.with_values(jnp.where(jnp.isfinite(y2.values), y2.values, 0))
    split = gpu_cases.random_split(rng, 1008, 128)
    actual, expected = (
        MATMUL_FEATURE_WISE[name](dy3, w_down, y2, split, grouping=STRIDED)
        for name in ("cuda", "reference")
    )
    assert_same(actual.y2_split, expected.y2_split)
    for ours, theirs in (
        (actual.dy1.values, expected.dy1.values),
        (actual.dy1_split.sparse.values, expected.dy1_split.sparse.values),
        (actual.dy1_split.dense, expected.dy1_split.dense),
    ):
        oracles.assert_close(ours, theirs)


@functools.partial(jax.jit, static_argnames="implementation", compiler_options=UNTUNED)
def relu2_ffn_and_gradients(x, w_up, w_down, dy3, implementation):
    ffn = functools.partial(relu2_ffn, implementation=implementation)
    y3, pull = jax.vjp(ffn, x, w_up, w_down)
    return y3, *pull(dy3)


@draws
@fused_shapes
def test_relu2_ffn_is_the_reference(shape, draw):
    rng = np.random.default_rng(0)
    tokens, width, features = shape
    sizes = [(tokens, width), (features, width), (features, width), (tokens, width)]
    data = [jnp.asarray(draw(rng, size)) for size in sizes]
    actual, expected = (
        relu2_ffn_and_gradients(*data, implementation=name) for name in ("cuda", "reference")
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs.astype(jnp.float32)) < 1e-2


# ----------------------------------------------------------- what only a kernel can get wrong: runs

LAUNCHES = [
    "sparsify24 cuda",
    "sparsify24 triton",
    "split_features",
    "feature_wise24 strided",
    "feature_wise24 adjacent",
    "matmul_sparsify24",
    "matmul_sparsify24 many tiles",
    "matmul_feature_wise24 strided",
    "matmul_feature_wise24 adjacent",
    "matmul_feature_wise24 many tiles",
    "relu2_ffn y2",
    "relu2_ffn dy1",
    "matmul24 tile 0",
    "matmul24 tile 1",
    "matmul24 tile 0 cut",
    "matmul24 tile 1 cut",
    "matmul24 lists",
    "split_matmul24",
]


@pytest.fixture(scope="module")
def launches():
    return gpu_cases.launches()


@pytest.fixture(params=LAUNCHES)
def launch(request, launches):
    """A function that launches one kernel, and its arguments."""
    if request.param not in launches:
        pytest.skip("there is no Triton here")
    return launches[request.param]


def test_no_launch_is_left_out(launches):
    assert set(launches) <= set(LAUNCHES)


def poison_like(array) -> jax.Array:
    """NaN or -1."""
    poison = np.full(array.nbytes, 0xFF, np.uint8).view(array.dtype)
    return jax.device_put(poison.reshape(array.shape))


def poison_free_memory(size: int) -> None:
    """Leaves poison where the next call may take its own memory, which holds `size` bytes."""
    sizes = [size] * (4 if size > 2**20 else 64) + [2**28]
    buffers = [jax.device_put(np.full(size, 0xFF, np.uint8)) for size in sizes if size]
    jax.block_until_ready(buffers)
    for buffer in buffers:
        buffer.delete()


def test_every_element_is_written(launch):
    """Whatever the memory of results and workspace held before."""
    function, arguments = launch
    expected = jax.device_get(jax.jit(function)(*arguments))
    for leaf in jax.tree.leaves(expected):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()

    def into(poison, arguments):
        return function(*arguments)

    compiled = jax.jit(into, donate_argnums=0, keep_unused=True).lower(expected, arguments)
    compiled = compiled.compile()
    for _ in range(3):
        poison_free_memory(compiled.memory_analysis().temp_size_in_bytes)
        poison = jax.tree.map(poison_like, expected)
        places = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(poison)}
        again = compiled(poison, arguments)
        assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(again)} == places
        assert_same(again, expected)


@functools.partial(jax.jit, compiler_options=UNTUNED)
def other_work(x):
    return x @ x


def check_repeats(call):
    """Twenty runs with other work between them, queued without waiting."""
    others = [jnp.ones((n, n), jnp.bfloat16) for n in (256, 2048)]
    first, counts = call(), []
    for i in range(19):
        other_work(others[i % 2])
        counts.append(differing(call(), first))
    assert not any(jax.tree.leaves(jax.device_get(counts)))


def test_repeated_runs_are_identical(launch):
    function, arguments = launch
    call = jax.jit(function)
    check_repeats(lambda: call(*arguments))


@pytest.mark.parametrize("tile", range(len(tuning.TILES)))
def test_repeated_runs_of_cut_tiles_are_identical(tile):
    rng = np.random.default_rng(0)
    m, k, n = gpu_cases.CUT_PRODUCTS[0]
    a, b = random_24(rng, m, k, normal), jnp.asarray(normal(rng, (k, n)))
    check_repeats(lambda: MATMUL(a, b, schedule=Schedule(tile, 8)))


# ------------------------------------------------------------------------------------- CUDA graphs


def layer(inputs, *, implementation: str):
    """What the layers of all recipes do: every kernel of CUDA's but those of dense layers."""
    y1, dy2, x, dy3, w_up, w_down = inputs
    how = {"implementation": implementation}
    y2, counts = sparsify24(y1, **how)
    dy1 = y2.gather(dy2)
    split = split_features(counts, 40, **how)
    prune = {"grouping": STRIDED, "shared_mask": True, **how}
    y2_split, dy1_split = feature_wise24(y2, dy1, split, **prune)
    return {
        "up": matmul_sparsify24(x, w_up, **how),
        "mid": matmul_feature_wise24(dy3, w_down, y2.with_values(abs(y2.values)), split, **prune),
        "y3": matmul24(y2, w_down, **how),
        "dx": matmul24(dy1, w_up, **how),
        "dw_down": split_matmul24(y2_split, dy3, split, **how),
        "dw_up": split_matmul24(dy1_split, x, split, **how),
        "counts": counts,
    }


def layers(inputs, implementation: str):
    """Layer after layer: the same buffers, and so the same graph, with other contents."""
    body = functools.partial(layer, implementation=implementation)
    return lax.scan(lambda _, one: (None, body(one)), None, inputs)[1]


def layers_inputs(seed: int, steps: int = 6):
    rng = np.random.default_rng(seed)
    tokens, features, width = 528, 1040, 264
    shapes = [(tokens, features)] * 2 + [(tokens, width)] * 2 + [(features, width)] * 2
    return tuple(jnp.asarray(integers(rng, (steps, *shape))) for shape in shapes)


def around(thunks: str) -> list[list[str]]:
    """The kind of each command in XLA's listing, after the kinds of those that it is a part of."""
    found, enclosing = [], []
    for line in re.finditer(r"^( *)\d+: (k\w+)", thunks, re.MULTILINE):
        indent = len(line[1])
        enclosing = [outer for outer in enclosing if outer[0] < indent] + [(indent, line[2])]
        found.append([kind for _, kind in enclosing])
    return found


def test_commands_are_read_out_of_their_listing():
    listing = (
        "000: kCopy\n001: kWhile \ncondition:\n  000: kKernel\nbody:\n  000: kCommandBuffer\t\n"
    )
    listing += "    000: kCustomCall\n    001: kKernel\n  001: kCubSort\n002: kCustomCall\n"
    assert around(listing) == [
        ["kCopy"],
        ["kWhile"],
        ["kWhile", "kKernel"],
        ["kWhile", "kCommandBuffer"],
        ["kWhile", "kCommandBuffer", "kCustomCall"],
        ["kWhile", "kCommandBuffer", "kKernel"],
        ["kWhile", "kCubSort"],
        ["kCustomCall"],
    ]


@contextlib.contextmanager
def no_compilation_cache():
    """What comes out of the cache leaves no listing."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_cuda_graphs(tmp_path):
    """A graph is recorded in the first step and replayed in the others."""
    graphs = {
        "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL,DYNAMIC_SLICE_FUSION",
        "xla_gpu_graph_min_graph_size": 1,
        "xla_dump_to": str(tmp_path),
    }
    inputs = layers_inputs(0)
    with no_compilation_cache():
        replay = jax.jit(layers, static_argnums=1, compiler_options=graphs)
        replay = replay.lower(inputs, "cuda").compile()
    (listing,) = tmp_path.glob("*jit_layers*thunk_sequence_after_thunk_passes*")
    calls = [kinds for kinds in around(listing.read_text()) if kinds[-1] == "kCustomCall"]
    assert len(calls) >= 9, listing.read_text()
    assert all("kCommandBuffer" in kinds for kinds in calls), listing.read_text()

    expect = jax.jit(layers, static_argnums=1, compiler_options=UNTUNED)
    for seed in (0, 1, 0):
        inputs = layers_inputs(seed)
        assert_same(replay(inputs), expect(inputs, "reference"))


# ------------------------------------------------------------------------------------------- ffn24


def ffn_data(tokens: int, width: int, features: int, *, batch: int = 1, stacked: int = 1):
    """X, W_up, W_down, dY3 of -1, 0 and 1: masks cannot depend on an order of summation."""
    rng = np.random.default_rng(0)
    x, w, dy3 = (batch, tokens, width), (stacked, features, width), (batch, tokens, width)
    if stacked > 1:
        dy3 = (stacked, *dy3)
    shapes = (x, w, w, dy3)
    return tuple(jnp.asarray(rng.integers(-1, 2, s).astype(BFLOAT16)) for s in shapes)


def one_layer(x, w_up, w_down, **how):
    return ffn24(x, w_up[0], w_down[0], **how)


def scanned(x, w_up, w_down, **how):
    """Layers side by side under remat: X stays exact."""

    def body(x, weights):
        return x, jax.checkpoint(functools.partial(ffn24, **how))(x, *weights)

    return lax.scan(body, x, (w_up, w_down))[1]


def mapped(x, w_up, w_down, **how):
    return jax.vmap(lambda x: ffn24(x, w_up[0], w_down[0], **how))(x)


@functools.partial(
    jax.jit, static_argnames=("function", "recipe", "implementation"), compiler_options=UNTUNED
)
def value_and_gradients(function, x, w_up, w_down, dy3, **how):
    y3, pull = jax.vjp(functools.partial(function, **how), x, w_up, w_down)
    return {"y3": y3, **dict(zip(("dx", "dw_up", "dw_down"), pull(dy3), strict=True))}


@pytest.mark.parametrize(
    "function, sizes, recipe, implementation",
    [
        (one_layer, {"tokens": 528, "width": 264, "features": 1040}, Recipe(), "cuda"),
        # The tokens are padded to 528.
        (
            one_layer,
            {"tokens": 525, "width": 264, "features": 1040},
            Recipe(token_grouping="adjacent"),
            "auto",
        ),
        (
            scanned,
            {"tokens": 80, "width": 72, "features": 272, "stacked": 3},
            Recipe(dense_multiple=16),
            "cuda",
        ),
        (
            mapped,
            {"tokens": 80, "width": 72, "features": 272, "batch": 2},
            Recipe(dense_multiple=16, token_grouping="adjacent"),
            "cuda",
        ),
    ],
    ids=["strided", "adjacent-padded-auto", "scan-of-checkpoint", "vmap"],
)
def test_ffn24_is_the_reference(function, sizes, recipe, implementation):
    data = ffn_data(**sizes)
    actual, expected = (
        value_and_gradients(function, *data, recipe=recipe, implementation=name)
        for name in (implementation, "reference")
    )
    for name, value in expected.items():
        oracles.assert_close(actual[name], value, name)
        assert np.any(np.asarray(value)), name


def test_ffn24_chooses_the_kernels():
    """The choice is made when it is traced; nothing is compiled."""
    data = ffn_data(144, 72, 272)
    value_and_gradients.trace(
        one_layer, *data, recipe=Recipe(dense_multiple=32), implementation="auto"
    )
    chosen = {choice.op: choice for choice in dispatch.choices() if choice.requested == "auto"}
    for op in (
        *("matmul_sparsify24", "matmul24", "split_features"),
        *("matmul_feature_wise24", "split_matmul24"),
    ):
        assert chosen[op].implementation == "cuda", chosen[op]


# ----------------------------------------------------------------------------------------- training

STEPS, SWITCH = 300, 100


def small(implementation: str) -> ConfigDict:
    """Two layers that the kernels take."""
    config = lm_100m.get_config("smoke")
    config.steps, config.sequence_length, config.batch_size = STEPS, 64, 8
    config.model.width, config.model.hidden, config.model.heads = 128, 512, 2
    config.model.dtype, config.model.implementation = "bfloat16", implementation
    config.optimizer.peak_learning_rate = 3e-3
    config.optimizer.learning_rate_warmup_steps = 20
    return config


def text(rng: np.random.Generator) -> np.ndarray:
    """Cyclic runs of bytes, which a model learns within some hundred steps."""
    starts, strides = rng.integers(0, 256, (8, 1)), rng.integers(1, 4, (8, 1))
    return ((starts + strides * np.arange(65)) % 256).astype(np.int32)


def train_small(implementation: str) -> tuple[list[float], list[int]]:
    """Losses, and the bytes in use after each step since the switch."""
    program = make_program(small(implementation), one_device())
    state, rng = program.init(), np.random.default_rng(0)
    losses, in_use = [], []
    for step in range(STEPS):
        tokens = jnp.asarray(text(rng))
        mode = "dense" if step < SWITCH else "sparse24"
        state, metrics = program.train_step(state, tokens, mode=mode)
        losses.append(float(metrics["loss"]))
        if step >= SWITCH + 5:
            in_use.append(jax.devices()[0].memory_stats()["bytes_in_use"])
    return losses, in_use


def test_training_follows_the_reference_and_keeps_its_memory():
    (losses, in_use), (expected, _) = map(train_small, ("cuda", "reference"))
    assert expected[0] > 5 and np.mean(expected[-50:]) < 0.2
    # Sums have another order, which runs amplify; means over 50 steps are the same for all that.
    ours, theirs = (np.reshape(values, (-1, 50)).mean(axis=1) for values in (losses, expected))
    np.testing.assert_allclose(ours, theirs, rtol=0.1, atol=0.02)
    # Medians, for at some steps a scalar of the step before is not freed yet.
    earlier, later = np.array_split(in_use, 2)
    assert np.median(later) <= np.median(earlier)


def first_steps(config: ConfigDict, mesh: Mesh, tokens: np.ndarray, mode: str) -> np.ndarray:
    """Loss and gradient norm of three steps on the same tokens."""
    program = make_program(config, mesh)
    state, placed, found = program.init(), program.place(tokens), []
    for _ in range(3):
        state, metrics = program.train_step(state, placed, mode=mode)
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(found)


@pytest.mark.two_gpus
@pytest.mark.parametrize("remat", ["none", "save_y2"])
@pytest.mark.parametrize("mode", ["dense", "sparse24"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_two_gpus_compute_what_one_does_part_by_part(shape, mode, remat):
    """One takes their sequences as microbatches. Of features a tensor group makes two parts, each
    with a split of its own, so that weight gradients drop a little else."""
    config, tokens = small("cuda"), text(np.random.default_rng(0))
    config.model.remat = remat
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)), jax.devices()[:2])
    two = first_steps(config, mesh, tokens, mode)
    if mesh.shape[TENSOR] == 1:
        config.accumulate = 2
        # optax deals sequences out to microbatches in turn.
        tokens = np.stack(np.split(tokens, 2), axis=1).reshape(tokens.shape)
    one = first_steps(config, one_device(), tokens, mode)
    assert one[2, 0] < one[0, 0]
    np.testing.assert_allclose(two[:, 0], one[:, 0], rtol=5e-4)
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=2e-3)


@pytest.mark.parametrize("remat", ["none", "save_y2"])
@pytest.mark.parametrize(
    "mode, calls",
    [
        ("dense", {"relu2_ffn_y2": 1, "relu2_ffn_dy1": 1}),
        (
            "sparse24",
            {
                "matmul_sparsify24": 1,
                "matmul24": 4,
                "split_features": 1,
                "matmul_feature_wise24": 1,
            },
        ),
    ],
)
def test_a_compiled_step_runs_each_kernel_once_a_layer(mode, calls, remat):
    """XLA may run a call twice where its result is kept and used."""
    config = small("cuda")
    config.model.remat = remat
    program = make_program(config, one_device())
    tokens = jnp.zeros((8, 65), jnp.int32)
    compiled = program.train_step.lower(program.init(), tokens, mode=mode).compile().as_text()
    found = re.findall(r'custom_call_target="s24jax_(\w+)"', compiled)
    layers = config.model.layers
    assert {name: found.count(name) / layers for name in set(found)} == calls


@pytest.mark.parametrize("mode", ["dense", "sparse24"])
def test_a_prompt_through_the_cache_gives_the_logits_of_a_plain_pass(mode):
    """In one piece, which attends to itself by cuDNN, and in two, the second with a past."""
    config = small("auto")
    program = make_program(config, one_device())
    params = program.init().params
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, config.model.vocabulary)
    model = program.model(params)
    expected = np.asarray(jax.jit(lambda: model(tokens, mode=mode)[:, -1])())
    for pieces in ([64], [40, 24]):
        cache = model.empty_cache(2, 80)
        for piece in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
            logits, cache = jax.jit(functools.partial(model.extend, mode=mode))(piece, cache)
        difference = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        assert difference < 2e-2, pieces


# -------------------------------------------------------------------------------- compute-sanitizer


def find_sanitizer() -> str:
    """compute-sanitizer of PATH or beside nvcc; without it a required suite fails."""
    compiler = nvcc.find()
    folders = [os.environ.get("PATH", ""), *([str(compiler.parent)] if compiler else [])]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        reason = "compute-sanitizer is neither on PATH nor beside nvcc; install the CUDA toolkit"
        required = "cuda" in os.environ.get("S24JAX_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(reason)
    return found


TOOLS = {
    # Without padding, what a kernel writes behind an array would be in the next one.
    "memcheck": ["--padding=1024", "--report-api-errors=no"],
    "racecheck": [],
}
CLEAN = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed",
}


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """The tools at work, side by side: processes and the files of what they say."""
    logs = tmp_path_factory.mktemp("compute-sanitizer")
    path = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Each array an allocation of its own. What is called "platform" is a pool in jax 0.10.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"
        if jax.__version_info__ >= (0, 11)
        else "cuda_async",
    }
    # XLA's kernels are left out: ours in CUDA have the namespace in their names, the other is
    # Triton's.
    command = [find_sanitizer(), "--error-exitcode=9", "--print-limit=10"]
    command += ["--kernel-name", "kns=s24jax", "--kernel-name", "kns=relu2_prune"]
    program = [sys.executable, str(TESTS / "gpu_cases.py")]
    running = {}
    for tool, options in TOOLS.items():
        with (logs / tool).open("w") as log:
            running[tool] = subprocess.Popen(
                [*command, f"--tool={tool}", *options, *program],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    yield {tool: (process, logs / tool) for tool, process in running.items()}
    for process in running.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_nothing(sanitizers, tool, launches):
    process, log = sanitizers[tool]
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=ENDLESS_S - 10)
    report = log.read_text()
    assert process.returncode == 0 and CLEAN[tool] in report, report
    assert [line for line in report.splitlines() if line in LAUNCHES] == list(launches), report
