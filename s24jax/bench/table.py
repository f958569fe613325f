"""The rows of a bench as Markdown: a line for each product and shape, a column for each contender.

A cell is the rate and the time of one call. Where there is none, and where there is more to know, a
number leads to the notes below the table.
"""

import statistics
from collections.abc import Iterable, Sequence

from s24jax.bench.ffn_operands import SYNTHETIC
from s24jax.bench.rates import RATES, share_of_ceiling
from s24jax.bench.rows import ENVIRONMENT, Row

OURS = "cuda"
_WATCHED = "xla"  # the one implementation of "clock"
# Columns of our kernel, where it has one, or of the product whose clock is watched.
BESIDE = {
    "ratio_to_dense": (f"{OURS} : dense", "{:.2f}"),
    "ratio_to_xla_dense": (f"{OURS} : xla_dense", "{:.2f}"),
    "ratio_to_fused_dense": (f"{OURS} : relu2_cuda", "{:.2f}"),
    "ratio_to_cusparselt": (f"{OURS} : cuSPARSELt", "{:.2f}"),
    "share": ("of the ceiling", "{:.0%}"),
    "mfu": (f"MFU of {OURS}", "{:.1%}"),
    "zeros": ("zeros in Y2", "{:.1%}"),
    "received_gb": ("GB that a device receives", "{:.3g}"),
    "mhz": ("MHz", "{:,.0f}"),
    "watts": ("W", "{:.0f}"),
    "idle_mhz": ("MHz idle", "{:,.0f}"),
    "idle_watts": ("W idle", "{:.0f}"),
    "rel_error": (f"error of {OURS}", "{:.1e}"),
}


def table(rows: Sequence[Row]) -> str:
    """Markdown of `rows`, the environment first, then a table for each bench."""
    lines = [_environment(row) for row in rows if row["bench"] == ENVIRONMENT]
    for bench in RATES:
        found = [row for row in rows if row["bench"] == bench]
        found = [row | {"share": share_of_ceiling(row, found)} for row in found]
        if found:
            lines += ["", *_table(bench, found)]
    return "\n".join(lines) + "\n"


def _environment(row: Row) -> str:
    shown = [row["device"], *(f"{name} {row[name]}" for name in ("jax", "torch"))]
    return f"{', '.join(shown)}, commit {row['commit']}"


def _table(bench: str, rows: list[Row]) -> list[str]:
    key, unit = RATES[bench]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        product = _label(row)
        line = tuple(row[k] for k in ("T", "D", "F")) + (product, row["M"], row["N"], row["K"])
        lines.setdefault(line, {})[row["implementation"]] = row
    shown = _WATCHED if bench == "clock" else OURS
    ours = [row for row in rows if row["implementation"] == shown]
    beside = {k: v for k, v in BESIDE.items() if any(row.get(k) is not None for row in ours)}
    sizes = ["M", "N", "K"] if bench == "gemm" else []
    header = ["T, D, F", "product", *sizes, *names, *(title for title, _ in beside.values())]
    notes: dict[str, int] = {}
    body = []
    for (*dims, product, m, n, k), found in lines.items():
        cells = [", ".join(map(str, dims)), product, *map(str, [m, n, k][: len(sizes)])]
        cells += [_cell(found.get(name), key, notes) for name in names]
        mine = found.get(shown, {})
        cells += [_number(mine.get(k), form) for k, (_, form) in beside.items()]
        body.append(cells)
    found = [f"{bench}: {unit} (ms)", "", *_aligned(header, body)]
    if bench == "gemm":
        found += _means(lines.values())
    elif bench == "ffn":
        found += _means(
            contenders
            for (*_, product, _, _, _), contenders in lines.items()
            if product.startswith("ffn both")
        )
    return found + [line for note, i in notes.items() for line in ("", f"[{i}] {note}")]


def _label(row: Row) -> str:
    """The product, with what else tells lines of one shape apart."""
    source = row.get("source", SYNTHETIC)
    more = [
        row.get("pass"),
        row.get("model"),
        row.get("mesh"),
        None if source == SYNTHETIC else f"({source})",
    ]
    return " ".join(filter(None, [row["product"], *more]))


def _means(lines: Iterable[dict[str, Row]]) -> list[str]:
    """How much faster ours is than each contender: geometric means over the lines of a table."""
    ratios: dict[str, list[float]] = {}
    for found in lines:
        ours = found.get(OURS, {}).get("ms")
        for name, row in found.items():
            if name != OURS and ours and row["ms"]:
                ratios.setdefault(name, []).append(row["ms"] / ours)
    means = [
        f"{OURS} : {name} {statistics.geometric_mean(found):.3f} ({len(found)})"
        for name, found in ratios.items()
    ]
    return ["", f"Geometric means (of how many): {', '.join(means)}"] if means else []


def _cell(row: Row | None, key: str, notes: dict[str, int]) -> str:
    if row is None:
        return ""
    rate = "" if row[key] is None else _rate(row[key])
    ms = "" if row["ms"] is None else f"({row['ms']:.3f})"
    note = f"[{notes.setdefault(row['note'], len(notes) + 1)}]" if row["note"] else ""
    return " ".join(filter(None, [rate, ms, note]))


def _rate(value: float) -> str:
    """Four digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 1e4 else f"{value:,.4g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _aligned(header: list[str], body: list[list[str]]) -> list[str]:
    """Markdown's table, to be read as text as well; the first two columns are words."""
    widths = [max(3, *map(len, column)) for column in zip(header, *body, strict=True)]
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for cells in (header, rule, *body):
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return lines
