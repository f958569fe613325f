"""Which tile and walk the CUDA kernel takes for a product: the tuned table, and a rule beyond it.

`tuned.json` holds what `python -m experiments.bench gemm --tune` found fastest on an H200.
"""

import functools
import json
import math
import pathlib
from typing import NamedTuple

TABLE = pathlib.Path(__file__).with_name("tuned.json")


class Tile(NamedTuple):
    """What one cluster of two blocks multiplies at a time."""

    rows: int
    columns: int


# In the order of the kernel's numbers for them.
TILES = (Tile(512, 192), Tile(256, 256))


class Schedule(NamedTuple):
    """How the kernel walks a product.

    Attributes:
      tile: index into TILES.
      group: row tiles that are walked together, so that they share B's columns in the L2 cache.
    """

    tile: int
    group: int


DEFAULT = Schedule(tile=0, group=8)
VARIANTS = tuple(Schedule(tile, group) for tile in range(len(TILES)) for group in (4, 8, 16))

Key = tuple[int, int, int, bool]  # M, N, K, and whether B's rows are taken in strided groups


def load() -> dict[Key, Schedule]:
    """The tuned table."""
    entries = json.loads(TABLE.read_text())
    return {
        (e["M"], e["N"], e["K"], e["strided"]): Schedule(e["tile"], e["group"]) for e in entries
    }


def save(entries: dict[Key, Schedule]) -> None:
    """Writes the tuned table, one line an entry."""
    lines = [
        json.dumps(dict(zip(("M", "N", "K", "strided"), key, strict=True)) | schedule._asdict())
        for key, schedule in sorted(entries.items())
    ]
    TABLE.write_text("[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]\n")
    _table.cache_clear()


def schedule_for(m: int, n: int, k: int, strided: bool) -> Schedule:
    """The tuned schedule of this product or, where there is none, of the most similar one."""
    table = _table()
    if not table:
        return DEFAULT

    def distance(key: Key) -> float:
        pairs = zip(key[:3], (m, n, k), strict=True)
        sizes = sum(abs(math.log(a / max(b, 1))) for a, b in pairs)
        return sizes + (key[3] != strided)

    return table[min(table, key=distance)]


@functools.cache
def _table() -> dict[Key, Schedule]:
    return load()
