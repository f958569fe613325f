import numpy as np
import pytest
from figures import assert_no_overlap, make_records, pick, save_records, texts, width_and_height
from matplotlib.figure import Figure

from s24jax.errors import InvalidInput
from s24jax.sweep_plot import plot_sweep, sweep_figure


@pytest.fixture
def rows(tmp_path):
    rows = []
    for seed, (name, cost) in enumerate({"dense": 0.0, "2:4": 0.004, "no warm-up": -0.003}.items()):
        records = make_records(twin=False, cost=cost)
        workdir = str(save_records(tmp_path / str(seed), records))
        final = pick(records, "validation", "main", "loss")[1][-1]
        row = {"name": name, "workdir": workdir, "validation_loss": final, "zero_share": 0.95}
        rows.append(row)
    return rows


def cells(figure):
    """The table right of the bars as rows of text, without its header."""
    found = texts(figure.axes[1])
    assert found[:3] == ["loss", "change", "zeros"]
    return [tuple(found[i : i + 3]) for i in range(3, len(found), 3)]


def test_sweep_figure_compares_with_the_baseline(tmp_path, rows):
    figure = sweep_figure(rows, baseline="2:4")
    left, right = figure.axes
    reference = rows[1]["validation_loss"]
    assert isinstance(figure, Figure) and len(left.lines) == 3
    for drawn, row in zip(left.lines, rows, strict=True):
        assert drawn.get_ydata()[-1] == row["validation_loss"]
    looks = [(drawn.get_color(), drawn.get_marker()) for drawn in left.lines]
    assert [(key.get_color(), key.get_marker()) for key in right.lines[:3]] == looks
    deltas = [row["validation_loss"] - reference for row in rows]
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], deltas)
    assert [label.get_text() for label in right.get_yticklabels()] == ["dense", "2:4", "no warm-up"]
    expected = [f"{delta:+.4f}".replace("-", "−") for delta in deltas]
    assert cells(figure) == [
        (f"{row['validation_loss']:.4f}", change, "95.0 %")
        for row, change in zip(rows, expected, strict=True)
    ]
    assert right.get_xlabel().endswith("(nats per token)\nfrom 2:4")
    assert right.get_xscale() == "linear"
    path = plot_sweep(tmp_path / "sweep", rows)
    assert path == tmp_path / "sweep" / "plots" / "sweep.png"
    assert width_and_height(path)[0] == 1650


def test_diverged_and_missing_rows_stay(tmp_path, rows):
    rows[1] |= {"validation_loss": None, "zero_share": None, "diverged": "the loss is nan"}
    rows[2]["validation_loss"] = float("inf")
    rows.append({"name": "never started", "workdir": str(tmp_path / "none")})
    rows.append(rows[0] | {"name": "worse", "validation_loss": rows[0]["validation_loss"] + 1.5})
    figure = sweep_figure(rows)
    assert [row[:2] for row in cells(figure)[1:]] == [
        ("diverged", ""),
        ("diverged", ""),
        ("no result", ""),
        (f"{rows[4]['validation_loss']:.4f}", "+1.5000"),
    ]
    assert [row[2] for row in cells(figure)] == ["95.0 %", "", "95.0 %", "", "95.0 %"]
    left, right = figure.axes
    assert len(left.lines) == 4 and len(right.get_yticks()) == 5
    assert right.get_xscale() == "symlog"
    assert right.get_xlabel().endswith("from dense (log scale beyond ±0.01)")


def test_a_diverged_baseline_leaves_the_losses(tmp_path, rows):
    rows[0]["validation_loss"] = None
    figure = sweep_figure(rows)
    assert [row[0] for row in cells(figure)][0] == "diverged"
    assert [row[1] for row in cells(figure)] == ["", "", ""]
    assert figure.axes[1].get_xlabel().endswith("from dense, which has no loss to compare with")
    assert plot_sweep(tmp_path, rows).exists()


def test_many_rows_look_different(rows):
    figure = sweep_figure([rows[0] | {"name": f"row {i}"} for i in range(30)])
    assert len({(x.get_color(), x.get_marker()) for x in figure.axes[0].lines}) == 30


def test_sweep_errors(tmp_path, rows):
    with pytest.raises(InvalidInput) as error:
        plot_sweep(tmp_path, [])
    expected = "the sweep has no rows, so there is nothing to plot: run one of them"
    assert str(error.value) == expected
    with pytest.raises(InvalidInput) as error:
        plot_sweep(tmp_path, rows, baseline="dnse")
    expected = (
        "baseline 'dnse' is not a row of the sweep: use one of ['dense', '2:4', 'no warm-up']"
    )
    assert str(error.value) == expected


def test_no_labels_overlap_or_leave_the_figure(rows):
    rows.append(rows[0] | {"name": "a row with a name so long that it takes two lines"})
    assert_no_overlap(sweep_figure(rows))
