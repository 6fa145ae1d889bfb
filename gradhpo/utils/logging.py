"""Metrics of a run as files: JSON Lines and CSV. Callbacks for `run`."""

import abc
import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from gradhpo.utils.processes import is_first, is_shared
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.warn import noted, warn


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
        # Absolute: the program may change its working directory.
        self._path, self._given = Path(path).absolute(), str(path)
        self._every, self._append, self._extra = every, append, extra
        self._label = label
        if self._path.is_dir():
            raise ValueError(f"path={str(path)!r} is a directory; pass a file, path/log.jsonl")
        self.memory = np.asarray(0)
        self._began = self._resumed = False
        self._writes = True  # of several processes that share a state, only one does
        self._written = ""  # the header
        self._waiting: list[dict[str, list]] = []  # columns that are not in the file yet
        self._error: OSError | None = None  # why they are not

    @property
    def identity(self) -> Any:
        """The file that the memory belongs to."""
        return {"path": self._given}

    @property
    def reads_states(self) -> bool:
        """Whether it reads more of a state than its step."""
        return self._extra is not None

    @property
    def unwritten(self) -> str | None:
        """What the report of a run says about lines that are not in the file."""
        if self._error is None:
            return None
        count = sum(len(columns["step"]) for columns in self._waiting)
        return f"{self._path} lacks its last {count} lines: {_said(self._error)}"

    @abc.abstractmethod
    def _header(self, columns: dict[str, list]) -> str:
        """The header above all rows."""

    @abc.abstractmethod
    def _rows(self, columns: dict[str, list]) -> str:
        """One line per row of these columns; `None` is not written."""

    def start(self, state: Any, resumed: bool) -> np.ndarray:
        """The memory before the first step; refuses to add to the file of another run."""
        self._writes = is_first(is_shared(state))
        if not self._writes:
            return np.asarray(0)
        size = self._path.stat().st_size if self._path.exists() else 0
        if size and not (resumed or self._append or self._began):
            raise ValueError(
                f"{self._path} already has content: pass another path, or append=True to add to it"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._began, self._resumed = True, resumed
        if resumed:  # steps that are taken again
            here = int(state.step)
            self._waiting = [columns for columns in self._waiting if columns["step"][-1] <= here]
        return np.asarray(size)

    def __call__(self, state: Any, metrics: Mapping[str, np.ndarray]) -> None:
        columns = self._columns(state, metrics)  # in every process: `extra` may need them all
        if not self._writes:
            return
        if columns["step"]:
            self._waiting.append(columns)
        try:
            self._write()
        except OSError as error:  # a full disk must not end a run: tried again after each chunk
            if self._error is None:
                warn(
                    f"{self._path} cannot be written ({_said(error)}): its lines wait, and are "
                    "written as soon as possible",
                    RuntimeWarning,
                )
            self._error = error
        else:
            self._waiting, self._error = [], None

    def _columns(self, state: Any, metrics: Mapping[str, np.ndarray]) -> dict[str, list]:
        metrics = _columns_of(metrics)
        last, length = int(state.step), len(next(iter(metrics.values())))
        first = last + 1 - length
        due = slice(-first % self._every, None, self._every)  # steps count from 1
        columns: dict[str, list] = {"step": list(range(first, last + 1))[due]}
        columns |= {name: x[due].tolist() for name, x in metrics.items()}
        if self._label is not None:
            columns |= {"label": [self._label] * len(columns["step"])}
        if self._extra is None:
            return columns
        if columns["step"][-1:] != [last]:  # it belongs to the last step
            columns["step"].append(last)
            for name, x in metrics.items():
                columns[name].append(x[-1].item())
            if self._label is not None:
                columns["label"].append(self._label)
        others = [None] * (len(columns["step"]) - 1)
        with noted(f"extra of {type(self).__name__}, called as extra(state)"):
            extra = self._extra(state)
        for name, x in extra.items():
            if name in columns:
                raise ValueError(
                    f"extra of {type(self).__name__} returned {name!r}, which every line has "
                    "already: choose another name"
                )
            columns[name] = [*others, float(x)]
        return columns

    def _write(self) -> None:
        with open(self._path, "ab", buffering=0) as file:
            if self._resumed:
                self._cut(file)
            start, lines = file.tell(), [self._rows(columns) for columns in self._waiting]
            for header in dict.fromkeys(self._header(columns) for columns in self._waiting):
                lines = [*self._above(header, start), *lines]
            left = memoryview("".join(lines).encode())
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(start)  # drops half a line
                raise
            self.memory = np.asarray(file.tell())

    def _above(self, header: str, start: int) -> list[str]:
        """The header if the file is empty; otherwise checks that it is the same."""
        if start and header != self._written:
            self._written = _first_line_of(self._path)
        if (start or self._written) and header.strip() != self._written.strip():
            raise ValueError(
                f"the first line of {self._path} is {self._written.strip()!r}, and the columns of "
                f"this run are {header.strip()!r}: pass another path (extra must return the same "
                "names every time)"
            )
        self._written = header
        return [] if start else [header]

    def _cut(self, file: IO[bytes]) -> None:
        """Lines written after the checkpoint will be written again."""
        self._resumed, place = False, int(self.memory)
        if file.tell() < place:
            warn(f"{self._path} is shorter than this run left it: new lines go to its end")
        else:
            file.truncate(place)
            file.seek(place)


def _columns_of(metrics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One value for each step; a population's members as `members.val_loss.0`."""
    found = {}
    for name, x in metrics.items():
        if x.ndim == 1:
            found[name] = x
        elif x.ndim == 2 and name.startswith("members."):
            found |= {f"{name}.{number}": column for number, column in enumerate(x.T)}
    return found


def _first_line_of(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline()


def _said(error: OSError) -> str:
    return f"{type(error).__name__}: {error}"


class JSONLinesLogger(_FileLogger):
    """Writes metrics as JSON Lines, `{"step": 1, "train_loss": 0.5, ...}`: a callback for `run`.

    `nan` and `inf`, which JSON lacks, become `null`. Written at the end of every chunk; if that
    fails (a full disk), the run continues, a warning says so, and the lines are written later.

    **Arguments:**

    - `path`: the file; its directory is created if it does not exist. A relative path starts at the
        current directory, even if the program leaves that later.
    - `every`: write a line every `every` steps, default 1.
    - `append`: whether to add to an existing file; default `False`: an existing file is an error. A
        run that is resumed from a checkpoint continues its own file.
    - `extra`: a function `state -> {name: number}`, called at the end of a chunk, for values that
        are not metrics, such as the hyperparameters. They go into the line of the last step of the
        chunk, under names that no metric has.
    - `label`: a string that every line has as `label`, to tell the runs in one file apart; default
        `None`.

    **Raises:** `ValueError` for a `path` that is a directory or `every < 1`; when `run` starts, for
    a file that already has content, without `append=True`; after the first chunk, for a name in
    `extra` that is a metric.

    ```python
    rate = lambda state: {"rate": jnp.exp(state.hyperparams["log_rate"])}
    logger = gradhpo.JSONLinesLogger("runs/digits/log.jsonl", every=10, extra=rate)
    ```
    """

    def _header(self, columns: dict[str, list]) -> str:
        return ""

    def _rows(self, columns: dict[str, list]) -> str:
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

    **Arguments:**

    - `path`: the file; its directory is created if it does not exist. A relative path starts at the
        current directory, even if the program leaves that later.
    - `every`: write a line every `every` steps, default 1.
    - `append`: whether to add to an existing file; default `False`: an existing file is an error. A
        run that is resumed from a checkpoint continues its own file.
    - `extra`: a function `state -> {name: number}`, called at the end of a chunk, for values that
        are not metrics, such as the hyperparameters. They go into the line of the last step of the
        chunk, under names that no metric has. Default `None`.
    - `label`: a text that every line has as `label`, to tell the runs in one file apart. Default
        `None`.

    **Raises:** `ValueError` for a `path` that is a directory or `every < 1`; when `run` starts, for
    a file that already has content, without `append=True`, or whose header has other columns; after
    the first chunk, for a name in `extra` that is a metric.

    ```python
    logger = gradhpo.CSVLogger("runs/digits/log.csv", every=10)
    ```
    """

    def _header(self, columns: dict[str, list]) -> str:
        return _csv([columns])

    def _rows(self, columns: dict[str, list]) -> str:
        return _csv(zip(*columns.values(), strict=True))


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
