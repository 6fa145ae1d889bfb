"""The loop of every script in this folder; it needs nothing but Python.

A script defines functions and ends with `serve(name=function, ...)`. Each line that comes in is
`{"do": name, ...keywords}`, each line that goes out `{"answer": ...}` or `{"error": ...}`.
"""

import functools
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


SHORT = 0.2  # seconds


def serve(**functions: Callable[..., Any]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    functions = {"versions": versions, **functions}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": functions[request.pop("do")](**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def serve_methods(
    load: Callable[[str, str], Any],
    methods: dict[str, Callable[..., Callable]],
    peak_mib: Callable[[Callable], float],
) -> None:
    """Serves methods of a problem: the result of a call, its seconds by the clock or of a
    processor, and its memory.

    `load(path, dtype)` makes the problem, `methods[name](problem, **setting)` a function without
    arguments, which returns a flat array once that is there; `peak_mib(function)` is the memory
    that the arrays of a call hold at once, at most.
    """
    problems: list[Any] = []

    def start(path: str, dtype: str) -> None:
        problems.append(load(path, dtype))

    @functools.cache
    def made(method: str, **setting: Any) -> Callable:
        function = methods[method](problems[0], **setting)
        function()  # what happens only once, such as compilation, is not measured
        return function

    def result(**request: Any) -> list[float]:
        return [float(x) for x in made(**request)()]

    def timed(calls: int, **request: Any) -> float:
        function = made(**request)
        function()  # until now caches and cores belonged to another program
        return statistics.median(seconds(function) for _ in range(calls))

    def processor(**request: Any) -> float:
        """Seconds of a processor that a call takes, of all threads: other programs do not count."""
        function = made(**request)
        start = time.process_time()
        function()
        return time.process_time() - start

    @functools.cache
    def memory(**request: Any) -> float:
        return peak_mib(made(**request))

    serve(start=start, result=result, timed=timed, processor=processor, memory=memory)


def versions(names: list[str]) -> list[str]:
    """`name version` of each of these packages that is installed here."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def seconds(function: Callable[[], Any]) -> float:
    """The time of one call, which must not return before its result is there."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def settled_seconds(
    function: Callable[[], Any], clock: Callable[[Callable[[], Any]], float] = seconds
) -> float:
    """Seconds of one call; of three more if it is short, as caches belonged to another program."""
    once = clock(function)
    return once if once > SHORT else statistics.median(clock(function) for _ in range(3))


def resident_mib(which: str = "VmRSS") -> float | None:
    """Memory of this process in MiB: `VmRSS` now, `VmHWM` the peak; `None` off Linux."""
    try:
        with open("/proc/self/status") as status:
            found = [line for line in status if line.startswith(which + ":")]
    except OSError:
        return None
    return int(found[0].split()[1]) / 1024 if found else None
