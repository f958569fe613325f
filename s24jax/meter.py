"""Tokens per second of the training steps alone."""

import time
from collections import defaultdict


class Meter:
    """Adds up the time of steps, keyed by what was compiled for them.

    The first step of each key compiles and is left out. Time spent between `add` calls (validation,
    probes, saving) is never seen.
    """

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._compiled: set = set()
        self._seconds: dict = defaultdict(float)
        self._steps: dict = defaultdict(int)

    def is_first(self, key) -> bool:
        """Whether the next step of `key` compiles; true once per key."""
        first = key not in self._compiled
        self._compiled.add(key)
        return first

    def add(self, key, since: float, *, steps: int = 0) -> None:
        """Counts the time since `since` (`time.perf_counter`) and `steps` steps of `key`."""
        self._seconds[key] += time.perf_counter() - since
        self._steps[key] += steps

    def read(self) -> dict:
        """Tokens per second of each key with a counted step since the last call."""
        rates = {
            key: self._tokens_per_step * steps / self._seconds[key]
            for key, steps in self._steps.items()
            if steps
        }
        self._seconds.clear()
        self._steps.clear()
        return rates
