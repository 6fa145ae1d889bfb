"""One checkpoint in one file: complete or absent, and checked before any of it is used."""

import contextlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.utils.freezing import without_frozen
from gradhpo.utils.keys import is_key
from gradhpo.utils.placement import is_of_several, placed
from gradhpo.utils.validation import leaf_names


_MAGIC = b"gradhpo-checkpoint"
_FORMAT = 3
_REMEDY = "Move it away to continue from the previous checkpoint, if there is one"


def write_file(path: Path, header: str, tree: PyTree) -> None:
    """Writes a temporary file and renames it: readers find all of it or nothing.

    `header` is JSON, in one line. Frozen leaves are left out: they have their own file.
    """
    body = io.BytesIO()
    body.write(header.encode() + b"\n")
    eqx.tree_serialise_leaves(body, without_frozen(tree), filter_spec=_write_leaf)
    content = body.getbuffer()
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.unlink(missing_ok=True)  # a link here must not be written through
        with open(beside, "xb") as file:
            file.write(b"%s %d %d %d\n" % (_MAGIC, _FORMAT, len(content), zlib.crc32(content)))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one of ours, complete or not."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class Leaves(io.BytesIO):
    """The leaves in a file, to be read one after another."""

    def __init__(self, content: bytes, path: Path, remedy: str):
        super().__init__(content)
        self._path, self._remedy = path, remedy

    def damaged(self, why: str) -> ValueError:
        """An error to raise."""
        return ValueError(
            f"{self._path} is damaged ({why}); nothing of it was used. {self._remedy}"
        )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A failure inside means that the file is damaged, in spite of its checksum."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # the device's, not the file's
            raise
        except Exception as error:
            raise self.damaged(f"{type(error).__name__} while it was read") from error

    def skip(self, count: int) -> None:
        """Passes over the next leaves."""
        with self.reading():
            for _ in range(count):
                np.load(self)

    def tree(self, like: PyTree) -> PyTree:
        """The next leaves as a tree like this one, placed as its arrays are."""
        return eqx.tree_deserialise_leaves(self, like, filter_spec=_read_leaf)


def read_file(
    path: Path, is_header: Callable[[Any], bool], remedy: str = _REMEDY
) -> tuple[dict[str, Any], Leaves]:
    """The header, which is one of this kind, and the leaves for `read_tree`.

    `ValueError` if anything is missing or not what gradhpo writes.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file, so not a checkpoint of gradhpo: move it away")
    with open(path, "rb") as file:
        first, content = file.readline(200).split(), file.read()
    if not first or first[0] != _MAGIC:
        raise ValueError(f"{path} is not a checkpoint of gradhpo: it was left unchanged")
    body = Leaves(content, path, remedy)
    try:
        version, length, checksum = map(int, first[1:])
    except ValueError:
        raise body.damaged("its first line is broken") from None
    if version != _FORMAT:
        raise ValueError(
            f"{path} has format {version}, and this gradhpo reads {_FORMAT}: use the version of "
            "gradhpo that wrote it"
        )
    if len(content) != length:
        raise body.damaged(f"it has {len(content)} of {length} bytes")
    if zlib.crc32(content) != checksum:
        raise body.damaged("its checksum does not match")
    with body.reading():
        header = json.loads(body.readline())
    if not is_header(header):
        raise body.damaged("its header is not one that gradhpo writes")
    return header, body


def is_checkpoint_header(x: Any) -> bool:
    """Whether JSON is the header of a checkpoint."""
    memories = x["leaves"]["memories"] if _fits(x, _CHECKPOINT) else None
    return memories is not None and len(x["callbacks"]) == len(memories)


def is_frozen_header(x: Any) -> bool:
    """Whether JSON is the header of the file of frozen leaves."""
    return _fits(x, {"leaves": [_is_leaf], "checksum": int})


def is_boundary_header(x: Any) -> bool:
    """Whether JSON is the header of a state at a boundary of a replay."""
    return _fits(x, {"description": dict, "leaves": [_is_leaf], "about": object})


def _fits(x: Any, kind: Any) -> bool:
    """Whether JSON has these types: `[kind]` is a list of it, a dict needs the keys."""
    if isinstance(kind, dict):
        return isinstance(x, dict) and all(k in x and _fits(x[k], y) for k, y in kind.items())
    if isinstance(kind, list):
        return isinstance(x, list) and all(_fits(y, kind[0]) for y in x)
    return isinstance(x, kind) if isinstance(kind, type) else kind(x)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 3 and isinstance(x[0], str)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and x >= 0


def _are_metrics(x: Any) -> bool:
    if not _fits(x, {"rows": _is_count, "dtypes": dict, "shapes": dict, "checksum": int}):
        return False
    dtypes, shapes = x["dtypes"], x["shapes"]
    of_shapes = all(_fits(shape, [_is_count]) for shape in shapes.values())
    return of_shapes and list(dtypes) == list(shapes) and _fits([*dtypes.values()], [str])


def _are_positions(x: Any) -> bool:
    if isinstance(x, list):  # of each process
        return len(x) > 0 and all(map(_are_positions, x))
    known = isinstance(x, dict) and set(x) <= {"train_data", "val_data"}
    return known and all(_fits(y, {"drawn": _is_count, "state": object}) for y in x.values())


_CHECKPOINT = {
    "versions": dict,
    "description": dict,
    "leaves": {"state": [_is_leaf], "memories": [[_is_leaf]], "rest": [_is_leaf]},
    "taken": _is_count,
    "metrics": _are_metrics,
    "stop_reason": str,
    "callbacks": [{"kind": str, "identity": object}],
    "positions": _are_positions,
}


def read_tree(body: Any, like: PyTree) -> PyTree:
    """The next leaves of a file or a folder as a tree like this, which fits its header.

    Frozen leaves come from `like`.
    """
    with body.reading():
        found = body.tree(without_frozen(like))
    return eqx.combine(found, like)


def leaves_of(tree: PyTree) -> list[list[Any]]:
    """Name, shape and dtype of each leaf that is written."""
    tree = without_frozen(tree)
    return [
        [name, list(np.shape(x)), str(x.dtype) if hasattr(x, "dtype") else type(x).__name__]
        for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
        if eqx.is_array_like(x) or is_key(x)
    ]


def _write_leaf(file: io.BytesIO, x: Any) -> None:
    eqx.default_serialise_filter_spec(file, jax.random.key_data(x) if is_key(x) else x)


def _read_leaf(file: io.BytesIO, like: Any) -> Any:
    if is_key(like):
        return jax.random.wrap_key_data(jnp.load(file), impl=jax.random.key_impl(like))
    if is_of_several(like):  # each process has the file, and takes its part
        return placed(np.load(file), like.sharding)
    found = eqx.default_deserialise_filter_spec(file, like)
    if isinstance(like, jax.Array) and like.committed:
        return jax.device_put(found, like.sharding)
    return found


def _sync_directory(directory: Path) -> None:
    """Makes the renaming survive a power failure, if the file system can promise that."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot
                os.fsync(handle)
        finally:
            os.close(handle)
