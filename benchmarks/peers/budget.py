"""Quality against budget: validation loss over model fits and over seconds, for three problems.

gradhpo, random search and Optuna's TPE minimise the same validation loss over the same space, from
the same first point, with the same training, compiled once. The rules:

- One fit is the number of steps of one full training. For gradhpo we count inner steps; the cost of
hypergradients shows in seconds, which exclude compilation.
- A point of a curve is the lowest validation loss so far of fully trained models. Where gradhpo
keeps training its parameters, that is the model trained online, evaluated once per fit. Row
`retrained`: one more fit, from the start, with the current hyperparameters, even if its loss is not
the lowest so far.
- Test losses and accuracies come from these models; they select nothing.
"""

import contextlib
import os
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

import gradhpo
from benchmarks.peers.budget_problems import PROBLEMS, Case, Problem
from benchmarks.peers.budget_report import Curve, Results, print_problem, save_figure
from benchmarks.peers.environment import ROOT, PeerError, Worker


OPTUNA = ("optuna==5.0.0",)
FIGURE = ROOT / "docs" / "images" / "quality_against_budget.png"


class Training:
    """One full training, compiled as a function of hyperparameters and data."""

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
        """A single fit with all coordinates equal."""
        started = time.perf_counter()
        params, loss = self.fit(case, self.place(point))
        return self.curve(case, [time.perf_counter() - started], [float(loss)], lambda k: params)

    def curve(
        self,
        case: Case,
        seconds: list[float],
        losses: ArrayLike,
        model: Callable[[int], PyTree],
        lowest: bool = True,
        more: int = 0,
    ) -> Curve:
        """After each evaluation: the lowest loss so far, and its model's test results.

        Without `lowest`, each evaluation by itself. There have been `more` fits than evaluations.
        """
        losses = np.where(np.isfinite(losses), losses, np.inf)
        looks = np.arange(len(losses))
        if lowest:
            looks = np.asarray([np.argmin(losses[: k + 1]) for k in looks])
        tested = {k: self.judge(model(k), case) for k in set(looks.tolist())}
        test_losses, accuracies = np.asarray([tested[k] for k in looks.tolist()]).T
        fits = np.arange(1, len(losses) + 1) + more
        return Curve(fits, np.asarray(seconds), losses[looks], test_losses, accuracies)


# Searchers yield points of the unit cube, and receive the validation loss of each.


def random_search(size: int, seed: int, tied: bool = False) -> Generator:
    """The middle of the cube, then uniform in it; if tied, along its diagonal."""
    random = np.random.default_rng([seed, 1])  # a stream that the data do not use
    yield 0.5
    while True:
        yield random.uniform(size=() if tied else size)


def tpe(worker: Worker, size: int, seed: int) -> Generator:
    """Optuna's, in a separate process; its first trial is the middle as well."""
    worker.ask("begin", seed=seed, first=[0.5] * size)  # before the clock of a search starts

    def suggestions() -> Generator:
        while True:
            value = yield np.asarray(worker.ask("suggest"))
            worker.ask("tell", value=value)

    return suggestions()


def searched(training: Training, case: Case, searcher: Generator, trials: int) -> Curve:
    seconds, losses, models = [], [], []
    started, value = time.perf_counter(), None
    for _ in range(trials):
        params, loss = training.fit(case, training.place(searcher.send(value)))
        value = float(loss) if np.isfinite(loss) else float("inf")
        losses.append(value)
        seconds.append(time.perf_counter() - started)
        models.append(params)
    return training.curve(case, seconds, losses, models.__getitem__)


def followed(
    training: Training, case: Case, outer_fits: int
) -> tuple[Curve, Curve | None, float | None]:
    """The curves of gradhpo and of fresh training runs with its hyperparameters.

    With cold restarts every fit is a fresh training, so the second result is instead the largest
    relative difference between its losses and plain training's.
    """
    problem, optimizer = training.problem, training.problem.optimizer
    each = problem.steps // optimizer.num_inner_steps  # outer steps in a fit
    looks, seconds = [], []

    def look(state: gradhpo.BilevelState, metrics: dict) -> None:
        looks.append(state)
        seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    state = optimizer.init(case.params, training.place(0.5))
    looks.append(state)
    _, history = gradhpo.run(
        optimizer, state, problem.losses, case.train, case.val,
        num_steps=each * outer_fits, chunk_size=each, callbacks=[look], progress=False,
        steps_per_episode=1 if problem.cold else None, reptile_rate=0.0 if problem.cold else 1.0,
    )  # fmt: skip
    # The loss of an evaluation belongs to the hyperparameters before the outer update.
    losses = history["val_loss"][each - 1 :: each]

    differences = []

    def trained_anew(k: int) -> PyTree:
        """A cold restart drops the model; plain training with the same settings repeats it."""
        params, loss = training.fit(case, looks[k].hyperparams)
        differences.append(np.abs(np.divide(loss, losses[k]) - 1))
        return params

    if problem.cold:
        online = training.curve(case, seconds, losses, trained_anew)
        return online, None, np.max(differences)
    online = training.curve(case, seconds, losses, lambda k: looks[k + 1].params)

    later, values, models = [], [], []
    for state, spent in zip(looks[1:], seconds, strict=True):
        started = time.perf_counter()
        params, loss = training.fit(case, state.hyperparams)
        values.append(float(loss))
        later.append(spent + time.perf_counter() - started)
        models.append(params)
    retrained = training.curve(case, later, values, models.__getitem__, lowest=False, more=1)
    return online, retrained, None


def first_calls(training: Training, case: Case) -> tuple[float, float]:
    """Seconds of the first fit, and of gradhpo's first, with compilation."""
    if training.problem.alone:
        training.at(training.problem.alone(case), 1.0)
    started = time.perf_counter()
    training.at(case, 0.5)
    fitted = time.perf_counter()
    followed(training, case, outer_fits=1)
    return fitted - started, time.perf_counter() - fitted


def compared(problem: Problem, seeds: int, worker: Worker | PeerError) -> Results:
    """Every row for every seed; the reason where a row cannot be made."""
    training = Training(problem)
    compiled = first_calls(training, problem.case(0))
    rows: dict[str, list[Curve] | str] = {}
    differences = []

    def add(name: str, curve: Curve | None) -> None:
        if curve is not None:
            rows.setdefault(name, []).append(curve)

    for seed in range(seeds):
        case = problem.case(seed)
        search = partial(searched, training, case)
        online, retrained, difference = followed(training, case, problem.outer_fits)
        if difference is not None:
            differences.append(difference)
        add("gradhpo", online)
        add("  retrained", retrained)
        add("random search", search(random_search(problem.size, seed), problem.trials))
        if problem.tied:
            tied = random_search(problem.size, seed, tied=True)
            add("  all alike", search(tied, problem.trials))
        if not isinstance(rows.get("Optuna's TPE"), str):
            try:
                if isinstance(worker, PeerError):
                    raise worker
                add("Optuna's TPE", search(tpe(worker, problem.size, seed), problem.tpe_trials))
            except PeerError as error:
                rows["Optuna's TPE"] = str(error)
        add("untuned", training.at(case, 0.5))
        if problem.alone:
            add("val. set alone", training.at(problem.alone(case), 1.0))
    return Results(problem, rows, compiled, np.max(differences) if differences else None)


def print_budget(seeds: int = 5, most: int | None = None, figure: Path | None = None) -> None:
    """With at most `most` fits per search, and a picture in `figure`.

    `print_budget(2, 3)` is a smoke test.
    """
    print(f"\nQuality against budget, {seeds} seeds (data split, start and search)")
    print(
        "  geometric means with 95 % t-intervals over seeds; all begin in the middle of the space"
    )
    print(f"  Optuna's TPE: {OPTUNA[0]}, pinned, as it comes")
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
                capped = {of: min(getattr(problem, of), most) for of in lengths}
                problem = problem._replace(**capped)
            results.append(compared(problem, seeds, worker))
            print_problem(results[-1])
    if figure is not None:
        save_figure(results, figure)
        print(f"  picture in {os.path.relpath(figure, ROOT)}")
