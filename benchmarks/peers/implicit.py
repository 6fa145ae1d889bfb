"""Implicit differentiation against jaxopt and Optimistix: the cost of the same hypergradients."""

import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import penalised
from benchmarks.peers.environment import Loadable, PeerError, Workers
from benchmarks.timed import Compared, by_turns


BUDGET = 1.0  # seconds for a row, roughly
STEPS = 30  # outer ones
SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_PLATFORMS": "cpu",  # the only device of the jaxlib on the package index
}
PEERS = {
    "jaxopt": ("implicit_jaxopt.py", ["jaxopt==0.8.5", "jax==0.10.2", "jaxlib==0.10.2"]),
    "Optimistix": (
        "implicit_optimistix.py",
        ["optimistix==0.1.0", "lineax==0.1.1", "equinox==0.13.8", "jax==0.10.2", "jaxlib==0.10.2"],
    ),
}  # fmt: skip
LINEAR_RULES = """\
  1e-10 of |r| / |b| (jaxopt), of |r / (1 + |b_i|)| and the same of the step (lineax: Optimistix,
  and gradhpo with b scaled to length 1); what libraries come with has tolerances of its own"""
INNER_RULES = """\
  1e-8 of the gradient's length, after a number of steps found beforehand, untimed (gradhpo); of
  that length (jaxopt); of the last step, with L-BFGS also of the change of the loss (Optimistix,
  where Newton's inner systems are dense, not counted as products)"""


class Task(NamedTuple):
    """One model and its penalties; `solved` is the solution by NumPy."""

    name: str
    kind: str
    model: Any
    h: np.ndarray
    solved: penalised.Solved

    @property
    def outer_rate(self) -> float:
        """The first step moves the penalty that matters most by a factor of e^0.05.

        With 0.3, penalties vanish within 30 steps (to e^-160) and the system becomes singular.
        """
        return 0.05 / np.abs(self.solved.hypergradient).max()

    def save(self, path: Path) -> None:
        x, y, u, v = self.model.data
        np.savez(
            path, model=self.kind, h=self.h, optimum=self.solved.w,
            outer_rate=self.outer_rate, outer_steps=STEPS,
            train_x=x, train_y=y, train_curvature=self.model.curvature,
            val_x=u, val_y=v, val_curvature=self.model.curvature,
        )  # fmt: skip


def tasks() -> list[Task]:
    """A penalty, or two, for each feature."""
    cubic, quadratic = penalised.diabetes(3), penalised.diabetes(2)
    chosen = (
        ("ridge", penalised.Ridge(cubic), 0.1, (cubic.x.shape[1],)),
        ("logistic", penalised.Logistic(penalised.digits()), 0.01, (65, 1)),
        ("elastic net", penalised.ElasticNet(quadratic), 0.01, (2, quadratic.x.shape[1])),
    )
    made = []
    for kind, model, penalty, shape in chosen:
        h = np.full(shape, np.log(penalty))
        made.append(Task(f"{kind}, {h.size} penalties", kind, model, h, model.solved(h)))
    return made


def error(found: Any, exact: np.ndarray) -> float:
    return np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact)


class Row(NamedTuple):
    """A program of one library for one task, and its label."""

    library: str
    how: str
    label: str


OURS = "gradhpo"


def derived(solver: str) -> list[Row]:
    """At one tolerance with one solver, and then with the defaults of each library."""
    return [
        Row(OURS, "same", f"gradhpo, {solver}"),
        Row("jaxopt", "same", f"jaxopt root_vjp, {solver}"),
        Row("Optimistix", "same", f"Optimistix implicit_jvp, {solver}"),
        Row(OURS, "default", f"gradhpo's default ({solver}, 4e-11)"),
        Row("jaxopt", "default", "jaxopt's (normal equations, 1e-5)"),
        Row("Optimistix", "default", "Optimistix's (dense LU, exact)"),
    ]


# By whether the model is the elastic net, whose system is not symmetric.
DERIVED = {False: derived("CG"), True: derived("GMRES")}
SOLVED = {
    False: [
        Row(OURS, "L-BFGS", "gradhpo, optax.lbfgs"),
        Row(OURS, "", "gradhpo, optax: Nesterov momentum"),
        Row("jaxopt", "", "jaxopt, LBFGS"),
        Row("Optimistix", "", "Optimistix, LBFGS"),
        Row("Optimistix", "Newton", "Optimistix, Newton (Cholesky)"),
    ],
    True: [
        Row(OURS, "", "gradhpo, proximal steps"),
        Row("jaxopt", "", "jaxopt, ProximalGradient (FISTA)"),
        Row("Optimistix", "", "Optimistix, proximal steps"),
    ],
}


class Libraries:
    """What programs of several libraries answer to the same tasks, and how long they take."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._answers: dict[tuple[Row, str, str], dict] = {}

    def _ask(self, do: str, row: Row, what: str, task: Loadable) -> Any:
        return self._workers.ask(row.library, do, name=task.name, task=what, how=row.how)

    def prepare(self, row: Row, what: str, task: Loadable) -> dict:
        """The answer of a program, which is built once."""
        key = row, what, task.name
        if key not in self._answers:
            self._answers[key] = self._ask("prepare", row, what, task)
        return self._answers[key]

    def _seconds(self, row: Row, what: str, task: Loadable) -> float:
        return self._ask("measure", row, what, task)

    def alone(self, row: Row, what: str, task: Loadable) -> float:
        """Median seconds of a prepared row."""
        measured = lambda: self._seconds(row, what, task)
        return statistics.median(measured() for _ in range(repeats(measured())))

    def compare(self, row: Row, base: Row, what: str, task: Loadable) -> Compared:
        """Seconds of a prepared row against another."""
        first = lambda: self._seconds(row, what, task)
        second = lambda: self._seconds(base, what, task)
        return by_turns(first, second, repeats(first() + second()))


def repeats(once: float) -> int:
    """For a program that takes `once` seconds; a short one runs four times for each measurement."""
    return int(np.clip(BUDGET / (4 * once), 3, 21))


def print_rows(
    libraries: Libraries, rows: list[Row], what: str, task: Task, figures: Callable[[dict], str]
) -> None:
    """A line for each row, its time in units of the first; `figures` writes the middle of it."""
    print(f"  {task.name}; {task.solved.w.size} weights, {len(task.model.data.x)} examples")
    base = rows[0]
    for row in rows:
        try:
            answer = libraries.prepare(row, what, task)
            if row == base:
                seconds, ratio = libraries.alone(row, what, task), ""
            else:
                time = libraries.compare(row, base, what, task)
                seconds = time.first
                ratio = f"{time.ratio:7.2f} ({time.low:.2f} to {time.high:.2f})"
        except PeerError as reason:
            print(f"    {row.label:34} {reason}"[:100], flush=True)
            continue
        line = f"    {row.label:34}{figures(answer)} {1e3 * seconds:8.2f} {ratio}"
        print(line.rstrip(), flush=True)


def print_derived(libraries: Libraries, all_tasks: list[Task]) -> None:
    print("\nImplicit differentiation at the same optimum, on the CPU, in float64, tolerance 1e-10")
    print(LINEAR_RULES)
    print(f"    {'':34}   error products     MiB       ms   ms / gradhpo's")
    for task in all_tasks:
        rows = DERIVED[task.kind == "elastic net"]

        def figures(answer: dict, exact: np.ndarray = task.solved.hypergradient) -> str:
            off = error(answer["hypergradient"], exact)
            products = answer["products"] or "dense"
            return f"{off:8.0e}{products:>9}{answer['mib']:8.2f}"

        print_rows(libraries, rows, "derive", task, figures)


def print_solved(libraries: Libraries, all_tasks: list[Task]) -> None:
    print("\nFrom weights of 0 to the optimum (to 1e-8), and the hypergradient there (to 1e-10)")
    print(INNER_RULES)
    print(f"    {'':34}   error     inner products     MiB       ms   ms / gradhpo's")
    for task in all_tasks:

        def figures(answer: dict, exact: np.ndarray = task.solved.hypergradient) -> str:
            off = error(answer["hypergradient"], exact)
            return f"{off:8.0e}{answer['inner']:10}{answer['products']:9}{answer['mib']:8.2f}"

        print_rows(libraries, SOLVED[task.kind == "elastic net"], "solve", task, figures)


def print_tuned(libraries: Libraries, all_tasks: list[Task]) -> None:
    print(f"\n{STEPS} outer steps on the penalties from the optimum, each from the last weights")
    print(INNER_RULES)
    print(f"    {'inner, products: of a step':34}   error     inner products  val loss       ms")
    for task in all_tasks:
        exact = penalised.tuned(task.model, task.h, task.outer_rate, STEPS)
        moved = exact.w - task.h

        def figures(answer: dict, start: np.ndarray = task.h, moved: np.ndarray = moved) -> str:
            inner, products = (answer[name] / STEPS for name in ("inner", "products"))
            off = error(answer["h"] - start, moved)
            return f"{off:8.0e}{inner:10.1f}{products:9.1f}{answer['val_loss']:10.5f}"

        print_rows(libraries, SOLVED[task.kind == "elastic net"], "tune", task, figures)
        print(f"    {'exactly':34}{'':27}{exact.val_loss:10.5f}")


def print_implicit() -> None:
    all_tasks = tasks()
    with contextlib.ExitStack() as stack:
        scripts = {OURS: ("implicit_gradhpo.py", ()), **PEERS}
        libraries = Libraries(Workers(stack, scripts, all_tasks, **SETTINGS))
        print_derived(libraries, all_tasks)
        print_solved(libraries, all_tasks)
        print_tuned(libraries, all_tasks)
