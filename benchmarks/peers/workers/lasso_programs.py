"""Shared by the workers of the table `lasso`: data and requests. Needs only NumPy."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from worker import serve, settled_seconds


OUTER_RATE = 0.5  # of plain gradient descent on the logarithms


class Split(NamedTuple):
    """Halves to fit and to evaluate, the log penalties `h`, and the solution `w` there."""

    x: np.ndarray
    y: np.ndarray
    u: np.ndarray
    v: np.ndarray
    h: np.ndarray  # of shape () or (features,)
    w: np.ndarray
    steps: int  # of a search

    @property
    def many(self) -> bool:
        return self.h.ndim > 0


def cpu_seconds(program: Callable[[], dict]) -> float:
    """CPU time of this process: on a busy machine, wall-clock time includes other programs."""
    start = time.process_time()
    program()
    return time.process_time() - start


def serve_searches(**builders: Callable[[Split, str], Callable[[], dict]]) -> None:
    splits: dict[str, Split] = {}
    programs: dict[tuple[str, str, str], Callable[[], dict]] = {}

    def load(name: str, path: str) -> None:
        with np.load(path) as arrays:
            values = {field: arrays[field] for field in Split._fields}
        splits[name] = Split(**values | {"steps": int(values["steps"])})

    def prepare(name: str, task: str, how: str) -> dict:
        """The program's results; this also compiles it."""
        program = builders[task](splits[name], how)
        programs[name, task, how] = program
        return {key: np.asarray(value).tolist() for key, value in program().items()}

    def measure(name: str, task: str, how: str) -> float:
        return settled_seconds(programs[name, task, how], cpu_seconds)

    serve(load=load, prepare=prepare, measure=measure)
