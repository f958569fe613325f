"""The summary of a run, from records written by hand."""

import copy
import json
import math

import pytest
from ml_collections import ConfigDict

from s24jax.summary import SHARES, closing_table, summarize
from s24jax.writer import write_json


def run_config(ffn="relu2_24", steps=40, warmup=20) -> ConfigDict:
    values = {"name": "tiny", "steps": steps, "sparse24_warmup_steps": warmup}
    return ConfigDict(values | {"model": {"ffn": ffn}})


def train(step, mode, rate, run="main"):
    values = {"loss": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3}
    return {
        "kind": "train",
        "run": run,
        "step": step,
        "mode": mode,
        "tokens_per_second": rate,
        **values,
    }


def validation(step, mode, loss, dense, run="main"):
    return {
        "kind": "validation",
        "run": run,
        "step": step,
        "mode": mode,
        "loss": loss,
        "loss_dense": dense,
        "bits_per_byte": None if loss is None else loss / math.log(2),
    }


def sparsity(step, shares, run="main"):
    """`shares`: SHARES by layer; the other metrics are there and not asked for."""
    shares = dict(zip(SHARES, shares, strict=True))
    other = {"dense_feature_density": [0.5, 0.5], "dropped_token_wise_energy": [0.1, 0.1]}
    return {"kind": "sparsity", "run": run, "step": step, **shares, **other}


SWITCH = {"kind": "switch", "run": "main", "step": 21, "mode": "sparse24"}
EARLY = [[0.5, 0.5], [0.4, 0.4], [0.6, 0.6], [0.0, 0.0]]
MAIN = [[0.8, 0.9], [0.01, 0.03], [0.02, 0.06], [0.25, 0.0]]
TWIN = [[0.7, 0.8], [0.05, 0.07], [0.1, 0.3], [0.125, 0.0]]


def twin_records():
    """A run that switches at step 21 with a dense twin, in the order in which it is written."""
    return [
        train(1, "dense", None),
        sparsity(1, EARLY),
        train(10, "dense", 100.0),
        validation(10, "dense", 2.5, 2.5),
        train(20, "dense", 102.0),
        validation(20, "dense", None, None),
        SWITCH,
        train(21, "sparse24", None),
        train(21, "dense", None, "dense_twin"),
        train(30, "sparse24", 150.0),
        train(30, "dense", 90.0, "dense_twin"),
        validation(30, "sparse24", 1.25, 1.3),
        validation(30, "dense", 1.0, 1.0, "dense_twin"),
        train(31, "sparse24", 400.0),
        train(31, "dense", 95.0, "dense_twin"),
        train(40, "sparse24", 170.0),
        train(40, "dense", 91.0, "dense_twin"),
        sparsity(40, MAIN),
        sparsity(40, TWIN, "dense_twin"),
        validation(40, "sparse24", 1.5, 1.75),
        validation(40, "dense", 1.4375, 1.4375, "dense_twin"),
    ]


def dense_records():
    return [
        train(1, "dense", None),
        train(5, "dense", 1000.0),
        validation(5, "dense", 2.0, 2.0),
        train(6, "dense", 3000.0),
        validation(10, "dense", 1.75, 1.75),
    ]


def test_a_run_with_a_twin():
    records = twin_records()
    before = copy.deepcopy(records)
    summary = summarize(run_config(), 1234, records)
    assert records == before
    twin = summary.pop("dense_twin")
    assert summary.pop("zero_share_per_layer") == [0.8, 0.9]
    assert twin.pop("zero_share_per_layer") == [0.7, 0.8]
    assert summary == pytest.approx(
        {
            "name": "tiny",
            "steps": 40,
            "parameters": 1234,
            "switch_step": 21,
            "mode": "sparse24",
            "validation_loss": 1.5,
            "validation_loss_dense": 1.75,
            "bits_per_byte": 1.5 / math.log(2),
            "tokens_per_second": 170.0,  # the median; the dense steps before do not count
            "tokens_per_second_before_switch": 102.0,  # nor the twin's here, nor the first ones
            "zero_share": 0.85,
            "dropped_token_wise": 0.02,
            "dropped_feature_wise": 0.04,
            "inactive_features": 0.125,
            "best_validation_loss": 1.25,  # neither None nor the twin's
        }
    )
    assert twin == pytest.approx(
        {
            "mode": "dense",
            "validation_loss": 1.4375,
            "validation_loss_dense": 1.4375,
            "bits_per_byte": 1.4375 / math.log(2),
            "tokens_per_second": 91.0,
            "zero_share": 0.75,
            "dropped_token_wise": 0.06,
            "dropped_feature_wise": 0.2,
            "inactive_features": 0.0625,
        }
    )


def test_a_run_of_a_kind_without_sparsity():
    summary = summarize(run_config("swiglu", steps=10), 7, dense_records())
    assert summary == pytest.approx(
        {
            "name": "tiny",
            "steps": 10,
            "parameters": 7,
            "switch_step": None,
            "mode": "dense",
            "validation_loss": 1.75,
            "validation_loss_dense": 1.75,
            "bits_per_byte": 1.75 / math.log(2),
            "tokens_per_second": 2000.0,
            "tokens_per_second_before_switch": None,
            **dict.fromkeys(SHARES),
            "zero_share_per_layer": None,
            "best_validation_loss": 1.75,
        }
    )


def test_a_run_that_ends_within_its_warmup_is_dense():
    summary = summarize(run_config(steps=10, warmup=10), 7, dense_records())
    assert summary["mode"] == "dense" and summary["switch_step"] is None
    assert "dense_twin" not in summary


def test_no_rate_where_every_step_compiled():
    records = [*dense_records(), SWITCH, train(21, "sparse24", None)]
    records.append(validation(21, "sparse24", 1.0, 1.5))
    assert summarize(run_config(steps=21), 7, records)["tokens_per_second"] is None


def test_is_written_as_it_is(tmp_path):
    """Nothing of numpy in it, nothing that JSON cannot hold."""
    for summary in (
        summarize(run_config(), 1234, twin_records()),
        summarize(run_config("swiglu", steps=10), 7, dense_records()),
    ):
        write_json(tmp_path / "summary.json", summary)
        assert json.loads((tmp_path / "summary.json").read_text()) == summary
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_closing_table_of_a_twin():
    assert closing_table(summarize(run_config(), 1234, twin_records())).splitlines() == [
        "| tiny, step 40 | 2:4 | dense twin |",
        "|---|---:|---:|",
        "| validation loss (nats/token) | 1.5000 | 1.4375 |",
        "| the same weights, evaluated dense | 1.7500 | 1.4375 |",
        "| bits per byte | 2.1640 | 2.0739 |",
        "| tokens/s | 170 | 91 |",
        "| tokens/s, dense, before 2:4 | 102 | - |",
        "| zeros in Y2 | 85.0% | 75.0% |",
        "| dropped token-wise | 2.0% | 6.0% |",
        "| dropped feature-wise | 4.0% | 20.0% |",
        "| inactive features | 12.5% | 6.2% |",
    ]


def test_closing_table_of_a_dense_run():
    summary = summarize(run_config("swiglu", steps=10), 7, dense_records())
    summary["tokens_per_second"] = 1234567.8
    assert closing_table(summary).splitlines() == [
        "| tiny, step 10 | dense |",
        "|---|---:|",
        "| validation loss (nats/token) | 1.7500 |",
        "| the same weights, evaluated dense | 1.7500 |",
        "| bits per byte | 2.5247 |",
        "| tokens/s | 1,234,568 |",
    ]


def test_closing_table_without_a_rate():
    summary = summarize(run_config(), 1234, twin_records())
    summary["tokens_per_second"] = None
    assert "| tokens/s | - | 91 |" in closing_table(summary).splitlines()


def test_closing_table_of_a_run_that_starts_with_sparse24():
    """And of a summary that was written before there was that row."""
    records = [record for record in twin_records() if record["step"] > 20]
    summary = summarize(run_config(), 1234, records)
    assert summary["tokens_per_second_before_switch"] is None
    table = closing_table(summary)
    assert "before 2:4" not in table
    del summary["tokens_per_second_before_switch"]
    assert closing_table(summary) == table


def test_a_run_whose_last_loss_is_not_finite_has_a_table():
    """The last update can spoil the weights after a finite loss; metrics.jsonl then has null."""
    records = [*dense_records()[:-1], validation(10, "dense", None, None)]
    summary = summarize(run_config("swiglu", steps=10), 7, records)
    assert summary["validation_loss"] is None
    assert "| validation loss (nats/token) | - |" in closing_table(summary).splitlines()


def test_a_run_without_a_finite_loss_has_a_summary():
    records = [*dense_records()[:2], validation(10, "dense", None, None)]
    summary = summarize(run_config("swiglu", steps=10), 7, records)
    assert summary["best_validation_loss"] is None
