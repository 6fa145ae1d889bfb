"""The states at the boundaries of a replay's segments: in memory, or in a directory."""

import abc
import json
import re
from pathlib import Path
from typing import Any

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


class Boundaries(abc.ABC):
    """Keeps trees by kind and number: `"state"` on the way forward, `"bar"` on the way back."""

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
        """What an earlier process has kept, in order."""
        return []

    def close(self) -> None:  # noqa: B027
        """Another replay may keep its states here."""


class InMemory(Boundaries):
    """In the memory of the host, for as long as the replay lasts."""

    where = "in memory"

    def __init__(self):
        self._kept: dict[tuple[str, int], PyTree] = {}

    def put(self, kind: str, number: int, tree: PyTree, about: Any = None) -> None:
        self._kept[kind, number] = jax.tree.map(_to_host, tree)

    def get(self, kind: str, number: int, like: PyTree) -> tuple[PyTree, Any]:
        return jax.tree.map(_to_place, self._kept[kind, number], like), None

    def drop(self, kind: str, number: int) -> None:
        self._kept.pop((kind, number), None)


def _to_host(x: Any) -> Any:
    """Spread arrays stay spread. Others come back uncommitted, as they were: no new program."""
    if not isinstance(x, jax.Array) or is_key(x):
        return x
    if x.committed:
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
    return np.asarray(x)


def _to_place(x: Any, like: Any) -> Any:
    if isinstance(x, np.ndarray):
        return jnp.asarray(x)
    return jax.device_put(x, like.sharding) if isinstance(x, jax.Array) and x.committed else x


class InDirectory(Boundaries):
    """One file each, `state-0000000071.ckpt`, complete or absent: a later process goes on."""

    lasts = True

    def __init__(self, directory: Path, description: dict[str, Any]):
        if directory.exists() and not directory.is_dir():
            raise ValueError(
                f"store={str(directory)!r} is a file; pass a directory, which is made if it is not "
                "there"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._description = directory, description
        self.where = f"in {directory}"
        self._lock = DirectoryLock(directory / ".lock")
        try:
            self._check_the_same()
        except BaseException:
            self._lock.close()
            raise

    def _check_the_same(self) -> None:
        kept = [(kind, number) for kind in ("state", "bar") for number in self.numbers(kind)]
        for one in kept[:1]:
            header, _ = read_file(self._path(*one), is_boundary_header)
            differing = differences(header["description"], self._description)
            if differing:
                raise ValueError(
                    f"{self._directory} holds another replay: {'; '.join(differing)}. To resume "
                    "it, call replay as before; to start a new one, pass a new directory"
                )

    def numbers(self, kind: str) -> list[int]:
        name = re.compile(rf"{kind}-(\d{{10}})\.ckpt")
        found = [name.fullmatch(path.name) for path in self._directory.iterdir()]
        return sorted(int(match[1]) for match in found if match)

    def put(self, kind: str, number: int, tree: PyTree, about: Any = None) -> None:
        header = {"description": self._description, "leaves": leaves_of(tree), "about": about}
        write_file(self._path(kind, number), json.dumps(header), tree)

    def get(self, kind: str, number: int, like: PyTree) -> tuple[PyTree, Any]:
        path = self._path(kind, number)
        header, body = read_file(path, is_boundary_header)
        if header["leaves"] != leaves_of(like):
            raise ValueError(f"{path} holds a tree of another structure: pass a new directory")
        return read_tree(body, like), header["about"]

    def drop(self, kind: str, number: int) -> None:
        self._path(kind, number).unlink(missing_ok=True)

    def _path(self, kind: str, number: int) -> Path:
        return self._directory / f"{kind}-{number:010d}.ckpt"

    def close(self) -> None:
        self._lock.close()
