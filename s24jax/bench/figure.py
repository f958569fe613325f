"""The figure of a bench: the rate of each implementation over the shapes, below the ceiling."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s24jax.bench.model_figure import MODEL_BENCHES, model_figure
from s24jax.bench.rates import CEILINGS, COPY, RATES
from s24jax.bench.rows import ENVIRONMENT, Row
from s24jax.errors import InvalidInput
from s24jax.figure_style import styled
from s24jax.writer import write_bytes

FORMATS = (".png", ".svg")

_TITLES = {
    "gemm": "How fast are the sparse products?",
    "sparsify": "How fast are the sparse operands made?",
    "ffn": "How fast is the feed-forward network?",
}
# split_features has no panel: a few kilobytes take as long as it takes to start a kernel.
_PANELS = {
    "gemm": {
        "y3": "Y3 = Y2 W_down",
        "dx": "dX = dY1 W_up",
        "dw_down": "dW_down = Y2ᵀ dY3",
        "dw_up": "dW_up = dY1ᵀ X",
    },
    "sparsify": {
        "sparsify24": "Y1 to compressed Y2",
        "feature_wise24": "Y2 and dY1 to both weight gradients' operands",
    },
    "ffn": {"forward": "forward", "backward": "backward", "both": "forward and backward"},
}
_COLOURS = {
    "cuda": "#0072B2",
    "cuda_split": "#56B4E9",
    "unfused": "#56B4E9",
    "relu2_cuda": "#E69F00",
    "triton": "#009E73",
    "cusparselt": "#D55E00",
    "cusparselt_compress": "#D55E00",
    "cublas": "#E69F00",
    "xla_dense": "#CC79A7",
    "reference": "#999999",
}


def check_format(path: str) -> None:
    """Raises InvalidInput where the name of a figure's file ends on no known format."""
    if Path(path).suffix not in FORMATS:
        raise InvalidInput(f"--figure: {path!r} ends on no known format; use .png or .svg")


@styled
def save_bench_figure(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes the figure of `rows`, as PNG or SVG; raises as `bench_figure` and `check_format`."""
    check_format(str(path))
    image = io.BytesIO()
    bench_figure(rows).savefig(image, format=Path(path).suffix[1:], dpi=150)
    write_bytes(path, image.getvalue())


@styled
def bench_figure(rows: Sequence[Row]) -> Figure:
    """A panel for each product of the rows' bench, with a group of bars for each shape; of whole
    models, see `s24jax.bench.model_figure`.

    Raises:
      InvalidInput: the bench has no figure, or no row of a product with a panel has a rate.
    """
    timed = [row for row in rows if row["bench"] != ENVIRONMENT and row["ms"] is not None]
    bench = timed[0]["bench"] if timed else ""
    timed = [row for row in timed if row["bench"] == bench]
    if bench in MODEL_BENCHES:
        return model_figure(timed)
    if bench and bench not in _PANELS:
        raise InvalidInput(f"--figure: rows of {bench} have none; leave it out")
    products = [p for p in _PANELS.get(bench, ()) if any(_panel(row) == p for row in timed)]
    if not products:
        raise InvalidInput("the rows have no rate to draw; run a bench of another product")
    lines, columns = math.ceil(len(products) / 2), min(2, len(products))
    figure = Figure((6.0 * columns, 1.6 + 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    figure.suptitle(_TITLES[bench], x=0.01, ha="left", weight="bold")
    for axes, product in zip(panels.flat, products, strict=False):
        _draw(axes, bench, product, timed)
    for axes in panels.flat[len(products) :]:
        axes.remove()
    _add_legend(figure, entries=2 * columns)
    return figure


def _draw(axes: Axes, bench: str, product: str, rows: list[Row]) -> None:
    key, unit = RATES[bench]
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    found = [row for row in rows if _panel(row) == product]
    names = [name for name in _COLOURS if any(row["implementation"] == name for row in found)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        bars = [row for row in found if row["implementation"] == name]
        places = [shapes.index(_shape(row)) - 0.4 + width * (i + 0.5) for row in bars]
        rates = [row[key] for row in bars]
        axes.bar(places, rates, 0.92 * width, color=_COLOURS[name], label=name)
    _draw_ceilings(axes, bench, shapes, [row for row in rows if row["product"] == COPY])
    axes.set_title(_PANELS[bench][product], pad=8.0)
    axes.set_ylabel(unit)
    axes.set_xticks(range(len(shapes)), [f"T {t:,}\nD {d:,}\nF {f:,}" for t, d, f in shapes])
    axes.tick_params(axis="x", labelsize=9, length=0)
    axes.grid(visible=False, axis="x")


def _draw_ceilings(axes: Axes, bench: str, shapes: list[tuple], copies: list[Row]) -> None:
    if bench == "gemm":
        for (kind, rate), dashes in zip(CEILINGS.items(), ("-", "--"), strict=True):
            axes.axhline(rate, ls=dashes, color="black", lw=1.2, label=f"measured ceiling, {kind}")
    for row in copies:
        place = shapes.index(_shape(row))
        ends = place - 0.45, place + 0.45
        axes.plot(ends, [row["gbps"]] * 2, color="black", lw=1.2, label="copy in the same run")


def _add_legend(figure: Figure, *, entries: int) -> None:
    """Every label of all panels once, so many in a line: the bars in their order, the ceilings."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    order = [
        *(name for name in _COLOURS if name in found),
        *(n for n in found if n not in _COLOURS),
    ]
    handles = [found[label] for label in order]
    figure.legend(handles, order, loc="outside lower center", ncols=entries)


def _panel(row: Row) -> str:
    """The product, or the pass of a whole FFN."""
    return row["pass"] if row["product"] == "ffn" else row["product"]


def _shape(row: Row) -> tuple[int, int, int]:
    return row["T"], row["D"], row["F"]
