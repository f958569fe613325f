"""The figures of results: what they show, and that they can be read."""

import numpy as np
import pytest
from figures import LAYERS, SWITCH, assert_no_overlap, make_row, width_and_height
from matplotlib.text import Text

from s24jax import results_plot
from s24jax.results_plot import plot_results, profile_figure, seconds_figure, sparsity_figure
from s24jax.sweep_plot import row_look


@pytest.fixture
def rows():
    return [make_row("dense", sparsity=False), make_row("2:4"), make_row("no warm-up", seed=3)]


@pytest.fixture
def looks(rows):
    return {row["name"]: row_look(index) for index, row in enumerate(rows)}


def test_all_figures_are_made(tmp_path, rows):
    paths = plot_results(tmp_path, rows, baseline="dense")
    assert [path.name for path in paths] == [
        "sweep.png",
        "seconds.png",
        "sparsity.png",
        "profile.png",
    ]
    assert all(path.parent == tmp_path / "plots" for path in paths)
    assert all(width_and_height(path)[0] >= 1200 for path in paths)


def test_a_twin_is_drawn_in_every_figure(tmp_path, rows, monkeypatch):
    figures = {}

    def keep(figure, folder, name):
        figures[name] = figure
        return folder

    monkeypatch.setattr(results_plot, "save_figure", keep)
    rows[1]["config"]["model"] = {"ffn": "relu2_24"}
    rows[1]["summary"] |= {"parameters": 9, "dense_twin": rows[2]["summary"]}
    rows[1]["curves"]["dense_twin"] = rows[2]["curves"]["main"]
    plot_results(tmp_path, rows[:2], baseline="dense")
    for name, figure in figures.items():
        shown = [text.get_text() for text in figure.findobj(Text)]
        assert "2:4, dense twin" in shown, name
    assert len(figures) == 4


def test_dense_rows_have_no_sparsity(tmp_path, rows):
    paths = plot_results(tmp_path, rows[:1], baseline="dense")
    assert [path.name for path in paths] == ["sweep.png", "seconds.png"]


def test_times_of_unlike_devices_are_not_compared(tmp_path, rows):
    plot_results(tmp_path, rows, baseline="dense")
    assert (tmp_path / "plots/seconds.png").exists()
    rows[1]["environment"] = {"devices": ["gpu: NVIDIA H100 80GB HBM3"]}
    paths = plot_results(tmp_path, rows, baseline="dense")
    assert [path.name for path in paths] == ["sweep.png", "sparsity.png", "profile.png"]
    assert not (tmp_path / "plots/seconds.png").exists()


def test_losses_over_seconds_and_where_a_run_switches(rows):
    rows[0]["summary"]["switch_step"] = None
    figure = seconds_figure(rows)
    (axes,) = figure.axes
    named = {line.get_label(): line for line in axes.lines}
    for row in rows:
        curve, line = row["curves"]["main"]["validation"], named[row["name"]]
        assert list(line.get_xdata()) == curve["seconds"]
        assert list(line.get_ydata()) == curve["loss"]
    rings = [line for line in axes.lines if line.get_label().startswith("_")]
    assert len(rings) == 2  # a dense run has none
    assert all(ring.get_xdata()[0] == 0.25 * (SWITCH - 1) for ring in rings)
    assert [ring.get_color() for ring in rings] == [row_look(1)["color"], row_look(2)["color"]]
    assert_no_overlap(figure)


def test_a_run_that_diverged_at_once_has_no_curve(rows):
    rows[1]["curves"] = {"main": {}}
    labels = [line.get_label() for line in seconds_figure(rows).axes[0].lines]
    assert "2:4" not in labels and "no warm-up" in labels


def test_the_last_probe_of_each_layer(rows, looks):
    figure = sparsity_figure(rows[1:], looks)
    panels = {axes.get_title(loc="left").split("\n")[0]: axes for axes in figure.axes}
    assert list(panels) == ["zeros in Y2", "dropped token-wise,", "dropped feature-wise,"]
    for row, line in zip(rows[1:], panels["zeros in Y2"].lines, strict=True):
        np.testing.assert_allclose(
            line.get_ydata(), row["curves"]["main"]["sparsity"]["zero_share"][-1]
        )
        assert len(line.get_xdata()) == LAYERS
    for name in ("token", "feature"):
        values = rows[1]["curves"]["main"]["sparsity"][f"dropped_{name}_wise"][-1]
        line = panels[f"dropped {name}-wise,"].lines[0]
        np.testing.assert_allclose(line.get_ydata(), np.maximum(values, 1e-4))
    assert [text.get_text() for text in figure.legends[0].texts] == ["2:4", "no warm-up"]
    assert_no_overlap(figure)


def test_the_profile_of_each_layer(rows):
    figure = profile_figure(rows[1:])
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("2:4", "no warm-up")
    profile = rows[1]["curves"]["main"]["density_profile"]["profile"][-1]
    for line, density in zip(first.lines, profile, strict=True):
        np.testing.assert_allclose(line.get_ydata(), np.maximum(density, 1e-5))
        assert 0 < line.get_xdata()[0] < line.get_xdata()[-1] < 1
    assert_no_overlap(figure)
