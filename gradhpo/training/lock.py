"""The lock of a run's directory: one run at a time, until its end and no longer."""

import contextlib
import os
import weakref
from pathlib import Path


try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


class DirectoryLock:
    """Held while a run is at work. `held` is false on file systems that have no locks.

    The system lets go of it however this process ends.
    """

    def __init__(self, path: Path):
        self._file, self.held = open(path, "ab"), False
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True
            _held.add(self)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"another run is at work in {path.parent}: wait for its end, or pass another "
                "directory"
            ) from None
        except OSError:
            pass

    def close(self) -> None:
        """Lets another run have the directory, even if a child process inherited the file."""
        if self.held and fcntl is not None and not self._file.closed:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def _leave_to_parent(self) -> None:
        """In a process that was forked: its copy would hold the lock beyond the run."""
        self._file.close()


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _leave_all() -> None:
    for lock in list(_held):
        lock._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all)
