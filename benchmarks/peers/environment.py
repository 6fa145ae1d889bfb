"""Where peers live: a virtual environment for each, and a process that answers requests.

Peers pin versions that do not go together with each other or with ours, so each has an
environment of its own, made from the package index on first use and kept in `benchmarks/.peers/`.
A process of its own for each program also keeps memory apart; and since it stays alive and measures
once for each request, programs in different environments can be timed by turns.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
CACHE = HERE.parent / ".peers"


class PeerError(Exception):
    """A peer does not install, or does not do what it was asked; the text says why."""


def python_of(requirements: Sequence[str]) -> Path:
    """The interpreter of an environment that holds exactly these requirements.

    Raises `PeerError` with pip's last lines where they cannot be installed.
    """
    digest = hashlib.sha256(" ".join([sys.version, *requirements]).encode()).hexdigest()[:8]
    directory = CACHE / f"{requirements[0].split('=')[0]}-{digest}"
    python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
    if (directory / "installed").exists():
        return python
    print(f"  (installing {', '.join(requirements)})", file=sys.stderr, flush=True)
    venv.create(directory, clear=True, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(directory)
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "rror:" in line]
        raise PeerError("does not install: " + " / ".join(lines[-2:] or ["pip gave no reason"]))
    (directory / "installed").touch()
    return python


class Worker:
    """A script of this folder in its own process, asked by lines of JSON (see `worker.serve`)."""

    def __init__(
        self, script: str, requirements: Sequence[str] = (), **environment: str | None
    ) -> None:
        """Without requirements it is this interpreter that runs it, with gradhpo at hand.

        A variable of the environment that is `None` is taken away.
        """
        python = python_of(requirements) if requirements else Path(sys.executable)
        settings = {
            **os.environ,
            # Each block of memory beyond 64 KiB is given back when it is freed, so that what a
            # computation adds to the process is what it holds at once.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            **environment,
        }
        # A peer must not find our packages before its own.
        settings["PYTHONPATH"] = "" if requirements else str(HERE.parents[1])
        settings = {name: value for name, value in settings.items() if value is not None}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, HERE / script], env=settings, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def ask(self, do: str, **request: Any) -> Any:
        """The answer to one request; `PeerError` with the last line of the peer's error."""
        requests, answers = self._process.stdin, self._process.stdout
        try:
            requests.write(json.dumps({"do": do, **request}) + "\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().splitlines() or ["no reason given"])[-1]
            raise PeerError(f"ended with {self._process.wait()} when asked to {do}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["answer"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
