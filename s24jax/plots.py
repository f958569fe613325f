"""Figures of one run, drawn from its metrics.jsonl.

Layers, which have an order, take a sequential colour map. Legends stand outside the axes, where no
curve can run through them.
"""

import logging
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from s24jax.errors import InvalidInput
from s24jax.figure_style import (
    BLUE,
    GREY,
    LOSS_DIGITS,
    NUMBER,
    VERMILION,
    ema,
    label_axes,
    log_ticks,
    save_figure,
    scale_loss,
    series,
    set_ticks,
    styled,
)
from s24jax.writer import METRICS, read_metrics

_LOG = logging.getLogger(__name__)
_RUNS = (
    # The twin's validation marks are small, to lie inside the main run's where the two agree.
    ("main", "main run", BLUE, "-", {"marker": "o", "ms": 8, "markerfacecolor": "white"}),
    ("dense_twin", "dense twin", VERMILION, "--", {"marker": "s", "ms": 3.5}),
)
_DROPPED = (
    ("dropped_token_wise", "token-wise (forward, dX)", BLUE, "-"),
    ("dropped_feature_wise", "feature-wise (dW)", VERMILION, "--"),
)
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")


def plot_run(workdir: str | Path) -> list[Path]:
    """Draws the figures of one run into workdir/plots, as PNG files 1200 pixels wide.

    loss.png, zero_share.png, dropped_share.png and gap.png (main run minus dense twin). A figure
    whose records the run does not have is not made, and one line in the log says so; a run
    without a dense twin has no gap to show, and no such line.

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
    return [save_figure(figure, workdir, name) for name, figure in figures.items()]


@styled
def run_figures(records: list[dict[str, Any]]) -> dict[str, Figure]:
    """The figures of one run by name, without those whose records are absent."""
    figures = {}
    for name, (kind, run, key, make) in _RUN_FIGURES.items():
        if np.isfinite(series(records, kind, run, key)[1]).any():
            figures[name] = make(records)
        elif run == "main" or any(record["run"] == run for record in records):
            # Most runs have no dense twin: then nothing is missing.
            _LOG.info(
                "plots/%s.png is not made: no %s in the %s records of %s", name, key, kind, run
            )
    return figures


def _loss_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("How well does the model predict?", "loss (nats per token)")
    for run, name, colour, dashes, mark in _RUNS:
        steps, loss = series(records, "train", run, "loss")
        if not len(steps):
            continue
        axes.plot(steps, loss, color=colour, alpha=0.25, lw=0.8)
        _smooth_line(axes, steps, loss, color=colour, ls=dashes, label=f"{name}, training")
        if not np.isfinite(loss[-1]):
            end = steps[np.isfinite(loss)].max(initial=0.0)
            label = f"{name}, not finite after step {end:,.0f}"
            axes.axvspan(end, steps[-1], facecolor=(colour, 0.1), edgecolor=colour, label=label)
        steps, loss = series(records, "validation", run, "loss")
        axes.plot(steps, loss, ls="", color=colour, label=f"{name}, validation", **mark)
    scale_loss(axes)
    _add_bits_axis(axes, records)
    _finish(figure, axes, records)
    return figure


def _zero_share_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure(
        "How sparse is each layer's hidden activation?", "zeros in Y2 = relu(Y1)² (% of values)"
    )
    steps, share = series(records, "sparsity", "main", "zero_share")
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
        steps, share = series(records, "sparsity", "main", key)
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
        set_ticks(axes.yaxis, log_ticks(axes.get_ylim(), (1.0, 2.0, 5.0)), _PERCENT)
    axes.fill_between([], [], color=GREY, alpha=0.3, label="band: from the least to the most")
    _finish(figure, axes, records)
    return figure


def _gap_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure(
        "What does 2:4 cost against the dense twin?", "main run − dense twin (nats per token)"
    )
    steps, gap = _gap(records, "train")
    axes.axhline(0.0, color="black", lw=1)
    axes.plot(steps, gap, color=BLUE, alpha=0.2, lw=0.8)
    smooth = _smooth_line(axes, steps, gap, color=BLUE, label="training")
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
    main_steps, main = series(records, kind, "main", "loss")
    twin_steps, twin = series(records, kind, "dense_twin", "loss")
    steps, main_at, twin_at = np.intersect1d(main_steps, twin_steps, return_indices=True)
    return steps, main[main_at] - twin[twin_at]


def _smooth_line(axes: Axes, steps: np.ndarray, values: np.ndarray, *, label: str, **look: Any):
    """Draws the moving average over a fiftieth of the records, and returns it."""
    smooth = ema(values, len(values) / 50)
    axes.plot(steps, smooth, lw=2, label=f"{label} (smoothed)", **look)
    return smooth


def _figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure((8.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    label_axes(axes, title, y_label)
    return figure, axes


def _finish(figure: Figure, axes: Axes, records: list[dict[str, Any]]) -> None:
    """The switch to 2:4 and the legend."""
    for step in [r["step"] for r in records if r["kind"] == "switch" and r["run"] == "main"]:
        axes.axvline(step, color=GREY, ls=":", lw=1.4)
        side = "left" if step <= sum(axes.get_xlim()) / 2 else "right"
        where = axes.get_xaxis_transform()
        text = f" 2:4 from step {step:,} "
        axes.text(step, 1.015, text, transform=where, ha=side, color=GREY, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2)


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
        ticks = log_ticks((low * ratio, high * ratio), LOSS_DIGITS)
        set_ticks(right.yaxis, ticks, NUMBER)


# Name: kind, run and key that the figure cannot do without, and what draws it.
_RUN_FIGURES = {
    "loss": ("train", "main", "loss", _loss_figure),
    "zero_share": ("sparsity", "main", "zero_share", _zero_share_figure),
    "dropped_share": ("sparsity", "main", "dropped_token_wise", _dropped_figure),
    "gap": ("train", "dense_twin", "loss", _gap_figure),
}
