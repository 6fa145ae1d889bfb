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
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import warn


class _FileLogger(abc.ABC):
    """A line every `every` steps.

    The memory is the length of the file: a resumed run cuts off everything after its checkpoint,
    and the file ends up as if nothing had happened.
    """

    @checked
    def __init__(
        self,
        path: str | Path,
        every: int = 1,
        append: bool = False,
        extra: Callable[[Any], Mapping[str, Any]] | None = None,
        label: str | None = None,
    ):
        check_count("every", every)
        self._path, self._every, self._append, self._extra = Path(path), every, append, extra
        self._label = label
        if self._path.is_dir():
            raise ValueError(f"path={str(path)!r} is a directory; pass a file, path/log.jsonl")
        self.memory = np.asarray(0)
        self._began = self._resumed = False

    @abc.abstractmethod
    def _text(self, columns: dict[str, list], first: bool) -> str:
        """One line per row of these columns; `None` is not written."""

    def start(self, state: Any, resumed: bool) -> np.ndarray:
        """The memory before the first step; refuses to add to the file of another run."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size and not (resumed or self._append or self._began):
            raise ValueError(
                f"{self._path} already has content: pass another path, or append=True to add to it"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._began, self._resumed = True, resumed
        return np.asarray(size)

    def __call__(self, state: Any, metrics: Mapping[str, np.ndarray]) -> None:
        metrics = {name: x for name, x in metrics.items() if x.ndim == 1}
        last, length = int(state.step), len(next(iter(metrics.values())))
        first = last + 1 - length
        due = slice(-first % self._every, None, self._every)  # steps count from 1
        columns: dict[str, list] = {"step": list(range(first, last + 1))[due]}
        columns |= {name: x[due].tolist() for name, x in metrics.items()}
        if self._extra is not None:
            if columns["step"][-1:] != [last]:  # it belongs to the last step
                columns["step"].append(last)
                for name, x in metrics.items():
                    columns[name].append(x[-1].item())
            others = [None] * (len(columns["step"]) - 1)
            columns |= {name: [*others, float(x)] for name, x in self._extra(state).items()}
        if self._label is not None:
            columns |= {"label": [self._label] * len(columns["step"])}
        with open(self._path, "ab") as file:
            if self._resumed:
                self._cut(file)
            file.write(self._text(columns, first=file.tell() == 0).encode())
            self.memory = np.asarray(file.tell())

    def _cut(self, file: IO[bytes]) -> None:
        """Lines written after the checkpoint will be written again."""
        self._resumed, place = False, int(self.memory)
        if file.tell() < place:
            warn(f"{self._path} is shorter than this run left it: new lines go to its end")
        else:
            file.truncate(place)
            file.seek(place)


class JSONLinesLogger(_FileLogger):
    """Writes metrics as JSON Lines, `{"step": 1, "train_loss": 0.5, ...}`: a callback for `run`.

    `nan` and `inf`, which JSON lacks, become `null`. Written at the end of every chunk.

    **Arguments:**

    - `path`: the file; its directory is created if it does not exist.
    - `every`: write a line every `every` steps, default 1.
    - `append`: whether to add to an existing file; default `False`: an existing file is an error. A
        run that is resumed from a checkpoint continues its own file.
    - `extra`: a function `state -> {name: number}`, called at the end of a chunk, for values that
        are not metrics, such as the hyperparameters. They go into the line of the last step of the
        chunk.
    - `label`: a text that every line has as `label`, to tell the runs in one file apart; default
        `None`, none.

    **Raises:** `ValueError` for a `path` that is a directory or `every < 1`; when `run` starts, for
    a file that already has content, without `append=True`.

    ```python
    rate = lambda state: {"rate": jnp.exp(state.hyperparams["log_rate"])}
    logger = gradhpo.JSONLinesLogger("runs/digits/log.jsonl", every=10, extra=rate)
    ```
    """

    def _text(self, columns: dict[str, list], first: bool) -> str:
        # Column by column, with numbers formatted by JSON: ten times as fast as row by row.
        written = [
            [f"{name}: {_number(x)}, " if x is not None else "" for x in column]
            for name, column in zip(map(json.dumps, columns), columns.values(), strict=True)
        ]
        return "".join("{" + "".join(row)[:-2] + "}\n" for row in zip(*written, strict=True))


def _number(x: float | int | str) -> str:
    if isinstance(x, str):
        return json.dumps(x)
    return repr(x) if math.isfinite(x) else "null"


class CSVLogger(_FileLogger):
    """Writes metrics as CSV with a header line: a callback for `run`.

    Numbers are formatted by Python, including `nan` and `inf`. Written at the end of every chunk.

    **Arguments:** as for [`JSONLinesLogger`][gradhpo.JSONLinesLogger], with the same errors.

    ```python
    logger = gradhpo.CSVLogger("runs/digits/log.csv", every=10)
    ```
    """

    def _text(self, columns: dict[str, list], first: bool) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([columns] if first else [])
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue()
