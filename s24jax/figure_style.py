"""What the figures of a run and of a sweep share: colours, style, moving average, axes, saving.

Figures are plain `matplotlib.figure.Figure` objects: pyplot's backend and the settings of a
notebook that imports this module stay as they are. The colours are Okabe and Ito's, which
colour-blind readers can tell apart.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from s24jax.writer import write_bytes

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#555555"
BAND = "#D9D9D9"
# Where a logarithmic axis of losses may have its ticks within a decade.
LOSS_DIGITS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
# Three significant digits.
NUMBER = FuncFormatter(lambda value, _: f"{value:.3g}")
_STEP = FuncFormatter(lambda step, _: f"{step:,.0f}")
# Decorates what makes or saves a figure: matplotlib's own defaults, and these settings.
styled = style.context(
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


def series(
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


def label_axes(axes: Axes, title: str, y_label: str) -> None:
    """Title and axis labels of a figure over training steps."""
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(_STEP)


def scale_loss(axes: Axes) -> None:
    """Limits that a diverging line cannot spoil, and a log scale where the range asks for one."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    lines = [y[np.isfinite(y) & (y > 0)] for y in lines]
    lines = [y for y in lines if len(y)]
    if not lines:
        return
    low = min(y.min() for y in lines) / 1.04
    high = 1.04 * min(max(y.max() for y in lines), 1.5 * max(y[0] for y in lines))
    ticks = log_ticks((low, high), LOSS_DIGITS)
    if len(ticks) >= 4:
        axes.set_yscale("log")
        set_ticks(axes.yaxis, ticks, NUMBER)
    axes.set_ylim(low, high)


def log_ticks(limits: tuple[float, float], digits: tuple[float, ...]) -> list[float]:
    """The digits times powers of ten that lie within limits (low, high)."""
    low, high = limits
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def set_ticks(axis: Axis, ticks: list[float], formatter: FuncFormatter) -> None:
    """These ticks and no others."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(formatter)


def figure_path(workdir: str | Path, name: str) -> Path:
    """Where `save_figure` puts it."""
    return Path(workdir) / "plots" / f"{name}.png"


@styled
def save_figure(figure: Figure, workdir: str | Path, name: str) -> Path:
    """Writes workdir/plots/NAME.png and returns its path."""
    path = figure_path(workdir, name)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_bytes(path, png.getvalue())
    return path
