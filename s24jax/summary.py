"""What a finished run comes down to: `summary.json` and the closing table."""

import numpy as np

from s24jax.schedules import ffn_mode

SHARES = ("zero_share", "dropped_token_wise", "dropped_feature_wise", "inactive_features")


def summarize(config, parameters: int, records: list[dict]) -> dict:
    """The final figures of a run, from its metrics.

    Args:
      config: the whole configuration.
      parameters: how many the model has.
      records: of metrics.jsonl.

    Returns:
      name, steps, parameters, switch_step (None in a dense run); mode, validation_loss (nats per
      token), validation_loss_dense (the same weights evaluated dense), bits_per_byte,
      tokens_per_second (median over the steps in the final mode, compilation left out), and the
      mean over layers of the shares in `SHARES`, all of the main run; `best_validation_loss`;
      `zero_share_per_layer`; `dense_twin`, the same figures of the twin, where there was one;
      tokens_per_second_before_switch, the median of the main run's dense steps in the second half
      of those before the switch, whose Y2 has nearly the zeros that it has later (None without a
      switch, or where none was timed): on a GPU those of a twin are slower, since 2:4 runs in their
      process (see `s24jax.bench.clock`).
    """
    switch = [record["step"] for record in records if record["kind"] == "switch"]
    losses = [r["loss"] for r in _select(records, "main", "validation") if r["loss"] is not None]
    summary = {
        "name": config.name,
        "steps": config.steps,
        "parameters": parameters,
        "switch_step": switch[-1] if switch else None,
        **_final(records, "main", ffn_mode(config.steps, config)),
        "tokens_per_second_before_switch": (
            _rate(records, "main", "dense", after=switch[-1] // 2) if switch else None
        ),
        "best_validation_loss": min(losses, default=None),
    }
    if _select(records, "dense_twin", "train"):
        summary["dense_twin"] = _final(records, "dense_twin", "dense")
    return summary


def closing_table(summary: dict) -> str:
    """The summary as a Markdown table: 2:4 beside its dense twin where there is one."""
    columns = {"2:4" if summary["mode"] == "sparse24" else "dense": summary}
    if "dense_twin" in summary:
        columns["dense twin"] = summary["dense_twin"]
    rows = [
        ("validation loss (nats/token)", "validation_loss", "{:.4f}"),
        ("the same weights, evaluated dense", "validation_loss_dense", "{:.4f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ]
    if summary.get("tokens_per_second_before_switch") is not None:
        rows.append(("tokens/s, dense, before 2:4", "tokens_per_second_before_switch", "{:,.0f}"))
    if summary["zero_share"] is not None:
        names = ("zeros in Y2", "dropped token-wise", "dropped feature-wise", "inactive features")
        rows += [(name, key, "{:.1%}") for name, key in zip(names, SHARES, strict=True)]
    lines = [f"| {summary['name']}, step {summary['steps']} | " + " | ".join(columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, key, form in rows:
        shown = (cell(column.get(key), form) for column in columns.values())
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def cell(value, form: str) -> str:
    """One figure of a table; "-" where there is none."""
    return "-" if value is None else form.format(value)


def _select(records: list[dict], run: str, kind: str) -> list[dict]:
    return [record for record in records if record["run"] == run and record["kind"] == kind]


def _final(records: list[dict], run: str, mode: str) -> dict:
    validation = _select(records, run, "validation")[-1]
    sparsity = _select(records, run, "sparsity")
    final = {
        "mode": mode,
        "validation_loss": validation["loss"],
        "validation_loss_dense": validation["loss_dense"],
        "bits_per_byte": validation["bits_per_byte"],
        "tokens_per_second": _rate(records, run, mode),
    }
    for key in SHARES:
        final[key] = float(np.mean(sparsity[-1][key])) if sparsity else None
    final["zero_share_per_layer"] = sparsity[-1]["zero_share"] if sparsity else None
    return final


def _rate(records: list[dict], run: str, mode: str, *, after: int = 0) -> float | None:
    """Tokens per second of a run's steps in one mode after that step, the median."""
    rates = [
        record["tokens_per_second"]
        for record in _select(records, run, "train")
        if record["mode"] == mode and record["step"] > after and record["tokens_per_second"]
    ]
    return float(np.median(rates)) if rates else None
