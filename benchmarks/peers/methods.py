"""Serves methods that make a function for a setting: its result, its seconds, its memory."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

from worker import seconds, serve


def serve_methods(
    load: Callable[[str, str], Any],
    methods: dict[str, Callable[..., Callable]],
    most_mib: Callable[[Callable], float],
) -> None:
    """`load(path, dtype)` makes the problem, `methods[name](problem, **setting)` a function of it.

    That function takes nothing and returns a flat array which is there when it returns;
    `most_mib(function)` is what the arrays of a call hold at once, at most.
    """
    problems: list[Any] = []

    def start(path: str, dtype: str) -> None:
        problems[:] = [load(path, dtype)]
        made.cache_clear()
        memory.cache_clear()

    @functools.cache
    def made(method: str, **setting: Any) -> Callable:
        function = methods[method](problems[0], **setting)
        function()  # what happens once, compilation say, is no part of what is measured
        return function

    def result(**request: Any) -> list[float]:
        return [float(x) for x in made(**request)()]

    def timed(calls: int, **request: Any) -> float:
        function = made(**request)
        function()  # the caches and the cores were another program's until now
        return statistics.median(seconds(function) for _ in range(calls))

    @functools.cache
    def memory(**request: Any) -> float:
        return most_mib(made(**request))

    serve(start=start, result=result, timed=timed, memory=memory)
