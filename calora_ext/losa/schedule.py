"""What each of the prunings of a run asks for: sparsity, share of the optimiser's steps, sum of ranks. Prunings count from 1."""

from __future__ import annotations

import math

from ..errors import CaloraError
from ..pruning import NofM, parse

SCHEDULES = ("cubic", "linear")
LAST_SHARE = 0.6  # of the steps, after the last pruning; published: 750 of 1250


def sparsity_at(sparsity: str | float, pruning: int, prunings: int, schedule: str = "cubic") -> str | float:
    """How sparse the model is after a pruning: S - S (1 - t/T)^3, or S t/T.

    Of n:m as many of every m are kept as that sparsity allows, rounded, so that 2:4 starts with 3:4. The last is what was asked for.
    """
    final = parse(sparsity)
    done = pruning / prunings
    share = 1 - (1 - done) ** 3 if schedule == "cubic" else done
    if pruning == prunings:
        return sparsity
    if isinstance(final, NofM):
        keep = max(final.keep, round(final.of - share * (final.of - final.keep)))
        return 0.0 if keep == final.of else str(NofM(keep, final.of))
    return share * final


def steps_at(steps: int, pruning: int, prunings: int) -> int:
    """Optimiser steps after a pruning: the last gets 60 % of them, as published, the others share the rest evenly."""
    if prunings == 1:
        return steps
    before = steps - math.ceil(LAST_SHARE * steps)
    if pruning == prunings:
        return steps - before
    return before * pruning // (prunings - 1) - before * (pruning - 1) // (prunings - 1)


def rank_at(rank: float, growth: float, pruning: int, prunings: int) -> float:
    """Mean rank after a pruning: growing by `growth` each time, `rank` halfway; published: 6, 7, 8, 9, 10. At least 1."""
    return max(1.0, rank + growth * (pruning - (prunings + 1) / 2))


def check(prunings: int, schedule: str, rank: int, growth: float) -> None:
    """Raises CaloraError for settings without meaning."""
    for name, value in (("prunings", prunings), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CaloraError(f"{name} must be a whole number of at least 1, got {value!r}")
    if schedule not in SCHEDULES:
        raise CaloraError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if isinstance(growth, bool) or not isinstance(growth, int | float) or not 0 <= growth < math.inf:
        raise CaloraError(f"rank_growth must be a number of at least 0, got {growth!r}")
