"""Figures of a run and of a sweep, drawn from metrics.jsonl.

Figures are plain `matplotlib.figure.Figure` objects: pyplot's backend and the settings of a
notebook that imports this module stay as they are. The colours are Okabe and Ito's, which
colour-blind readers can tell apart; layers, which have an order, take a sequential map. Legends
stand outside the axes, where no curve can run through them.
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
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from s24jax.errors import InvalidInput
from s24jax.writer import METRICS, read_metrics, write_bytes

_LOG = logging.getLogger(__name__)
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#555555"
_RUNS = (
    # The twin's validation marks are small, to lie inside the main run's where the two agree.
    ("main", "main run", _BLUE, "-", {"marker": "o", "ms": 8, "markerfacecolor": "white"}),
    ("dense_twin", "dense twin", _VERMILION, "--", {"marker": "s", "ms": 3.5}),
)
_DROPPED = (
    ("dropped_token_wise", "token-wise (forward, dX)", _BLUE, "-"),
    ("dropped_feature_wise", "feature-wise (dW)", _VERMILION, "--"),
)
_ROW_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_ROW_MARKERS = "osD^vPXp"
_LOSS_DIGITS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
_STEP = FuncFormatter(lambda step, _: f"{step:,.0f}")
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")
_NUMBER = FuncFormatter(lambda value, _: f"{value:.3g}")
_styled = style.context(
    [
        "default",
        {
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
            "legend.frameon": False,
        },
    ]
)


def plot_run(workdir: str | Path) -> list[Path]:
    """Draws the figures of one run into workdir/plots, as PNG files 1200 pixels wide.

    loss.png, zero_share.png, dropped_share.png and gap.png (main run minus dense twin). A figure
    whose records the run does not have is not made, and one line in the log says so.

    Returns:
      the paths of the files made.

    Raises:
      InvalidInput: there are no metrics, or none that a figure shows.
      BrokenEnvironment: metrics.jsonl is damaged, or the disk is full or not writable.
    """
    figures = run_figures(read_metrics(workdir))
    if not figures:
        raise InvalidInput(
            f"{Path(workdir) / METRICS} has no finite losses and no sparsity records, so there is "
            "nothing to plot: pass the workdir of a run that has logged at least one step"
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
            _LOG.info(
                "plots/%s.png is not made: no %s in the %s records of %s", name, key, kind, run
            )
    return figures


def plot_sweep(
    workdir: str | Path, rows: list[dict[str, Any]], *, baseline: str | None = None
) -> Path:
    """Draws workdir/plots/sweep.png: validation losses over steps, and final ones compared.

    Args:
      workdir: where the figure goes.
      rows: per row name, workdir, validation_loss (final, nats per token) and zero_share (0..1,
        optional). A row stays in the figure whatever became of it: it reads "diverged" where
        validation_loss is None or not finite, "no result" where it is absent.
      baseline: the name of the row that the others are compared with; by default the first. Where
        it has diverged, the final losses stand without bars.

    Raises:
      InvalidInput: there are no rows, or none of that name.
      BrokenEnvironment: a row's metrics.jsonl is damaged, or the disk is full or not writable.
    """
    return _save(sweep_figure(rows, baseline=baseline), workdir, "sweep")


@_styled
def sweep_figure(rows: list[dict[str, Any]], *, baseline: str | None = None) -> Figure:
    """The figure of `plot_sweep`; same arguments and errors."""
    if not rows:
        raise InvalidInput("the sweep has no rows, so there is nothing to plot: run one of them")
    names = [row["name"] for row in rows]
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise InvalidInput(f"baseline '{baseline}' is not a row of the sweep: use one of {names}")
    losses = np.array([row.get("validation_loss") for row in rows], dtype=float)
    # NaN is a loss that is not there; without the baseline's no row has a change to show.
    losses[~np.isfinite(losses)] = np.nan
    reference = losses[names.index(baseline)]
    labels = [textwrap.fill(name, 30) for name in names]
    pitch = 0.17 + 0.17 * max(1 + label.count("\n") for label in labels)
    figure = Figure((11.0, max(4.8, 1.8 + pitch * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(6, 5))
    _label(left, "How does each run learn?", "validation loss (nats per token)")
    for index, row in enumerate(rows):
        _sweep_curve(left, row, _row_look(index))
    _scale_loss(left)
    right.set_title("What does each choice cost?")
    right.set_xlabel(
        f"change in final validation loss (nats per token)\nfrom {baseline}"
        + ("" if np.isfinite(reference) else ", which has no loss to compare with")
    )
    right.set_yticks(range(len(rows)), labels)
    _sweep_bars(right, losses - reference)
    _sweep_table(right, rows, losses, losses - reference)
    return figure


def _sweep_curve(axes: Axes, row: dict[str, Any], look: dict[str, Any]) -> None:
    try:
        steps, loss = _series(read_metrics(row["workdir"]), "validation", "main", "loss")
    except InvalidInput:
        # A row that never started: the bar chart says that it has no result.
        return
    axes.plot(steps, loss, lw=1.4, ms=5, markevery=max(1, len(steps) // 12), **look)


def _sweep_bars(axes: Axes, deltas: np.ndarray) -> None:
    for index, delta in enumerate(deltas):
        look = _row_look(index)
        # The key to the curves on the left, in a column of its own as a bar may have no length.
        axes.plot(-0.05, index, ms=8, transform=axes.get_yaxis_transform(), clip_on=False, **look)
        axes.barh(index, np.nan_to_num(delta), height=0.6, color=look["color"])
    if np.abs(np.nan_to_num(deltas)).max() > 0.2:
        # Repeated runs differ by less than 0.01: below that a log scale would magnify noise.
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xlabel(f"{axes.get_xlabel()} (log scale beyond ±0.01)")
        axes.xaxis.set_major_formatter(_NUMBER)
    axes.axvline(0.0, color=_GREY, lw=1)
    axes.margins(x=0.08)
    axes.set_ylim(len(deltas) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, pad=22)
    axes.tick_params(axis="x", labelsize=10)
    axes.grid(visible=False, axis="y")


def _sweep_table(
    axes: Axes, rows: list[dict[str, Any]], losses: np.ndarray, deltas: np.ndarray
) -> None:
    """The numbers of each row, right of its bar."""
    table = [("loss", "change", "zeros")]
    for row, loss, delta in zip(rows, losses, deltas, strict=True):
        final = f"{loss:.4f}" if np.isfinite(loss) else "diverged"
        if "validation_loss" not in row:
            final = "no result"
        change = f"{delta:+.4f}".replace("-", "\N{MINUS SIGN}") if np.isfinite(delta) else ""
        share = row.get("zero_share")
        table.append((final, change, "" if share is None else f"{100 * share:.1f} %"))
    heights = [1.04, *(1 - (index + 0.5) / len(rows) for index in range(len(rows)))]
    for cells, height in zip(table, heights, strict=True):
        for cell, offset in zip(cells, (62, 122, 172), strict=True):
            where = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 10}
            look = {"ha": "right", "va": "center_baseline"}
            axes.annotate(cell, (1.0, height), (offset, 0), **where, **look)


def _row_look(index: int) -> dict[str, Any]:
    # Seven colours and eight markers: 56 rows before a pair comes back.
    marker = _ROW_MARKERS[index % len(_ROW_MARKERS)]
    return {"color": _ROW_COLOURS[index % len(_ROW_COLOURS)], "marker": marker}


def _loss_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("How well does the model predict?", "loss (nats per token)")
    for run, name, colour, dashes, mark in _RUNS:
        steps, loss = _series(records, "train", run, "loss")
        if not len(steps):
            continue
        axes.plot(steps, loss, color=colour, alpha=0.25, lw=0.8)
        _smooth_line(axes, steps, loss, color=colour, ls=dashes, label=f"{name}, training")
        if not np.isfinite(loss[-1]):
            end = steps[np.isfinite(loss)].max(initial=0.0)
            label = f"{name}, not finite after step {end:,.0f}"
            axes.axvspan(end, steps[-1], facecolor=(colour, 0.1), edgecolor=colour, label=label)
        steps, loss = _series(records, "validation", run, "loss")
        axes.plot(steps, loss, ls="", color=colour, label=f"{name}, validation", **mark)
    _scale_loss(axes)
    _add_bits_axis(axes, records)
    _finish(figure, axes, records)
    return figure


def _zero_share_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure(
        "How sparse is each layer's hidden activation?", "zeros in Y2 = relu(Y1)² (% of values)"
    )
    steps, share = _series(records, "sparsity", "main", "zero_share")
    layers = share.shape[1]
    # The last tenth of viridis is a yellow too light for a line on white.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, layers))
    for layer in range(layers):
        axes.plot(steps, share[:, layer], color=colours[layer], lw=1.2)
    mean = np.ma.masked_invalid(share).mean(axis=1)
    axes.plot(steps, mean, "k", lw=2.8, label="mean of the layers")
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set_ylim(top=1.0)
    scale = ScalarMappable(
        BoundaryNorm(np.arange(layers + 1) - 0.5, layers), ListedColormap(colours)
    )
    ticks = np.arange(0, layers, math.ceil(layers / 12))
    bar = figure.colorbar(scale, ax=axes, ticks=ticks, label="layer (0 is next to the input)")
    bar.minorticks_off()
    _finish(figure, axes, records)
    return figure


def _dropped_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure(
        "How much of the activation does 2:4 pruning drop?", "dropped (% of the non-zeros)"
    )
    lowest = 1.0
    for key, name, colour, dashes in _DROPPED:
        steps, share = _series(records, "sparsity", "main", key)
        # A mask leaves NaN out of min, max and mean without a warning where all are NaN.
        share = np.ma.masked_invalid(share)
        band = share.min(axis=1).filled(np.nan), share.max(axis=1).filled(np.nan)
        axes.fill_between(steps, *band, facecolor=colour, alpha=0.15, lw=0)
        mean = share.mean(axis=1)
        axes.plot(steps, mean, color=colour, ls=dashes, lw=2, label=f"{name}: mean of the layers")
        for edge in band:
            axes.plot(steps, edge, color=colour, ls=dashes, lw=0.6)
        lowest = min(lowest, np.where(share > 0, share, 1.0).min())
    if lowest < 1.0:
        axes.set_yscale("log")
        # A layer that drops nothing has no place on a log scale: its band runs off the lower edge.
        axes.set_ylim(max(lowest / 1.5, 1e-5), None)
        _set_ticks(axes.yaxis, _log_ticks(axes.get_ylim(), (1.0, 2.0, 5.0)), _PERCENT)
    axes.fill_between([], [], color=_GREY, alpha=0.3, label="band: from the least to the most")
    _finish(figure, axes, records)
    return figure


def _gap_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure(
        "What does 2:4 cost against the dense twin?", "main run − dense twin (nats per token)"
    )
    steps, gap = _gap(records, "train")
    axes.axhline(0.0, color="black", lw=1)
    axes.plot(steps, gap, color=_BLUE, alpha=0.2, lw=0.8)
    smooth = _smooth_line(axes, steps, gap, color=_BLUE, label="training")
    steps, gap = _gap(records, "validation")
    axes.plot(steps, gap, "kD", ms=6, zorder=3, label="validation")
    shown = np.concatenate([smooth, gap, [0.0]])
    low, high = np.nanmin(shown), np.nanmax(shown)
    # Single batches scatter far more than the gap is wide; they may run out of the frame.
    room = max(0.2 * (high - low), 1e-4)
    axes.set_ylim(low - room, high + room)
    _finish(figure, axes, records)
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


def ema(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential moving average: s += 2 / (w + 1) * (x - s), started at the first finite x.

    The width w of the i-th value (from 0) is max(1, min(span, i / 10)): a steep start is not
    dragged along into the flat part. A value that is not finite gives NaN at its own place and
    leaves the average as it was.
    """
    smooth = np.full(len(values), np.nan)
    state = None
    for i, value in enumerate(values):
        if np.isfinite(value):
            width = max(1.0, min(span, i / 10))
            state = value if state is None else state + 2.0 / (width + 1.0) * (value - state)
            smooth[i] = state
    return smooth


def _smooth_line(axes: Axes, steps: np.ndarray, values: np.ndarray, *, label: str, **look: Any):
    """Draws the moving average over a fiftieth of the records, and returns it."""
    smooth = ema(values, len(values) / 50)
    axes.plot(steps, smooth, lw=2, label=f"{label} (smoothed)", **look)
    return smooth


def _figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure((8.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    _label(axes, title, y_label)
    return figure, axes


def _label(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(_STEP)


def _finish(figure: Figure, axes: Axes, records: list[dict[str, Any]]) -> None:
    """The switch to 2:4 and the legend."""
    for step in [r["step"] for r in records if r["kind"] == "switch" and r["run"] == "main"]:
        axes.axvline(step, color=_GREY, ls=":", lw=1.4)
        side = "left" if step <= sum(axes.get_xlim()) / 2 else "right"
        where = axes.get_xaxis_transform()
        text = f" 2:4 from step {step:,} "
        axes.text(step, 1.015, text, transform=where, ha=side, color=_GREY, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2)


def _scale_loss(axes: Axes) -> None:
    """Limits that a diverging line cannot spoil, and a log scale where the range asks for one."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    lines = [y[np.isfinite(y) & (y > 0)] for y in lines]
    lines = [y for y in lines if len(y)]
    if not lines:
        return
    low = min(y.min() for y in lines) / 1.04
    high = 1.04 * min(max(y.max() for y in lines), 1.5 * max(y[0] for y in lines))
    ticks = _log_ticks((low, high), _LOSS_DIGITS)
    if len(ticks) >= 4:
        axes.set_yscale("log")
        _set_ticks(axes.yaxis, ticks, _NUMBER)
    axes.set_ylim(low, high)


def _log_ticks(limits: tuple[float, float], digits: tuple[float, ...]) -> list[float]:
    low, high = limits
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def _set_ticks(axis: Axis, ticks: list[float], formatter: FuncFormatter) -> None:
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(formatter)


def _add_bits_axis(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Bits per byte on the right: a fixed multiple of nats per token, read off the records."""
    pairs = [(r.get("loss"), r.get("bits_per_byte")) for r in records if r["kind"] == "validation"]
    ratios = [bits / loss for loss, bits in pairs if loss and bits]
    if not ratios:
        return
    ratio = float(np.median(ratios))
    right = axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
    right.set_ylabel("bits per byte")
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        ticks = _log_ticks((low * ratio, high * ratio), _LOSS_DIGITS)
        _set_ticks(right.yaxis, ticks, _NUMBER)


@_styled
def _save(figure: Figure, workdir: str | Path, name: str) -> Path:
    path = Path(workdir) / "plots" / f"{name}.png"
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_bytes(path, png.getvalue())
    return path


# Name: kind, run and key that the figure cannot do without, and what draws it.
_RUN_FIGURES = {
    "loss": ("train", "main", "loss", _loss_figure),
    "zero_share": ("sparsity", "main", "zero_share", _zero_share_figure),
    "dropped_share": ("sparsity", "main", "dropped_token_wise", _dropped_figure),
    "gap": ("train", "dense_twin", "loss", _gap_figure),
}
