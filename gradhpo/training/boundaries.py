"""Storage for a long call, such as the states between a replay's segments: memory or disk."""

import abc
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.training.checkpoint_file import (
    is_boundary_header,
    leaves_of,
    read_file,
    read_tree,
    write_file,
)
from gradhpo.training.lock import DirectoryLock
from gradhpo.utils.description import differences
from gradhpo.utils.keys import is_key
from gradhpo.utils.placement import from_parts, parts_of
from gradhpo.utils.processes import exchanged, is_first, together


class Boundaries(abc.ABC):
    """Keeps trees by number and kind, a name that the caller chooses.

    A replay uses `"state"` on the way forward and `"bar"` on the way back.
    """

    where: str
    """For the report."""
    lasts = False
    """Whether what is kept outlives the process."""

    @abc.abstractmethod
    def put(self, kind: str, number: int, tree: PyTree, about: Any = None) -> None:
        """Keeps a tree, and something about it that JSON can hold."""

    @abc.abstractmethod
    def get(self, kind: str, number: int, like: PyTree) -> tuple[PyTree, Any]:
        """A tree, placed as `like` is, and what was kept about it."""

    @abc.abstractmethod
    def drop(self, kind: str, number: int) -> None:
        """Forgets a tree, if it is there."""

    def numbers(self, kind: str) -> list[int]:
        """The numbers that an earlier process has kept, in order."""
        return []

    def about(self, kind: str, number: int) -> Any:
        """What was kept about a tree of an earlier process."""
        raise KeyError((kind, number))

    def close(self) -> None:  # noqa: B027
        """Lets another call keep its trees here."""


class InMemory(Boundaries):
    """In host memory, for as long as the replay lasts."""

    where = "in memory"

    def __init__(self):
        self._kept: dict[tuple[str, int], PyTree] = {}

    def put(self, kind: str, number: int, tree: PyTree, about: Any = None) -> None:
        self._kept[kind, number] = jax.tree.map(np.asarray, _in_parts(tree))

    def get(self, kind: str, number: int, like: PyTree) -> tuple[PyTree, Any]:
        return _joined(self._kept[kind, number], like), None

    def drop(self, kind: str, number: int) -> None:
        self._kept.pop((kind, number), None)


def _in_parts(tree: PyTree) -> PyTree:
    """Each array replaced by the list of this process's pieces; keys by their numbers."""

    def parts(x: Any) -> Any:
        x = jax.random.key_data(x) if is_key(x) else x
        return parts_of(x) if x.committed else [x]

    return jax.tree.map(lambda x: parts(x) if isinstance(x, jax.Array) else x, tree)


def _joined(parts: PyTree, like: PyTree) -> PyTree:
    """The inverse of `_in_parts`. Unplaced arrays stay unplaced, or programs compile again."""

    def joined(like: Any, parts: Any) -> Any:
        if is_key(like):
            data = joined(jax.random.key_data(like), parts)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
        return from_parts(parts, like) if like.committed else jnp.asarray(parts[0])

    return jax.tree.map(lambda x, y: joined(x, y) if isinstance(x, jax.Array) else y, like, parts)


class Caller(NamedTuple):
    """Who keeps something in a directory, for messages: what it is, the call, and its argument."""

    what: str
    call: str
    argument: str

    @property
    def remedy(self) -> str:
        return f"Move it away, and the {self.what} recreates it"


_REPLAY = Caller("replay", "replay", "store")
# By kind and number. The checkpoints of a run, `step-0000001000.ckpt`, do not match.
_NAME = re.compile(r"(?!step-)(\w+)-(\d{10})(?:-(\d+)of(\d+))?\.ckpt")


class InDirectory(Boundaries):
    """One file each, `state-0000000071.ckpt`, complete or absent: a later process can continue.

    If several processes share the states, each writes and reads its own pieces.
    """

    lasts = True

    def __init__(
        self,
        directory: Path,
        description: dict[str, Any],
        shared: bool,
        caller: Caller = _REPLAY,
    ):
        self._directory, self._description, self._shared = directory, description, shared
        self._caller = caller
        self._whose = (str(jax.process_index()), str(jax.process_count())) if shared else ("", "")
        self.where, self._lock = f"in {directory}", None
        with together(shared):
            if directory.exists() and not directory.is_dir():
                raise ValueError(
                    f"{caller.argument}={str(directory)!r} is a file; pass a directory, which is "
                    "created if it does not exist"
                )
            directory.mkdir(parents=True, exist_ok=True)
            if is_first(shared):
                self._lock = DirectoryLock(directory / ".lock")
        try:
            with together(shared):
                self._check_the_same()
        except BaseException:
            self.close()
            raise

    def _check_the_same(self) -> None:
        for path in sorted(self._directory.iterdir()):
            name = _NAME.fullmatch(path.name)
            if name is None:
                continue
            if (name[4] or "") != self._whose[1]:
                raise ValueError(
                    f"{self._directory} holds a {self._caller.what} by a different number of "
                    "processes: pass a new directory"
                )
            header, _ = read_file(path, is_boundary_header, self._caller.remedy)
            found = header.get("what", self._caller.what)
            if found != self._caller.what:
                raise ValueError(
                    f"{self._directory} holds a {found}, and {self._caller.call} keeps a "
                    f"{self._caller.what} in its {self._caller.argument}: pass a new directory"
                )
            differing = differences(header["description"], self._description)
            if differing:
                raise ValueError(
                    f"{self._directory} holds another {self._caller.what}: "
                    f"{'; '.join(differing)}. To resume it, call {self._caller.call} as before; to "
                    "start a new one, pass a new directory"
                )
            break

    def numbers(self, kind: str) -> list[int]:
        names = [_NAME.fullmatch(path.name) for path in self._directory.iterdir()]
        mine = lambda x: x[1] == kind and (x[3] or "", x[4] or "") == self._whose
        own = [int(name[2]) for name in names if name and mine(name)]
        of_all = exchanged(own) if self._shared else [own]
        return sorted(set.intersection(*map(set, of_all)))

    def put(self, kind: str, number: int, tree: PyTree, about: Any = None) -> None:
        tree = _in_parts(tree) if self._shared else tree
        header = {"what": self._caller.what, "description": self._description}
        header |= {"leaves": leaves_of(tree), "about": about}
        with together(self._shared):
            write_file(self._path(kind, number), json.dumps(header), tree)

    def get(self, kind: str, number: int, like: PyTree) -> tuple[PyTree, Any]:
        path, pieces = self._path(kind, number), _in_parts(like) if self._shared else like
        with together(self._shared):
            header, body = read_file(path, is_boundary_header, self._caller.remedy)
            if header["leaves"] != leaves_of(pieces):
                raise ValueError(f"{path} holds a tree of another structure: pass a new directory")
            found = read_tree(body, pieces)
        return (_joined(found, like) if self._shared else found), header["about"]

    def about(self, kind: str, number: int) -> Any:
        return read_file(self._path(kind, number), is_boundary_header, self._caller.remedy)[0][
            "about"
        ]

    def drop(self, kind: str, number: int) -> None:
        self._path(kind, number).unlink(missing_ok=True)

    def _path(self, kind: str, number: int) -> Path:
        whose = "-{}of{}".format(*self._whose) if self._shared else ""
        return self._directory / f"{kind}-{number:010d}{whose}.ckpt"

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
