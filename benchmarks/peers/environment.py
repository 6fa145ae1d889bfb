"""A virtual environment for each peer, and a process inside it that answers requests.

Peers pin versions that conflict with each other and with ours, so each gets a separate environment,
made from the package index on first use and kept in `benchmarks/.peers/`. Separate processes also
separate memory; and since a process stays alive and measures once per request, timings of programs
in different environments can alternate. POSIX only: `select` on a pipe limits the wait for an
answer.
"""

import contextlib
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).parents[2]
CACHE = ROOT / "benchmarks" / ".peers"
# Limits in seconds for pip, for git, and for an answer.
INSTALLING, CLONING, ANSWERING = 1800.0, 300.0, 900.0


class PeerError(Exception):
    """A peer does not install, or fails at a request; the text says why."""


def python_of(requirements: Sequence[str]) -> Path:
    """The interpreter of an environment that holds exactly these requirements.

    Raises `PeerError` with the reason, usually pip's last lines, if that fails.
    """
    digest = hashlib.sha256(" ".join([sys.version, *requirements]).encode()).hexdigest()[:8]
    directory = CACHE / f"{requirements[0].split('=')[0]}-{digest}"
    python = directory / "bin" / "python"
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


def clone_of(url: str, commit: str) -> Path:
    """Clones a program that is on no package index, at this commit.

    Raises `PeerError` with git's last line if that fails.
    """
    directory = CACHE / f"{Path(url).stem}-{commit[:8]}"
    if (directory / "cloned").exists():
        return directory
    print(f"  (cloning {url})", file=sys.stderr, flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(exist_ok=True)
    commands = [
        ["git", "clone", "--quiet", url, directory],
        ["git", "-C", directory, "checkout", "--quiet", commit],
    ]
    try:
        for command in commands:
            subprocess.run(command, capture_output=True, text=True, timeout=CLONING, check=True)
    except subprocess.TimeoutExpired:
        reason = f"git takes more than {CLONING:.0f} s"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.splitlines() or ["git gave no reason"])[-1]
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        (directory / "cloned").touch()
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    raise PeerError(f"cannot be cloned: {reason}")


class Worker:
    """A script of `workers/` in its own process, asked by lines of JSON (see `worker.serve`)."""

    def __init__(self, script: str, requirements: Sequence[str] = (), **environment: str) -> None:
        """Without requirements it is ours: this interpreter runs it, and it can import gradhpo.

        A failure of ours is a bug, raised as `RuntimeError`; a failure of a peer is a `PeerError`,
        reported in the table.
        """
        self._requirements = requirements
        self._raises = PeerError if requirements else RuntimeError
        self._ended = ""  # the reason, once it has ended
        python = python_of(requirements) if requirements else Path(sys.executable)
        settings = {**os.environ, **environment}
        # A program cached by an earlier run would hide the compilation time.
        settings.pop("JAX_COMPILATION_CACHE_DIR", None)
        # A peer must not find our packages before its own.
        settings["PYTHONPATH"] = "" if requirements else str(ROOT)
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        try:
            self._process = subprocess.Popen(
                [python, WORKERS / script], env=settings, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        except OSError as error:
            raise self._raises(f"does not start: {error}") from error

    def ask(self, do: str, *, limit: float = ANSWERING, **request: Any) -> Any:
        """The answer to one request, or the last line of the worker's error as an exception.

        A worker without an answer after `limit` seconds is killed.
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
        """Everything up to the end of a line, or of the process.

        Read from the descriptor, since `select` does not know what the file object has buffered.
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
        """The exit code of a process that is ending; one that only closed its pipe is killed."""
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return (self._errors.read().splitlines() or ["no reason given"])[-1]

    def versions(self) -> list[str]:
        """Name and version of each requirement."""
        required = [text for text in self._requirements if not text.startswith("--")]
        names = [text.replace("@", "=").split("=")[0].strip() for text in required]
        return self.ask("versions", names=names)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class Loadable(Protocol):
    """A task that a script can `load`, by its name and a file with its arrays."""

    @property
    def name(self) -> str: ...

    def save(self, path: Path) -> None: ...


class Workers:
    """A worker for each library that has loaded every task, or the reason why there is none."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        scripts: Mapping[str, tuple[str, Sequence[str]]],
        tasks: Sequence[Loadable],
        **environment: str,
    ) -> None:
        """Each of `scripts` is that of a library, with its requirements; `stack` ends them."""
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = {task.name: directory / f"{i}.npz" for i, task in enumerate(tasks)}
        for task in tasks:
            task.save(paths[task.name])
        self._workers: dict[str, Worker] = {}
        self._missing: dict[str, str] = {}
        for library, (script, requirements) in scripts.items():
            try:
                worker = stack.enter_context(Worker(script, requirements, **environment))
                for name, path in paths.items():
                    worker.ask("load", name=name, path=str(path))
                self._workers[library] = worker
            except PeerError as reason:
                self._missing[library] = str(reason)

    def ask(self, library: str, do: str, **request: Any) -> Any:
        if library in self._missing:
            raise PeerError(self._missing[library])
        return self._workers[library].ask(do, **request)
