"""The figure of the benches of whole models: the gain over XLA's dense model, over widths."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from s24jax.bench.rows import Row
from s24jax.errors import InvalidInput
from s24jax.figure_style import BLUE, GREY, styled

BASELINE = "xla_dense"
_TITLES = {
    "step": "How much faster is a training step?",
    "prefill": "How much faster is a prompt read?",
    "decode": "How much faster is a token decoded?",
}
MODEL_BENCHES = tuple(_TITLES)
_SIDES = {"cuda": ("2:4, our kernels", BLUE), "relu2_cuda": ("dense, our kernels", "#E69F00")}
_DASHES = ("-", "--", ":", "-.")
_NUMBER = FuncFormatter(lambda value, _: f"{value:,.0f}")


@styled
def model_figure(rows: Sequence[Row]) -> Figure:
    """A panel for each model; a line for each implementation and number of tokens.

    Args:
      rows: timed, of one bench.

    Raises:
      InvalidInput: no implementation stands beside the dense model of XLA.
    """
    rows = [row for row in rows if row["implementation"] in _SIDES and row["ratio_to_xla_dense"]]
    if not rows:
        raise InvalidInput(f"no row has a time beside {BASELINE}'s; run the bench with both")
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure((max(8.0, 5.5 * len(models)), 5.0), layout="constrained")
    figure.suptitle(_TITLES[rows[0]["bench"]], x=0.01, ha="left", weight="bold")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        found = [row for row in rows if row["model"] == model]
        _draw(axes, found)
        axes.set_title(f"{model}, {found[0]['layers']} layers", pad=8.0)
    panels[0].set_ylabel("time of XLA's dense model / time")
    handles = {}
    for axes in panels:
        found = zip(*axes.get_legend_handles_labels(), strict=True)
        handles |= {label: handle for handle, label in found}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure


def _draw(axes: Axes, rows: list[Row]) -> None:
    tokens = sorted({row["T"] for row in rows})
    for name, (label, colour) in _SIDES.items():
        for count, dashes in zip(tokens, _DASHES * len(tokens), strict=False):
            line = sorted(
                (row["D"], row["ratio_to_xla_dense"])
                for row in rows
                if (row["implementation"], row["T"]) == (name, count)
            )
            if line:
                look = {"color": colour, "ls": dashes, "marker": "o", "ms": 5}
                axes.plot(*zip(*line, strict=True), label=f"{label}, T {count:,}", **look)
    axes.axhline(1.0, color=GREY, lw=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["D"] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_NUMBER)
    axes.set_xlabel("D")
    axes.margins(x=0.08)
