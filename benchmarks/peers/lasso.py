"""Penalties of the Lasso by hold-out error, beside sparho: hypergradients, and whole searches."""

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import Lasso

from benchmarks.peers import penalised
from benchmarks.peers.environment import PeerError, Workers
from benchmarks.peers.implicit import Libraries, Row, error
from benchmarks.peers.penalised import Data
from benchmarks.rows import Kept, measured, taken


STEPS = 50
# One thread for each: the wheels of both come with thread pools of their own.
SETTINGS = {
    "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
OURS, PEER = "gradhpo", "sparho"
SCRIPTS: dict[str, tuple[str, Sequence[str]]] = {
    OURS: ("lasso_gradhpo.py", []),
    PEER: (
        "lasso_sparho.py",
        ["sparho==0.2.0", "celer==0.7.4", "scikit-learn==1.9.1", "scipy==1.17.1", "numpy==2.4.6"],
    ),
}
# The first of each is what the others are compared with.
ROWS = {
    "derive": [
        Row(OURS, "Support", "gradhpo, Support"),
        Row(OURS, "GMRES", "gradhpo, GMRES (default)"),
        Row(PEER, "closely", "sparho, CG to 1e-14"),
        Row(PEER, "default", "sparho, default (CG, 1e-8)"),
    ],
    "solve": [
        Row(OURS, "Support", "gradhpo, Support, scikit-learn"),
        Row(OURS, "GMRES", "gradhpo, GMRES, scikit-learn"),
        Row(PEER, "sklearn", "sparho, scikit-learn"),
        Row(PEER, "celer", "sparho, celer"),
    ],
    "search": [
        Row(OURS, "descent", "gradhpo, gradient descent, Support"),
        Row(PEER, "descent", "sparho, gradient descent"),
        Row(OURS, "Support", "gradhpo, Adam, Support"),
        Row(OURS, "GMRES", "gradhpo, Adam, GMRES (default)"),
        Row(PEER, "sklearn", "sparho, HOAG, scikit-learn"),
        Row(PEER, "celer", "sparho, HOAG, celer"),
        Row(OURS, "grid", "scikit-learn, a grid of penalties"),
    ],
}
# sparho has celer for one penalty alone, and so has a grid its penalties.
FOR_ONE = {"celer", "grid"}
HEADS = {
    "derive": "The hypergradient at the solution, which is given",
    "solve": "From weights of 0 to the solution (duality gap 1e-14) and its hypergradient",
    "search": f"A whole search, {STEPS} steps",
}


class Task(NamedTuple):
    """A split, and penalties with the solution and the hypergradient at them."""

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

    Sex has two values: its square is the same feature again, the Lasso's solution is not unique,
    and the linear system of its derivative singular (condition 9e14).
    """
    data = penalised.diabetes(2)
    keep = np.delete(np.arange(65), 10 + 10)  # 10 features, 10 products with the first, sex's own
    return data._replace(x=data.x[:, keep], u=data.u[:, keep])


def sparse(seed: int = 0) -> Data:
    """200 examples to fit, 200 to judge, 1,000 features; 20 of them count.

    Neighbours correlate (0.5 to the power of their distance); the noise has half of the standard
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

    By the closed form on the support that `penalised` has, with no l2 penalty and for half the
    error. scikit-learn's solution is where its coordinate descent begins.
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
    """One penalty, and one for each feature, from a tenth of the one at which all weights are 0."""
    made = []
    for name, data in (("diabetes", diabetes()), ("sparse", sparse())):
        p = data.x.shape[1]
        start = np.log(np.abs(data.x.T @ data.y).max() / len(data.x) / 10)
        for h, what in ((np.array(start), "1 penalty"), (np.full(p, start), f"{p} penalties")):
            made.append(Task(f"{name}, {what}", data, h, *exact(data, h)))
    return made


def rows_of(what: str, many: bool) -> list[Row]:
    return [row for row in ROWS[what] if not (many and row.how in FOR_ONE)]


def settings_of(chosen: Iterable[Task], quick: bool) -> list[dict[str, str]]:
    """One setting per row; the quick form leaves out GMRES, which is slow to compile."""
    return [
        {"what": what, "task": task.name, "library": row.library, "how": row.how}
        for what in ROWS
        for task in chosen
        for row in rows_of(what, task.h.ndim > 0)
        if not (quick and row.how == "GMRES")
    ]


def measure(libraries: Libraries, task: Task, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the answer, and seconds by turns with the first row; or why there are none."""
    what = setting["what"]
    base = ROWS[what][0]
    row = next(x for x in ROWS[what] if x[:2] == (setting["library"], setting["how"]))
    try:
        answer, expected = (libraries.prepare(x, what, task) for x in (row, base))
        if row == base:
            times: dict[str, Any] = {"seconds": libraries.alone(row, what, task)}
        else:
            found = libraries.compare(row, base, what, task)
            times = {"seconds": found.first, "of_first": found.second}
            times |= {"ratio": found.ratio, "quartiles": [found.low, found.high]}
    except PeerError as reason:
        return {"failed": str(reason)}
    if what != "search":
        return {"error": error(answer["hypergradient"], task.hypergradient), **times}
    off = np.abs(np.subtract(answer["h"], expected["h"])).max() if answer["descent"] else None
    return {"loss": answer["loss"], "steps": answer["steps"], "off": off, **times}


def line(row: Mapping[str, Any]) -> str:
    label = next(x.label for x in ROWS[row["what"]] if x[:2] == (row["library"], row["how"]))
    if "failed" in row:
        return f"    {label:34} {row['failed']}"[:100]
    if row["what"] == "search":
        off = "" if row["off"] is None else f"{row['off']:.0e}"
        figures = f"{row['loss']:10.5f}{row['steps']:7}{off:>9}"
    else:
        figures = f"{row['error']:8.0e}"
    ratio = ""
    if "ratio" in row:
        low, high = row["quartiles"]
        first = 1e3 * row["of_first"]  # by turns with this row: not what the first row shows
        ratio = f"{first:9.2f}{row['ratio']:7.2f} ({low:.2f} to {high:.2f})"
    return f"    {label:34}{figures}{1e3 * row['seconds']:10.2f} {ratio}".rstrip()


def print_rows(chosen: Iterable[Task], rows: Sequence[Mapping[str, Any]], what: str) -> None:
    for task in chosen:
        weights, support = task.w.size, np.count_nonzero(task.w)
        print(f"  {task.name}; {weights} weights, {support} of them not 0 at the start")
        for row in rows:
            if (row["what"], row["task"]) == (what, task.name):
                print(line(row))


def print_lasso(quick: bool = False, file: Path | Kept | None = None) -> None:
    chosen = tasks()[:1] if quick else tasks()
    of = {task.name: task for task in chosen}
    with contextlib.ExitStack() as stack:
        started = lambda: Libraries(Workers(stack, SCRIPTS, chosen, **SETTINGS))
        libraries = functools.cache(started)  # once a row is missing
        of_setting = lambda setting: measure(libraries(), of[setting["task"]], setting)
        rows = measured(settings_of(chosen, quick), of_setting, file)
    print("\nThe Lasso |y - Xw|^2 / 2n + sum_j e^h_j |w_j|, hold-out mean squared error, by h;")
    print("float64, one thread; error: of the hypergradient, against a closed form with NumPy;")
    print("ms of CPU time, because the machine is shared; first: ms of the first row, by turns")
    print("with them, in two processes or in one; ratio: of each turn. All are medians, quartiles")
    print("in brackets")
    for what in ("derive", "solve"):
        print(f"\n{HEADS[what]}\n    {'':34}   error        ms     first  ratio")
        print_rows(chosen, rows, what)
    print(f"\n{HEADS['search']}: lowest hold-out error, steps taken, and how far the penalties")
    print("of the last step of gradient descent are from our own (largest difference of logs).")
    print("Descent has a fixed rate and fits to 1e-10, Adam a falling rate and fits to 1e-6; HOAG")
    print("fits to 1e-5 and stops at a hypergradient below 1e-6, the grid fits to 1e-4 (defaults)")
    print(f"    {'':34}{'loss':>10}{'steps':>7}{'off':>9}{'ms':>10}     first  ratio")
    print_rows(chosen, rows, "search")
    print(f"\n{taken(rows)}")
