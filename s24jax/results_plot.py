"""The figures of a sweep's results: how its runs learn, over steps and over time, and how sparse
their layers become."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from s24jax.figure_style import (
    GREY,
    figure_path,
    label_axes,
    log_ticks,
    save_figure,
    scale_loss,
    set_ticks,
    styled,
)
from s24jax.results import PROFILE, Row, with_twins
from s24jax.sweep_plot import row_look, sweep_figure

# Of axes with a logarithmic scale, which has no place for nothing: what is below stands there.
_FLOOR = {"dropped_token_wise": 1e-4, "dropped_feature_wise": 1e-4, PROFILE: 1e-5}
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")
# What the sparsity figure shows of each layer, and whether its axis is logarithmic.
_PANELS = (
    ("zero_share", "zeros in Y2", "linear"),
    ("dropped_token_wise", "dropped token-wise,\n% of the non-zeros", "log"),
    ("dropped_feature_wise", "dropped feature-wise,\n% of the non-zeros", "log"),
    ("inactive_features", "inactive features", "linear"),
    ("inactive_blocks", "inactive blocks of\n128 tokens x 32 features", "linear"),
)


def plot_results(folder: str | Path, rows: Sequence[Row], *, baseline: str) -> list[Path]:
    """Draws the figures of a sweep's rows and their dense twins into folder/plots; their paths.

    sweep.png: validation losses over steps, final ones compared with the baseline's. seconds.png:
    the same over training time, where all rows have the same devices. sparsity.png: each layer of
    each row at its last probe. profile.png: how active the features of each layer are. The last two
    have the rows with Squared ReLU and are not made where there is none.

    Raises:
      InvalidInput: there are no rows.
      BrokenEnvironment: the disk is full or not writable.
    """
    rows = with_twins(rows)
    figures = {"sweep": sweep_figure(rows, baseline=baseline)}
    if len({tuple(row["environment"]["devices"]) for row in rows}) == 1:
        figures["seconds"] = seconds_figure(rows)
    else:  # an earlier one would compare times of unlike devices
        figure_path(folder, "seconds").unlink(missing_ok=True)
    looks = {row["name"]: row_look(index) for index, row in enumerate(rows)}
    sparse = [row for row in rows if "sparsity" in row["curves"]["main"]]
    if sparse:
        figures |= {
            "sparsity": sparsity_figure(sparse, looks),
            "profile": profile_figure(sparse),
        }
    return [save_figure(figure, folder, name) for name, figure in figures.items()]


@styled
def seconds_figure(rows: Sequence[Row]) -> Figure:
    """Validation loss over training seconds; a ring where a run switches to 2:4."""
    figure = Figure((10.0, 5.4), layout="constrained")
    axes = figure.subplots()
    label_axes(axes, "How soon is which loss reached?", "validation loss (nats per token)")
    axes.set_xlabel("seconds of training steps (without compilation and validation)")
    for index, row in enumerate(rows):
        curve = row["curves"]["main"].get("validation")
        if not curve:
            continue  # it diverged before the first validation
        steps, seconds, loss = (
            np.array(curve[key], dtype=float) for key in ("step", "seconds", "loss")
        )
        every = max(1, len(steps) // 12)
        look = row_look(index)
        axes.plot(seconds, loss, lw=1.4, ms=5, markevery=every, label=row["name"], **look)
        last_dense = (row["summary"].get("switch_step") or 0) - 1
        if steps[0] <= last_dense <= steps[-1]:
            at = np.interp(last_dense, steps, seconds), np.interp(last_dense, steps, loss)
            axes.plot(*at, "o", ms=13, mfc="none", mew=1.5, color=look["color"])
    axes.plot([], [], "o", ms=13, mfc="none", mew=1.5, color=GREY, label="switch to 2:4")
    scale_loss(axes)
    figure.legend(loc="outside right upper")
    return figure


@styled
def sparsity_figure(rows: Sequence[Row], looks: dict[str, dict]) -> Figure:
    """Layer by layer, at the last probe: zeros, what is dropped, what is inactive."""
    shown = [p for p in _PANELS if any(p[0] in row["curves"]["main"]["sparsity"] for row in rows)]
    figure = Figure((4.0 * len(shown), 4.6), layout="constrained")
    for axes, (key, label, scale) in zip(
        np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True
    ):
        axes.set_xlabel("layer (0 is next to the input)")
        axes.set_title(label, fontsize=11)
        for row in rows:
            values = row["curves"]["main"]["sparsity"].get(key)
            if values:
                shares = np.maximum(np.array(values[-1], dtype=float), _FLOOR.get(key, 0.0))
                axes.plot(shares, ms=5, lw=1.2, **looks[row["name"]])
        axes.set_yscale(scale)
        axes.yaxis.set_major_formatter(_PERCENT)
        if scale == "log":
            low, high = axes.get_ylim()
            subs = (1.0, 2.0, 5.0) if high > 10 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
            set_ticks(axes.yaxis, log_ticks((low, high), subs), _PERCENT)
    _legend(figure, rows, looks)
    return figure


@styled
def profile_figure(rows: Sequence[Row]) -> Figure:
    """How often features are active at the last probe, from the densest to the sparsest."""
    columns = min(4, max(1, len(rows)))
    lines = max(1, -(-len(rows) // columns))
    figure = Figure((max(8.0, 3.6 * columns + 1.0), 3.2 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(rows) :]:
        axes.set_axis_off()
    for axes in panels.flat[max(0, len(rows) - columns) : len(rows)]:
        axes.tick_params(labelbottom=True)  # also above a panel that is off
    for axes, row in zip(panels.flat, rows, strict=False):
        profile = np.array(row["curves"]["main"][PROFILE]["profile"][-1], dtype=float)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(profile)))
        share = (np.arange(profile.shape[1]) + 0.5) / profile.shape[1]
        for layer, density in enumerate(profile):
            axes.plot(share, np.maximum(density, _FLOOR[PROFILE]), color=colours[layer], lw=1.2)
        axes.set_title(row["name"], fontsize=11)
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        # Without 100 %, which would run into the next panel's 0 %.
        axes.xaxis.set_major_locator(FixedLocator([0.0, 0.25, 0.5, 0.75]))
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_formatter(_PERCENT)
    figure.supxlabel("features, the densest first; a line for each layer, dark next to the input")
    figure.supylabel("active in % of the tokens")
    return figure


def _legend(figure: Figure, rows: Sequence[Row], looks: dict[str, dict]) -> None:
    lines = [matplotlib.lines.Line2D([], [], lw=1.2, ms=5, **looks[row["name"]]) for row in rows]
    figure.legend(lines, [row["name"] for row in rows], loc="outside right upper")
