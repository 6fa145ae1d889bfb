"""What every script in a peer's environment is made of; it needs nothing but Python.

A script defines functions and ends with `serve(name=function, ...)`. Each line that comes in is
`{"do": name, ...keywords}`, each line that goes out `{"answer": ...}` or `{"error": ...}`.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


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


def versions(names: list[str]) -> list[str]:
    """`name version` of those of these packages that are installed here."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, which must not return before its result is there."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def resident_mib(which: str = "VmRSS") -> float | None:
    """Memory of this process in MiB: `VmRSS` now, `VmHWM` the most so far.

    `None` where the system does not tell, off Linux say.
    """
    try:
        with open("/proc/self/status") as status:
            found = [line for line in status if line.startswith(which + ":")]
    except OSError:
        return None
    return int(found[0].split()[1]) / 1024 if found else None
