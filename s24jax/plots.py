"""Figures of a run and of a sweep, drawn from metrics.jsonl.

Figures are plain `matplotlib.figure.Figure` objects: pyplot's backend and the settings of a
notebook that imports this module stay as they are. The colours are Okabe and Ito's, which
colour-blind readers can tell apart; layers, which have an order, take a sequential map.
"""

import io
import logging
import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from s24jax.errors import InvalidInput
from s24jax.writer import METRICS, read_metrics, write_bytes

_LOG = logging.getLogger(__name__)
_DPI = 150
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#555555"
_RUNS = (("main", "main run", _BLUE, "-", "o"), ("dense_twin", "dense twin", _VERMILION, "--", "s"))
_ROW_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_ROW_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
# The losses of repeated runs differ by less than this; below it a log scale would magnify noise.
_LINEAR_NATS = 0.01
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 24.0,
    "axes.titlesize": 12.0,
    "axes.titleweight": "bold",
    "axes.xmargin": 0.02,
    "font.size": 11.0,
    "grid.color": "#E4E4E4",
    "legend.fontsize": 10.0,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
}
_styled = style.context(["default", _STYLE])


def ema(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential moving average, started at the first finite value.

    s[i] = s[i-1] + 2 / (span + 1) * (x[i] - s[i-1]). A value that is not finite gives NaN at its
    own place and leaves the average as it was.
    """
    smooth = np.full(len(values), np.nan)
    state = None
    for i, value in enumerate(values):
        if np.isfinite(value):
            state = value if state is None else state + 2.0 / (span + 1.0) * (value - state)
            smooth[i] = state
    return smooth


def plot_run(workdir: str | Path) -> list[Path]:
    """Draws the figures of one run into workdir/plots as PNG files 1200 pixels wide.

    loss.png, zero_share.png, dropped_share.png and gap.png; a figure whose records the run does
    not have is not made, and one line in the log says so.

    Returns:
      the paths of the files made.

    Raises:
      InvalidInput: there are no metrics, or none that a figure shows.
      BrokenEnvironment: metrics.jsonl is damaged, or the disk is full or not writable.
    """
    figures = run_figures(read_metrics(workdir))
    if not figures:
        raise InvalidInput(
            f"{Path(workdir) / METRICS} holds no train or sparsity records of the main run: "
            "nothing to plot; pass the workdir of a run that has logged at least one step"
        )
    return [_save(figure, workdir, name) for name, figure in figures.items()]


@_styled
def run_figures(records: list[dict[str, Any]]) -> dict[str, Figure]:
    """The figures of one run by name, without those whose records are absent."""
    figures = {}
    for name, (kind, run, key, make) in _RUN_FIGURES.items():
        if np.isfinite(_series(records, kind, run, key)[1]).any():
            figures[name] = make(records)
        else:
            _LOG.info("plots/%s.png is not made: no %s of %s in %s records", name, key, run, kind)
    return figures


def plot_sweep(
    workdir: str | Path, rows: list[dict[str, Any]], *, baseline: str | None = None
) -> Path:
    """Draws workdir/plots/sweep.png: what each row of a sweep costs against the baseline row.

    Args:
      workdir: where the figure goes.
      rows: per row name, workdir, validation_loss (final, nats per token) and zero_share (0..1,
        optional). A row stays in the figure whatever became of it: it reads "diverged" where
        validation_loss is None or not finite, "no result" where it is absent.
      baseline: the name of the row that the others are compared with; by default the first.

    Raises:
      InvalidInput: no rows, no row of that name, or a baseline without a finite validation loss.
      BrokenEnvironment: a row's metrics.jsonl is damaged, or the disk is full or not writable.
    """
    return _save(sweep_figure(rows, baseline=baseline), workdir, "sweep")


@_styled
def sweep_figure(rows: list[dict[str, Any]], *, baseline: str | None = None) -> Figure:
    """The figure of `plot_sweep`: losses over steps on the left, final differences on the right."""
    if not rows:
        raise InvalidInput("the sweep has no rows: nothing to plot; run at least one of them first")
    names = [row["name"] for row in rows]
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise InvalidInput(f"baseline '{baseline}' is no row of the sweep: use one of {names}")
    reference = _final_loss(rows[names.index(baseline)])
    if not math.isfinite(reference):
        raise InvalidInput(
            f"baseline '{baseline}' has no finite validation loss: compare with another row"
        )
    figure = Figure(figsize=(10.0, max(4.5, 1.5 + 0.45 * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _label(left, "Do the runs train alike?", "validation loss (nats per token)")
    _sweep_curves(left, rows)
    _label(right, f"What does each cost against {baseline}?", "")
    _sweep_bars(right, rows, reference)
    return figure


def _sweep_curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for index, row in enumerate(rows):
        try:
            records = read_metrics(row["workdir"])
        except InvalidInput:
            continue
        steps, loss = _series(records, "validation", "main", "loss")
        axes.plot(
            steps, loss, lw=1.4, ms=4.5, markevery=max(1, len(steps) // 12), **_row_look(index)
        )
    _scale_loss(axes)


def _sweep_bars(axes: Axes, rows: list[dict[str, Any]], reference: float) -> None:
    deltas = np.array([_final_loss(row) for row in rows]) - reference
    for index, delta in enumerate(deltas):
        look = _row_look(index)
        shown = delta if np.isfinite(delta) else 0.0
        axes.barh(index, shown, height=0.55, color=look["color"], alpha=0.35)
        axes.plot(shown, index, ms=7, clip_on=False, **look)
        axes.annotate(
            _delta_label(rows[index], delta),
            (shown, index),
            xytext=(8 if shown >= 0 else -8, 0),
            textcoords="offset points",
            ha="left" if shown >= 0 else "right",
            va="center",
            fontsize=10,
        )
    if np.nanmax(np.abs(deltas)) > 20 * _LINEAR_NATS:
        axes.set_xscale("symlog", linthresh=_LINEAR_NATS)
    axes.axvline(0.0, color=_GREY, lw=1)
    axes.margins(x=0.3)
    axes.set_yticks(range(len(rows)), [_row_label(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("difference in final validation loss (nats per token)")


def _row_look(index: int) -> dict[str, Any]:
    # Seven colours and eight markers: 56 rows before a pair comes back.
    colour = _ROW_COLOURS[index % len(_ROW_COLOURS)]
    return {"color": colour, "marker": _ROW_MARKERS[index % len(_ROW_MARKERS)]}


def _row_label(row: dict[str, Any]) -> str:
    label = textwrap.fill(row["name"], 24)
    zero_share = row.get("zero_share")
    return label if zero_share is None else f"{label}\n({100 * zero_share:.1f} % zeros)"


def _delta_label(row: dict[str, Any], delta: float) -> str:
    if np.isfinite(delta):
        return f"{delta:+.4f}"
    return "diverged" if "validation_loss" in row else "no result"


def _final_loss(row: dict[str, Any]) -> float:
    loss = row.get("validation_loss")
    return float(loss) if loss is not None and math.isfinite(loss) else math.nan


def _loss_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("How well does the model predict?", "loss (nats per token)")
    for run, name, colour, dashes, marker in _RUNS:
        steps, loss = _series(records, "train", run, "loss")
        axes.plot(steps, loss, color=colour, alpha=0.25, lw=0.8)
        _smooth_line(axes, steps, loss, color=colour, ls=dashes, label=f"{name}, training")
        steps, loss = _series(records, "validation", run, "loss")
        if len(steps):
            look = {"color": colour, "markerfacecolor": "white", "markeredgewidth": 1.5}
            axes.plot(steps, loss, marker, ms=6, label=f"{name}, validation", zorder=3, **look)
    _scale_loss(axes)
    _add_bits_axis(axes, records)
    _mark_switch(axes, records)
    steps, loss = _series(records, "train", "main", "loss")
    if not np.isfinite(loss[-1]):
        end = steps[np.flatnonzero(np.isfinite(loss))[-1]]
        _mark(axes, end, f"not finite after step {end:,.0f}", height=0.03)
    axes.legend(loc="upper right")
    return figure


def _zero_share_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("How sparse is each layer's hidden activation?", "zeros in Y2")
    steps, share = _series(records, "sparsity", "main", "zero_share")
    layers = share.shape[1]
    # The last tenth of viridis is a yellow too light for a line on white.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, layers))
    for layer in range(layers):
        axes.plot(steps, share[:, layer], color=colours[layer], lw=1.2, label=f"layer {layer}")
    axes.plot(
        steps, _over_layers(share).mean(axis=1), color="black", lw=2.8, label="mean of layers"
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(top=1.0)
    _mark_switch(axes, records)
    axes.legend(handles=[axes.lines[layers]], loc="lower right")
    norm = BoundaryNorm(np.arange(layers + 1) - 0.5, layers)
    scale = ScalarMappable(norm, ListedColormap(colours))
    ticks = np.arange(0, layers, max(1, math.ceil(layers / 12)))
    bar = figure.colorbar(scale, ax=axes, ticks=ticks, label="layer (0 is next to the input)")
    bar.minorticks_off()
    return figure


def _dropped_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure(
        "How much of the activation does 2:4 pruning drop?", "dropped share of the non-zeros"
    )
    lowest = 1.0
    for key, name, colour, dashes in _DROPPED:
        steps, share = _series(records, "sparsity", "main", key)
        share = _over_layers(share)
        band = share.min(axis=1).filled(np.nan), share.max(axis=1).filled(np.nan)
        axes.fill_between(steps, *band, color=colour, alpha=0.18, lw=0)
        axes.plot(
            steps, share.mean(axis=1).filled(np.nan), color=colour, ls=dashes, lw=2, label=name
        )
        lowest = min([lowest, *share.compressed()[share.compressed() > 0]])
    axes.plot([], [], color=_GREY, alpha=0.3, lw=8, label="least to most of the layers")
    axes.set_yscale("log")
    # A layer that drops nothing has no place on a log scale: its band runs off the lower edge.
    axes.set_ylim(bottom=max(lowest / 1.5, 1e-5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    _mark_switch(axes, records)
    axes.legend(loc="upper right")
    return figure


def _gap_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure(
        "What does 2:4 cost against the dense twin?", "main run - dense twin (nats per token)"
    )
    steps, gap = _gap(records, "train")
    axes.axhline(0.0, color="black", lw=1)
    axes.plot(steps, gap, color=_BLUE, alpha=0.2, lw=0.8)
    smooth = _smooth_line(axes, steps, gap, color=_BLUE, label="training")
    steps, gap = _gap(records, "validation")
    axes.plot(steps, gap, "D", color=_VERMILION, ms=7, zorder=3, label="validation")
    shown = np.concatenate([smooth, gap, [0.0]])
    low, high = np.nanmin(shown), np.nanmax(shown)
    # Single batches scatter far more than the gap is wide; they may run out of the frame.
    room = max(0.25 * (high - low), 1e-4)
    axes.set_ylim(low - room, high + room)
    _mark_switch(axes, records)
    axes.legend(loc="upper right")
    return figure


def _gap(records: list[dict[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss of the main run minus the twin's, at the steps that both have."""
    main_steps, main = _series(records, kind, "main", "loss")
    twin_steps, twin = _series(records, kind, "dense_twin", "loss")
    steps, main_at, twin_at = np.intersect1d(main_steps, twin_steps, return_indices=True)
    return steps, main[main_at] - twin[twin_at]


def _series(
    records: list[dict[str, Any]], kind: str, run: str, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and values [n], or [n, layers], of the records that have key; null as NaN."""
    found = [r for r in records if r["kind"] == kind and r["run"] == run and key in r]
    steps = np.array([record["step"] for record in found], dtype=float)
    return steps, np.array([record[key] for record in found], dtype=float)


def _over_layers(share: np.ndarray) -> np.ma.MaskedArray:
    # A masked array leaves NaN out of min, max and mean without a warning where all are NaN.
    return np.ma.masked_invalid(share)


def _smooth_line(axes: Axes, steps: np.ndarray, values: np.ndarray, *, label: str, **look: Any):
    """Draws the moving average over a fiftieth of the records, and returns it."""
    smooth = ema(values, max(1.0, len(values) / 50))
    if len(steps):
        axes.plot(steps, smooth, lw=2, label=f"{label} (smoothed)", **look)
    return smooth


def _figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.add_subplot()
    _label(axes, title, y_label)
    return figure, axes


def _label(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _scale_loss(axes: Axes) -> None:
    """Limits and a log scale that a diverging line cannot spoil."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    lines = [y[np.isfinite(y) & (y > 0)] for y in lines]
    lines = [y for y in lines if len(y)]
    if not lines:
        return
    low = min(y.min() for y in lines) / 1.04
    high = 1.04 * min(max(y.max() for y in lines), 1.5 * max(y[0] for y in lines))
    axes.set_ylim(low, high)
    if len(_log_ticks(low, high)) >= 3:
        axes.set_yscale("log")
        _set_log_ticks(axes.yaxis, low, high)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 1.5, 2, 3, 4, 6, 8)]
    return [tick for tick in ticks if low <= tick <= high]


def _set_log_ticks(axis: Any, low: float, high: float) -> None:
    axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _add_bits_axis(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Bits per byte on the right: a fixed multiple of nats per token, read off the records."""
    pairs = [(r.get("loss"), r.get("bits_per_byte")) for r in records if r["kind"] == "validation"]
    ratios = [bits / loss for loss, bits in pairs if loss and bits is not None]
    if not ratios:
        return
    ratio = float(np.median(ratios))
    right = axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
    right.set_ylabel("bits per byte")
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        _set_log_ticks(right.yaxis, low * ratio, high * ratio)


def _mark_switch(axes: Axes, records: list[dict[str, Any]]) -> None:
    for record in records:
        if record["kind"] == "switch" and record["run"] == "main":
            step = record["step"]
            _mark(axes, step, f"2:4 from step {step:,}", height=1.015)


def _mark(axes: Axes, step: float, text: str, *, height: float) -> None:
    """A vertical line at step, its text on the side with more room; height in axes, 1 is the top."""
    axes.axvline(step, color=_GREY, ls=":", lw=1.4)
    low, high = axes.get_xlim()
    side = "left" if step <= (low + high) / 2 else "right"
    where = axes.get_xaxis_transform()
    axes.text(step, height, f" {text} ", transform=where, ha=side, color=_GREY, fontsize=10)


def _save(figure: Figure, workdir: str | Path, name: str) -> Path:
    path = Path(workdir) / "plots" / f"{name}.png"
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI)
    write_bytes(path, png.getvalue())
    return path


_DROPPED = (
    ("dropped_token_wise", "token-wise (forward, dX), mean of layers", _BLUE, "-"),
    ("dropped_feature_wise", "feature-wise (dW), mean of layers", _VERMILION, "--"),
)
# Name: kind, run and key that the figure cannot do without, and what draws it.
_RUN_FIGURES = {
    "loss": ("train", "main", "loss", _loss_figure),
    "zero_share": ("sparsity", "main", "zero_share", _zero_share_figure),
    "dropped_share": ("sparsity", "main", "dropped_token_wise", _dropped_figure),
    "gap": ("train", "dense_twin", "loss", _gap_figure),
}
