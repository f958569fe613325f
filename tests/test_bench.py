"""The benches without a GPU: operands, arithmetic, rows, table, figure, the order of samples, the
search for cuSPARSELt's algorithm on a fake library, tuning on fake schedules, the command line.
"""

import collections
import itertools
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from figures import assert_no_overlap, texts
from matplotlib.colors import to_hex

from s24jax.bench import cusparselt, gemm, sparsify, torch_peers, tune
from s24jax.bench.figure import bench_figure, save_bench_figure
from s24jax.bench.operands import (
    DENSE,
    SPARSE,
    densities,
    make_operands,
    make_split,
    pre_activation,
)
from s24jax.bench.products import Problem, make_problem, make_split_problem, relative_error
from s24jax.bench.rates import CEILINGS
from s24jax.bench.rows import KEYS, make_rows, read_rows, write_rows
from s24jax.bench.shapes import SHAPES, Shape, Size, parse_names, parse_shapes
from s24jax.bench.table import table
from s24jax.bench.timing import Contender, Result, interleave, measure
from s24jax.compressed import compress24
from s24jax.errors import BrokenEnvironment, InvalidInput, Unsupported
from s24jax.ops import matmul24 as matmul24_op
from s24jax.ops.matmul24 import tuning
from s24jax.ops.split_matmul24 import split_matmul24
from s24jax.token_groups import TokenGrouping

ROOT = pathlib.Path(__file__).parents[1]
SMALL = Shape(64, 32, 128)


# ---------------------------------------------------------------------------------------- operands


def test_the_zeros_lie_as_in_a_trained_model():
    """90 % zeros: 5 % of the features active in 39 % of the tokens, the rest in 8.5 %."""
    shape = Shape(4096, 8, 400)
    y1 = np.asarray(pre_activation(shape), np.float32)
    assert y1.shape == (4096, 400)
    density = (np.square(np.maximum(y1, 0)) > 0).mean(axis=0)
    dense = density > (DENSE + SPARSE) / 2
    assert dense.sum() == 20
    # Five standard deviations of a mean over 4096 tokens.
    np.testing.assert_allclose(density[dense], 0.39, atol=5 * (0.39 * 0.61 / 4096) ** 0.5)
    np.testing.assert_allclose(density[~dense], 0.085, atol=5 * (0.085 * 0.915 / 4096) ** 0.5)
    assert (y1 > 0).mean() == pytest.approx(0.1, abs=0.002)
    assert (y1 != 0).all()
    active = y1[y1 > 0]
    assert active.mean() == pytest.approx((2 / np.pi) ** 0.5, rel=0.02)  # of |N(0, 1)|


def test_dense_features_stand_in_random_order():
    places = [np.flatnonzero(densities(jax.random.key(i), 400) > 0.2) for i in range(2)]
    assert not np.array_equal(*places)
    for found in places:
        assert len(found) == 20
        assert np.ptp(found) > 200  # neither all at one end nor side by side


def test_operands_share_their_mask_and_come_again():
    operands = make_operands(SMALL)
    np.testing.assert_array_equal(operands.y2.metadata, operands.dy1.metadata)
    y2, dy1 = operands.y2.decompress(), operands.dy1.decompress()
    assert (np.asarray(dy1)[np.asarray(y2) == 0] == 0).all()
    assert (np.asarray(dy1) < 0).any()
    np.testing.assert_array_equal(operands.counts_F, (pre_activation(SMALL) > 0).sum(axis=0))
    for once, again in zip(*map(jax.tree.leaves, (operands, make_operands(SMALL))), strict=True):
        np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize("product", gemm.PRODUCTS)
def test_products_are_the_ffns(product):
    operands, problem = make_operands(SMALL), make_problem(make_operands(SMALL), product)
    y2, dy1 = (np.asarray(y.decompress(), np.float64) for y in (operands.y2, operands.dy1))
    x, dy3, w_up, w_down = (
        np.asarray(getattr(operands, f"{name}"), np.float64)
        for name in ("x_TD", "dy3_TD", "w_up_FD", "w_down_FD")
    )
    full = {"y3": y2 @ w_down, "dx": dy1 @ w_up, "dw_down": y2.T @ dy3, "dw_up": dy1.T @ x}[product]
    assert problem.size == ((64, 32, 128) if product in ("y3", "dx") else (128, 32, 64))
    if product in ("y3", "dx"):
        np.testing.assert_allclose(problem.oracle, full, rtol=1e-4, atol=1e-3)
    else:  # pruned once more, in groups of tokens T/4 apart
        error = np.linalg.norm(problem.oracle - full) / np.linalg.norm(full)
        assert 0.0 < error < 0.5
        groups = np.asarray(problem.a_dense).reshape(4, 16, 128)
        assert ((groups != 0).sum(axis=0) <= 2).all()
    reference = matmul24_op.matmul24(problem.a, problem.b, implementation="reference")
    assert relative_error(reference, problem.oracle) < 5e-3


# -------------------------------------------------------------------------------------- arithmetic


def test_rates_and_ratios():
    """By hand: M, N, K = 4, 2, 8 are 128 operations."""
    results = {
        "cuda": Result(2e-6, 1e-3),
        "xla_dense": Result(6e-6),
        "cublas": Result(4e-6),
        "cusparselt": Result(3e-6, 1e-3, "algorithm 7"),
        "reference": Result(note="because"),
    }
    nbytes = {name: gemm._bytes(Size(4, 2, 8), name) for name in results}
    # A: 4*8 values of 2 bytes, compressed 9/16 of that; B: 8*2 values; the product: 4*2.
    assert nbytes["cublas"] == 64 + 32 + 16
    assert nbytes["cuda"] == nbytes["cusparselt"] == 36 + 32 + 16
    rows = {
        row["implementation"]: row
        for row in make_rows(
            "gemm", "y3", Shape(4, 2, 8), results, nbytes=nbytes, size=Size(4, 2, 8)
        )
    }
    assert all(tuple(row) == KEYS for row in rows.values())
    ours = rows["cuda"]
    assert ours["ms"] == pytest.approx(2e-3)
    assert ours["tflops"] == pytest.approx(128 / 2e-6 / 1e12)
    assert ours["gbps"] == pytest.approx(84 / 2e-6 / 1e9)
    assert ours["ratio_to_dense"] == pytest.approx(2.0)  # of the faster dense product
    assert ours["ratio_to_cusparselt"] == pytest.approx(1.5)
    assert rows["xla_dense"]["ratio_to_dense"] == pytest.approx(4 / 6)
    assert rows["cusparselt"]["note"] == "algorithm 7"
    empty = rows["reference"]
    assert [empty[key] for key in KEYS[9:]] == [None] * 6 + ["because"]
    assert [ours[key] for key in KEYS[:9]] == ["gemm", "y3", 4, 2, 8, 4, 2, 8, "cuda"]


def test_ratios_without_peers():
    results = {"cuda": Result(1e-3), "cublas": Result(note="torch is not installed")}
    rows = make_rows("gemm", "y3", SMALL, results, size=Size(64, 32, 128))
    assert rows[0]["ratio_to_dense"] is None
    assert rows[0]["ratio_to_cusparselt"] is None


def test_fewest_bytes():
    shape = Shape(1024, 16, 4096)
    elements = 1024 * 4096
    assert sparsify.fewest_bytes("copy", shape) == 2 * elements + 2 * elements
    values_and_metadata = elements + elements // 8  # half the values, 4 bits for each group
    counts = 4 * 4096
    assert sparsify.fewest_bytes("sparsify24", shape) == 2 * elements + values_and_metadata + counts
    assert sparsify.fewest_bytes("split_features", shape) == 2 * counts
    dense = 1024 * 256  # 5 % of 4096 features, rounded up to 128
    sparse = elements - dense
    read = elements + elements + elements // 8
    written = sparse + sparse + sparse // 8 + 2 * (2 * dense)
    assert sparsify.fewest_bytes("feature_wise24", shape) == read + written
    # A weight gradient with those 256 features dense.
    size = Size(4096, 16, 1024)
    a = 2 * dense + sparse + sparse // 8
    assert gemm._bytes(size, gemm.SPLIT) == a + 2 * 1024 * 16 + 2 * 4096 * 16


def test_the_dense_slice_is_the_rest():
    results = {"cuda": Result(1.0), gemm.SPLIT: Result(4e-3, 1e-3), gemm._SPARSE_PART: Result(3e-3)}
    found = gemm._with_dense_slice(results)
    assert set(found) == {"cuda", gemm.SPLIT}
    assert found[gemm.SPLIT] == Result(4e-3, 1e-3, "the dense slice takes 1.000 of 4.000 ms")


# ------------------------------------------------------------------------------------------ timing


class FakeDevice:
    """A clock that only work advances: queued calls take their time when they are waited for."""

    def __init__(self):
        self.now, self.queued, self.calls = 0.0, 0.0, []

    def clock(self):
        return self.now

    def contender(self, name, seconds, error=0.0, **how):
        def call():
            self.calls.append(name)
            self.queued += seconds
            return name

        def wait(_):
            self.now += self.queued
            self.queued = 0.0

        def error_of(out):
            wait(out)
            return error

        return Contender(call, error_of, wait, spoil=wait, **how)


def test_contenders_take_turns():
    device = FakeDevice()
    times = {"a": 0.010, "b": 0.005, "c": 0.080}
    contenders = {name: device.contender(name, seconds) for name, seconds in times.items()}
    found = interleave(contenders, 9, clock=device.clock)
    assert found == pytest.approx(times)
    calls = "".join(device.calls)
    # One call to warm up and three to see how long one takes; then the rounds, in changing orders:
    # each contender for 60 ms to settle the clock, and for 80 ms.
    assert calls[:12] == 4 * "a" + 4 * "b" + 4 * "c"
    samples = [(6 + 8) * "a", (12 + 16) * "b", (1 + 1) * "c"]
    rounds = [calls[start : start + 44] for start in range(12, len(calls), 44)]
    turns = {"".join(order) for order in itertools.permutations(samples)}
    assert len(rounds) == 9 and set(rounds) <= turns and len(set(rounds)) > 3


def test_the_median_leaves_out_what_disturbs():
    device = FakeDevice()
    # Calibration first; then a call to settle the clock before each that counts.
    seconds = iter([0.08] * 4 + [0.08, 0.08, 0.3, 0.5, 0.3, 0.09])

    def call():
        device.queued += next(seconds)

    contender = device.contender("a", 0.0)._replace(call=call)
    assert interleave({"a": contender}, 3, clock=device.clock) == {"a": pytest.approx(0.09)}


def test_wrong_results_have_no_time():
    device = FakeDevice()
    contenders = {
        "right": device.contender("right", 0.03, error=2e-3, note="fine"),
        "wrong": device.contender("wrong", 0.01, error=0.3, note="id 3"),
        "nan": device.contender("nan", 0.01, error=float("nan")),
        "unchecked": device.contender("unchecked", 0.03)._replace(error=None),
    }
    makers = {name: lambda contender=c: contender for name, c in contenders.items()}

    def refuse():
        raise Unsupported("op: not here; use 'auto'")

    found = measure(makers | {"absent": refuse}, 2, clock=device.clock)
    assert found["right"] == (pytest.approx(0.03), 2e-3, "fine")
    assert found["wrong"] == (None, 0.3, "wrong result: relative error 0.3; id 3")
    assert found["nan"].seconds is None
    assert found["nan"].note == "wrong result: relative error nan"
    assert found["unchecked"] == (pytest.approx(0.03), None, "")
    assert found["absent"] == (None, None, "op: not here; use 'auto'")
    # Asked twice (memory spoilt in between), never timed.
    assert device.calls.count("wrong") == 2


def test_a_result_that_turns_wrong_has_no_time():
    device, errors = FakeDevice(), iter([1e-3, 0.5])
    contender = device.contender("a", 0.03)._replace(error=lambda out: next(errors))
    found = measure({"a": lambda: contender}, 2, clock=device.clock)
    assert found["a"] == (None, 0.5, "wrong result: relative error 0.5")


def test_a_kernel_that_writes_nothing_is_found_out():
    """Memory that still held the last right result would hide it."""
    operands = make_operands(SMALL)
    kept = []

    def call():
        out = kept.pop() if kept else operands.x_TD + 0
        kept.append(out)
        return out

    def spoil(out):
        kept[0] = jnp.full_like(out, jnp.nan)

    contender = Contender(call, lambda out: float(relative_error(out, operands.x_TD)), spoil=spoil)
    assert measure({"lazy": lambda: contender}, 1)["lazy"].seconds is None


# ------------------------------------------------------- cuSPARSELt: the search, on a fake library


def fake_library(device, times, wrong=()):
    """A `make` for the search: algorithms in `times` exist, those in `wrong` give wrong results."""

    def make(algorithm):
        def refuse():
            raise RuntimeError("CUDA error: invalid value when calling `cusparseLtMatmulAlgSet...`")

        if algorithm not in times:
            return Contender(refuse)
        return device.contender(algorithm, times[algorithm], error=0.2 * (algorithm in wrong))

    return make


def test_the_search_discards_and_names_wrong_results():
    A = cusparselt.Algorithm
    times = {
        A("row", 0): 4e-3,
        A("row", 1): 3e-3,
        A("column", 0): 2e-3,
        A("column", 1): 1e-3,  # the fastest, and wrong
        A("row", 2, -1, 1): 0.1e-3,  # of the layout that is slower, so not tried
        A("column", 0, -1, -1): 1.8e-3,
        A("column", 0, -1, 2): 1.6e-3,
        A("column", 1, 4, 1): 0.5e-3,  # wrong again
    }
    wrong = {A("column", 1), A("column", 1, 4, 1)}
    device = FakeDevice()
    found = cusparselt.search(
        ["row", "column"], fake_library(device, times, wrong), clock=device.clock
    )
    assert found.best == A("column", 0, -1, 2)
    assert set(found.wrong) == wrong
    assert set(device.calls) == set(times) - {A("row", 2, -1, 1)}
    assert found.note() == (
        "algorithm 0/-1/2 with B column, the fastest of 5 right ones (id/split-K/mode); "
        "wrong results, discarded: 1 with B column, 1/4/1 with B column"
    )


def test_the_search_times_hopeless_algorithms_once(monkeypatch):
    monkeypatch.setattr(cusparselt, "FINALISTS", 1)
    A = cusparselt.Algorithm
    device = FakeDevice()
    times = {A("row", 0): 1e-3, A("row", 1): 9e-3}
    cusparselt.search(["row"], fake_library(device, times), clock=device.clock)
    assert device.calls.count(A("row", 1)) == 2  # the check, and one
    assert device.calls.count(A("row", 0)) > 2 + cusparselt.CALLS


def slower_when_it_runs_long(device, times, after):
    """A `make` as `fake_library`'s, where `after` says how much slower each is in the end."""
    calls = collections.Counter()

    def make(algorithm):
        def call():
            calls[algorithm] += 1
            late = calls[algorithm] > 2 + cusparselt.CALLS
            device.queued += times[algorithm] * (after[algorithm] if late else 1)

        if algorithm not in times:
            return fake_library(device, times)(algorithm)
        return device.contender(algorithm, 0.0)._replace(call=call)

    return make


def test_the_final_decides_between_the_fastest():
    A = cusparselt.Algorithm
    times = {A("row", i): seconds for i, seconds in enumerate([1e-3, 1.1e-3, 1.2e-3])}
    after = {A("row", 0): 1.5, A("row", 1): 1.0, A("row", 2): 1.1}
    device = FakeDevice()
    make = slower_when_it_runs_long(device, times, after)
    assert cusparselt.search(["row"], make, clock=device.clock).best == A("row", 1)


def test_an_algorithm_that_is_right_only_once_is_wrong():
    A = cusparselt.Algorithm
    device = FakeDevice()
    make = fake_library(device, {A("row", 0): 2e-3, A("row", 1): 1e-3})
    errors = iter([0.0, 0.2])

    def flaky(algorithm):
        contender = make(algorithm)
        return (
            contender if algorithm.alg_id != 1 else contender._replace(error=lambda _: next(errors))
        )

    found = cusparselt.search(["row"], flaky, clock=device.clock)
    assert (found.best, found.wrong) == (A("row", 0), [A("row", 1)])


def test_no_algorithm_that_is_right_twice():
    device = FakeDevice()
    make = fake_library(device, {cusparselt.Algorithm("row", i): 1e-3 for i in range(6)})
    errors = iter([0.0] * 6 + [0.2] * 6)

    def flaky(algorithm):
        return make(algorithm)._replace(error=lambda _: next(errors))

    with pytest.raises(Unsupported, match="none of its 6 algorithms gives a right result"):
        cusparselt.search(["row"], flaky, clock=device.clock)


def test_no_right_algorithm():
    times = {cusparselt.Algorithm("row", i): 1e-3 for i in range(3)}
    device = FakeDevice()
    with pytest.raises(Unsupported, match="none of its 3 algorithms gives a right result"):
        cusparselt.search(["row"], fake_library(device, times, times), clock=device.clock)


# ------------------------------------------------------------------------- torch's peers, faked


class Tensor(np.ndarray):
    """As much of torch.Tensor as the peers use."""

    def t(self):
        return self.T

    def contiguous(self):
        return np.ascontiguousarray(self).view(Tensor)

    def fill_(self, value):
        self.fill(value)


class FakeTorch(types.SimpleNamespace):
    """Products by numpy. Algorithm 2 with column-major B is right, 1 is wrong, others do not exist.

    Notes which B each product got.
    """

    def __init__(self):
        arguments = [types.SimpleNamespace(name=name) for name in torch_peers.ARGUMENTS]
        op = types.SimpleNamespace(_schema=types.SimpleNamespace(arguments=arguments))
        super().__init__(
            __version__="2.11.0",
            cuda=types.SimpleNamespace(synchronize=lambda: None, is_available=lambda: True),
            backends=types.SimpleNamespace(
                cusparselt=types.SimpleNamespace(is_available=lambda: True)
            ),
            ops=types.SimpleNamespace(
                aten=types.SimpleNamespace(_cslt_sparse_mm=types.SimpleNamespace(default=op))
            ),
            matmul=lambda a, b: np.matmul(a, b).view(Tensor),
            from_dlpack=lambda x: np.array(x).view(Tensor),
        )

    def _cslt_compress(self, a):
        groups = np.asarray(a).reshape(a.shape[0], -1, 4)
        assert ((groups != 0).sum(axis=-1) <= 2).all()
        return a + 0

    def _cslt_sparse_mm(self, a, b, *, alg_id, split_k, split_k_mode):
        column_major = b.flags.f_contiguous
        if alg_id not in (1, 2) or split_k != 1 or (alg_id == 2 and not column_major):
            raise RuntimeError("invalid value")
        return np.matmul(a, b).view(Tensor) * (1.5 if alg_id == 1 else 1.0)


@pytest.fixture
def fake_torch(monkeypatch):
    torch = FakeTorch()
    monkeypatch.setattr(torch_peers, "_load", lambda: torch)
    return torch


def float32_problem(axis):
    """numpy has no bfloat16 to hand over; the peers do not care."""
    rng = np.random.default_rng(0)
    grouping = TokenGrouping("strided" if axis == 0 else "adjacent")
    a = compress24(jnp.asarray(rng.normal(size=(16, 24)), jnp.float32), axis, grouping=grouping)
    dense = a.decompress()
    b = jnp.asarray(rng.normal(size=(dense.shape[axis], 8)), jnp.float32)
    oracle = (dense if axis == 1 else dense.T) @ b
    return Problem(a, dense, b, oracle)


@pytest.mark.cpu_only
@pytest.mark.parametrize("axis", [0, 1])
def test_peers_compute_the_same_product(fake_torch, axis):
    """Strided groups included: cuSPARSELt wants them side by side, so B's rows move with them."""
    problem = float32_problem(axis)
    makers = {
        "cublas": lambda: torch_peers.dense(problem),
        "cusparselt": lambda: torch_peers.sparse(problem),
        "cusparselt_compress": lambda: torch_peers.compress(problem.a),
    }
    found = measure(makers, 1)
    assert found["cublas"].rel_error < 1e-6
    assert found["cublas"].note.endswith("the faster of two layouts")
    assert found["cusparselt"].rel_error < 1e-6
    assert found["cusparselt"].note == (
        "algorithm 2 with B column-major, the fastest of 1 right ones (id/split-K/mode); wrong "
        "results, discarded: 1 with B row-major, 1 with B column-major"
    )
    assert found["cusparselt_compress"].seconds > 0
    assert found["cusparselt_compress"].rel_error is None


@pytest.mark.cpu_only
def test_peers_say_why_they_cannot(monkeypatch, fake_torch):
    fake_torch.backends.cusparselt.is_available = lambda: False
    with pytest.raises(BrokenEnvironment, match="torch 2.11.0 has no cuSPARSELt; install one"):
        torch_peers.sparse(float32_problem(1))
    fake_torch.backends.cusparselt.is_available = lambda: True
    fake_torch.ops.aten._cslt_sparse_mm.default._schema.arguments.pop()
    with pytest.raises(BrokenEnvironment, match="torch 2.11.0 cannot set split-K; install 2.7"):
        torch_peers.sparse(float32_problem(1))


@pytest.mark.cpu_only
def test_torch_is_looked_for(monkeypatch):
    monkeypatch.setattr(torch_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BrokenEnvironment, match="torch is not installed; pip install torch"):
        torch_peers.dense(float32_problem(1))
    monkeypatch.setattr(torch_peers.importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(Unsupported, match="needs an NVIDIA GPU, jax runs on cpu"):
        torch_peers.dense(float32_problem(1))
    torch = FakeTorch()
    torch.cuda.is_available = lambda: False
    monkeypatch.setattr(torch_peers.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch_peers.importlib, "import_module", lambda name: torch)
    with pytest.raises(BrokenEnvironment, match="torch 2.11.0 sees no GPU; install one with CUDA"):
        torch_peers.dense(float32_problem(1))


# ---------------------------------------------------------------- our kernel, played by reference


def as_cuda(a, b, *, implementation):
    assert implementation in ("cuda", "reference")
    return matmul24_op.matmul24(a, b, implementation="reference")


def split_as_cuda(a, b, split, *, implementation):
    assert implementation == "cuda"
    return split_matmul24(a, b, split, implementation="reference")


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(gemm, "op", types.SimpleNamespace(matmul24=as_cuda))
    monkeypatch.setattr(gemm, "split_matmul24", split_as_cuda)


def test_gemm_with_a_kernel(kernel):
    implementations = ("cuda", "xla_dense", gemm.SPLIT)
    batches = list(gemm.bench([SMALL], ("y3", "dw_up"), implementations, 1))
    assert [[row["implementation"] for row in rows] for rows in batches] == [
        ["cuda", "xla_dense"],
        ["cuda", "xla_dense", gemm.SPLIT],
    ]
    for row in itertools.chain(*batches):
        assert row["ms"] > 0
        assert row["rel_error"] < 5e-3
        assert row["tflops"] == pytest.approx(2 * 64 * 32 * 128 / row["ms"] / 1e9)
        assert row["ratio_to_dense"] > 0
    note = batches[1][2]["note"]
    assert note.startswith("the dense slice takes ") and note.endswith(" ms")


def test_a_kernel_that_drops_the_dense_slice_is_wrong(kernel, monkeypatch):
    monkeypatch.setattr(
        gemm,
        "split_matmul24",
        lambda a, b, split, **how: split_as_cuda(a._replace(dense=0 * a.dense), b, split, **how),
    )
    (rows,) = gemm.bench([SMALL], ("dw_down",), (gemm.SPLIT,), 1)
    assert rows[0]["ms"] is None
    assert rows[0]["note"].startswith("wrong result: relative error 0.")


def test_the_split_oracle_keeps_dense_features_dense():
    operands = make_operands(SMALL)
    split = make_split(operands.counts_F)
    assert (split.dense.size, split.sparse.size) == (32, 96)
    problem = make_split_problem(operands, "dw_down", split)
    full = operands.y2.decompress().T.astype(jnp.float32) @ operands.dy3_TD.astype(jnp.float32)
    np.testing.assert_allclose(problem.oracle[split.dense], full[split.dense], rtol=1e-4, atol=1e-3)


RIGHT, WRONG, OTHER = (tuning.Schedule(tile=1, group=g) for g in (1, 2, 4))


@pytest.fixture
def saved(monkeypatch):
    """The tuned table, with one old entry; the kernel is the reference, twice that if WRONG."""
    entries = {(1, 2, 3, False): OTHER}

    def matmul24(a, b, *, schedule):
        out = as_cuda(a, b, implementation="cuda")
        return 2 * out if schedule == WRONG else out

    def save(found):
        entries.clear()
        entries.update(found)

    monkeypatch.setattr(tune, "cuda", types.SimpleNamespace(matmul24=matmul24))
    monkeypatch.setattr(tuning, "VARIANTS", (WRONG, RIGHT))
    monkeypatch.setattr(tuning, "load", lambda: dict(entries))
    monkeypatch.setattr(tuning, "save", save)
    monkeypatch.setattr(tune.device, "hopper_reason", lambda: None)
    return entries


def test_tune_saves_the_fastest_right_schedule(saved):
    lines = list(tune.tune([Shape(128, 32, 256)], 1))
    assert [line.partition(" of ")[0] for line in lines] == [
        "y3",
        "dw_down",
        "dw_down's sparse part",
    ]
    assert saved == {
        (1, 2, 3, False): OTHER,
        (128, 32, 256, False): RIGHT,
        (256, 32, 128, True): RIGHT,
        (192, 32, 128, True): RIGHT,
    }


def test_tune_without_a_right_schedule(saved, monkeypatch):
    monkeypatch.setattr(tuning, "VARIANTS", (WRONG,))
    with pytest.raises(Unsupported, match="no schedule runs y3 of 64x32x128 .wrong result"):
        list(tune.tune([SMALL], 1))
    assert saved == {(1, 2, 3, False): OTHER}


# --------------------------------------------------------------------------- rows, table, figure

ENVIRONMENT = {
    "bench": "environment",
    "device": "gpu: NVIDIA H200",
    "commit": "abc",
    "command": "python -m experiments.bench gemm",
    "jax": "0.11.2",
    "torch": "2.11.0",
}
SPEED = {"cuda": 1200, "xla_dense": 750, "cublas": 800, "reference": 150, gemm.SPLIT: 1100}


@pytest.fixture
def rows():
    """Of a made-up run: four products at the default shapes; cuSPARSELt is not there."""
    rows = [ENVIRONMENT]
    for shape, product in itertools.product(SHAPES, gemm.PRODUCTS):
        gradient = product.startswith("dw")
        size = Size(shape.F, shape.D, shape.T) if gradient else Size(shape.T, shape.D, shape.F)
        results = {
            name: Result(size.flops / 1e12 / speed, 1.7e-3)
            for name, speed in SPEED.items()
            if gradient or name != gemm.SPLIT
        }
        results["cusparselt"] = Result(note="torch is not installed; pip install torch")
        nbytes = {name: gemm._bytes(size, name) for name in results}
        rows += make_rows("gemm", product, shape, results, nbytes=nbytes, size=size)
    return rows


@pytest.fixture
def sparsify_rows():
    speed = {"cuda": 3800, "triton": 3500, "reference": 900, "xla": 4300}
    names = {"copy": ["xla"], "split_features": ["reference"]}
    rows = []
    for shape, product in itertools.product(SHAPES, sparsify.PRODUCTS):
        nbytes = sparsify.fewest_bytes(product, shape)
        results = {
            name: Result(nbytes / 1e9 / speed[name])
            for name in names.get(product, ("cuda", "triton", "reference"))
        }
        nbytes = dict.fromkeys(results, nbytes)
        rows += make_rows("sparsify", product, shape, results, nbytes=nbytes)
    return rows


def test_rows_go_round_through_json(tmp_path, rows):
    rows[-1]["rel_error"] = float("nan")
    path = tmp_path / "made" / "rows.json"
    write_rows(path, rows)
    found = read_rows(path)
    assert isinstance(json.loads(path.read_text()), list)
    assert found[0] == ENVIRONMENT
    assert found[-1].pop("rel_error") is None  # strict JSON
    assert found[1:-1] == rows[1:-1]
    assert all(tuple(row) == KEYS for row in found[1:-1])


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "other.json"
    for text in ('{"a": 1}', "[1]", '[{"bench": "gemm"}]'):
        path.write_text(text)
        with pytest.raises(InvalidInput, match="holds no rows of a bench; name a file"):
            read_rows(path)


def test_table(rows):
    lines = table(rows).splitlines()
    assert lines[0] == "gpu: NVIDIA H200, jax 0.11.2, torch 2.11.0, commit abc"
    assert lines[2] == "gemm: TFLOP/s of the dense product (ms)"
    head, rule, *body = (line for line in lines if line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *body)]
    assert cells[0] == [
        *("T, D, F", "product", "M", "N", "K"),
        *("cuda", "xla_dense", "cublas", "reference", "cusparselt", "cuda_split"),
        # No ratio to cuSPARSELt where it is not there.
        *("cuda : dense", "of the ceiling", "error of cuda"),
    ]
    assert len(body) == 16
    assert len({len(line) for line in (head, rule, *body)}) == 1
    by_hand = 2 * 16384 * 2048 * 8192 / 1.2e15 * 1e3
    assert cells[1] == [
        *("16384, 2048, 8192", "y3", "16384", "2048", "8192"),
        *(f"1,200 ({by_hand:.3f})", f"750 ({by_hand * 1.6:.3f})", f"800 ({by_hand * 1.5:.3f})"),
        *(f"150 ({by_hand * 8:.3f})", "[1]", "", "1.50", "89%", "1.7e-03"),
    ]
    assert cells[3][10] == f"1,100 ({by_hand * 1200 / 1100:.3f})"
    assert lines[-3] == (
        "Geometric means (of how many): cuda : xla_dense 1.600 (16), cuda : cublas 1.500 (16), "
        "cuda : reference 8.000 (16), cuda : cuda_split 1.091 (8)"
    )
    assert lines[-1] == "[1] torch is not installed; pip install torch"


def test_table_of_both_benches(rows, sparsify_rows):
    text = table(rows + sparsify_rows)
    assert text.count("| T, D, F") == 2
    assert "sparsify: GB/s (ms)" in text
    header = next(line for line in text.splitlines() if "triton" in line)
    assert "M" not in header.split() and "cuda : dense" not in header
    passes = [line for line in text.splitlines() if "feature_wise24" in line]
    assert [line.split("|")[-2].strip() for line in passes] == ["88%"] * 4  # 3800 of 4300 GB/s


def test_figure(rows, tmp_path):
    figure = bench_figure(rows)
    assert len(figure.axes) == 4
    y3, _, dw_down, _ = figure.axes
    assert y3.get_title(loc="left") == "Y3 = Y2 W_down"
    assert len(y3.patches) == 4 * 4 and len(dw_down.patches) == 5 * 4
    heights = {to_hex(bar.get_facecolor()): bar.get_height() for bar in dw_down.patches}
    assert sorted(heights.values()) == pytest.approx(sorted(SPEED.values()))
    assert [line.get_ydata()[0] for line in y3.lines] == list(CEILINGS.values())
    assert y3.get_ylim()[0] == 0 and y3.get_ylim()[1] > max(CEILINGS.values())
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [
        *("cuda", "cuda_split", "cublas", "xla_dense", "reference"),
        *("measured ceiling, 2:4", "measured ceiling, dense"),
    ]
    assert [label.get_text() for label in y3.get_xticklabels()][0] == "T 16,384\nD 2,048\nF 8,192"
    assert texts(y3) == []
    assert_no_overlap(figure)
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        save_bench_figure(tmp_path / name, rows)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_figure_of_the_passes(sparsify_rows):
    figure = bench_figure(sparsify_rows)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Y1 to compressed Y2", "Y2 and dY1 to both weight gradients' operands"]
    for axes in figure.axes:
        assert [bar.get_height() for bar in axes.patches[:4]] == pytest.approx([3800] * 4)
        assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([4300] * 4)
    assert_no_overlap(figure)


def test_figure_of_few_rows(rows):
    some = [row for row in rows if row.get("product") == "dx" and row["T"] == 8192]
    figure = bench_figure(some)
    assert len(figure.axes) == 1
    assert_no_overlap(figure)


def test_figure_errors(rows, sparsify_rows, tmp_path):
    empty = [row | {"ms": None} for row in rows if row["bench"] == "gemm"]
    copies = [row for row in sparsify_rows if row["product"] == "copy"]
    for nothing in ([ENVIRONMENT], empty, copies):
        with pytest.raises(InvalidInput, match="the rows have no rate to draw; run a bench"):
            bench_figure(nothing)
    scaling = [row | {"bench": "scaling"} for row in rows if row["bench"] == "gemm"]
    with pytest.raises(InvalidInput, match="--figure: rows of scaling have none; leave it out"):
        bench_figure(scaling)
    with pytest.raises(InvalidInput, match="'.*x.pdf' ends on no known format; use .png or .svg"):
        save_bench_figure(tmp_path / "x.pdf", rows)


# -------------------------------------------------------------------------------------- the flags


def test_shapes_of_a_flag():
    assert parse_shapes("64x32x128, 16384x2048x8192") == [SMALL, SHAPES[0]]
    assert str(SHAPES[0]) == "16384x2048x8192"
    assert Size(2, 3, 5).flops == 60


@pytest.mark.parametrize(
    "text, words",
    [
        ("64x32", "--shapes: '64x32' is no shape; write TxDxF, as 16384x2048x8192"),
        ("64x32x128,", "--shapes: '' is no shape"),
        ("64x0x128", "--shapes: '64x0x128' is no shape"),
        ("64x-3x128", "--shapes: '64x-3x128' is no shape"),
        ("66x32x128", "--shapes: T=66 of '66x32x128' is no multiple of 4; use 68"),
        ("64x32x130", "--shapes: F=130 of '64x32x130' is no multiple of 4; use 132"),
    ],
)
def test_shapes_that_are_none(text, words):
    with pytest.raises(InvalidInput) as error:
        parse_shapes(text)
    assert words in str(error.value)


def test_names_of_a_flag():
    assert parse_names("products", "dx, y3", gemm.PRODUCTS) == ("y3", "dx")
    with pytest.raises(InvalidInput) as error:
        parse_names("products", "y3,y4", gemm.PRODUCTS)
    expected = "--products: 'y4' does not exist; use some of y3, dx, dw_down, dw_up"
    assert str(error.value) == expected


# ------------------------------------------------------------------------------- the command line


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.bench", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(*arguments) -> str:
    finished = bench(*arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def fail(*arguments) -> str:
    finished = bench(*arguments)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "Traceback" not in finished.stderr
    return finished.stderr.splitlines()[-1].removeprefix("error: ")


@pytest.mark.cpu_only
def test_gemm_end_to_end(tmp_path):
    files = {kind: tmp_path / f"gemm.{kind}" for kind in ("json", "md", "png")}
    finished = bench(
        "gemm",
        "--shapes=64x32x128",
        "--rounds=1",
        f"--json={files['json']}",
        f"--table={files['md']}",
        f"--figure={files['png']}",
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.startswith("columns stay empty: the default device is a CPU; needs")
    assert finished.stdout == files["md"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    environment, *rows = json.loads(files["json"].read_text())
    assert environment["bench"] == "environment"
    assert environment["device"] == "cpu: cpu"
    assert environment["jax"] == jax.__version__
    assert environment["command"].startswith("python -m experiments.bench gemm --shapes=64x32x128")
    assert {"commit", "python", "torch"} <= set(environment)
    assert len(rows) == 2 * 5 + 2 * 6
    for row in rows:
        assert tuple(row) == KEYS
        assert (row["bench"], row["T"], row["D"], row["F"]) == ("gemm", 64, 32, 128)
        if row["implementation"] in ("xla_dense", "reference"):
            assert row["ms"] > 0 and row["tflops"] > 0 and row["rel_error"] < 5e-3
            assert row["note"] == ""
        else:
            assert row["ms"] is None and row["rel_error"] is None
            assert row["note"]
        if row["implementation"] == "cuda":
            assert "'cuda' cannot run" in row["note"]


@pytest.mark.cpu_only
def test_sparsify_end_to_end(tmp_path):
    """And `draw`, which makes the same table and figure of the rows."""
    file, figure = tmp_path / "rows.json", tmp_path / "bench.svg"
    out = succeed("sparsify", "--shapes=64x32x128", "--rounds=1", f"--json={file}")
    rows = read_rows(file)[1:]
    times = {(row["product"], row["implementation"]): row["ms"] for row in rows}
    timed = [name for name, ms in times.items() if ms]
    assert timed == [
        ("copy", "xla"),
        ("sparsify24", "reference"),
        ("feature_wise24", "reference"),
        ("split_features", "reference"),
    ]
    assert {name for product, name in times if product == "sparsify24"} == {
        *("cuda", "triton", "reference", "cusparselt_compress")
    }
    errors = {row["product"]: row["rel_error"] for row in rows if row["ms"]}
    assert errors["sparsify24"] < 5e-3
    assert (errors["copy"], errors["feature_wise24"], errors["split_features"]) == (None, 0.0, 0.0)
    assert succeed("draw", f"--json={file}", f"--figure={figure}") == out
    assert b"<svg" in figure.read_bytes()


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "command, flag, preallocates",
    [
        ("gemm", "shapes=64x32x128", "false"),
        ("ffn", "shapes=64x32x128", None),
        ("step", "layers=1", None),
    ],
)
def test_only_beside_torch_jax_takes_memory_bit_by_bit(command, flag, preallocates):
    code = f"""
import os
from absl import flags
from experiments import bench
flags.FLAGS(["bench", "--{flag}"])
bench._run = lambda found_rows, written: []
bench._show = lambda rows: print(os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"))
bench.main(["{command}"])
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (finished.returncode, finished.stdout) == (0, f"{preallocates}\n"), finished.stderr


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["gem"],
            "'gem' is no bench; write gemm, sparsify, ffn, step, prefill, decode, scaling, "
            "estimate or draw before the flags",
        ),
        (["gemm"], "--shapes: 16384x2048x8192 and more are for a GPU; pass small ones"),
        (["gemm", "--shapes=64x32"], "'64x32' is no shape; write TxDxF"),
        (["sparsify", "--shapes=64x32x128", "--products=y3"], "--products: 'y3' does not exist"),
        (["gemm", "--tune", "--shapes=64x32x128"], "tune: the default device is a CPU; needs"),
        (["sparsify", "--tune"], "--tune goes with gemm, not with sparsify; leave it out"),
        (["gemm", "--figure=x.pdf"], "--figure: 'x.pdf' ends on no known format"),
        (["gemm", "--from-workdir=x"], "--from-workdir goes with ffn, step, not with gemm; leave"),
        (["gemm", "--profile=x"], "--profile goes with ffn, not with gemm; leave it out"),
        (["gemm", "--widths=64"], "--widths goes with step, prefill, decode, scaling, not with ge"),
        (["step", "--meshes=8x1x1"], "--meshes goes with scaling, not with step; leave it out"),
        (["step", "--shapes=64x32x128"], "--shapes goes with gemm, sparsify, ffn, not with step"),
        (["scaling", "--figure=x.png"], "ffn, step, prefill, decode, draw, not with scaling; le"),
        (["estimate", "--json=x"], "decode, scaling, draw, not with estimate; leave it out"),
        (
            ["ffn", "--from-workdir=x", "--shapes=64x32x128"],
            "--from-workdir and --shapes exclude each other; leave one out",
        ),
        (["ffn", "--profile=x.json", "--shapes=64x32x128"], "x.json does not exist"),
        (
            ["ffn", "--profile=x", "--from-workdir=x"],
            "--from-workdir and --profile exclude each other; leave one out",
        ),
        (["ffn", "--from-workdir=x"], "no run.json in x; name the workdir of a run"),
        (["step", "--from-workdir=x"], "no run.json in x; name the workdir of a run"),
        (
            ["step", "--from-workdir=x", "--models=lm_100m"],
            "--from-workdir and --models exclude each other; leave one out",
        ),
        (
            ["step", "--from-workdir=x", "--layers=1"],
            "--from-workdir and --layers exclude each other; leave one out",
        ),
        (
            ["step", "--from-workdir=x", "--widths=64"],
            "--from-workdir and --widths exclude each other; leave one out",
        ),
        (["draw"], "draw: --json is not given; name the file of the rows"),
        (["gemm", "stray"], "'stray' is no flag; write --flag=value"),
    ],
)
def test_errors(arguments, words):
    assert words in fail(*arguments)
