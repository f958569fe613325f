"""The search for cuSPARSELt's fastest algorithm that is right.

Its own search misses the best, and some of its algorithms give wrong results, in some versions not
every time. So every algorithm id is tried with both layouts of B, then, with the better layout, in
every form of split-K, each in a few calls; the fastest go into a final, whose calls are enough for
the GPU's clock to settle. Results are compared with the oracle before and after they are timed.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from s24jax.bench.timing import Clock, Contender, interleave, is_wrong, sample
from s24jax.errors import Unsupported

# Wider than any version's range: torch does not tell its end, and refuses what lies beyond.
IDS = range(128)
# What the versions accept: 2 and more slices before sm_90, -1 ("segment-K") on it. Modes are one
# kernel, two kernels, heuristic, data-parallel, split-K, stream-K; -1 leaves the mode alone.
SPLITS = [(split_k, mode) for split_k in (-1, 2, 4, 8) for mode in (-1, 1, 2, 3, 4, 5, 6)]
# An algorithm whose first timed call is this much slower than the best is not timed again.
HOPELESS = 1.3
CALLS = 3
FINALISTS, FINAL_ROUNDS = 4, 3


class Algorithm(NamedTuple):
    """The arguments of one product."""

    layout: str
    alg_id: int
    split_k: int = 1
    split_k_mode: int = -1

    def __str__(self) -> str:
        split = "" if self.split_k == 1 else f"/{self.split_k}/{self.split_k_mode}"
        return f"{self.alg_id}{split} with B {self.layout}"


class Screening:
    """What the algorithms take so far; `make` turns an algorithm into a contender."""

    def __init__(self, make: Callable[[Algorithm], Contender], *, clock: Clock):
        self._make, self._clock = make, clock
        self.best: Algorithm | None = None
        self.right: dict[Algorithm, float] = {}
        self.wrong: list[Algorithm] = []

    def try_all(self, algorithms: Iterable[Algorithm]) -> None:
        """Times those that the library takes and that are right, in a few calls each."""
        for algorithm in algorithms:
            contender = self._make(algorithm)
            try:
                out = contender.call()
            except RuntimeError:  # torch's word for an id or a split that does not exist here
                continue
            if self._is_right(contender, out):
                self.right[algorithm] = self._time(contender)
            else:
                self.wrong.append(algorithm)

    def fastest(self, number: int) -> list[Algorithm]:
        """Of those that are right."""
        return sorted(self.right, key=self.right.get)[:number]

    def hold_final(self) -> None:
        """Measures the fastest as the bench does; the best is the first that is right again."""
        finalists = {algorithm: self._make(algorithm) for algorithm in self.fastest(FINALISTS)}
        seconds = interleave(finalists, FINAL_ROUNDS, clock=self._clock)
        for algorithm in sorted(seconds, key=seconds.get):
            if self._is_right(finalists[algorithm], finalists[algorithm].call()):
                self.best = algorithm
                return
            del self.right[algorithm]
            self.wrong.append(algorithm)

    def _is_right(self, contender: Contender, out: Any) -> bool:
        right = not is_wrong(contender.error(out))
        contender.spoil(out)  # the next call is likely to write to this memory
        return right

    def _time(self, contender: Contender) -> float:
        seconds = sample(contender, 1, self._clock)
        if seconds > HOPELESS * min(self.right.values(), default=math.inf):
            return seconds
        return sample(contender, CALLS, self._clock)

    def note(self) -> str:
        """Which algorithm it is, and which ones were wrong: id, or id/split-K/mode."""
        wrong = ", ".join(map(str, self.wrong)) or "none"
        return (
            f"algorithm {self.best}, the fastest of {len(self.right)} right ones "
            f"(id/split-K/mode); wrong results, discarded: {wrong}"
        )


def search(
    layouts: Sequence[str],
    make: Callable[[Algorithm], Contender],
    *,
    clock: Clock = time.perf_counter,
) -> Screening:
    """The fastest right algorithm.

    Args:
      layouts: names of B's layouts.
      make: an algorithm's contender; its call raises RuntimeError where the library refuses.
      clock: seconds.

    Raises:
      Unsupported: no algorithm gives a right result.
    """
    screening = Screening(make, clock=clock)
    screening.try_all(Algorithm(layout, alg_id) for layout in layouts for alg_id in IDS)
    if screening.right:
        layout = screening.fastest(1)[0].layout
        accepted = [a for a in (*screening.right, *screening.wrong) if a.layout == layout]
        screening.try_all(
            a._replace(split_k=k, split_k_mode=mode) for a in accepted for k, mode in SPLITS
        )
    while screening.best is None and screening.right:
        screening.hold_final()
    if screening.best is None:
        raise Unsupported(
            f"cuSPARSELt: none of its {len(screening.wrong)} algorithms gives a right result"
        )
    return screening
