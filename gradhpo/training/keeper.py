"""Writes the checkpoints of a run, and finds the last one."""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.state import BilevelState
from gradhpo.training.callbacks import Callbacks
from gradhpo.training.checkpoint import (
    Checkpoint,
    check_leaves,
    checkpoints_in,
    read_memories,
)
from gradhpo.training.checkpoint_file import (
    is_checkpoint,
    is_checkpoint_header,
    leaves_of,
    read_tree,
    write_file,
)
from gradhpo.training.checkpoint_folder import (
    SUFFIX,
    is_folder,
    orbax,
    read_kept,
    remove_folder,
    write_folder,
)
from gradhpo.training.frozen_file import FrozenFile
from gradhpo.training.lock import DirectoryLock
from gradhpo.training.metrics_file import MetricsFile
from gradhpo.training.record import Columns
from gradhpo.utils.description import differences
from gradhpo.utils.processes import exchanged, from_first, is_first, together
from gradhpo.utils.warn import warn


class Keeper:
    """Writes the checkpoints of one run, and finds the last one."""

    def __init__(self, settings: Checkpoint, description: dict[str, Any], shared: bool = False):
        self._settings, self._description, self._shared = settings, description, shared
        self._directory = Path(settings.directory).absolute()
        self._metrics = MetricsFile(self._directory / "metrics.bin")
        self._frozen_file, self._frozen = FrozenFile(self._directory), None
        self.saved_step = self._tried_step = 0
        self._tried_at = time.monotonic()
        self._same, self._tidied = "", False
        self.failures: list[str] = []
        self._lock: DirectoryLock | None = None
        self._there: list[Path] = []
        self._known: set[Path] = set()
        try:
            with together(shared):
                if shared:
                    orbax()  # before the first step
            newest = from_first(shared, self._open)
            self._found = None if newest is None else self._directory / newest
            with together(shared):
                if self._found is not None:
                    _check_seen(self._found)
                    self._header, self._body = read_kept(self._found, is_checkpoint_header)
        except BaseException:
            self.close()
            raise

    def _open(self) -> str | None:
        """Locks the directory, and returns the name of the newest checkpoint in it."""
        if self._directory.exists() and not self._directory.is_dir():
            raise ValueError(
                f"checkpoint={str(self._settings.directory)!r} is a file; pass a directory, which "
                "is created if it does not exist"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = DirectoryLock(self._directory / ".lock")
        self._there = checkpoints_in(self._directory)
        self._known = set(self._there)
        if not self._there:
            self._metrics.check_absent()
            return None
        return self._there[-1].name

    @property
    def holds_a_run(self) -> bool:
        """Whether there is something to resume."""
        return self._found is not None

    def check_resumable(self, num_steps: int) -> None:
        """Checks that the checkpoint belongs to the requested run."""
        assert self._found is not None
        differing = differences(*map(_said, (self._header["description"], self._description)))
        upgrades = differences(self._header["versions"], _versions())
        taken = self._header["taken"]
        if differing:
            raise ValueError(
                f"{self._found} is of another run: " + "; ".join([*differing, *upgrades]) + ". To "
                "resume it, call run as before. To start a new run from this state, load it with "
                "state, _ = gradhpo.load_checkpoint(directory, state) and pass a new directory"
            )
        if taken > num_steps:
            raise ValueError(
                f"the run in {self._directory} has taken {taken} steps, but num_steps={num_steps} "
                "asks for fewer: gradhpo.load_checkpoint(directory, state) returns its results"
            )
        if upgrades:
            warn(
                f"the run in {self._directory} continues with other versions: "
                f"{'; '.join(upgrades)}. Its results may not match one version's bit for bit"
            )

    def begin(self, state: BilevelState) -> None:
        """Writes what no step of a new run changes."""
        self._frozen = self._frozen_file.write(state, self._shared)

    def resume(self, state: BilevelState) -> BilevelState:
        """The state in the checkpoint; `state` is the one that the run started from."""
        assert self._found is not None
        check_leaves(self._found, self._header["leaves"]["state"], leaves_of(state))
        self._frozen = self._header.get("frozen")
        return read_tree(self._body, self._frozen_file.read_into(state, self._frozen))

    def read(self, part: str, like: PyTree) -> PyTree:
        """The next part of the checkpoint, all of it or an error."""
        assert self._found is not None
        check_leaves(self._found, self._header["leaves"][part], leaves_of(like))
        return read_tree(self._body, like)

    def read_memories(self, callbacks: Callbacks) -> None:
        """Reads the callbacks' memories, which follow the state."""
        assert self._found is not None
        read_memories(self._found, self._header, self._body, callbacks)

    def read_past(self) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
        """The metrics so far, the positions of the data, and which metrics the losses returned."""
        self.saved_step = self._tried_step = self._header["taken"]
        metrics = self._metrics.read(self._header["metrics"])
        return metrics, self._positions(), self._header.get("aux", [])

    def _positions(self) -> dict[str, Any]:
        """The data positions of this process; for iterators the number of processes must agree."""
        found = self._header["positions"]
        of_each = found if isinstance(found, list) else [found]
        here = jax.process_count() if self._shared else 1
        if not any(of_each):
            return {}
        if len(of_each) != here:
            raise ValueError(
                f"{self._found} is of a run whose {' and '.join(of_each[0])} came from iterators "
                f"in {len(of_each)} processes, each with a part of every batch, and {here} "
                f"cannot continue them: resume it in {len(of_each)}, or load its state with "
                "gradhpo.load_checkpoint(directory, state) for a new run. Runs on "
                "gradhpo.ArrayData or on functions of the index resume in any number"
            )
        return of_each[jax.process_index() if self._shared else 0]

    def is_due(self, taken: int) -> bool:
        """Whether the settings ask for a checkpoint now."""
        every = self._settings.every_steps
        by_steps = every is not None and taken - self._tried_step >= every
        return by_steps or time.monotonic() - self._tried_at >= self._settings.every_seconds

    def save(self, steps: Columns, parts: dict[str, PyTree], header: dict[str, Any]) -> None:
        """Writes a checkpoint. A full disk must not end a run: it is noted, and retried later."""
        taken = steps.length
        path = self._directory / f"step-{taken:010d}{SUFFIX if self._shared else '.ckpt'}"
        if not self._same:  # for every checkpoint of this session
            leaves: dict[str, Any] = {name: leaves_of(part) for name, part in parts.items()}
            leaves["memories"] = [leaves_of(memory) for memory in parts["memories"]]
            same = {"versions": _versions(), "description": self._description}
            self._same = json.dumps(same | {"leaves": leaves, "frozen": self._frozen})
        try:
            with together(self._shared):
                if is_first(self._shared):
                    self._check_alone()
                    self._known.add(path)
                    self._metrics.add(steps.since(self._metrics.num_rows))
            changing = header | {"taken": taken, "metrics": self._metrics.header()}
            if self._shared:
                changing["positions"] = exchanged(header["positions"])
            written = self._same[:-1] + ", " + json.dumps(changing)[1:]
            write = write_folder if self._shared else write_file
            write(path, written, list(parts.values()))
            self._there = [*(old for old in self._there if old != path), path]
            self.saved_step = taken
        except Exception as error:
            if taken == 0:
                raise
            self.failures.append(f"{type(error).__name__}: {error}")
        self._tried_step, self._tried_at = taken, time.monotonic()
        if is_first(self._shared):
            with contextlib.suppress(OSError):  # leftovers are removed the next time
                self._tidy_up()

    def _tidy_up(self) -> None:
        if not self._tidied:
            self._tidied = True
            for torn in self._directory.glob(".step-*.ckpt.tmp"):  # from a process that was killed
                with contextlib.suppress(OSError):
                    torn.unlink()
            for torn in self._directory.glob(f"step-{'?' * 10}{SUFFIX}"):
                if not is_folder(torn):
                    remove_folder(torn)
        while len(self._there) > self._settings.keep:
            old = self._there[0]
            if is_folder(old):
                remove_folder(old)
            elif old.is_file() and is_checkpoint(old):
                old.unlink()
            del self._there[0]

    def _check_alone(self) -> None:
        """Without a lock, another run shows by its checkpoints."""
        if self._lock is not None and self._lock.held:
            return
        other = set(checkpoints_in(self._directory)) - self._known
        if other:
            raise OSError(f"{min(other)} was written by another run in the same directory")

    def close(self) -> None:
        """Another run may use the directory."""
        if self._lock is not None:
            self._lock.close()


def _check_seen(path: Path) -> None:
    """Checks that this process sees the checkpoint that the first process found."""
    if not path.exists():
        raise ValueError(
            f"process {jax.process_index()} does not see {path}: pass checkpoint= a directory that "
            "all processes see"
        )


def _versions() -> dict[str, str]:
    ours = sys.modules[__name__.partition(".")[0]].__version__
    return {"gradhpo": ours, "jax": jax.__version__}


def _said(description: Any) -> Any:
    """The description, with recordings worded for messages."""
    kinds = {"record": "a function that returns", "monitored": "a Monitor of"}
    if not isinstance(description, dict):
        return description
    names = {part: description.get(part) for part in kinds}
    return description | {
        part: f"{kinds[part]} {x!r}" if x else None
        for part, x in names.items()
        if x is None or isinstance(x, str)
    }
