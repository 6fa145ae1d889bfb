"""The loop of every script in this folder; needs only Python.

A script defines functions and ends with `serve(name=function, ...)`. Each line of input is
`{"do": name, ...keywords}`, each line of output `{"answer": ...}` or `{"error": ...}`.
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
    os.dup2(2, 1)  # keeps the libraries' output apart from the answers
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
    """Serves a problem's methods: a call's result, its wall-clock or CPU seconds, and its memory.

    `load(path, dtype)` makes the problem; `methods[name](problem, **setting)` makes a function
    without arguments that returns a flat array when it is ready; `peak_mib(function)` is the peak
    memory of a call's arrays.
    """
    problems: list[Any] = []

    def start(path: str, dtype: str) -> None:
        problems.append(load(path, dtype))

    @functools.cache
    def made(method: str, **setting: Any) -> Callable:
        function = methods[method](problems[0], **setting)
        function()  # do not measure one-time work such as compilation
        return function

    def result(**request: Any) -> list[float]:
        return [float(x) for x in made(**request)()]

    def timed(calls: int, **request: Any) -> float:
        function = made(**request)
        function()  # caches and cores belonged to another program until now
        return statistics.median(seconds(function) for _ in range(calls))

    def processor(**request: Any) -> float:
        """CPU seconds of a call, over all threads: other programs do not count."""
        function = made(**request)
        start = time.process_time()
        function()
        return time.process_time() - start

    @functools.cache
    def memory(**request: Any) -> float:
        return peak_mib(made(**request))

    serve(start=start, result=result, timed=timed, processor=processor, memory=memory)


def versions(names: list[str]) -> list[str]:
    """`name version` of each of these packages that is installed."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def seconds(function: Callable[[], Any]) -> float:
    """The time of one call, which must not return before its result is ready."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def settled_seconds(
    function: Callable[[], Any], clock: Callable[[Callable[[], Any]], float] = seconds
) -> float:
    """Seconds of one call; if short, of three more, since another program had the caches."""
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
