"""Which tokens share a group of four in the weight gradients.

Neighbouring tokens fire the same features, so a group of neighbours loses more than two non-zeros
often. Only the membership matters: a sum over tokens does not care about their order, so nothing is
ever permuted in memory; a grouping is a rule that kernels follow when they load rows.
"""

import dataclasses
from typing import Literal, get_args

import numpy as np

from s24jax.errors import InvalidInput

Kind = Literal["strided", "adjacent", "random"]


@dataclasses.dataclass(frozen=True)
class TokenGrouping:
    """A rule that puts T tokens (a multiple of 4) into T/4 groups.

    strided    group j holds tokens j, j + T/4, j + 2T/4, j + 3T/4
    adjacent   group j holds tokens 4j, 4j + 1, 4j + 2, 4j + 3
    random     a permutation drawn once from `seed`, cut into fours

    Source: arXiv 2503.16672, section 4 (token permutation); the strided form is ours.
    """

    kind: Kind = "strided"
    seed: int = 0

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise InvalidInput(
                f"token grouping {self.kind!r} does not exist; "
                f"use one of {', '.join(get_args(Kind))}"
            )
        if self.seed < 0:
            raise InvalidInput(f"grouping_seed={self.seed} is negative; use 0 or more")

    def order(self, tokens: int) -> np.ndarray:
        """Token indices [T] in group order: group j is `order[4*j : 4*j + 4]`."""
        if tokens % 4:
            raise InvalidInput(f"{tokens} tokens do not form groups of 4; pad to a multiple of 4")
        if self.kind == "strided":
            return np.arange(tokens).reshape(4, tokens // 4).T.ravel()
        if self.kind == "adjacent":
            return np.arange(tokens)
        return np.random.default_rng(self.seed).permutation(tokens)


ADJACENT = TokenGrouping("adjacent")
