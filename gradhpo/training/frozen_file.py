"""The frozen leaves of a run on disk: one file (or folder) that all its checkpoints share."""

import json
import zlib
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from gradhpo.core.state import BilevelState
from gradhpo.training.checkpoint_file import (
    is_checkpoint,
    is_frozen_header,
    leaves_of,
    read_tree,
    write_file,
)
from gradhpo.training.checkpoint_folder import (
    SUFFIX,
    is_folder,
    read_kept,
    remove_folder,
    write_folder,
)
from gradhpo.utils.freezing import frozen_part, with_frozen
from gradhpo.utils.keys import is_key
from gradhpo.utils.processes import is_first, is_shared, together
from gradhpo.utils.sums import checksum_of_bits


_REMEDY = "No checkpoint next to it can be read without it: restore it from a copy"


class FrozenFile:
    """`frozen.ckpt` in the directory of a run, or `frozen.orbax` where several processes wrote it.

    Checkpoints contain its checksum.
    """

    def __init__(self, directory: Path):
        self._file, self._folder = directory / "frozen.ckpt", directory / f"frozen{SUFFIX}"

    @property
    def path(self) -> Path:
        """Where the frozen leaves are: there is only one of the two."""
        return self._folder if is_folder(self._folder) else self._file

    def write(self, state: BilevelState, shared: bool = False) -> int | None:
        """Writes the frozen leaves of a new run; their checksum, or `None` if nothing is frozen.

        Replaces the file of a run that was killed before its first checkpoint.
        """
        part = frozen_part(state.params)
        checksum = _checksum(part, of_bits=shared)
        if checksum is None:
            return None
        with together(shared):
            if is_first(shared):
                self._make_room()
        header = json.dumps({"leaves": leaves_of(part), "checksum": checksum})
        if shared:
            write_folder(self._folder, header, part)
        else:
            write_file(self._file, header, part)
        return checksum

    def _make_room(self) -> None:
        path = self._file
        if path.exists() and not (path.is_file() and is_checkpoint(path)):
            raise ValueError(
                f"{path} exists and was not written by gradhpo, which uses this name for the "
                "frozen leaves of a run: move the file away, or pass another directory"
            )
        path.unlink(missing_ok=True)
        if is_folder(self._folder):
            remove_folder(self._folder)

    def read_into(self, state: BilevelState, checksum: int | None) -> BilevelState:
        """The state with the frozen leaves of the run.

        If its own are the same, it keeps them, so that they are not in memory twice.
        """
        if checksum is None:
            return state
        path = self.path
        if not path.exists():
            raise ValueError(f"{path}, the frozen leaves of the run, is missing. {_REMEDY}")
        header, body = read_kept(path, is_frozen_header, _REMEDY)
        if header["checksum"] != checksum:
            raise ValueError(f"{path} holds the frozen leaves of another run. {_REMEDY}")
        part = frozen_part(state.params)
        _check_leaves(path, header["leaves"], leaves_of(part))
        of_bits = path == self._folder
        can_tell = of_bits or not is_shared(part)
        if can_tell and _checksum(part, of_bits) == checksum:
            return state
        return state.update(params=with_frozen(state.params, read_tree(body, part)))


def _checksum(part: PyTree, of_bits: bool) -> int | None:
    """Over every byte, or by the bits where the arrays are; `None` if nothing is frozen."""
    found = None
    for leaf in jax.tree.leaves(part):
        if of_bits:
            data = str(checksum_of_bits(leaf)).encode()
        else:
            data = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
            data = np.ravel(data).view(np.uint8).data
        found = zlib.crc32(data, found or 0)
    return found


def _check_leaves(path: Path, found: list, expected: list) -> None:
    """Checks that the run and the state have frozen the same leaves."""
    there, here = ([name for name, *_ in leaves] for leaves in (found, expected))
    if there != here:
        differing = sorted(set(there) ^ set(here))
        where = "there" if differing[0] in there else "here"
        raise ValueError(
            f"{path} is from a run that froze other leaves: {differing[0]} is frozen only {where}. "
            "Pass a state from the same optimizer.init for the same model, with the same leaves "
            "frozen"
        )
    for (name, *then), (_, *now) in zip(found, expected, strict=True):
        if then != now:
            raise ValueError(
                f"{path} is from a run of another model: its frozen leaf {name} is {then} there "
                f"and {now} here"
            )
