"""A checkpoint of several processes: a folder in which each writes its part, by Orbax.

Arrays come first, then the header of a checkpoint file, by the first process alone: a folder
without it is incomplete, and ignored. Any number of processes can read it.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradhpo.training.checkpoint_file import Leaves, read_file, write_file
from gradhpo.utils.freezing import without_frozen
from gradhpo.utils.keys import is_key
from gradhpo.utils.placement import is_of_several
from gradhpo.utils.processes import from_first, is_first, together


SUFFIX = ".orbax"
_HEADER, _ARRAYS = "header.ckpt", "arrays"


def orbax() -> Any:
    """The library, or an error that says how to install it."""
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "checkpoints of several processes are written by Orbax, which is not installed: "
            'run pip install -e ".[orbax]" in a clone of gradhpo'
        ) from error
    return orbax.checkpoint


def write_folder(path: Path, header: str, tree: PyTree) -> None:
    """Writes one checkpoint; called in all processes at once. Frozen leaves are left out."""
    leaves = [x for x in jax.tree.leaves(without_frozen(tree)) if eqx.is_array_like(x) or is_key(x)]
    if from_first(True, lambda: is_folder(path)):  # of the same step: only the header is new
        with together(shared=True):
            if is_first(shared=True):
                write_file(path / _HEADER, header, None)
        return
    with together(shared=True):
        if is_first(shared=True):
            remove_folder(path)
            path.mkdir()
    with together(shared=True):
        arrays = {_name(i): _as_stored(x) for i, x in enumerate(leaves) if np.size(x)}
        with _checkpointer(alone=False) as checkpointer:
            checkpointer.save(path / _ARRAYS, args=orbax().args.PyTreeSave(arrays))
    with together(shared=True):
        if is_first(shared=True):
            write_file(path / _HEADER, header, None)


def is_folder(path: Path) -> bool:
    """Whether a folder is one of ours, and complete."""
    return path.suffix == SUFFIX and (path / _HEADER).is_file()


def remove_folder(path: Path) -> None:
    """Removes a checkpoint, which is incomplete from the first moment on."""
    (path / _HEADER).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def read_kept(
    path: Path, is_header: Callable[[Any], bool], *remedy: str
) -> tuple[dict[str, Any], "Leaves | Stored"]:
    """The header of a file or of a folder, and the leaves for `read_tree`."""
    if path.suffix != SUFFIX:
        return read_file(path, is_header, *remedy)
    header, empty = read_file(path / _HEADER, is_header, *remedy)
    return header, Stored(path / _ARRAYS, empty)


class Stored:
    """The leaves in a folder, to be read one after another, like those in a file."""

    def __init__(self, path: Path, empty: Leaves):
        self._path, self._next = path, 0
        self.reading: Callable[[], contextlib.AbstractContextManager[None]] = empty.reading

    def skip(self, count: int) -> None:
        """Passes over the next leaves."""
        self._next += count

    def tree(self, like: PyTree) -> PyTree:
        """The next leaves as a tree like this one, placed as its arrays are."""
        leaves, treedef = jax.tree.flatten(like)
        stored = [x for x in leaves if eqx.is_array_like(x) or is_key(x)]
        names = [_name(self._next + i) for i in range(len(stored))]
        self._next += len(stored)
        wanted = {name: x for name, x in zip(names, stored, strict=True) if np.size(x)}
        arrays = self._found(wanted)
        found = iter([arrays.get(name) for name in names])
        return jax.tree.unflatten(treedef, [
            _as_like(next(found), x) if eqx.is_array_like(x) or is_key(x) else x for x in leaves
        ])  # fmt: skip

    def _found(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if not wanted:
            return {}
        ocp, like = orbax(), {name: _data(x) for name, x in wanted.items()}
        how = {
            name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            if isinstance(x, jax.Array) and x.committed
            else ocp.RestoreArgs(restore_type=np.ndarray)
            for name, x in like.items()
        }
        alone = not any(map(is_of_several, like.values()))
        with _checkpointer(alone) as checkpointer:
            args = ocp.args.PyTreeRestore(item=like, restore_args=how, partial_restore=True)
            return checkpointer.restore(self._path, args=args)


def _name(number: int) -> str:
    return f"{number:06d}"


def _checkpointer(alone: bool) -> Any:
    """`alone`: no other process takes part."""
    ocp, number = orbax(), jax.process_index()
    options = {}
    if alone and jax.process_count() > 1:
        of_this = ocp.options.MultiprocessingOptions(number, {number}, f"process_{number}")
        options = {"multiprocessing_options": of_this}
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options), **options)


def _as_stored(x: Any) -> Any:
    """Arrays of a single process are stored as the first process has them."""
    x = _data(x)
    return x if is_of_several(x) else np.asarray(x)


def _data(x: Any) -> Any:
    return jax.random.key_data(x) if is_key(x) else x


def _as_like(found: Any, like: Any) -> Any:
    if found is None:  # nothing is in it
        return like
    if is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(like))
    if isinstance(like, jax.Array):
        return found if isinstance(found, jax.Array) else jnp.asarray(found)
    if isinstance(like, (np.ndarray, np.generic)):
        return found if isinstance(like, np.ndarray) else found[()]
    return found.item()
