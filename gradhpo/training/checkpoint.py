"""Checkpoints of a run: how often, how many, and the directory that holds them."""

import contextlib
import dataclasses
import io
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import PyTree

from gradhpo.core.state import METRICS, BilevelState
from gradhpo.training.callbacks import Callbacks
from gradhpo.training.checkpoint_file import (
    is_checkpoint,
    leaves_of,
    read_file,
    read_tree,
    write_file,
)
from gradhpo.training.history import History
from gradhpo.training.metrics_file import MetricsFile
from gradhpo.utils.description import differences
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked, warn


try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


_NAME = re.compile(r"step-\d{10}\.ckpt")


@checked
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where `run` keeps checkpoints, how often it writes one, and how many stay.

    `run(..., checkpoint="runs/digits")` is short for `checkpoint=Checkpoint("runs/digits")`. A
    checkpoint is written before the first step, then at the end of the first chunk after
    `every_steps` or `every_seconds`, whichever comes first, and where the run ends (unless a
    callback failed, which has not seen all of the last chunk). Each is one
    file `step-0000001000.ckpt`, which appears whole or not at all; the history is beside them, in
    `metrics.bin`.

    **Arguments:**

    - `directory`: made if it is not there. One directory holds one run. Other files in it, a log
        say, are left alone.
    - `every_steps`: default `None`, by the clock alone.
    - `every_seconds`: default 60; `float("inf")` for by steps alone.
    - `keep`: the newest so many stay, default 2.

    **Raises:** `ValueError` or `TypeError` for a setting that cannot be meant.

    ```python
    checkpoint = gradhpo.Checkpoint("runs/digits", every_seconds=600.0, keep=3)
    ```
    """

    directory: str | Path
    every_steps: int | None = None
    every_seconds: float | int = 60.0
    keep: int = 2

    def __post_init__(self):
        if not str(self.directory):
            raise ValueError("Checkpoint(directory) must be the path of a directory, got ''")
        if self.every_steps is not None:
            check_count("every_steps", self.every_steps)
        check_count("keep", self.keep)
        if not self.every_seconds >= 0:
            raise ValueError(f"every_seconds must be at least 0, got {self.every_seconds!r}")

    @classmethod
    def of(cls, value: "str | Path | Checkpoint") -> "Checkpoint":
        """Settings from what `run` was given."""
        return value if isinstance(value, Checkpoint) else cls(value)


@checked
def load_checkpoint(
    path: str | Path, state: BilevelState, callbacks: Sequence[Callable] = ()
) -> tuple[BilevelState, History]:
    """State and history of a run from its checkpoints, to look at or to go on from elsewhere.

    **Arguments:**

    - `path`: the directory of the run (its newest checkpoint), or one file in it.
    - `state`: any state of the same optimizer and model, from `optimizer.init`: it gives the
        structure and is not changed.
    - `callbacks`: those whose memory is wanted: `best = gradhpo.BestState()` in
        `callbacks=[best]` has `best.state` afterwards.

    **Raises:** `ValueError` where there is none, or one that is damaged or of another structure.
    Where only the history is damaged, a warning says so and the history is empty.

    ```python
    import tempfile
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2 * batch)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1))
    start = optimizer.init(jnp.zeros(3), jnp.ones(3))
    losses = gradhpo.LossFunctions(loss, loss)
    with tempfile.TemporaryDirectory() as directory:
        gradhpo.run(optimizer, start, losses, jnp.ones(3), jnp.ones(3), num_steps=5,
                    checkpoint=directory, progress=False)
        state, history = gradhpo.load_checkpoint(directory, start)
    assert state.step == 5 and len(history["val_loss"]) == 5
    ```
    """
    path = Path(path)
    if path.is_dir():
        found = checkpoints_in(path)
        if not found:
            raise ValueError(f"{path} holds no checkpoint (a file such as step-0000001000.ckpt)")
        path = found[-1]
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    header, body = read_file(path)
    _check_leaves(path, header["leaves"]["state"], leaves_of(state))
    state = read_tree(body, state)
    if callbacks:
        wanted = Callbacks(callbacks)
        wanted.start(state, resumed=True)
        _read_memories(path, header, body, wanted, all_of_them=False)
    metrics, report = {}, f"Read from {path}."
    try:
        metrics = MetricsFile(path.parent / "metrics.bin").read(header["metrics"])
    except ValueError as error:
        report += f" The history is empty: {error}"
        warn(report, RuntimeWarning)
    metrics = metrics or {name: np.zeros(0) for name in METRICS}
    return state, History(metrics, header["stop_reason"], report)


def _read_memories(
    path: Path,
    header: dict[str, Any],
    body: io.BytesIO,
    callbacks: Callbacks,
    all_of_them: bool = True,
) -> None:
    """Gives each callback the memory of one of its class, in their order."""
    left = callbacks.remembering
    for name, leaves in zip(header["callbacks"], header["leaves"]["memories"], strict=True):
        mine = next((x for x in left if type(x).__name__ == name), None)
        if mine is None:
            for _ in leaves:
                np.load(body)
            if all_of_them:
                warn(f"{path} has the memory of a {name}, and no callback to take it: it is lost")
            continue
        left.remove(mine)
        _check_leaves(path, leaves, leaves_of(mine.memory))
        mine.memory = read_tree(body, mine.memory)
    for callback in left:
        name = type(callback).__name__
        if not all_of_them:
            raise ValueError(f"{path} has no memory of a {name}: it was not among the callbacks")
        warn(f"{name} was not among the callbacks of {path}: it begins where the run goes on")


def checkpoints_in(directory: Path) -> list[Path]:
    """From the oldest to the newest."""
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def _newest(directory: Path) -> Path | None:
    return next(reversed(checkpoints_in(directory)), None)


def _locked(path: Path) -> IO[bytes]:
    """A file that one process holds; the system lets go of it however that process ends."""
    file = open(path, "ab")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"another run is at work in {path.parent}: wait for its end, or pass another "
                "directory"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
    return file


class Keeper:
    """Writes the checkpoints of one run, and finds the last one."""

    def __init__(self, settings: Checkpoint, description: dict[str, Any]):
        self._settings, self._description = settings, description
        self._directory = Path(settings.directory).absolute()
        if self._directory.exists() and not self._directory.is_dir():
            raise ValueError(
                f"checkpoint={str(settings.directory)!r} is a file; pass a directory, which is "
                "made if it is not there"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(self._directory / "metrics.bin")
        self._unsaved: list[dict[str, np.ndarray]] = []
        self.saved_step, self._saved_at = 0, time.monotonic()
        self._same = ""
        self.failures: list[str] = []
        self._lock = _locked(self._directory / ".lock")
        self._found = self._newest = _newest(self._directory)
        try:
            if self._found is None:
                self._metrics.check_absent()
            else:
                self._header, self._body = read_file(self._found)
        except BaseException:
            self._lock.close()
            raise

    @property
    def holds_a_run(self) -> bool:
        """Whether there is something to resume."""
        return self._found is not None

    def check_resumable(self, num_steps: int) -> None:
        """The checkpoint is one of the run that was asked for."""
        assert self._found is not None
        differing = differences(self._header["description"], self._description)
        taken = self._header["taken"]
        if differing:
            raise ValueError(
                f"{self._found} is of another run: " + "; ".join(differing) + ". To resume it, "
                "call run as before; for another run pass another directory (one that begins from "
                "this one's state: state, _ = gradhpo.load_checkpoint(directory, state))"
            )
        if taken > num_steps:
            raise ValueError(
                f"the run in {self._directory} has taken {taken} steps, and num_steps={num_steps} "
                "asks for fewer: gradhpo.load_checkpoint(directory, state) returns what it has"
            )

    def read(self, part: str, like: PyTree) -> PyTree:
        """The next part of the checkpoint, all of it or an error."""
        assert self._found is not None
        _check_leaves(self._found, self._header["leaves"][part], leaves_of(like))
        return read_tree(self._body, like)

    def read_memories(self, callbacks: Callbacks) -> None:
        """What the callbacks remembered, which is the part after the state."""
        assert self._found is not None
        _read_memories(self._found, self._header, self._body, callbacks)

    def read_past(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The metrics so far, and the positions of the data."""
        self.saved_step = self._header["taken"]
        return self._metrics.read(self._header["metrics"]), self._header["positions"]

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """The metrics of one more chunk, for the next checkpoint."""
        self._unsaved.append(metrics)

    def is_due(self, taken: int) -> bool:
        """Whether the settings ask for a checkpoint now."""
        every = self._settings.every_steps
        by_steps = every is not None and taken - self.saved_step >= every
        return by_steps or time.monotonic() - self._saved_at >= self._settings.every_seconds

    def save(self, taken: int, parts: dict[str, PyTree], header: dict[str, Any]) -> None:
        """Writes a checkpoint. A full disk must not end a run: it is noted, and tried again."""
        path = self._directory / f"step-{taken:010d}.ckpt"
        if not self._same:  # for every checkpoint of this session
            leaves: dict[str, Any] = {name: leaves_of(part) for name, part in parts.items()}
            leaves["memories"] = [leaves_of(memory) for memory in parts["memories"]]
            self._same = json.dumps({"description": self._description, "leaves": leaves})
        try:
            self._check_alone()
            self._metrics.add(_joined(self._unsaved))
            self._unsaved = []
            changing = header | {"taken": taken, "metrics": self._metrics.header()}
            written = self._same[:-1] + ", " + json.dumps(changing)[1:]
            write_file(path, written, list(parts.values()))
            self._newest = path
        except Exception as error:
            if taken == 0:
                raise
            self.failures.append(f"{type(error).__name__}: {error}")
        self.saved_step, self._saved_at = taken, time.monotonic()
        with contextlib.suppress(OSError):  # what is left over is tidied up the next time
            self._tidy_up()

    def _tidy_up(self) -> None:
        for old in checkpoints_in(self._directory)[: -self._settings.keep]:
            if is_checkpoint(old):
                old.unlink()
        for torn in self._directory.glob(".step-*.ckpt.tmp"):
            torn.unlink()

    def _check_alone(self) -> None:
        """Where there is no lock, another run shows by its checkpoints."""
        newest = _newest(self._directory)
        if newest != self._newest:
            raise OSError(f"{newest} was written by another run in the same directory")

    def close(self) -> None:
        """Another run may have the directory."""
        self._lock.close()


def _joined(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([p[name] for p in pieces]) for name in (pieces or [{}])[0]}


def _check_leaves(path: Path, found: list, expected: list) -> None:
    if found == expected:
        return
    theirs, ours = ({name: rest for name, *rest in leaves} for leaves in (found, expected))
    lines = [
        f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
        for name in dict.fromkeys([*theirs, *ours])
        if theirs.get(name) != ours.get(name)
    ]
    raise ValueError(
        f"{path} holds a state of another structure: " + "; ".join(lines[:5]) + ". Pass the state "
        "that the same optimizer.init makes of the same model, in the same precision"
    )
