"""What the clock says: ratios within one process, medians of alternating runs."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.peers.worker import seconds


class Compared(NamedTuple):
    """Median seconds of each, and median and quartiles of the ratios within a pair."""

    first: float
    second: float
    ratio: float
    low: float
    high: float


def by_turns(first: Callable[[], float], second: Callable[[], float], repeats: int) -> Compared:
    """Compares what two functions return, seconds as a rule, calling them by turns."""
    first(), second()
    measured: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        for which in order:
            measured[which].append((first, second)[which]())
    ratios = [a / b for a, b in zip(*measured, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Compared(*map(statistics.median, measured), middle, low, high)


def alternating(first: Callable, second: Callable, repeats: int) -> Compared:
    """Times both by turns."""
    return by_turns(lambda: seconds(first), lambda: seconds(second), repeats)
