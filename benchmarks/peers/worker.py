"""What every script in a peer's environment is made of; it needs nothing but Python.

A script defines functions and ends with `serve(name=function, ...)`. Each line that comes in is
`{"do": name, ...keywords}`, each line that goes out `{"answer": ...}` or `{"error": ...}`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(**functions: Callable[..., Any]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": functions[request.pop("do")](**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, which must not return before its result is there."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def resident_mib(which: str = "VmRSS") -> float:
    """Memory of this process in MiB: `VmRSS` now, `VmHWM` the most so far (Linux)."""
    with open("/proc/self/status") as status:
        found = next(line for line in status if line.startswith(which + ":"))
    return int(found.split()[1]) / 1024


def peak_mib(function: Callable[[], Any]) -> float:
    """The most memory in MiB that a call holds beyond what was resident before it (Linux)."""
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # VmHWM starts again from what is resident now
    before = resident_mib()
    function()
    return resident_mib("VmHWM") - before
