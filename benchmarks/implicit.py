"""Implicit differentiation against jaxopt and Optimistix: the same hypergradients, at what cost?"""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import penalised
from benchmarks.peers.environment import PeerError, Worker
from benchmarks.timed import Compared, by_turns


BUDGET = 1.0  # seconds for a row, as a rule
STEPS = 30  # outer ones, as in peers/implicit_programs.py
SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_PLATFORMS": "cpu",  # the only device that jaxlib of the package index knows
    # Nothing measures the memory of these processes, so theirs need not go back at once.
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "33554432",
}
PEERS = {
    "jaxopt": ("implicit_jaxopt.py", ["jaxopt==0.8.5", "jax==0.10.2", "jaxlib==0.10.2"]),
    "Optimistix": (
        "implicit_optimistix.py",
        ["optimistix==0.1.0", "lineax==0.1.1", "equinox==0.13.8", "jax==0.10.2", "jaxlib==0.10.2"],
    ),
}  # fmt: skip


class Task(NamedTuple):
    """One model and its penalties; `solved` is what NumPy says."""

    name: str
    kind: str
    model: Any
    h: np.ndarray
    solved: penalised.Solved

    @property
    def many(self) -> bool:
        return self.h.size > 2

    @property
    def outer_rate(self) -> float:
        """The first step moves the penalty that matters most by a factor of e^0.05.

        With 0.3, penalties vanish within 30 steps (to e^-160), and with them the condition.
        """
        return 0.05 / np.abs(self.solved.hypergradient).max()

    def save(self, path: Path) -> None:
        x, y, u, v = self.model.data
        np.savez(
            path, model=self.kind, h=self.h, optimum=self.solved.w, outer_rate=self.outer_rate,
            train_x=x, train_y=y, train_curvature=self.model.curvature,
            val_x=u, val_y=v, val_curvature=self.model.curvature,
        )  # fmt: skip


def tasks() -> list[Task]:
    """The one penalty for all, and then one for each feature."""
    cubic, quadratic = penalised.diabetes(3), penalised.diabetes(2)
    chosen = (
        ("ridge", penalised.Ridge(cubic), 0.1, ((1,), (cubic.x.shape[1],))),
        ("logistic", penalised.Logistic(penalised.digits()), 0.01, ((1, 1), (65, 1))),
        ("elastic net", penalised.ElasticNet(quadratic), 0.01, ((2, 1), (2, quadratic.x.shape[1]))),
    )
    made = []
    for kind, model, penalty, shapes in chosen:
        for shape in shapes:
            h = np.full(shape, np.log(penalty))
            name = f"{kind}, {h.size} {'penalty' if h.size == 1 else 'penalties'}"
            made.append(Task(name, kind, model, h, model.solved(h)))
    return made


def error(found: Any, exact: np.ndarray) -> float:
    return np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact)


class Row(NamedTuple):
    """A program of one library for one task, and what is written before its figures."""

    library: str
    how: str
    label: str


OURS = "gradhpo"
DERIVED = {
    False: [
        Row(OURS, "same", "gradhpo, CG"),
        Row("jaxopt", "same", "jaxopt root_vjp, CG"),
        Row("Optimistix", "same", "Optimistix implicit_jvp, CG"),
        Row(OURS, "default", "gradhpo's default (CG, 4e-11)"),
        Row("jaxopt", "default", "jaxopt's (normal equations, 1e-5)"),
        Row("Optimistix", "default", "Optimistix's (LU)"),
    ],
    True: [
        Row(OURS, "same", "gradhpo, GMRES"),
        Row("jaxopt", "same", "jaxopt root_vjp, GMRES"),
        Row("Optimistix", "same", "Optimistix implicit_jvp, GMRES"),
        Row(OURS, "default", "gradhpo's default (GMRES, 4e-11)"),
        Row("jaxopt", "default", "jaxopt's (normal equations, 1e-5)"),
        Row("Optimistix", "default", "Optimistix's (LU)"),
    ],
}
SOLVED = {
    False: [
        Row(OURS, "", "gradhpo, optax: Nesterov momentum"),
        Row(OURS, "L-BFGS", "gradhpo, optax.lbfgs"),
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
    """The worker of each library, or why there is none."""

    def __init__(self, stack: contextlib.ExitStack, all_tasks: list[Task]) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._workers: dict[str, Worker] = {}
        self._missing: dict[str, str] = {}
        for name, (script, requirements) in {OURS: ("implicit_gradhpo.py", ()), **PEERS}.items():
            try:
                worker = stack.enter_context(Worker(script, requirements, **SETTINGS))
                for i, task in enumerate(all_tasks):
                    task.save(directory / f"{i}.npz")
                    worker.ask("load", name=task.name, path=str(directory / f"{i}.npz"))
                self._workers[name] = worker
            except PeerError as reason:
                self._missing[name] = str(reason)

    def prepare(self, row: Row, what: str, task: Task) -> dict:
        if row.library in self._missing:
            raise PeerError(self._missing[row.library])
        return self._workers[row.library].ask("prepare", name=task.name, task=what, how=row.how)

    def compare(self, row: Row, base: Row, what: str, task: Task) -> Compared:
        """Seconds of a row against those of ours, which is prepared too."""

        def measured(row: Row) -> float:
            ask = self._workers[row.library].ask
            return ask("measure", name=task.name, task=what, how=row.how)

        repeats = int(np.clip(BUDGET / (measured(row) + measured(base)), 3, 21))
        return by_turns(lambda: measured(row), lambda: measured(base), repeats)


def print_rows(
    libraries: Libraries, rows: list[Row], what: str, task: Task, figures: Callable[[dict], str]
) -> None:
    """One line for each, its time in units of the first; `figures` writes the middle of it."""
    print(f"  {task.name}; {task.solved.w.size} weights, {len(task.model.data.x)} examples")
    base = rows[0]
    for row in rows:
        try:
            answer = libraries.prepare(row, what, task)
            time = libraries.compare(row, base, what, task)
        except PeerError as reason:
            print(f"    {row.label:34} {reason}"[:100], flush=True)
            continue
        ratio = f"{time.ratio:7.2f} ({time.low:.2f} to {time.high:.2f})" if row != base else ""
        print(
            f"    {row.label:34}{figures(answer)} {1e3 * time.first:8.2f} {ratio}".rstrip(),
            flush=True,
        )


def print_derived(libraries: Libraries, all_tasks: list[Task]) -> None:
    print("\nImplicit differentiation at the same optimum, in float64, tolerance 1e-10")
    print(f"    {'':34}   error products     MiB       ms   ms / gradhpo's")
    for task in all_tasks:
        rows = DERIVED[task.kind == "elastic net"]

        def figures(answer: dict, exact: np.ndarray = task.solved.hypergradient) -> str:
            off = error(answer["hypergradient"], exact)
            return f"{off:8.0e}{answer['products']:9}{answer['mib']:8.2f}"

        # The settings that libraries come with are looked at for many penalties only.
        print_rows(libraries, rows if task.many else rows[:3], "derive", task, figures)


def print_solved(libraries: Libraries, all_tasks: list[Task]) -> None:
    print("\nFrom weights of 0 to the optimum (to 1e-8), and the hypergradient there (to 1e-10)")
    print(f"    {'':34}   error     inner products     MiB       ms   ms / gradhpo's")
    for task in all_tasks:

        def figures(answer: dict, exact: np.ndarray = task.solved.hypergradient) -> str:
            off = error(answer["hypergradient"], exact)
            return f"{off:8.0e}{answer['inner']:10}{answer['products']:9}{answer['mib']:8.2f}"

        print_rows(libraries, SOLVED[task.kind == "elastic net"], "solve", task, figures)


def print_tuned(libraries: Libraries, all_tasks: list[Task]) -> None:
    print(f"\n{STEPS} outer steps on the penalties from the optimum, each from the last weights")
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
    many = [task for task in all_tasks if task.many]
    with contextlib.ExitStack() as stack:
        libraries = Libraries(stack, all_tasks)
        print_derived(libraries, all_tasks)
        print_solved(libraries, many)
        print_tuned(libraries, many)
