import numpy as np
import pytest
from figures import assert_no_overlap, make_row, texts
from matplotlib.figure import Figure

from s24jax.errors import InvalidInput
from s24jax.sweep_plot import sweep_figure


@pytest.fixture
def rows():
    costs = {"dense": 0.0, "2:4": 0.004, "no warm-up": -0.003}
    return [make_row(name, cost=cost) for name, cost in costs.items()]


def loss_of(row):
    return row["summary"]["validation_loss"]


def diverged(row):
    return row | {"summary": {"validation_loss": None, "zero_share": None, "diverged": "nan"}}


def cells(figure):
    """The table right of the bars as rows of text, without its header."""
    found = texts(figure.axes[1])
    assert found[:3] == ["loss", "change", "zeros"]
    return [tuple(found[i : i + 3]) for i in range(3, len(found), 3)]


def test_sweep_figure_compares_with_the_baseline(rows):
    figure = sweep_figure(rows, baseline="2:4")
    left, right = figure.axes
    reference = loss_of(rows[1])
    assert isinstance(figure, Figure) and len(left.lines) == 3
    for drawn, row in zip(left.lines, rows, strict=True):
        assert drawn.get_ydata()[-1] == loss_of(row)
    looks = [(drawn.get_color(), drawn.get_marker()) for drawn in left.lines]
    assert [(key.get_color(), key.get_marker()) for key in right.lines[:3]] == looks
    deltas = [loss_of(row) - reference for row in rows]
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], deltas)
    assert [label.get_text() for label in right.get_yticklabels()] == ["dense", "2:4", "no warm-up"]
    expected = [f"{delta:+.4f}".replace("-", "−") for delta in deltas]
    assert cells(figure) == [
        (f"{loss_of(row):.4f}", change, "95.0 %")
        for row, change in zip(rows, expected, strict=True)
    ]
    assert right.get_xlabel().endswith("(nats per token)\nfrom 2:4")
    assert right.get_xscale() == "linear"


def test_no_change_is_not_magnified(rows):
    """Beside losses that agree to the last digits an axis still has a scale that says something."""
    rows[1]["summary"]["validation_loss"] = loss_of(rows[0]) + 1e-9
    figure = sweep_figure(rows[:2], baseline="dense")
    assert figure.axes[1].get_xlim() == (-1e-3, 1e-3)
    assert_no_overlap(figure)


def test_the_baselines_seeds_are_a_band(rows):
    rows += [make_row(f"dense, seed {seed}", cost=0.001 * seed) for seed in (1, 2)]
    for seed, row in enumerate((rows[0], *rows[3:])):
        row["config"] = {"name": row["name"], "choice": "dense", "seed": seed}
    (*_, band) = sweep_figure(rows, baseline="dense").axes[1].patches
    np.testing.assert_allclose((band.get_x(), band.get_width()), (0.0, 0.002), atol=1e-9)


def test_rows_that_diverged_stay(rows):
    rows[1] = diverged(rows[1])
    rows[2]["summary"]["validation_loss"] = float("inf")
    rows.append(diverged({"name": "at once", "curves": {"main": {}}}))
    rows.append(make_row("worse", cost=1.5))
    figure = sweep_figure(rows)
    assert [row[:2] for row in cells(figure)[1:]] == [
        ("diverged", ""),
        ("diverged", ""),
        ("diverged", ""),
        (f"{loss_of(rows[4]):.4f}", "+1.5000"),
    ]
    assert [row[2] for row in cells(figure)] == ["95.0 %", "", "95.0 %", "", "95.0 %"]
    left, right = figure.axes
    assert len(left.lines) == 4 and len(right.get_yticks()) == 5
    assert right.get_xscale() == "symlog"
    assert right.get_xlabel().endswith("from dense (log scale beyond ±0.01)")


@pytest.mark.parametrize("why", ["diverged", "not there yet"])
def test_without_the_baselines_loss_the_losses_are_left(rows, why):
    rows = [diverged(rows[0]), *rows[1:]] if why == "diverged" else rows[1:]
    figure = sweep_figure(rows, baseline="dense")
    assert [row[0] for row in cells(figure)][-2:] == [f"{loss_of(row):.4f}" for row in rows[-2:]]
    assert {row[1] for row in cells(figure)} == {""}
    assert figure.axes[1].get_xlabel().endswith("from dense, which has no loss to compare with")


def test_many_rows_look_different(rows):
    figure = sweep_figure([rows[0] | {"name": f"row {i}"} for i in range(30)])
    assert len({(x.get_color(), x.get_marker()) for x in figure.axes[0].lines}) == 30


def test_no_rows():
    with pytest.raises(InvalidInput) as error:
        sweep_figure([])
    expected = "the sweep has no rows, so there is nothing to plot: run one of them"
    assert str(error.value) == expected


def test_no_labels_overlap_or_leave_the_figure(rows):
    rows.append(rows[0] | {"name": "a row with a name so long that it takes two lines"})
    assert_no_overlap(sweep_figure(rows))
