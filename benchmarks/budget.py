"""Quality against budget: validation loss over model fits and over seconds, for three problems.

gradhpo, random search and Optuna's TPE minimise the same validation loss over the same space, from
the same first point, with the same training, compiled once. How it is counted:

- One fit is the steps of one full training. Of gradhpo its inner steps are counted, dear as they
  are: what hypergradients cost shows in seconds, from which compilation is left out.
- A point of a curve is the lowest validation loss so far of fully trained models. Where gradhpo
  carries its parameters on, that is the model trained online, looked at once in each fit. Row
  `retrained`: one more fit, from the start, with the hyperparameters reached by then.
"""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import gradhpo
from benchmarks.budget_problems import PROBLEMS, Case, Problem
from benchmarks.budget_report import Curve, Results, print_problem, save_figure
from benchmarks.peers.environment import PeerError, Worker


OPTUNA = ("optuna==5.0.0",)
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "quality_against_budget.png"


class Training:
    """One full training as one compiled program of hyperparameters and data."""

    def __init__(self, problem: Problem) -> None:
        train_loss, val_loss = problem.losses.train_loss, problem.losses.val_loss

        @eqx.filter_jit
        def fit(case: Case, hyperparams: PyTree) -> tuple[PyTree, Array]:
            w, static = eqx.partition(case.params, eqx.is_inexact_array)
            optimizer = problem.inner(hyperparams)
            whole = lambda w: eqx.combine(w, static)

            def step(carry, t):
                w, state = carry
                batch = case.train(t) if callable(case.train) else case.train
                loss = lambda w: train_loss(whole(w), hyperparams, batch)
                updates, state = optimizer.update(jax.grad(loss)(w), state, w)
                return (eqx.apply_updates(w, updates), state), None

            (w, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), jnp.arange(problem.steps))
            return whole(w), val_loss(whole(w), hyperparams, case.val)

        @eqx.filter_jit
        def judge(params: PyTree, case: Case) -> tuple[Array, Array]:
            right = jnp.nan if problem.accuracy is None else problem.accuracy(params, case.test)
            return val_loss(params, None, case.test), jnp.asarray(right)

        self.problem, self.fit = problem, fit
        self.judge: Callable = lambda params, case: tuple(map(float, judge(params, case)))

    def place(self, point: np.ndarray | float) -> PyTree:
        return self.problem.place(jnp.broadcast_to(jnp.float32(point), self.problem.size))

    def at(self, case: Case, point: float) -> Curve:
        """A single fit with all coordinates alike."""
        started = time.perf_counter()
        params, loss = self.fit(case, self.place(point))
        losses = np.asarray([loss])
        seconds = np.asarray([time.perf_counter() - started])
        return Curve(np.ones(1), seconds, losses, *self.judge(params, case))


class Searcher(Protocol):
    def suggest(self) -> np.ndarray | float: ...
    def tell(self, value: float) -> None: ...


class RandomSearch:
    """Uniform in the cube, after its middle; tied, along its diagonal."""

    def __init__(self, size: int, seed: int, tied: bool = False) -> None:
        self.random = np.random.default_rng([seed, 1])  # not that of the data
        self.shape, self.first = (() if tied else size), True

    def suggest(self) -> np.ndarray | float:
        drawn = 0.5 if self.first else self.random.uniform(size=self.shape)
        self.first = False
        return drawn

    def tell(self, value: float) -> None:
        pass


class TPE:
    """Optuna's, in a process of its own; the middle is its first trial as well."""

    def __init__(self, worker: Worker, size: int, seed: int) -> None:
        self.worker = worker
        worker.ask("begin", seed=seed, first=[0.5] * size)

    def suggest(self) -> np.ndarray:
        return np.asarray(self.worker.ask("suggest"))

    def tell(self, value: float) -> None:
        self.worker.ask("tell", value=value)


def searched(training: Training, case: Case, searcher: Searcher, trials: int) -> Curve:
    seconds, losses, best = [], [], case.params
    started = time.perf_counter()
    for _ in range(trials):
        params, loss = training.fit(case, training.place(searcher.suggest()))
        value = float(loss) if jnp.isfinite(loss) else float("inf")
        searcher.tell(value)
        if value < min(losses, default=np.inf):
            best = params
        losses.append(value)
        seconds.append(time.perf_counter() - started)
    fits = np.arange(1, len(losses) + 1)
    lowest = np.minimum.accumulate(losses)
    return Curve(fits, np.asarray(seconds), lowest, *training.judge(best, case))


def followed(training: Training, case: Case, outer_fits: int) -> tuple[Curve, Curve | None]:
    """gradhpo, and what retraining makes of its hyperparameters, unless it does so by itself."""
    problem, optimizer = training.problem, training.problem.optimizer
    each = problem.steps // optimizer.num_inner_steps  # outer steps in a fit
    state = optimizer.init(case.params, training.place(0.5))
    looks, seconds = [state], []

    def look(state: gradhpo.BilevelState, metrics: dict) -> None:
        looks.append(state)
        seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    _, history = gradhpo.run(
        optimizer, state, problem.losses, case.train, case.val,
        num_steps=each * outer_fits, chunk_size=each, callbacks=[look], progress=False,
        steps_per_episode=1 if problem.cold else None, reptile_rate=0.0 if problem.cold else 1.0,
    )  # fmt: skip
    losses = np.asarray(history["val_loss"][each - 1 :: each])
    fits, best = np.arange(1, len(losses) + 1), int(np.nanargmin(losses))
    # The loss of a look is that before its outer update. After a cold restart the model is gone,
    # and the same training makes it anew.
    if problem.cold:
        params, loss = training.fit(case, looks[best].hyperparams)
        if not np.isclose(loss, losses[best], rtol=1e-2):
            raise AssertionError(f"{problem.title}: {losses[best]} is {loss} by plain training")
    else:
        params = looks[best + 1].params
    lowest = np.fmin.accumulate(losses)
    curve = Curve(fits, np.asarray(seconds), lowest, *training.judge(params, case))
    if problem.cold:
        return curve, None

    later, losses = [], []
    for state, spent in zip(looks[1:], seconds, strict=True):
        started = time.perf_counter()
        params, loss = training.fit(case, state.hyperparams)
        losses.append(float(loss))
        later.append(spent + time.perf_counter() - started)
    judged = training.judge(params, case)
    return curve, Curve(fits + 1, np.asarray(later), np.asarray(losses), *judged)


def first_calls(training: Training, case: Case) -> tuple[float, float]:
    """Compiles a fit, and a fit of gradhpo, with the seconds of each."""
    if training.problem.alone:
        training.at(training.problem.alone(case), 1.0)
    started = time.perf_counter()
    training.at(case, 0.5)
    fitted = time.perf_counter()
    followed(training, case, outer_fits=1)
    return fitted - started, time.perf_counter() - fitted


def compared(problem: Problem, seeds: int, worker: Worker | PeerError) -> Results:
    """Every row for every seed; a row that cannot be is the reason why."""
    training = Training(problem)
    compiled = first_calls(training, problem.case(0))
    rows: dict[str, list[Curve] | str] = {}

    def add(name: str, curve: Curve | None) -> None:
        if curve is not None:
            rows.setdefault(name, []).append(curve)

    for seed in range(seeds):
        case = problem.case(seed)
        search = partial(searched, training, case)
        online, retrained = followed(training, case, problem.outer_fits)
        add("gradhpo", online)
        add("  retrained", retrained)
        add("random search", search(RandomSearch(problem.size, seed), problem.trials))
        if problem.tied:
            tied = RandomSearch(problem.size, seed, tied=True)
            add("  one for all", search(tied, problem.trials))
        if not isinstance(rows.get("Optuna's TPE"), str):
            try:
                if isinstance(worker, PeerError):
                    raise worker
                add("Optuna's TPE", search(TPE(worker, problem.size, seed), problem.tpe_trials))
            except PeerError as error:
                rows["Optuna's TPE"] = str(error)
        add("untuned", training.at(case, 0.5))
        if problem.alone:
            add("val. set alone", training.at(problem.alone(case), 1.0))
    return Results(problem, rows, compiled)


def print_budget(seeds: int = 5, most: int | None = None, figure: Path | None = FIGURE) -> None:
    """With at most `most` fits in a search: `print_budget(2, 3, None)` is a smoke test."""
    print(f"\nQuality against budget, {seeds} seeds (data split, start and search)")
    print(
        "  geometric means with 95 % t-intervals over seeds; all begin in the middle of the space"
    )
    results = []
    with contextlib.ExitStack() as stack:
        try:
            worker = stack.enter_context(Worker("optuna_tpe.py", OPTUNA))
        except PeerError as error:
            worker = error
        for make in PROBLEMS:
            problem = make()
            if most:
                lengths = ("trials", "tpe_trials", "outer_fits")
                problem = problem._replace(
                    **{of: min(getattr(problem, of), most) for of in lengths}
                )
            results.append(compared(problem, seeds, worker))
            print_problem(results[-1])
    if figure is not None:
        save_figure(results, figure)
        print(f"  picture in {figure}")
