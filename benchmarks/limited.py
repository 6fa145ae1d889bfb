"""Processes with a time limit each, and a clock for all of them together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


HOME = Path(__file__).parents[1]


class Clock:
    """Counts down `minutes` from its creation."""

    def __init__(self, minutes: float):
        self._start, self._seconds = time.monotonic(), 60 * minutes

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time has passed."""
        return self._start + share * self._seconds - time.monotonic()


class Ended(NamedTuple):
    """The output of a process, and why it failed (empty if it did not)."""

    stdout: str
    failure: str


def python(*arguments: str, limit: float, **environment: str) -> Ended:
    """`python *arguments`, killed after `limit` seconds with all of its child processes."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=HOME, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _kill(process)
        return Ended(process.communicate()[0], f"stopped after {limit:.0f} s")
    finally:
        _kill(process)
    if process.returncode == 0:
        return Ended(stdout, "")
    said = (stderr.strip().splitlines() or [""])[-1]
    if process.returncode > 0 and said:
        return Ended(stdout, said)
    return Ended(stdout, f"ended with {process.returncode} {said}".strip())


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
