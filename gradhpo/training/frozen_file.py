"""The frozen leaves of a run on disk: one file that all its checkpoints share."""

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
    read_file,
    read_tree,
    write_file,
)
from gradhpo.utils.freezing import frozen_part, with_frozen
from gradhpo.utils.keys import is_key


_REMEDY = "No checkpoint next to it can be read without it: restore it from a copy"


class FrozenFile:
    """`frozen.ckpt` in the directory of a run; checkpoints contain its checksum."""

    def __init__(self, directory: Path):
        self.path = directory / "frozen.ckpt"

    def write(self, state: BilevelState) -> int | None:
        """Writes the frozen leaves of a new run; their checksum, or `None` if nothing is frozen.

        Replaces the file of a run that was killed before its first checkpoint.
        """
        part = frozen_part(state.params)
        checksum = _checksum(part)
        if checksum is None:
            return None
        if self.path.exists() and not (self.path.is_file() and is_checkpoint(self.path)):
            raise ValueError(
                f"{self.path} exists and was not written by gradhpo, but the frozen leaves of a "
                "run are kept under this name: move it away, or pass another directory"
            )
        header = {"leaves": leaves_of(part), "checksum": checksum}
        write_file(self.path, json.dumps(header), part)
        return checksum

    def read_into(self, state: BilevelState, checksum: int | None) -> BilevelState:
        """The state with the frozen leaves of the run.

        If its own are the same, it keeps them, so that they are not in memory twice.
        """
        if checksum is None:
            return state
        if not self.path.is_file():
            raise ValueError(f"{self.path}, the frozen leaves of the run, is missing. {_REMEDY}")
        header, body = read_file(self.path, is_frozen_header, _REMEDY)
        if header["checksum"] != checksum:
            raise ValueError(f"{self.path} holds the frozen leaves of another run. {_REMEDY}")
        part = frozen_part(state.params)
        _check_leaves(self.path, header["leaves"], leaves_of(part))
        if _checksum(part) == checksum:
            return state
        return state.update(params=with_frozen(state.params, read_tree(body, part)))


def _checksum(part: PyTree) -> int | None:
    """Over every byte; `None` if nothing is frozen."""
    found = None
    for leaf in jax.tree.leaves(part):
        data = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        found = zlib.crc32(np.ravel(data).view(np.uint8).data, found or 0)
    return found


def _check_leaves(path: Path, found: list, expected: list) -> None:
    """The run and the state have frozen the same leaves."""
    there, here = ([name for name, *_ in leaves] for leaves in (found, expected))
    if there != here:
        differing = sorted(set(there) ^ set(here))
        where = "there" if differing[0] in there else "here"
        raise ValueError(
            f"{path} is from a run that froze other leaves: {differing[0]} is frozen only {where}. "
            "Pass the state that the same optimizer.init makes of the same model, with the same "
            "leaves frozen"
        )
    for (name, *then), (_, *now) in zip(found, expected, strict=True):
        if then != now:
            raise ValueError(
                f"{path} is from a run of another model: its frozen leaf {name} is {then} there "
                f"and {now} here"
            )
