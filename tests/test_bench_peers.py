"""cuSPARSELt and cuBLAS beside our kernels: the search for an algorithm and torch, both faked."""

import collections
import types
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from fake_device import FakeDevice

from s24jax.bench import cusparselt, torch_peers
from s24jax.bench.products import Problem
from s24jax.bench.timing import Contender, measure
from s24jax.compressed import compress24
from s24jax.errors import BrokenEnvironment, Unsupported
from s24jax.token_groups import TokenGrouping

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

    What it compresses must be held until it has been waited for, and only then be multiplied.
    """

    def __init__(self):
        arguments = [types.SimpleNamespace(name=name) for name in torch_peers.ARGUMENTS]
        op = types.SimpleNamespace(_schema=types.SimpleNamespace(arguments=arguments))
        super().__init__(
            __version__="2.11.0",
            cuda=types.SimpleNamespace(synchronize=self._synchronize, is_available=lambda: True),
            backends=types.SimpleNamespace(
                cusparselt=types.SimpleNamespace(is_available=lambda: True)
            ),
            ops=types.SimpleNamespace(
                aten=types.SimpleNamespace(_cslt_sparse_mm=types.SimpleNamespace(default=op))
            ),
            matmul=lambda a, b: np.matmul(a, b).view(Tensor),
            from_dlpack=lambda x: np.array(x).view(Tensor),
            compressing=None,
        )

    def _synchronize(self):
        assert self.compressing is None or self.compressing() is not None
        self.compressing = None

    def _cslt_compress(self, a):
        groups = np.asarray(a).reshape(a.shape[0], -1, 4)
        assert ((groups != 0).sum(axis=-1) <= 2).all()
        self.compressing = weakref.ref(a)
        return a + 0

    def _cslt_sparse_mm(self, a, b, *, alg_id, split_k, split_k_mode):
        assert self.compressing is None
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
