"""What a bench leaves behind: rows, table, figure."""

import itertools
import json

import pytest
from figures import assert_no_overlap, texts
from matplotlib.colors import to_hex

from s24jax.bench import gemm, sparsify
from s24jax.bench.figure import bench_figure, save_bench_figure
from s24jax.bench.rates import CEILINGS
from s24jax.bench.rows import KEYS, make_rows, read_rows, write_rows
from s24jax.bench.shapes import SHAPES, Size
from s24jax.bench.table import table
from s24jax.bench.timing import Result
from s24jax.errors import InvalidInput

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
