"""Which schedule a product gets: the tuned table, and the rule beyond it."""

import json

import pytest

from s24jax.ops.matmul24 import tuning
from s24jax.ops.matmul24.tuning import DEFAULT, TILES, VARIANTS, Schedule

A, B, C = Schedule(0, 4), Schedule(1, 8), Schedule(1, 16)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table instead of the one that is installed."""
    path = tmp_path / "tuned.json"
    path.write_text("[]\n")
    monkeypatch.setattr(tuning, "TABLE", path)
    tuning._table.cache_clear()
    yield path
    tuning._table.cache_clear()


def test_what_is_saved_comes_back(table):
    entries = {(8192, 2048, 16384, True): B, (64, 32, 128, False): A}
    tuning.save(entries)
    assert tuning.load() == entries
    tuning.save(tuning.load() | {(64, 32, 128, False): C})
    assert tuning.load() == entries | {(64, 32, 128, False): C}
    tuning.save({})
    assert tuning.load() == {}


def test_a_line_for_each_entry_in_their_order(table):
    """So that a difference between two tables can be read."""
    tuning.save({(8192, 2048, 16384, True): B, (64, 32, 128, False): A})
    assert table.read_text() == (
        "[\n"
        '  {"M": 64, "N": 32, "K": 128, "strided": false, "tile": 0, "group": 4},\n'
        '  {"M": 8192, "N": 2048, "K": 16384, "strided": true, "tile": 1, "group": 8}\n'
        "]\n"
    )


def test_the_default_where_nothing_is_tuned(table):
    assert tuning.schedule_for(8192, 2048, 16384, False) == DEFAULT
    assert DEFAULT in VARIANTS


def test_the_tuned_one_where_there_is_one(table):
    tuning.save({(64, 32, 128, False): A, (64, 32, 128, True): B, (64, 128, 32, False): C})
    assert tuning.schedule_for(64, 32, 128, False) == A
    assert tuning.schedule_for(64, 32, 128, True) == B
    assert tuning.schedule_for(64, 128, 32, False) == C


def test_a_product_without_rows_has_a_schedule(table):
    tuning.save({(64, 32, 128, False): A})
    assert tuning.schedule_for(0, 32, 128, False) == A


def test_a_table_that_is_saved_counts_at_once(table):
    tuning.save({(64, 32, 128, False): A})
    assert tuning.schedule_for(64, 32, 128, False) == A
    tuning.save({(64, 32, 128, False): B})
    assert tuning.schedule_for(64, 32, 128, False) == B


@pytest.mark.parametrize(
    "product, nearest",
    [
        ((1000, 1000, 900, False), A),
        ((1000, 4000, 1000, False), B),
        ((100_000, 4000, 1000, False), B),
        ((1000, 1900, 1000, False), A),  # by ratio, not by difference
        ((1000, 2100, 1000, False), B),
        ((1000, 1000, 1000, True), A),  # B is four times as wide, the grouping weighs less
        ((1000, 4000, 1000, True), B),
        ((5000, 1000, 5000, True), C),
    ],
)
def test_else_that_of_the_most_similar_product(table, product, nearest):
    tuning.save(
        {(1000, 1000, 1000, False): A, (1000, 4000, 1000, False): B, (8000, 1000, 8000, True): C}
    )
    assert tuning.schedule_for(*product) == nearest


def test_the_grouping_decides_between_equal_sizes(table):
    tuning.save({(1000, 1000, 1000, False): A, (1000, 1000, 1000, True): B})
    assert tuning.schedule_for(999, 1001, 1000, False) == A
    assert tuning.schedule_for(999, 1001, 1000, True) == B


def test_variants_are_distinct_and_of_tiles_that_exist():
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert {schedule.tile for schedule in VARIANTS} == set(range(len(TILES)))


def test_the_table_that_is_installed():
    entries = json.loads(tuning.TABLE.read_text())
    assert len(tuning.load()) == len(entries), "a product stands twice"
    assert set(tuning.load().values()) <= set(VARIANTS)
    for m, n, k, strided in tuning.load():
        assert min(m, n, k) > 0 and isinstance(strided, bool)
