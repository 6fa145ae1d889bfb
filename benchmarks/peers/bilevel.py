"""The quadratic of benchopt's benchmark_bilevel, and the workers that solve it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.environment import Worker, clone_of


# Without access to GitHub, set this variable to a copy of the repository.
SOURCE = os.environ.get("BENCHMARK_BILEVEL", "https://github.com/benchopt/benchmark_bilevel")
COMMIT = "3ad65dccff5cce27a656630a4f98be52920850b4"
# Later releases of joblib lack a module that this benchopt imports.
REQUIREMENTS = ["benchopt==1.7.0", "joblib==1.4.2", "jax==0.10.2", "jaxlib==0.10.2"]
PROBLEM = {"n_samples_inner": 1024, "n_samples_outer": 1024, "dim_inner": 100, "dim_outer": 10}


class Value(NamedTuple):
    """The value function h(x) = f(x, z*(x)), a quadratic: x'Ax/2 + b'x, up to a constant."""

    a: np.ndarray
    b: np.ndarray
    solution: np.ndarray
    start: np.ndarray

    def above(self, x: Any) -> np.ndarray:
        """How far h lies above its minimum, relative to the start of the search.

        Exact to the last digit near the minimum, since h is never evaluated there.
        """
        away = np.asarray(x, np.float64) - self.solution
        first = self.start - self.solution
        of_square = lambda d: np.einsum("...i,ij,...j->...", d, self.a, d)
        return of_square(away) / of_square(first)


def value_of(path: Path) -> Value:
    """In float64, from the means of the matrices of the problem."""
    with np.load(path) as found:
        mean = lambda name: np.mean(np.asarray(found[name], np.float64), axis=0)
        h, c, of_w = (mean(f"inner_{x}") for x in ("hess_inner", "cross", "linear_inner"))
        q, k, d = (mean(f"outer_{x}") for x in ("hess_inner", "hess_outer", "cross"))
        of_z, of_x = mean("outer_linear_inner"), mean("outer_linear_outer")
        start = np.asarray(found["outer_start"], np.float64)
    slope, at_zero = -np.linalg.solve(h, c.T), -np.linalg.solve(h, of_w)  # z* = slope x + at_zero
    a = slope.T @ q @ slope + k + d @ slope + slope.T @ d.T
    b = slope.T @ (q @ at_zero + of_z) + d @ at_zero + of_x
    if np.linalg.eigvalsh(a)[0] <= 0:
        raise RuntimeError("this quadratic has no minimum")
    return Value(a, b, -np.linalg.solve(a, b), start)


class Both(NamedTuple):
    theirs: Worker
    ours: Worker
    value: Value
    dtype: str


@contextlib.contextmanager
def both(x64: bool) -> Iterator[Both]:
    """The two programs, each with the same quadratic.

    Raises `PeerError` if the other one, which draws the quadratic, is not available.
    """
    root = clone_of(SOURCE, COMMIT)
    settings = {"JAX_ENABLE_X64": str(int(x64)), "JAX_PLATFORMS": "cpu"}
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "quadratic.npz"
        theirs = stack.enter_context(Worker("bilevel_benchopt.py", REQUIREMENTS, **settings))
        told = theirs.ask("load", root=str(root), path=str(path), **PROBLEM)
        ours = stack.enter_context(Worker("bilevel_gradhpo.py", **settings))
        ours.ask("load", path=str(path))
        yield Both(theirs, ours, value_of(path), told["dtype"])
