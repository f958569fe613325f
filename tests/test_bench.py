"""The benches of ops without a GPU: operands, arithmetic, the order of samples, a kernel played by
the reference, tuning on fake schedules.
"""

import itertools
import types
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_device import FakeDevice

from s24jax.bench import gemm, sparsify, tune
from s24jax.bench.operands import (
    DENSE,
    SPARSE,
    densities,
    make_operands,
    make_split,
    pre_activation,
)
from s24jax.bench.products import make_problem, make_split_problem, relative_error
from s24jax.bench.rows import CASE, KEYS, make_rows, median_rows, merged
from s24jax.bench.shapes import Shape, Size
from s24jax.bench.timing import Contender, Result, interleave, measure
from s24jax.errors import Unsupported
from s24jax.ops import matmul24 as matmul24_op
from s24jax.ops.matmul24 import tuning
from s24jax.ops.split_matmul24 import split_matmul24

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


def test_rows_of_two_runs_are_compared():
    """Each product's rows next to each other, with the ratios that one run would have had."""
    size = Size(64, 32, 128)

    def run(commit, **seconds):
        rows = [{"bench": "environment", "commit": commit}]
        for product, factor in (("y3", 1), ("dx", 2)):
            results = {name: Result(factor * value) for name, value in seconds.items()}
            rows += make_rows("gemm", product, SMALL, results, size=size)
        return rows

    seconds = {"cuda": 1e-3, "cusparselt": 2e-3, "cublas": 4e-3, "xla_dense": 3e-3}
    one_by_one = reduce(merged, (run(name, **{name: value}) for name, value in seconds.items()))
    assert one_by_one == run("cuda", **seconds)
    ours = one_by_one[1]
    assert (ours["ratio_to_dense"], ours["ratio_to_cusparselt"]) == pytest.approx((3, 2))
    assert "ratio_to_xla_dense" not in ours


def test_the_median_of_several_processes():
    """Row by row; a time that one process has not is none."""

    def run(*ms):
        rows = [{"product": i, "ms": time, "note": f"of {ms}"} for i, time in enumerate(ms)]
        return [{"bench": "environment", "first": ms[0]}, *rows]

    runs = [run(3.0, 1.0, None), run(1.0, 2.0, 4.0), run(2.0, 3.0, 5.0)]
    environment, *rows = median_rows(runs)
    assert environment == {"bench": "environment", "first": 3.0}
    assert [(row["ms"], row["note"]) for row in rows] == [
        (2.0, "of (2.0, 3.0, 5.0)"),
        (2.0, "of (1.0, 2.0, 4.0)"),
        (None, "of (3.0, 1.0, None)"),
    ]
    assert [row["ms"] for row in median_rows(runs[1:])[1:]] == [1.0, 2.0, 4.0]
    assert median_rows(runs[:1]) == runs[0]


@pytest.mark.parametrize(
    "key, values",
    [
        ("bench", ("step", "scaling")),
        ("product", ("step", "prefill")),
        ("pass", ("forward", "both")),
        ("source", ("layer 1 of 12", "layer 12 of 12")),
        ("model", ("lm_100m", "paper_1p5b")),
        ("layers", (4, 12)),
        ("mesh", ("2x1x1", "1x2x1")),
        ("T", (4, 8)),
        ("D", (2, 4)),
        ("F", (8, 16)),
    ],
)
def test_rows_of_unlike_cases_are_not_compared(key, values):
    def run(implementation, *ms):
        row = {"implementation": implementation, "ratio_to_dense": None} | dict.fromkeys(CASE, "-")
        rows = [row | {key: value, "ms": time} for value, time in zip(values, ms, strict=True)]
        return [{"bench": "environment"}, *rows]

    rows = merged(run("cuda", 1.0, 3.0), run("xla_dense", 2.0, 12.0))[1:]
    assert [row[key] for row in rows] == [values[0]] * 2 + [values[1]] * 2
    assert [row["ratio_to_dense"] for row in rows] == [2.0, 1.0, 4.0, 1.0]


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


def test_a_gpu_settles_first(monkeypatch):
    """60 ms of each in turns, for two seconds; on a CPU not at all."""
    calls = {}
    for backend in ("gpu", "cpu"):
        monkeypatch.setattr("jax.default_backend", lambda backend=backend: backend)
        device = FakeDevice()
        times = {"a": 0.03, "b": 0.06}
        makers = {name: partial(device.contender, name, s) for name, s in times.items()}
        found = measure(makers, 1, clock=device.clock)
        assert {name: result.seconds for name, result in found.items()} == pytest.approx(times)
        calls[backend] = "".join(device.calls)
    settled = 17 * "aab"  # 2.04 s
    checked_and_timed = 2 * "a" + 2 * "b" + 4 * "a" + 4 * "b"
    assert calls["gpu"].startswith(checked_and_timed + settled)
    assert calls["gpu"].replace(settled, "", 1) == calls["cpu"]
    assert interleave({}, 1, settle_s=9.0) == {}


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
