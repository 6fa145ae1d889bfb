"""Where peers live: a virtual environment for each, and a process that answers requests.

Peers pin versions that do not go together with each other or with ours, so each has an
environment of its own, made from the package index on first use and kept in `benchmarks/.peers/`.
A process of its own for each program also keeps memory apart; and since it stays alive and measures
once for each request, programs in different environments can be timed by turns. POSIX only: the
wait for an answer has a limit by `select` on a pipe.
"""

import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
CACHE = HERE.parent / ".peers"
INSTALLING, ANSWERING = 1800.0, 900.0  # seconds, after which pip or a peer is thought to hang


class PeerError(Exception):
    """A peer does not install, or does not do what it was asked; the text says why."""


def python_of(requirements: Sequence[str]) -> Path:
    """The interpreter of an environment that holds exactly these requirements.

    Raises `PeerError` with the reason, pip's last lines as a rule, where it cannot be made.
    """
    digest = hashlib.sha256(" ".join([sys.version, *requirements]).encode()).hexdigest()[:8]
    directory = CACHE / f"{requirements[0].split('=')[0]}-{digest}"
    python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
    if (directory / "installed").exists():
        return python
    print(f"  (installing {', '.join(requirements)})", file=sys.stderr, flush=True)
    command = [python, "-m", "pip", "install", "--quiet", *requirements]
    try:
        venv.create(directory, clear=True, with_pip=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALLING)
        if not done.returncode:
            (directory / "installed").touch()
            return python
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "rror:" in line]
        reason = " / ".join(lines[-2:] or ["pip gave no reason"])
    except subprocess.TimeoutExpired:
        reason = f"pip takes more than {INSTALLING:.0f} s"
    except (subprocess.CalledProcessError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
    shutil.rmtree(directory, ignore_errors=True)
    raise PeerError(f"does not install: {reason}")


class Worker:
    """A script of this folder in its own process, asked by lines of JSON (see `worker.serve`)."""

    def __init__(
        self,
        script: str,
        requirements: Sequence[str] = (),
        raises: type[Exception] = PeerError,
        **environment: str | None,
    ) -> None:
        """Without requirements it is this interpreter that runs it, with gradhpo at hand.

        A variable of the environment that is `None` is taken away. What goes wrong is `raises`:
        ours may be given another one than what is caught for the peers.
        """
        self._requirements = requirements
        self._raises = raises
        self._ended = ""  # why it answers no more
        python = python_of(requirements) if requirements else Path(sys.executable)
        # A program that was compiled by an earlier run would hide what compiling takes.
        settings = {**os.environ, "JAX_COMPILATION_CACHE_DIR": None, **environment}
        # A peer must not find our packages before its own.
        settings["PYTHONPATH"] = "" if requirements else str(HERE.parents[1])
        settings = {name: value for name, value in settings.items() if value is not None}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        try:
            self._process = subprocess.Popen(
                [python, HERE / script], env=settings, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        except OSError as error:
            raise raises(f"does not start: {error}") from error

    def ask(self, do: str, *, limit: float = ANSWERING, **request: Any) -> Any:
        """The answer to one request, or the last line of the peer's error as an exception.

        A peer without an answer after `limit` seconds is ended.
        """
        if self._ended:
            raise self._raises(self._ended)
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._line(limit))
        except TimeoutError:
            self._process.kill()
            self._ended = f"gave no answer in {limit:.0f} s when asked to {do}"
        except (BrokenPipeError, json.JSONDecodeError):  # nothing came, or half a line
            self._ended = f"ended with {self._code()} when asked to {do}: {self._last_words()}"
        if self._ended:
            raise self._raises(self._ended)
        if "error" in answer:
            raise self._raises(answer["error"])
        return answer["answer"]

    def _line(self, limit: float) -> str:
        """What comes until the end of a line, or of the process.

        Read past the buffer of the pipe's file: `select` knows nothing of what lies in that.
        """
        answers, line = self._process.stdout.fileno(), b""
        end = time.monotonic() + limit
        while not line.endswith(b"\n"):
            left = max(0.0, end - time.monotonic())
            if not select.select([answers], [], [], left)[0]:
                raise TimeoutError
            if not (piece := os.read(answers, 2**16)):
                break
            line += piece
        return line.decode()

    def _code(self) -> int:
        """Of a process that is ending; one that has but closed its pipe is killed."""
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return (self._errors.read().splitlines() or ["no reason given"])[-1]

    def versions(self, *more: str) -> list[str]:
        """Name and version of each requirement, and of the other packages named, if installed."""
        required = [text for text in self._requirements if not text.startswith("--")]
        names = [text.replace("@", "=").split("=")[0].strip() for text in required]
        return self.ask("versions", names=[*dict.fromkeys([*names, *more])])

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
