"""One checkpoint in one file: complete or absent, and checked before any of it is used."""

import contextlib
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.utils.freezing import without_frozen
from gradhpo.utils.keys import is_key
from gradhpo.utils.validation import leaf_names


_MAGIC = b"gradhpo-checkpoint"
_FORMAT = 3
_REMEDY = "Move it away to go on from the checkpoint before it, if there is one"


def write_file(path: Path, header: str, tree: PyTree) -> None:
    """Writes a temporary file and renames it: readers find all of it or nothing.

    `header` is JSON, in one line. Frozen leaves are left out: they have a file of their own.
    """
    body = io.BytesIO()
    body.write(header.encode() + b"\n")
    eqx.tree_serialise_leaves(body, without_frozen(tree), filter_spec=_write_leaf)
    content = body.getbuffer()
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
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


def read_file(path: Path, remedy: str = _REMEDY) -> tuple[dict[str, Any], io.BytesIO]:
    """The header, and the leaves as a file for `read_tree`; `ValueError` if it is not complete."""

    def damaged(why: str) -> ValueError:
        return ValueError(f"{path} is damaged ({why}); nothing of it was used. {remedy}")

    with open(path, "rb") as file:
        first, content = file.readline(200).split(), file.read()
    if not first or first[0] != _MAGIC:
        raise ValueError(f"{path} is not a checkpoint of gradhpo: it is left as it is")
    try:
        version, length, checksum = map(int, first[1:])
    except ValueError:
        raise damaged("its first line is broken") from None
    if version != _FORMAT:
        raise ValueError(
            f"{path} has format {version}, and this gradhpo reads {_FORMAT}: use the version of "
            "gradhpo that wrote it"
        )
    if len(content) != length:
        raise damaged(f"it has {len(content)} of {length} bytes")
    if zlib.crc32(content) != checksum:
        raise damaged("its checksum does not fit")
    body = io.BytesIO(content)
    return json.loads(body.readline()), body


def read_tree(body: io.BytesIO, like: PyTree) -> PyTree:
    """The leaves of a tree like this one, which was checked against the header.

    Frozen leaves are those of `like`.
    """
    found = eqx.tree_deserialise_leaves(body, without_frozen(like), filter_spec=_read_leaf)
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
