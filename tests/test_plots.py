import logging
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from figures import (
    BITS_PER_NAT,
    LAYERS,
    STEPS,
    SWITCH,
    assert_no_overlap,
    make_records,
    pick,
    record,
    save_records,
    texts,
    width_and_height,
)
from matplotlib.colors import to_hex

from s24jax.errors import BrokenEnvironment, InvalidInput
from s24jax.figure_style import ema, save_figure
from s24jax.plots import plot_run, run_figures


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def line(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found


def test_ema_against_a_plain_loop():
    values = np.array([4.0, np.nan, 3.0, 5.0, np.inf, *np.linspace(3, 1, 60)])
    expected, state = [], 4.0
    for i, x in enumerate(values):
        alpha = 2 / (1 + min(5.0, i / 10)) if i > 10 else 1.0
        state = (1 - alpha) * state + alpha * x if np.isfinite(x) else state
        expected.append(state if np.isfinite(x) else np.nan)
    np.testing.assert_allclose(ema(values, 5.0), expected, rtol=1e-12)
    assert ema(np.array([]), 3.0).shape == (0,)


def test_ema_of_a_steep_start_is_not_dragged_along():
    values = np.where(np.arange(1000) < 5, 12.0, 2.5)
    assert np.abs(ema(values, 20.0)[20:] - 2.5).max() < 0.01


def test_plot_run_writes_every_figure_1200_pixels_wide(tmp_path):
    save_records(tmp_path, make_records())
    settings, backend = dict(matplotlib.rcParams), matplotlib.rcParams._get("backend")
    paths = plot_run(str(tmp_path))
    names = ["loss.png", "zero_share.png", "dropped_share.png", "gap.png"]
    assert paths == [tmp_path / "plots" / name for name in names]
    assert {width_and_height(path) for path in paths} == {(1200, 780)}
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(names)
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.rcParams._get("backend") == backend


def test_the_settings_of_a_notebook_do_not_show(tmp_path):
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": False, "axes.facecolor": "black"}):
        figure = run_figures(make_records())["loss"]
        saved = save_figure(figure, tmp_path, "there").read_bytes()
    axes = figure.axes[0]
    assert saved == save_figure(figure, tmp_path, "here").read_bytes()
    assert axes.xaxis.label.get_fontsize() == 11.0
    assert to_hex(axes.get_facecolor()) == "#ffffff"


def test_importing_the_modules_leaves_pyplot_alone():
    code = (
        "import sys, s24jax.plots, s24jax.sweep_plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_loss_figure_shows_both_runs():
    records = make_records()
    figure = run_figures(records)["loss"]
    axes = figure.axes[0]
    for run, name in (("main", "main run"), ("dense_twin", "dense twin")):
        steps, loss = pick(records, "train", run, "loss")
        smooth = line(axes, f"{name}, training (smoothed)")
        np.testing.assert_array_equal(smooth.get_xdata(), steps)
        np.testing.assert_array_equal(smooth.get_ydata(), ema(np.array(loss), len(loss) / 50))
        (raw,) = [x for x in axes.lines if list(x.get_ydata()) == loss]
        assert raw.get_alpha() < 0.5 and raw.get_color() == smooth.get_color()
        points = line(axes, f"{name}, validation")
        steps, loss = pick(records, "validation", run, "loss")
        assert (list(points.get_xdata()), list(points.get_ydata())) == (steps, loss)
        assert points.get_linestyle() == "None" and points.get_marker() != "None"
    assert len(legend(figure)) == 4
    assert axes.get_title(loc="left") == "How well does the model predict?"
    assert axes.get_ylabel() == "loss (nats per token)" and axes.get_xlabel() == "training step"
    low, high = axes.get_ylim()
    every = [r["loss"] for r in records if "loss" in r]
    assert low < min(every) < max(every) < high < 1.1 * max(every)


def test_bits_per_byte_stand_on_the_right():
    axes = run_figures(make_records())["loss"].axes[0]
    (right,) = axes.child_axes
    axes.figure.draw_without_rendering()
    assert right.get_ylabel() == "bits per byte"
    np.testing.assert_allclose(right.get_ylim(), np.array(axes.get_ylim()) * BITS_PER_NAT)
    without = [r for r in make_records() if r["kind"] != "validation"]
    assert run_figures(without)["loss"].axes[0].child_axes == []


@pytest.mark.parametrize("name", ["loss", "zero_share", "dropped_share", "gap"])
def test_the_switch_is_marked_and_labelled(name):
    axes = run_figures(make_records())[name].axes[0]
    assert texts(axes) == ["2:4 from step 80"]
    assert [SWITCH, SWITCH] in [list(line.get_xdata()) for line in axes.lines]


@pytest.mark.parametrize(("switch", "side"), [(1, "left"), (STEPS, "right")])
def test_the_mark_of_the_switch_stays_inside_the_figure(switch, side):
    records = make_records(twin=False)
    records[0]["step"] = switch
    axes = run_figures(records)["loss"].axes[0]
    assert axes.texts[0].get_horizontalalignment() == side


def test_a_run_without_a_switch_has_no_mark():
    records = [r for r in make_records(twin=False) if r["kind"] != "switch"]
    assert all(texts(figure.axes[0]) == [] for figure in run_figures(records).values())


def test_a_diverged_run_is_marked_and_does_not_spoil_the_limits():
    records = make_records()
    for r in records:
        if r["run"] == "main" and r["kind"] == "train" and r["step"] > 150:
            r["loss"] = 1e6 if r["step"] <= 160 else None
    figure = run_figures(records)["loss"]
    assert "main run, not finite after step 160" in legend(figure)
    assert figure.axes[0].get_ylim()[1] < 12


def test_zero_share_has_a_line_for_each_layer_and_a_bold_mean():
    records = make_records()
    figure = run_figures(records)["zero_share"]
    axes, bar = figure.axes
    steps, share = pick(records, "sparsity", "main", "zero_share")
    share = np.array(share)
    layers = axes.lines[:LAYERS]
    for layer, drawn in enumerate(layers):
        np.testing.assert_array_equal(drawn.get_ydata(), share[:, layer])
    lightness = [np.mean(matplotlib.colors.to_rgb(drawn.get_color())) for drawn in layers]
    assert lightness == sorted(lightness)
    mean = line(axes, "mean of the layers")
    assert list(mean.get_xdata()) == steps
    np.testing.assert_allclose(mean.get_ydata(), [sum(row) / LAYERS for row in share.tolist()])
    assert mean.get_linewidth() > 2 * layers[0].get_linewidth()
    assert axes.yaxis.get_major_formatter()(0.905) == "90.5 %" and axes.get_ylim()[1] == 1.0
    assert bar.get_ylabel() == "layer (0 is next to the input)"
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0", "1", "2", "3", "4"]


def test_dropped_share_has_a_mean_and_a_band_on_a_log_scale():
    records = make_records()
    axes = run_figures(records)["dropped_share"].axes[0]
    names = ("token-wise (forward, dX)", "feature-wise (dW)")
    keys = ("dropped_token_wise", "dropped_feature_wise")
    for name, key, band in zip(names, keys, axes.collections, strict=False):
        share = np.array(pick(records, "sparsity", "main", key)[1])
        drawn = line(axes, f"{name}: mean of the layers").get_ydata()
        np.testing.assert_allclose(drawn, share.mean(axis=1))
        corners = band.get_paths()[0].vertices
        assert set(share.min(axis=1)) | set(share.max(axis=1)) == set(corners[:, 1])
    assert axes.get_yscale() == "log"
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["0.5 %", "1 %", "2 %", "5 %", "10 %", "20 %", "50 %"]
    smallest = min(min(r["dropped_token_wise"]) for r in records if r["kind"] == "sparsity")
    assert axes.get_ylim()[0] == pytest.approx(smallest / 1.5)


def test_dropped_share_where_nothing_is_dropped_or_finite(tmp_path):
    records = make_records(twin=False)
    for r in records:
        if r["kind"] == "sparsity":
            r["dropped_token_wise"] = [0.0] * LAYERS
            r["dropped_feature_wise"] = [0.0] * LAYERS if r["step"] > 10 else [None] * LAYERS
            r["zero_share"] = r["zero_share"] if r["step"] > 10 else [None] * LAYERS
    assert run_figures(records)["dropped_share"].axes[0].get_yscale() == "linear"
    assert len(plot_run(save_records(tmp_path, records))) == 3


def test_gap_is_main_minus_twin_at_common_steps():
    records = make_records(cost=0.02)
    records = [r for r in records if (r["run"], r["step"]) != ("dense_twin", 100)]
    figure = run_figures(records)["gap"]
    axes = figure.axes[0]
    main = dict(zip(*pick(records, "validation", "main", "loss"), strict=True))
    twin = dict(zip(*pick(records, "validation", "dense_twin", "loss"), strict=True))
    points = line(axes, "validation")
    assert list(points.get_xdata()) == sorted(main.keys() & twin.keys())
    assert 100 not in points.get_xdata()
    np.testing.assert_allclose(points.get_ydata(), [main[s] - twin[s] for s in points.get_xdata()])
    smooth = line(axes, "training (smoothed)").get_ydata()
    assert len(smooth) == STEPS - SWITCH and abs(smooth[-50:].mean() - 0.02) < 0.002
    assert [0.0, 0.0] in [list(drawn.get_ydata()) for drawn in axes.lines]
    assert axes.get_ylim()[0] < 0.0 < 0.02 < axes.get_ylim()[1]
    assert axes.get_ylabel() == "main run − dense twin (nats per token)"


LOGGED = "plots/{}.png is not made: no {} in the {} records of {}".format


def logged(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "s24jax.plots"]


def test_figures_without_records_are_left_out_and_said(tmp_path, caplog):
    """Not so the gap: a run without a dense twin misses nothing."""
    save_records(tmp_path, make_records(twin=False, sparsity=False))
    with caplog.at_level(logging.INFO):
        assert [path.name for path in plot_run(tmp_path)] == ["loss.png"]
    assert logged(caplog) == [
        LOGGED("zero_share", "zero_share", "sparsity", "main"),
        LOGGED("dropped_share", "dropped_token_wise", "sparsity", "main"),
    ]


def test_a_twin_without_a_finite_loss_is_said(caplog):
    records = make_records(twin=False) + [record("train", STEPS, "dense_twin", loss=None)]
    with caplog.at_level(logging.INFO):
        assert "gap" not in run_figures(records)
    assert logged(caplog) == [LOGGED("gap", "loss", "train", "dense_twin")]


def test_one_step_is_enough(tmp_path):
    records = [record("train", 1, loss=5.0), record("train", 1, "dense_twin", loss=5.0)]
    records.append(record("switch", 1, mode="sparse24"))
    assert [p.name for p in plot_run(save_records(tmp_path, records))] == ["loss.png", "gap.png"]


@pytest.mark.parametrize("records", [[], [record("train", 1, loss=None)]])
def test_nothing_to_plot(tmp_path, records):
    save_records(tmp_path, records)
    with pytest.raises(InvalidInput) as error:
        plot_run(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/metrics.jsonl has no finite losses and no sparsity records, so there is "
        "nothing to plot: pass the workdir of a run that has logged at least one step"
    )
    with pytest.raises(InvalidInput, match="metrics.jsonl does not exist: pass the workdir"):
        plot_run(tmp_path / "elsewhere")


def test_a_folder_that_cannot_be_written(tmp_path):
    save_records(tmp_path, make_records(twin=False, sparsity=False))
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(BrokenEnvironment, match=r"loss.png cannot be written \(.*make it writable"):
        plot_run(tmp_path)


@pytest.mark.parametrize("name", ["loss", "zero_share", "dropped_share", "gap"])
def test_no_labels_overlap_or_leave_the_figure(name):
    assert_no_overlap(run_figures(make_records())[name])
