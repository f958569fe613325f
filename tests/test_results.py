"""results.json: what a row holds, and that no row is lost or changed."""

import json
import multiprocessing

import numpy as np
import pytest

from configs import lm_100m
from s24jax.errors import BrokenEnvironment, InvalidInput
from s24jax.results import (
    PROBES,
    PROFILES,
    TRAIN_POINTS,
    curves_of,
    read_results,
    record_row,
    recorded_row,
    repeats,
    seconds_of,
    with_twins,
)

ORDER = ["a", "b", "c", "d"]


def record(path, name, **row):
    row = {"name": name, "config": {"seed": 0}, **row}
    record_row(path, row, sweep="sweep", baseline="a", order=ORDER)


def names(path):
    return [row["name"] for row in read_results(path)["rows"]]


def test_rows_stand_in_the_sweeps_order(tmp_path):
    path = tmp_path / "new" / "results.json"
    for name in ("c", "removed", "a"):
        record(path, name, summary={"loss": float("nan")})
    assert names(path) == ["a", "c", "removed"]
    assert read_results(path)["rows"][0]["summary"] == {"loss": None}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def _record_many(path, process):
    for i in range(10):
        record(path, f"{process}-{i}")


def test_no_row_is_lost_between_processes(tmp_path):
    path = tmp_path / "results.json"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_record_many, args=(path, p)) for p in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert sorted(names(path)) == sorted(f"{p}-{i}" for p in range(3) for i in range(10))


def test_a_row_is_never_changed(tmp_path):
    path = tmp_path / "results.json"
    record(path, "a", summary=1)
    before = path.read_bytes()
    with pytest.raises(InvalidInput) as error:
        record(path, "a", summary=2)
    assert str(error.value) == f"{path} has a row 'a' already; use another --results"
    with pytest.raises(InvalidInput) as error:
        record_row(path, {"name": "b"}, sweep="other", baseline="b", order=["b"])
    assert str(error.value) == (
        f"{path} holds the rows of sweep 'sweep', not of 'other'; use another --results"
    )
    assert path.read_bytes() == before


def test_a_recorded_row_belongs_to_its_configuration(tmp_path):
    path, config = tmp_path / "results.json", lm_100m.get_config()
    assert recorded_row(path, "a", config) is None
    record(path, "a", config=config.to_dict())
    assert recorded_row(path, "b", config) is None
    assert recorded_row(path, "a", config)["name"] == "a"
    config.model.recipe.dense_share = 0.1
    with pytest.raises(InvalidInput) as error:
        recorded_row(path, "a", config)
    assert str(error.value) == (
        f"row 'a' of {path} had another config: model.recipe.dense_share is 0.05 there, 0.1 here; "
        "rename the row, or use another --results"
    )


def test_files_of_something_else(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(InvalidInput, match="does not exist"):
        read_results(path)
    path.write_text("[]")
    with pytest.raises(InvalidInput) as error:
        read_results(path)
    assert str(error.value) == f"{path} holds no results of a sweep; name its results.json"
    path.write_text("{")
    with pytest.raises(BrokenEnvironment, match="is not JSON"):
        record(path, "a")


# --------------------------------------------------------------------------------------- curves


def train(step, rate, loss=1.0, run="main"):
    return {"kind": "train", "run": run, "step": step, "tokens_per_second": rate, "loss": loss}


def test_seconds_add_up_what_each_step_took():
    # 100 tokens a step: 4 s before the first rate is known, then 4, 2, 2, and 2 for the last.
    records = [train(1, None), train(2, 25.0), train(3, 50.0), train(4, 50.0), train(5, None)]
    assert seconds_of(records, 100) == {1: 4.0, 2: 8.0, 3: 10.0, 4: 12.0, 5: 14.0}
    assert all(np.isnan(s) for s in seconds_of([train(1, None)], 100).values())
    assert seconds_of([], 100) == {}


def test_curves_hold_each_run_and_kind():
    validation = {"kind": "validation", "run": "main", "step": 4, "mode": "dense"}
    sparsity = {"kind": "sparsity", "run": "main", "step": 4, "zero_share": [0.123456789, 1.0]}
    records = [
        {"kind": "switch", "run": "main", "step": 3, "mode": "sparse24"},
        *(train(step, 50.0, loss=1 / step) for step in range(1, 5)),
        validation | {"loss": 0.25, "loss_dense": None, "bits_per_byte": 1.0},
        sparsity | {"density_profile": [[0.5, 0.25], [1.0, 0.0]]},
        train(4, 100.0, run="dense_twin"),
    ]
    curves = curves_of(records, tokens_per_step=100)
    assert curves["main"] == {
        "train": {"step": [1, 2, 3, 4], "loss": [1.0, 0.5, 0.333333, 0.25]},
        "validation": {"step": [4], "seconds": [8.0], "loss": [0.25], "loss_dense": [None]},
        "sparsity": {"step": [4], "zero_share": [[0.1235, 1.0]]},
        "density_profile": {"step": [4], "profile": [[[0.5, 0.25], [1.0, 0.0]]]},
    }
    assert curves["dense_twin"] == {"train": {"step": [4], "loss": [1.0]}}


def row_with_a_twin(main, twin, switch_step=301):
    summary = {"validation_loss": 1.5, "parameters": 9, "switch_step": switch_step}
    return {
        "name": "main",
        "config": {"name": "sweep/main", "seed": 0, "model": {"ffn": "relu2_24", "width": 8}},
        "environment": {"devices": ["gpu"]},
        "summary": summary | {"dense_twin": {"validation_loss": 1.4}},
        "curves": {"main": {"validation": main}, "dense_twin": {"validation": twin}},
    }


def test_a_twin_is_shown_behind_its_run():
    """It goes on from step 300, where both were one; it is no repeat of its run."""
    main = {"step": [100, 300, 400], "seconds": [10.0, 30.0, 39.0], "loss": [3.0, 2.0, 1.5]}
    twin = {"step": [350, 400], "seconds": [5.5, 11.0], "loss": [1.7, 1.4]}
    row = row_with_a_twin(main, twin)
    other = row | {"name": "other", "summary": {"validation_loss": 1.5}}
    shown = with_twins([row, other])
    assert [r["name"] for r in shown] == ["main", "main, dense twin", "other"]
    assert shown[0] == row
    joined = {"step": [300, 350, 400], "seconds": [30.0, 35.5, 41.0], "loss": [2.0, 1.7, 1.4]}
    assert shown[1] == row | {
        "name": "main, dense twin",
        "config": row["config"] | {"model": {"ffn": "relu2", "width": 8}},
        "summary": {"validation_loss": 1.4, "parameters": 9},
        "curves": {"main": {"validation": joined}},
    }
    assert repeats(shown) == {"main": [1.5, 1.5]}


@pytest.mark.parametrize(
    "main_seconds, twin_seconds, expected",
    [([12.0], [5.0], 8.0), ([12.0], [None], np.nan), ([None], [5.0], np.nan)],
)
def test_a_twin_whose_run_was_not_validated_before(main_seconds, twin_seconds, expected):
    """Switched after the first of four steps; a rate may not be known."""
    main = {"step": [4], "seconds": main_seconds, "loss": [1.5]}
    twin = {"step": [4], "seconds": twin_seconds, "loss": [1.4]}
    shown = with_twins([row_with_a_twin(main, twin, switch_step=2)])[1]
    curve = shown["curves"]["main"]["validation"]
    assert curve["step"] == [4] and curve["loss"] == [1.4]
    np.testing.assert_allclose(curve["seconds"], [expected])


def test_long_curves_are_thinned():
    """Fifteen rows of a long run, with 200 probes of 12 layers each, stay below 1 MB."""
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 5, 10_000)
    records = [train(i + 1, 1e5 * rng.uniform(), loss=x) for i, x in enumerate(losses.tolist())]
    for step in range(50, 10_001, 50):
        probe = {"kind": "sparsity", "run": "main", "step": step}
        metrics = {f"metric {i}": rng.uniform(size=12).tolist() for i in range(10)}
        records.append(probe | metrics | {"density_profile": rng.uniform(size=(12, 64)).tolist()})
    curves = curves_of(records, tokens_per_step=65_536)["main"]
    assert len(curves["train"]["step"]) == TRAIN_POINTS and curves["train"]["step"][-1] == 10_000
    np.testing.assert_allclose(curves["train"]["loss"][0], losses[:50].mean(), rtol=1e-5)
    for kind, count in (("sparsity", PROBES), ("density_profile", PROFILES)):
        steps = curves[kind]["step"]
        assert len(steps) == count and (steps[0], steps[-1]) == (50, 10_000)
    assert 15 * len(json.dumps(curves)) < 1e6
