"""The figure of a sweep: how its runs learn, and their final losses against a baseline's."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s24jax.errors import InvalidInput
from s24jax.figure_style import BAND, GREY, NUMBER, label_axes, scale_loss, styled
from s24jax.results import Row, repeats

_ROW_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_ROW_MARKERS = "osD^vPXp"
# So far the axis of changes reaches at least, to both sides.
_LEAST_CHANGE = 1e-3


@styled
def sweep_figure(rows: Sequence[Row], *, baseline: str | None = None) -> Figure:
    """Validation losses over steps, and final ones compared.

    Args:
      rows: of `s24jax.results`. A row stays in the figure whatever became of it: it reads
        "diverged" where its final loss is none or not finite.
      baseline: the name of the row that the others are compared with; by default the first. Where
        it is not there yet or has diverged, the final losses stand without bars.

    Raises:
      InvalidInput: there are no rows.
    """
    if not rows:
        raise InvalidInput("the sweep has no rows, so there is nothing to plot: run one of them")
    names = [row["name"] for row in rows]
    baseline = names[0] if baseline is None else baseline
    losses = np.array([row["summary"]["validation_loss"] for row in rows], dtype=float)
    # NaN is a loss that is not there; without the baseline's no row has a change to show.
    losses[~np.isfinite(losses)] = np.nan
    reference = losses[names.index(baseline)] if baseline in names else np.nan
    labels = [textwrap.fill(name, 30) for name in names]
    pitch = 0.17 + 0.17 * max(1 + label.count("\n") for label in labels)
    figure = Figure((11.0, max(4.8, 1.8 + pitch * len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(6, 5))
    label_axes(left, "How does each run learn?", "validation loss (nats per token)")
    for index, row in enumerate(rows):
        _sweep_curve(left, row, row_look(index))
    scale_loss(left)
    right.set_title("What does each choice cost?")
    right.set_xlabel(
        f"change in final validation loss (nats per token)\nfrom {baseline}"
        + ("" if np.isfinite(reference) else ", which has no loss to compare with")
    )
    right.set_yticks(range(len(rows)), labels)
    _sweep_bars(right, losses - reference)
    repeated = np.array(repeats(rows).get(baseline, [])) - reference
    if np.isfinite(repeated).any():
        right.axvspan(np.nanmin(repeated), np.nanmax(repeated), color=BAND, zorder=0)
        right.set_xlabel(f"{right.get_xlabel()}\ngrey: its repeats")
    _sweep_table(right, rows, losses, losses - reference)
    return figure


def _sweep_curve(axes: Axes, row: Row, look: dict[str, Any]) -> None:
    curve = row["curves"]["main"].get("validation")
    if curve:  # else it diverged before the first validation
        steps, loss = (np.array(curve[key], dtype=float) for key in ("step", "loss"))
        axes.plot(steps, loss, lw=1.4, ms=5, markevery=max(1, len(steps) // 12), **look)


def _sweep_bars(axes: Axes, deltas: np.ndarray) -> None:
    for index, delta in enumerate(deltas):
        look = row_look(index)
        # The key to the curves on the left, in a column of its own as a bar may have no length.
        axes.plot(-0.05, index, ms=8, transform=axes.get_yaxis_transform(), clip_on=False, **look)
        axes.barh(index, np.nan_to_num(delta), height=0.6, color=look["color"])
    if np.abs(np.nan_to_num(deltas)).max() > 0.2:
        # Repeated runs differ by less than 0.01: below that a log scale would magnify noise.
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set_xlabel(f"{axes.get_xlabel()} (log scale beyond ±0.01)")
        axes.xaxis.set_major_formatter(NUMBER)
    else:
        axes.locator_params(axis="x", nbins=4)
    axes.axvline(0.0, color=GREY, lw=1)
    axes.margins(x=0.08)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -_LEAST_CHANGE), max(high, _LEAST_CHANGE))
    axes.set_ylim(len(deltas) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, pad=22)
    axes.tick_params(axis="x", labelsize=10)
    axes.grid(visible=False, axis="y")


def _sweep_table(axes: Axes, rows: Sequence[Row], losses: np.ndarray, deltas: np.ndarray) -> None:
    """The numbers of each row, right of its bar."""
    table = [("loss", "change", "zeros")]
    for row, loss, delta in zip(rows, losses, deltas, strict=True):
        final = f"{loss:.4f}" if np.isfinite(loss) else "diverged"
        change = f"{delta:+.4f}".replace("-", "\N{MINUS SIGN}") if np.isfinite(delta) else ""
        share = row["summary"]["zero_share"]
        table.append((final, change, "" if share is None else f"{100 * share:.1f} %"))
    heights = [1.04, *(1 - (index + 0.5) / len(rows) for index in range(len(rows)))]
    for cells, height in zip(table, heights, strict=True):
        for cell, offset in zip(cells, (62, 122, 172), strict=True):
            where = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 10}
            look = {"ha": "right", "va": "center_baseline"}
            axes.annotate(cell, (1.0, height), (offset, 0), **where, **look)


def row_look(index: int) -> dict[str, Any]:
    """Colour and marker of a row in every figure of its sweep."""
    # Seven colours and eight markers: 56 rows before a pair comes back.
    marker = _ROW_MARKERS[index % len(_ROW_MARKERS)]
    return {"color": _ROW_COLOURS[index % len(_ROW_COLOURS)], "marker": marker}
