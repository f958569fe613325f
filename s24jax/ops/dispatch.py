"""What an op's `implementation` resolves to, and why. Says it once; never falls back in silence.

A named implementation that cannot run raises. "auto" takes the first one that can, in the order in
which the op lists them, logs one line with the reason, and leaves it in `choices()` for the run's
record.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

from s24jax.errors import InvalidInput, Unsupported
from s24jax.typing import Implementation

_log = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """One implementation of an op.

    Attributes:
      name: a member of `Implementation`, or a library's name where the op is not ours.
      run: the function, with the signature of the op.
      reason_against: called with the op's arguments; why this implementation cannot take them, or
        None where it can.
    """

    name: str
    run: Callable[..., Any]
    reason_against: Callable[..., str | None] = lambda *args, **kwargs: None


class Choice(NamedTuple):
    """What an op resolved to."""

    op: str
    requested: str
    implementation: str
    reason: str


_choices: dict[Choice, None] = {}


def choices() -> list[Choice]:
    """Every distinct choice that this process has made, in order."""
    return list(_choices)


def resolve(op: str, requested: str, candidates: Sequence[Candidate], *args, **kwargs) -> Candidate:
    """The candidate that runs `op` on these arguments.

    Args:
      op: the op's name, for messages.
      requested: "auto" or the name of an implementation.
      candidates: the implementations that exist, the preferred first.

    Raises:
      InvalidInput: `requested` is no name of an implementation, of this op or in general.
      Unsupported: the named implementation does not exist for this op, or cannot take the case.
    """
    existing = ", ".join(candidate.name for candidate in candidates)
    if requested not in {*get_args(Implementation), *existing.split(", ")}:
        raise InvalidInput(
            f"{op}: implementation {requested!r} does not exist; use 'auto' or one of {existing}"
        )
    reasons = []
    for candidate in candidates:
        if requested not in ("auto", candidate.name):
            continue
        reason = candidate.reason_against(*args, **kwargs)
        if reason is None:
            return _record(op, requested, candidate, reasons, len(candidates))
        reasons.append(f"{candidate.name}: {reason}")
    if requested == "auto":
        raise Unsupported(f"{op}: no implementation can run here ({'; '.join(reasons)})")
    against = "; ".join(reasons) or f"it exists as {existing}"
    raise Unsupported(f"{op}: implementation {requested!r} cannot run ({against}); use 'auto'")


def _record(op, requested, candidate, reasons, existing: int) -> Candidate:
    if requested != "auto":
        reason = "named by the caller"
    else:
        first = "the only implementation" if existing == 1 else "the preferred implementation"
        reason = "; ".join(reasons) or first
    choice = Choice(op, requested, candidate.name, reason)
    if choice not in _choices:
        _choices[choice] = None
        _log.info("%s: %s (%s)", op, candidate.name, reason)
    return candidate
