"""Lasso penalties by hold-out error, against sparho: hypergradients, and whole searches."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import Lasso, lasso_path

from benchmarks.peers import penalised
from benchmarks.peers.environment import PeerError, Worker
from benchmarks.peers.implicit import error, repeats
from benchmarks.peers.penalised import Data
from benchmarks.timed import Compared, by_turns


STEPS, GRID = 50, 100
# One thread each: both ship with separate thread pools.
SETTINGS = {
    "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
OURS, PEER = "gradhpo", "sparho"
WORKERS = {
    OURS: ("lasso_gradhpo.py", []),
    PEER: (
        "lasso_sparho.py",
        ["sparho==0.2.0", "celer==0.7.4", "scikit-learn==1.9.1", "scipy==1.17.1", "numpy==2.4.6"],
    ),
}
ROWS = {
    "derive": [
        (OURS, "Support", "gradhpo, Support"),
        (PEER, "closely", "sparho, CG to 1e-14"),
        (PEER, "default", "sparho, default (CG, 1e-8)"),
    ],
    "solve": [
        (OURS, "Support", "gradhpo, Support, scikit-learn"),
        (PEER, "sklearn", "sparho, scikit-learn"),
        (PEER, "celer", "sparho, celer"),
    ],
    "search": [
        (OURS, "descent", "gradhpo, gradient descent"),
        (PEER, "descent", "sparho, gradient descent"),
        (OURS, "Support", "gradhpo, Adam, Support"),
        (PEER, "sklearn", "sparho, HOAG, scikit-learn"),
        (PEER, "celer", "sparho, HOAG, celer"),
    ],
}
HEADS = {
    "derive": "The hypergradient at the solution, which is given",
    "solve": "From weights of 0 to the solution (duality gap 1e-14) and its hypergradient",
    "search": f"A whole search, {STEPS} steps",
}


class Task(NamedTuple):
    """A split, and penalties with their solution and hypergradient."""

    name: str
    data: Data
    h: np.ndarray
    w: np.ndarray
    hypergradient: np.ndarray

    def save(self, path: Path) -> None:
        x, y, u, v = self.data
        np.savez(path, x=x, y=y, u=u, v=v, h=self.h, w=self.w, steps=STEPS)


def diabetes() -> Data:
    """With squares and products, but without the square of sex.

    Sex has two values, so its square is the same feature again: the Lasso's solution would not be
    unique, and the linear system of its derivative would be singular (condition 9e14).
    """
    data = penalised.diabetes(2)
    keep = np.delete(np.arange(65), 10 + 10)  # 10 features, 10 products with the first, sex's own
    return data._replace(x=data.x[:, keep], u=data.u[:, keep])


def sparse(seed: int = 0) -> Data:
    """200 examples to fit, 200 to evaluate, 1,000 features, 20 of them relevant.

    Neighbours correlate (0.5 to the power of their distance); the noise has half the standard
    deviation of the signal.
    """
    random = np.random.default_rng(seed)
    n, p = 400, 1_000
    x = random.normal(size=(n, p))
    for j in range(1, p):
        x[:, j] = 0.5 * x[:, j - 1] + np.sqrt(0.75) * x[:, j]
    w = np.zeros(p)
    w[random.choice(p, 20, replace=False)] = random.choice([-1.0, 1.0], 20)
    signal = x @ w
    y = signal + 0.5 * signal.std() * random.normal(size=n)
    x = (x - x[:200].mean(0)) / x[:200].std(0)
    y = (y - y[:200].mean()) / y[:200].std()
    return Data(x[:200], y[:200], x[200:], y[200:])


def exact(data: Data, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The solution at penalties exp(h), and the hypergradient of the hold-out error by h.

    By the closed form on the support in `penalised`, with no l2 penalty and for half the error. Its
    coordinate descent starts from scikit-learn's solution.
    """
    x, y = data.x, data.y
    logs = np.broadcast_to(h, x.shape[1])
    fit = Lasso(alpha=1.0, fit_intercept=False, tol=1e-12, max_iter=100_000)
    start = fit.fit(x / np.exp(logs), y).coef_ / np.exp(logs)
    both = np.stack([logs, np.full(len(logs), -np.inf)])
    solved = penalised.ElasticNet(data).solved(both, start)
    g = 2 * solved.hypergradient[0]
    return solved.w, g if np.ndim(h) else g.sum()


def tasks() -> list[Task]:
    """One penalty, and one per feature, from a tenth of the penalty that makes all weights 0."""
    made = []
    for name, data in (("diabetes", diabetes()), ("sparse", sparse())):
        p = data.x.shape[1]
        start = np.log(np.abs(data.x.T @ data.y).max() / len(data.x) / 10)
        for h, what in ((np.array(start), "1 penalty"), (np.full(p, start), f"{p} penalties")):
            made.append(Task(f"{name}, {what}", data, h, *exact(data, h)))
    return made


class Both:
    """The workers of both libraries, or why there is none."""

    def __init__(self, stack: contextlib.ExitStack, all_tasks: list[Task]) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.workers: dict[str, Worker] = {}
        self.missing = ""
        for library, (script, requirements) in WORKERS.items():
            try:
                worker = stack.enter_context(Worker(script, requirements, **SETTINGS))
                for i, task in enumerate(all_tasks):
                    task.save(directory / f"{i}.npz")
                    worker.ask("load", name=task.name, path=str(directory / f"{i}.npz"))
                self.workers[library] = worker
            except PeerError as reason:
                self.missing = str(reason)

    def ask(self, do: str, row: tuple[str, str, str], what: str, task: Task) -> Any:
        if row[0] not in self.workers:
            raise PeerError(self.missing)
        return self.workers[row[0]].ask(do, name=task.name, task=what, how=row[1])

    def compare(self, row: tuple, base: tuple, what: str, task: Task) -> Compared:
        first = lambda: self.ask("measure", row, what, task)
        second = lambda: self.ask("measure", base, what, task)
        return by_turns(first, second, repeats(first() + second()))


def rows_of(what: str, task: Task) -> list[tuple[str, str, str]]:
    """Without celer for many penalties: sparho's adapter supports only one."""
    return [row for row in ROWS[what] if row[1] != "celer" or not task.h.ndim]


def print_rows(both: Both, what: str, task: Task, figures: Callable[[dict], str]) -> None:
    """A line per row, with times relative to our first row."""
    p = task.data.x.shape[1]
    print(f"  {task.name}; {p} weights, {np.count_nonzero(task.w)} of them not 0 at the start")
    rows = rows_of(what, task)
    for row in rows:
        try:
            answer = both.ask("prepare", row, what, task)
            if row is rows[0]:
                once = both.ask("measure", row, what, task)
                times = [both.ask("measure", row, what, task) for _ in range(repeats(once))]
                seconds, ratio = statistics.median(times), ""
            else:
                found = both.compare(row, rows[0], what, task)
                seconds = found.first
                ratio = f"{found.ratio:8.2f} ({found.low:.2f} to {found.high:.2f})"
        except PeerError as reason:
            print(f"    {row[2]:34} {reason}"[:100], flush=True)
            continue
        line = f"    {row[2]:34}{figures(answer)}{1e3 * seconds:10.2f} {ratio}"
        print(line.rstrip(), flush=True)


def print_grid(task: Task) -> None:
    """One penalty from a grid, along a path of warm starts."""
    x, y, u, v = task.data
    started = time.process_time()
    _, weights, _ = lasso_path(x, y, alphas=GRID, eps=1e-3)
    losses = np.mean((u @ weights - v[:, None]) ** 2, axis=0)
    seconds = time.process_time() - started
    label = f"{GRID} penalties of a grid, lasso_path"
    print(f"    {label:34}{losses.min():10.5f}{GRID:7}{'':9}{1e3 * seconds:10.2f}")


def print_lasso() -> None:
    all_tasks = tasks()
    with contextlib.ExitStack() as stack:
        both = Both(stack, all_tasks)
        print("\nThe Lasso |y - Xw|^2 / 2n + sum_j e^h_j |w_j|, hold-out mean squared error, by h;")
        print("float64, one thread; error: of the hypergradient, against a closed form with NumPy;")
        print("ms of CPU time, because the machine is shared; last column: ms / the first row's,")
        print("quartiles in brackets")
        for what in ("derive", "solve"):
            print(f"\n{HEADS[what]}\n    {'':34}   error        ms")
            for task in all_tasks:

                def figures(answer: dict, exactly: np.ndarray = task.hypergradient) -> str:
                    return f"{error(answer['hypergradient'], exactly):8.0e}"

                print_rows(both, what, task, figures)
        print(f"\n{HEADS['search']}: lowest hold-out error, steps taken, and how far the penalties")
        print("of the last step of gradient descent are from our own (largest difference of logs)")
        print(f"    {'':34}{'loss':>10}{'steps':>7}{'off':>9}{'ms':>10}")
        for task in all_tasks:
            ours = np.asarray(both.ask("prepare", ROWS["search"][0], "search", task)["h"])

            def figures(answer: dict, ours: np.ndarray = ours) -> str:
                off = np.abs(np.asarray(answer["h"]) - ours).max()
                off = f"{off:9.0e}" if answer.get("descent") else f"{'':9}"
                return f"{answer['loss']:10.5f}{answer['steps']:7}{off}"

            print_rows(both, "search", task, figures)
            if not task.h.ndim:
                print_grid(task)
