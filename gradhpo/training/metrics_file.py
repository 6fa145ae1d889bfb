"""The metrics of a run on disk: rows that are only appended."""

import math
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np


_STATE = (
    "gradhpo.load_checkpoint(directory, state) still returns the state, to start a new run from"
)


class MetricsFile:
    """Rows of float64, one per step, which hold every metric's dtype exactly (int64 to 2^53).

    A checkpoint says how many of the rows belong to it. Rows beyond that come from steps that the
    run has lost, and are overwritten.
    """

    def __init__(self, path: Path):
        self.path = path
        self._dtypes: dict[str, str] = {}
        self._shapes: dict[str, list[int]] = {}  # of one step
        self._rows, self._checksum = 0, 0

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """The metrics of more steps, on disk when this returns."""
        if not any(map(len, metrics.values())):
            return
        self._dtypes = {name: str(x.dtype) for name, x in metrics.items()}
        self._shapes = {name: list(x.shape[1:]) for name, x in metrics.items()}
        columns = [x.astype("<f8").reshape(len(x), -1) for x in metrics.values()]
        rows = np.concatenate(columns, axis=1).tobytes()
        end = self._bytes()
        self._unlink()
        with open(self.path, "r+b" if self.path.exists() else "xb") as file:
            found = os.fstat(file.fileno()).st_size
            if found < end:
                raise OSError(f"{self.path} has {found} bytes, and this run had written {end}")
            file.truncate(end)
            file.seek(end)
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self._rows += len(rows) // self._row_bytes()
        self._checksum = zlib.crc32(rows, self._checksum)

    @property
    def num_rows(self) -> int:
        """How many steps are there."""
        return self._rows

    def _unlink(self) -> None:
        """Copies a file that has another name too, so that it is not written through."""
        if self.path.is_symlink() or (self.path.exists() and self.path.stat().st_nlink > 1):
            copy = self.path.with_name(f".{self.path.name}.tmp")
            copy.unlink(missing_ok=True)
            shutil.copyfile(self.path, copy)
            os.replace(copy, self.path)

    def check_absent(self) -> None:
        """A new run does not overwrite anything."""
        if self.path.is_symlink() or (self.path.exists() and self.path.stat().st_size):
            raise ValueError(
                f"{self.path} exists without a checkpoint next to it: move it away, or pass "
                "another directory"
            )

    def header(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `read`."""
        about = {"dtypes": self._dtypes, "shapes": self._shapes}
        return {"rows": self._rows, **about, "checksum": self._checksum}

    def read(self, header: dict[str, Any]) -> dict[str, np.ndarray]:
        """The metrics of a checkpoint with this header, after which `add` continues."""
        self._rows, self._checksum = header["rows"], header["checksum"]
        self._dtypes, self._shapes = header["dtypes"], header["shapes"]
        if self._rows == 0:
            return {}
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._bytes():
            raise ValueError(
                f"{self.path} has {size} bytes, but the checkpoint needs {self._bytes()}: the "
                f"history of the run is lost; nothing was used or changed. {_STATE}"
            )
        with open(self.path, "rb") as file:
            rows = file.read(self._bytes())
        if zlib.crc32(rows) != self._checksum:
            raise ValueError(
                f"{self.path} is damaged (its checksum does not match); nothing was used or "
                f"changed. {_STATE}"
            )
        try:
            table = np.frombuffer(rows, "<f8").reshape(self._rows, -1)
            parts = np.split(table, np.cumsum(self._widths())[:-1], axis=1)
            return {
                name: columns.astype(np.dtype(dtype)).reshape(-1, *self._shapes[name])
                for (name, dtype), columns in zip(self._dtypes.items(), parts, strict=True)
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} does not fit the header of its checkpoint, which is damaged; nothing "
                f"was used or changed. {_STATE}"
            ) from error

    def _widths(self) -> list[int]:
        return [math.prod(shape) for shape in self._shapes.values()]

    def _row_bytes(self) -> int:
        return 8 * sum(self._widths())

    def _bytes(self) -> int:
        return self._rows * self._row_bytes()
