"""The finished runs of a sweep in one file that is small enough to keep: results.json.

    name, baseline    of the sweep
    rows              one for each finished run, in the sweep's order:
        name, config
        environment   commit, devices, versions, data, implementations
        summary       see `s24jax.summary`; of a run that diverged, validation_loss null and the
                      reason as "diverged"
        curves        run ("main", "dense_twin") -> kind -> column -> values, see `curves_of`

A row is written as soon as its run has finished, and never changed. Several processes may write
rows of one sweep into one file.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s24jax.errors import InvalidInput
from s24jax.workdir import first_difference
from s24jax.writer import read_json, read_metrics, to_json, write_bytes

RESULTS = "results.json"
# So that a sweep's file stays below 1 MB: a curve of training losses has at most so many points,
# each the mean of its steps; the metrics of layers are those of so many probes, and the profiles
# over features, the largest of them, of fewer.
TRAIN_POINTS, PROBES, PROFILES = 200, 24, 4
LOSS_DIGITS, SHARE_DIGITS = 6, 4  # significant
PROFILE = "density_profile"

Row = dict[str, Any]


def read_results(path: str | Path) -> dict[str, Any]:
    """The file's name, baseline and rows.

    Raises:
      InvalidInput: there is no such file, or it is none of results.
      BrokenEnvironment: it is no JSON.
    """
    results = read_json(path)
    if not isinstance(results, dict) or not {"name", "baseline", "rows"} <= results.keys():
        raise InvalidInput(f"{path} holds no results of a sweep; name its {RESULTS}")
    return results


def recorded_row(path: str | Path, name: str, config) -> Row | None:
    """The row of this name; None where there is none yet.

    Raises:
      InvalidInput: the row of this name had another configuration.
    """
    if not Path(path).exists():
        return None
    row = next((row for row in read_results(path)["rows"] if row["name"] == name), None)
    if row is None:
        return None
    key, there, here = first_difference(row["config"], config.to_dict())
    if key:
        raise InvalidInput(
            f"row {name!r} of {path} had another config: {key} is {there!r} there, {here!r} here; "
            "rename the row, or use another --results"
        )
    return row


def record_row(path: str | Path, row: Row, *, sweep: str, baseline: str, order: Sequence[str]):
    """Adds a row to the file, which is made where it is missing.

    Args:
      order: the names of the sweep's rows. Rows of other names stay behind them.

    Raises:
      InvalidInput: the file is another sweep's, or has such a row already.
      BrokenEnvironment: the disk is full or not writable.
    """
    path = Path(path)
    with _locked(path.parent):
        results = {"name": sweep, "baseline": baseline, "rows": []}
        if path.exists():
            results = read_results(path)
        if results["name"] != sweep:
            raise InvalidInput(
                f"{path} holds the rows of sweep {results['name']!r}, not of {sweep!r}; "
                "use another --results"
            )
        if any(there["name"] == row["name"] for there in results["rows"]):
            raise InvalidInput(f"{path} has a row {row['name']!r} already; use another --results")
        places = {name: place for place, name in enumerate(order)}
        rows = [*results["rows"], row]
        rows.sort(key=lambda row: places.get(row["name"], len(places)))
        # A line for each row.
        head = to_json({"name": sweep, "baseline": baseline})[:-1]
        lines = ",\n".join(map(to_json, rows))
        write_bytes(path, f'{head}, "rows": [\n{lines}\n]}}\n'.encode())


def make_row(name: str, config, workdir: str | Path, summary: dict[str, Any]) -> Row:
    """The row of a finished run: its summary, and what its workdir tells of it."""
    record = read_json(Path(workdir) / "run.json")
    data = {key: record["data"][key] for key in ("name", "fingerprint", "documents", "bytes")}
    return {
        "name": name,
        "config": config.to_dict(),
        "environment": {
            "commit": record["git_commit"],
            "devices": record["devices"],
            "versions": record["versions"],
            "data": data,
            "implementations": record["implementations"],
        },
        "summary": summary,
        "curves": curves_of(
            read_metrics(workdir), tokens_per_step=config.batch_size * config.sequence_length
        ),
    }


def repeats(rows: Sequence[Row]) -> dict[str, list[float]]:
    """The losses of rows that are alike but for their seed, by the name of the first of them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "diverged" not in row["summary"]:
            config = {key: v for key, v in row["config"].items() if key not in ("name", "seed")}
            groups.setdefault(repr(config), []).append(row)
    return {
        group[0]["name"]: [row["summary"]["validation_loss"] for row in group]
        for group in groups.values()
        if len(group) > 1
    }


def with_twins(rows: Sequence[Row]) -> list[Row]:
    """The rows as tables and figures show them: behind each that has a dense twin, its twin."""
    shown = []
    for row in rows:
        shown.append(row)
        if "dense_twin" in row["summary"]:
            shown.append(_twin(row))
    return shown


def _twin(row: Row) -> Row:
    """Its curve begins where the run was validated before the switch, its seconds there too."""
    summary, curves = row["summary"], row["curves"]["dense_twin"]
    main, twin = row["curves"]["main"].get("validation"), curves.get("validation")
    if main and twin:
        fork = summary["switch_step"] - 1
        steps, seconds = (np.array(main[key], dtype=float) for key in ("step", "seconds"))
        shared = np.interp(fork, np.append(0.0, steps), np.append(0.0, seconds))
        own = (shared + np.array(twin["seconds"], dtype=float)).tolist()
        places = [i for i, step in enumerate(main["step"]) if step == fork]
        before = {key: [main[key][i] for i in places] for key in twin}
        after = twin | {"seconds": own}
        curves = curves | {"validation": {key: before[key] + after[key] for key in twin}}
    return row | {
        "name": f"{row['name']}, dense twin",
        "config": row["config"] | {"model": row["config"]["model"] | {"ffn": "relu2"}},
        "summary": summary["dense_twin"] | {"parameters": summary["parameters"]},
        "curves": {"main": curves},
    }


def curves_of(records: list[dict[str, Any]], *, tokens_per_step: int) -> dict[str, Any]:
    """What a run's metrics say, thinned and rounded.

    Columns, whose values belong together by their place:
      train: step, loss; each the mean of some steps.
      validation: step, seconds, loss, loss_dense.
      sparsity: step, and for each metric of `s24jax.sparsity_metrics` a list over layers.
      density_profile: step and profile, a few of them.

    `seconds` are those of the training steps up to there, without compilation, validation, probes
    and saving, as `tokens_per_second` tells them.
    """
    runs = dict.fromkeys(record["run"] for record in records)
    return {run: _curves([r for r in records if r["run"] == run], tokens_per_step) for run in runs}


def seconds_of(records: list[dict[str, Any]], tokens_per_step: int) -> dict[int, float]:
    """The training seconds of one run up to each of its steps, from the records of kind "train".

    A rate is that of all steps since the last one. A step without one, as the first, which
    compiled, is taken to be as fast as the next that has one.
    """
    train = [record for record in records if record["kind"] == "train"]
    rates = [record["tokens_per_second"] or np.nan for record in train]
    known = np.flatnonzero(np.isfinite(rates))
    if not len(known):
        return {record["step"]: np.nan for record in train}
    following = np.minimum(np.searchsorted(known, np.arange(len(rates))), len(known) - 1)
    seconds = np.cumsum(tokens_per_step / np.array(rates)[known[following]])
    return {record["step"]: float(s) for record, s in zip(train, seconds, strict=True)}


def _curves(records: list[dict[str, Any]], tokens_per_step: int) -> dict[str, Any]:
    seconds = seconds_of(records, tokens_per_step)
    kinds = {
        kind: [record for record in records if record["kind"] == kind]
        for kind in ("train", "validation", "sparsity")
    }
    train = [
        {
            "step": window[-1]["step"],
            "loss": np.mean([np.nan if r["loss"] is None else r["loss"] for r in window]),
        }
        for window in _windows(kinds["train"])
    ]
    validation = [
        {
            "step": record["step"],
            "seconds": seconds.get(record["step"]),
            "loss": record["loss"],
            "loss_dense": record["loss_dense"],
        }
        for record in kinds["validation"]
    ]
    sparsity = [
        {key: value for key, value in record.items() if key not in ("kind", "run", PROFILE)}
        for record in _thinned(kinds["sparsity"], PROBES)
    ]
    profiles = [
        {"step": record["step"], "profile": record[PROFILE]}
        for record in _thinned(kinds["sparsity"], PROFILES)
        if PROFILE in record
    ]
    tables = {
        "train": (train, LOSS_DIGITS),
        "validation": (validation, LOSS_DIGITS),
        "sparsity": (sparsity, SHARE_DIGITS),
        PROFILE: (profiles, SHARE_DIGITS),
    }
    return {kind: _columns(*table) for kind, table in tables.items() if table[0]}


def _windows(records: list) -> list[list]:
    length = max(1, -(-len(records) // TRAIN_POINTS))
    return [records[start : start + length] for start in range(0, len(records), length)]


def _thinned(records: list, most: int) -> list:
    """So many of the records at most, evenly spread, the first and the last among them."""
    count = min(most, len(records))
    return [records[i] for i in np.linspace(0, len(records) - 1, count).round().astype(int)]


def _columns(table: list[dict[str, Any]], digits: int) -> dict[str, list]:
    return {key: [_rounded(row[key], digits) for row in table] for key in table[0]}


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    return value if value is None or isinstance(value, int) else float(f"{value:.{digits}g}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time write results into a folder, which is made where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
