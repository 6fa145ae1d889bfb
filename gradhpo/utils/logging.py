"""Metrics of a run as files: JSON Lines and CSV. Callbacks for `run`."""

import abc
import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked, warn


class _FileLogger(abc.ABC):
    """A line for every so many steps.

    The memory is the length of the file: a run that is resumed cuts off what was written after its
    checkpoint, and the file comes out as if nothing had happened.
    """

    @checked
    def __init__(
        self,
        path: str | Path,
        every: int = 1,
        append: bool = False,
        extra: Callable[[Any], Mapping[str, Any]] | None = None,
    ):
        check_count("every", every)
        self._path, self._every, self._append, self._extra = Path(path), every, append, extra
        if self._path.is_dir():
            raise ValueError(f"path={str(path)!r} is a directory; pass a file, path/log.jsonl")
        self.memory = np.asarray(0)
        self._began = self._resumed = False

    @abc.abstractmethod
    def _text(self, rows: list[list], names: list[str], first: bool) -> str:
        """The lines of these rows, whose first entry is the step; `None` is not written."""

    def start(self, state: Any, resumed: bool) -> np.ndarray:
        """The memory before the first step; a file that is another run's is not added to."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size and not (resumed or self._append or self._began):
            raise ValueError(
                f"{self._path} already holds something: pass another path, or append=True to add "
                "to it"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._began, self._resumed = True, resumed
        return np.asarray(size)

    def __call__(self, state: Any, metrics: Mapping[str, np.ndarray]) -> None:
        values = {name: x.tolist() for name, x in metrics.items()}
        last = int(state.step)
        first = last + 1 - len(next(iter(values.values())))
        # Steps count from 1; the first one due in this chunk.
        due = range(first + -first % self._every, last + 1, self._every)
        rows = [[step, *(x[step - first] for x in values.values())] for step in due]
        if self._extra is not None:
            extra = {name: float(x) for name, x in self._extra(state).items()}
            if not rows or rows[-1][0] != last:  # it belongs to the last step
                rows.append([last, *(x[-1] for x in values.values())])
            rows = [*([*row, *(None for _ in extra)] for row in rows[:-1]), rows[-1]]
            rows[-1] += extra.values()
            values |= extra
        with open(self._path, "ab") as file:
            if self._resumed:
                self._cut(file)
            text = self._text(rows, ["step", *values], first=file.tell() == 0)
            file.write(text.encode())
            self.memory = np.asarray(file.tell())

    def _cut(self, file: IO[bytes]) -> None:
        """What was written after the checkpoint comes again."""
        self._resumed, place = False, int(self.memory)
        if file.tell() < place:
            warn(f"{self._path} is shorter than this run had left it: it goes on at its end")
        else:
            file.truncate(place)
            file.seek(place)


class JSONLinesLogger(_FileLogger):
    """Writes metrics as JSON Lines, `{"step": 1, "train_loss": 0.5, ...}`: a callback for `run`.

    Numbers that JSON does not have (`nan`, `inf`) are `null`. Written at the end of every chunk.

    **Arguments:**

    - `path`: the file; its directory is made if it is not there.
    - `every`: a line for every so many steps, default 1.
    - `append`: whether a file that is there is added to, default `False`: an error. A run that is
        resumed from a checkpoint goes on with its own file.
    - `extra`: a function `state -> {name: number}`, called where a chunk ends, for what is no
        metric: hyperparameters themselves. It stands in the line of the last step of a chunk.

    ```python
    rate = lambda state: {"rate": jnp.exp(state.hyperparams["log_rate"])}
    logger = gradhpo.JSONLinesLogger("runs/digits/log.jsonl", every=10, extra=rate)
    ```
    """

    def _text(self, rows: list[list], names: list[str], first: bool) -> str:
        # A number is written as JSON writes it: several times as quick as by way of a dict.
        quoted = [json.dumps(name) for name in names]
        number = lambda x: repr(x) if math.isfinite(x) else "null"
        pairs = lambda row: [
            f"{name}: {number(x)}" for name, x in zip(quoted, row, strict=True) if x is not None
        ]
        return "".join("{" + ", ".join(pairs(row)) + "}\n" for row in rows)


class CSVLogger(_FileLogger):
    """Writes metrics as CSV with a line of names: a callback for `run`.

    **Arguments:** as for [`JSONLinesLogger`][gradhpo.JSONLinesLogger].

    ```python
    logger = gradhpo.CSVLogger("runs/digits/log.csv", every=10)
    ```
    """

    def _text(self, rows: list[list], names: list[str], first: bool) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([names] if first else [])
        writer.writerows(rows)
        return text.getvalue()
