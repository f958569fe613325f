"""Tokens per second, by a clock that moves when told to."""

import types

import pytest

from s24jax import meter
from s24jax.meter import Meter


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter, "time", types.SimpleNamespace(perf_counter=clock))
    return clock


def take(clock, counter, key, seconds, steps=1):
    """`steps` steps of `key` that take `seconds`."""
    started = clock()
    clock.passes(seconds)
    counter.add(key, started, steps=steps)


def test_the_first_step_of_each_key():
    counter = Meter(100)
    assert counter.is_first("dense")
    assert not counter.is_first("dense")
    assert counter.is_first(("main", "sparse24"))
    assert not counter.is_first("dense")
    assert not counter.is_first(("main", "sparse24"))
    counter.read()
    assert not counter.is_first("dense"), "once, not once per reading"
    assert Meter(100).is_first("dense"), "each meter has its own"


def test_steps_over_seconds(clock):
    counter = Meter(100)
    take(clock, counter, "dense", 0.5)
    take(clock, counter, "dense", 1.5)
    assert counter.read() == {"dense": 100.0}


def test_a_mean_over_time_and_not_of_rates(clock):
    counter = Meter(120)
    take(clock, counter, "dense", 1.0)
    take(clock, counter, "dense", 3.0, steps=2)
    assert counter.read() == {"dense": 90.0}


def test_keys_are_apart(clock):
    counter = Meter(10)
    take(clock, counter, "dense", 2.0)
    take(clock, counter, "sparse24", 0.5)
    take(clock, counter, "dense", 2.0)
    assert counter.read() == {"dense": 5.0, "sparse24": 20.0}


def test_time_between_the_steps_is_never_seen(clock):
    counter = Meter(10)
    clock.passes(50)
    take(clock, counter, "dense", 1.0)
    clock.passes(50)
    take(clock, counter, "dense", 1.0)
    clock.passes(50)
    assert counter.read() == {"dense": 10.0}


def test_time_without_a_step_is_added_to_its_key(clock):
    """Waiting for the results of steps that were only sent off before."""
    counter = Meter(10)
    take(clock, counter, "dense", 0.5)
    take(clock, counter, "dense", 0.5)
    take(clock, counter, "dense", 3.0, steps=0)
    assert counter.read() == {"dense": 5.0}


def test_a_key_without_a_step_has_no_rate(clock):
    counter = Meter(10)
    take(clock, counter, "dense", 3.0, steps=0)
    assert counter.read() == {}
    take(clock, counter, "dense", 1.0)
    assert counter.read() == {"dense": 10.0}, "since the last call"


def test_reading_starts_anew(clock):
    counter = Meter(10)
    assert counter.read() == {}
    take(clock, counter, "dense", 4.0)
    take(clock, counter, "sparse24", 4.0)
    assert counter.read() == {"dense": 2.5, "sparse24": 2.5}
    take(clock, counter, "dense", 1.0)
    assert counter.read() == {"dense": 10.0}, "of the keys with a step since the last call"
    assert counter.read() == {}
