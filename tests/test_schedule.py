"""Which cluster of the kernel multiplies what: `ffi/matmul24_schedule.cuh` on the host."""

import collections
import ctypes
import itertools
import pathlib
import subprocess
from typing import NamedTuple

import gpu_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s24jax import cuda_library, nvcc
from s24jax.ops.matmul24 import cuda
from s24jax.ops.matmul24.tuning import TILES

pytestmark = pytest.mark.skipif(
    nvcc.reason_against() is not None, reason=str(nvcc.reason_against())
)
SOURCE = pathlib.Path(__file__).with_name("matmul24_schedule.cu")
CHUNK = 64


class Piece(NamedTuple):
    cluster: int
    turn: int
    row_tile: int
    column_tile: int
    chunks: int
    dense: int
    first: int
    last: int
    parts: int
    part: int
    slot: int
    partials: int

    @property
    def tile(self):
        return self.dense, self.row_tile, self.column_tile

    @property
    def work(self):
        """Shared memory that a 64-row product reads: 2 KiB of A, 4 KiB of B for each 64 columns."""
        return (self.last - self.first) * (2 * self.chunks + 1)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A function that lists the pieces of all clusters."""
    library = tmp_path_factory.mktemp("schedule") / "schedule.so"
    command = [nvcc.find(), "-std=c++17", "-shared", "-Xcompiler=-fPIC"]
    command += ["-I", cuda_library.SOURCES, SOURCE, "-o", library]
    subprocess.run(command, check=True, capture_output=True, text=True)
    function = ctypes.CDLL(str(library)).walk

    def pointer(array):
        return None if array is None else array.ctypes.data_as(ctypes.POINTER(ctypes.c_int))

    def walk(*sizes, counts=None):
        out = np.zeros((100_000, len(Piece._fields)), np.int32)
        count = function(*sizes, pointer(counts), pointer(out), len(out))
        assert count >= 0, "more pieces than expected"
        return [Piece(*row) for row in out[:count].tolist()]

    return walk


sizes = st.tuples(
    st.integers(0, len(TILES) - 1),
    st.integers(1, 30_000),  # rows
    st.integers(0, 3_000),  # dense rows
    st.integers(1, 900).map(lambda n: 8 * n),  # columns
    st.integers(1, 300),  # blocks along K
    st.sampled_from([1, 4, 8, 16]),  # group
    st.sampled_from([1, 2, 57, 66, 72]),  # clusters
    st.sampled_from([0, 5, cuda.MOST_PARTIAL_SUMS]),  # partial sums
)
MULTIPROCESSORS = 132  # of the GPUs that the bench is for
CLUSTERS = MULTIPROCESSORS // 2


def walk_on_a_gpu(walk, tile, m, n, k, dense=0):
    """With the workspace that the op asks for."""
    partial_sums = cuda.most_partial_sums(m + dense, n, TILES[tile])
    return walk(tile, m, dense, n, -(-k // cuda.LIST_BLOCK), 8, CLUSTERS, partial_sums)


@settings(max_examples=300, deadline=None)
@given(sizes)
def test_every_tile_is_multiplied_once_all_along_k(walk, sizes):
    tile, rows, dense_rows, columns, blocks, _, clusters, _ = sizes
    pieces = walk(*sizes)
    stages = collections.defaultdict(list)
    for piece in pieces:
        stages[piece.tile] += range(piece.first, piece.last)
        width = min(columns - piece.column_tile * TILES[tile].columns, TILES[tile].columns)
        assert piece.chunks == -(-width // CHUNK)
    expected = {
        (dense, row, column): list(range(blocks * (1 + dense)))
        for dense, m in enumerate([rows, dense_rows])
        for row in range(-(-m // TILES[tile].rows))
        for column in range(-(-columns // TILES[tile].columns))
    }
    assert {tile: sorted(found) for tile, found in stages.items()} == expected
    turns = collections.Counter(piece.cluster for piece in pieces)
    assert max(turns.values()) - min(turns[c] for c in range(clusters)) <= 1


@settings(max_examples=300, deadline=None)
@given(sizes)
def test_partial_sums_have_places_of_their_own(walk, sizes):
    *_, most = sizes
    pieces = walk(*sizes)
    partials = pieces[0].partials
    assert partials <= most
    cut = [piece for piece in pieces if piece.parts > 1]
    assert sorted(piece.slot + piece.part for piece in cut) == list(range(partials))
    by_tile = collections.defaultdict(list)
    for piece in cut:
        by_tile[piece.tile].append(piece)
    for parts in by_tile.values():
        assert len({piece.slot for piece in parts}) == 1  # where their counter is
        assert sorted(piece.part for piece in parts) == list(range(parts[0].parts))
        assert parts[0].parts <= 2 * cuda.MOST_PARTS
    assert all(piece.part == 0 for piece in pieces if piece.parts == 1)


def makespan(pieces):
    busy = collections.Counter()
    for piece in pieces:
        busy[piece.cluster] += piece.work
    return max(busy.values())


@settings(max_examples=200, deadline=None)
@given(sizes)
def test_cutting_shortens_the_longest_walk(walk, sizes):
    *same, most = sizes
    pieces = walk(*same, most)
    whole = makespan(walk(*same, 0))
    if pieces[0].partials:
        assert makespan(pieces) < whole
    else:
        assert makespan(pieces) == whole


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(0, 2**32 - 1))
def test_lists_of_k_blocks_are_multiplied_whole(walk, sizes, seed):
    tile, rows, _, _, blocks, *_ = sizes
    counts = np.random.default_rng(seed).integers(0, blocks + 1, -(-rows // TILES[tile].rows))
    pieces = walk(*sizes, counts=counts.astype(np.int32))
    assert all(piece.parts == 1 and piece.first == 0 for piece in pieces)
    assert {piece.last for piece in pieces if piece.dense} <= {2 * blocks}
    for piece in pieces:
        assert piece.dense or piece.last == counts[piece.row_tile]


@pytest.mark.parametrize("tile", range(len(TILES)))
@pytest.mark.parametrize("m, k, n", gpu_cases.CUT_PRODUCTS)
def test_what_the_gpu_tests_call_cut_is_cut(walk, m, k, n, tile):
    assert any(piece.parts > 1 for piece in walk_on_a_gpu(walk, tile, m, n, k))


@pytest.mark.parametrize(
    "m, dense, n, k, least",
    [
        (16384, 0, 4096, 16384, 0.98),
        (7680, 512, 2048, 16384, 0.9),
        (15488, 896, 4096, 16384, 0.94),
        (27136, 1536, 8192, 8192, 0.98),
        (512, 0, 192, 65536, 0.1),  # one tile
    ],
)
def test_clusters_are_busy(walk, m, dense, n, k, least):
    """Of their time until the last is done."""
    pieces = walk_on_a_gpu(walk, 0, m, n, k, dense)
    assert sum(piece.work for piece in pieces) / CLUSTERS / makespan(pieces) > least


def test_what_runs_together_reads_the_same_of_k(walk):
    """All parts of a turn, but for those of the narrow tiles, begin at few places along K."""
    pieces = walk_on_a_gpu(walk, 0, 8192, 2048, 16384)
    assert any(piece.parts > 1 for piece in pieces)
    by_turn = itertools.groupby(sorted(pieces, key=lambda p: p.turn), key=lambda p: p.turn)
    for _, together in by_turn:
        assert len({piece.first for piece in together if piece.chunks == 3}) <= 2
