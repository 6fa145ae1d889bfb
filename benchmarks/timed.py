"""Ratios of times: two alternating programs, medians within pairs."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.peers.workers.worker import seconds


class Compared(NamedTuple):
    """The median of each, and the median and quartiles of ratios within pairs."""

    first: float
    second: float
    ratio: float
    low: float
    high: float


def by_turns(first: Callable[[], float], second: Callable[[], float], repeats: int) -> Compared:
    """Alternates two functions, in changing order, and compares the seconds they return."""
    first(), second()
    pairs = []
    for i in range(repeats):
        if i % 2 == 0:
            pairs.append((first(), second()))
        else:
            b, a = second(), first()
            pairs.append((a, b))
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Compared(a, b, middle, low, high)


def alternating(first: Callable, second: Callable, repeats: int) -> Compared:
    """Times two functions alternately."""
    return by_turns(lambda: seconds(first), lambda: seconds(second), repeats)
