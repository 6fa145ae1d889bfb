"""Cosines to the exact hypergradient along a run, in the manner of HyperDistill's figure 3.

HyperDistill tunes layers of a network for many short episodes. Before some of
them the run is held, and all methods follow the next episode from its start, with the
hyperparameters held fixed: for every window of t steps, the estimate of a method beside the exact
hypergradient of the same window (`benchmarks/costs/accuracy.py`).
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo
from benchmarks.costs.accuracy import (
    MOMENTUM_01,
    OFFLINE,
    Episode,
    followed,
    layers_of_digits,
    online_methods,
)
from benchmarks.intervals import with_interval
from benchmarks.rows import Kept, Row, measured, taken
from examples import meta_learning_sinusoid as sinusoid
from gradhpo.utils.tables import aligned


SEEDS, STEPS, REPTILE = 5, 30, 0.1
MARKS = (0, 20, 40)  # episodes before which the run is held
WINDOWS = (5, 15, 30)
GAMMAS = (0.9, 0.99, 0.999)
GAMMA = 0.99  # of the run
TERMS = 5
ORDER = ("DrMAD", "HyperDistill .99", "one step", "first order")  # as published


class Problem(NamedTuple):
    """One for all the run: `episode.batch` and `val` are functions of the step."""

    episode: Episode
    val: Callable
    outer: optax.GradientTransformation
    rate: float  # of the inner optimizer
    num_tasks: int | None = None
    own_theta: bool = False  # fitted on the episode that is measured, and of few methods

    def around(self, optimizer: Any) -> Any:
        if self.num_tasks is None:
            return optimizer
        return gradhpo.TaskBatched(optimizer, self.num_tasks)

    def at(self, state: gradhpo.BilevelState, first: int) -> Episode:
        """The episode that starts at this step of the run, where it has come to."""
        params = state.params
        if self.num_tasks is not None:  # all tasks start from the same point
            params = jax.tree.map(lambda x: x[0] if eqx.is_inexact_array(x) else x, params)
        return self.episode._replace(
            params=params,
            hyperparams=state.hyperparams,
            batch=lambda t: self.episode.batch(first + t),
            val_batch=self.val(first),
        )


def sinusoid_tasks(seed: int) -> Problem:
    """Ten sine waves at a time, other ones in every episode."""
    k1, k2 = jax.random.split(jax.random.key(seed))
    net = eqx.nn.MLP(1, 1, width_size=100, depth=3, key=k1)
    params, hyperparams = gradhpo.partition(net, lambda net: net.layers[:-1])
    train, val = (sinusoid.Points(k2, purpose) for purpose in (1, 2))
    episode = Episode(
        params, hyperparams, MOMENTUM_01, train, val(jnp.zeros((), int)), sinusoid.squared_error,
        sinusoid.squared_error, True,
    )  # fmt: skip
    return Problem(episode, val, sinusoid.OUTER_OPTIMIZER, 0.01, sinusoid.TASKS)


def layers_of_all_digits(seed: int) -> Problem:
    """The same digits in every episode, in other minibatches."""
    episode = layers_of_digits(seed)
    return Problem(episode, lambda step: episode.val_batch, optax.adam(1e-3), 0.02)


OWN_THETA = "layers, ten sine waves, theta fitted on the episode that is measured"
PROBLEMS = {
    "layers, ten sine waves": sinusoid_tasks,
    OWN_THETA: lambda seed: sinusoid_tasks(seed)._replace(own_theta=True),
    "layers, digits": layers_of_all_digits,
}


def methods(problem: Problem) -> dict[str, Any]:
    """Those that estimate at every step."""
    inner = problem.episode.inner_optimizer
    online = online_methods(inner, GAMMAS)
    if problem.own_theta:
        return online
    online["T1-T2"] = gradhpo.T1T2Optimizer(inner)
    for name, share in (("the inner rate", 1.0), ("a tenth of it", 0.1)):
        series = gradhpo.Neumann(TERMS, share * problem.rate)
        online[f"Neumann, {name}"] = gradhpo.ImplicitOptimizer(inner, linear_solver=series)
    return online


def print_cosines(quick: bool = False, file: Path | Kept | None = None) -> None:
    names, seeds = (["layers, digits"], 1) if quick else (list(PROBLEMS), SEEDS)
    marks, windows = ((0, 2), (5,)) if quick else (MARKS, WINDOWS)
    rows = rows_of(names, seeds, marks, windows, file)
    print(
        "\nCosine to the exact hypergradient of the same window, the first t steps of an episode"
        f"\nof {STEPS}. HyperDistill ({GAMMA}) tunes the hyperparameters at every step of a run;"
        f"\nall methods are measured in its episodes {', '.join(map(str, marks))}, with the"
        f"\nhyperparameters held fixed. Mean over these and {seeds} seeds; with the 95 % interval"
        "\nover seeds, the mean over windows as well. Published: DrMAD > HyperDistill > one step"
        "\n> first order"
    )
    print(
        f"Ours, where the paper is silent: Reptile at {REPTILE}; theta fitted on the episode after"
        f"\nthe one that is measured unless stated otherwise; {TERMS} terms of the Neumann series,"
        "\nat each step, with two rates; greedy with gamma .99"
    )
    for name in names:
        found = [row for row in rows if row["problem"] == name]
        print(f"\n{name}\n\n{_table(found, windows)}\n\n{_differences(found)}")
    print(f"\n{taken(rows)}")


def rows_of(
    names: list[str], seeds: int, marks: tuple, windows: tuple, file: Path | Kept | None = None
) -> list[Row]:
    settings = [
        {"problem": name, "seed": seed, "marks": list(marks), "windows": list(windows)}
        for name in names
        for seed in range(seeds)
    ]
    return measured(settings, _row, file)


def _row(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    """Cosines of each method, `[marks, windows]`."""
    problem = PROBLEMS[setting["problem"]](setting["seed"])
    episode, online = problem.episode, methods(problem)
    runner = problem.around(
        gradhpo.OnlineHypergradientOptimizer(episode.inner_optimizer, problem.outer, gamma=GAMMA)
    )
    losses = gradhpo.LossFunctions(episode.train_loss, episode.val_loss)
    state, now = runner.init(episode.params, episode.hyperparams), 0
    found: dict[str, list[list[float]]] = {}
    for mark in setting["marks"]:
        if mark > now:
            state, _ = gradhpo.run(
                runner, state, losses, episode.batch, problem.val, num_steps=(mark - now) * STEPS,
                steps_per_episode=STEPS, reptile_rate=REPTILE, chunk_size=2 * STEPS, progress=False,
            )  # fmt: skip
            now = mark
        at, after = (problem.at(state, k * STEPS) for k in (mark, mark + 1))
        windows = tuple(setting["windows"])
        offline = {} if problem.own_theta else OFFLINE
        fitted_on = at if problem.own_theta else after
        cosines = followed(at, windows, online, offline, fitted_on=fitted_on, around=problem.around)
        for name, values in cosines.items():
            found.setdefault(name, []).append(values)
    return {"cosines": found}


def of_method(rows: list[Row], method: str) -> np.ndarray:
    """`[seeds, marks, windows]`."""
    return np.asarray([row["cosines"][method] for row in rows])


def _table(rows: list[Row], windows: tuple) -> str:
    table = [["t", *map(str, windows), "all"]]
    means = {name: of_method(rows, name) for name in rows[0]["cosines"]}
    for name in sorted(means, key=lambda name: -means[name].mean()):
        by_window = [f"{x:.3f}" for x in means[name].mean(axis=(0, 1))]
        table.append([name, *by_window, with_interval(means[name].mean(axis=(1, 2)).tolist(), 3)])
    return aligned(table)


def differences(rows: list[Row]) -> dict[str, np.ndarray]:
    """Each method of the published order less the next one: means of the seeds."""
    known = [name for name in ORDER if name in rows[0]["cosines"]]  # few with a theta of its own
    mean = lambda name: of_method(rows, name).mean(axis=(1, 2))
    return {f"{a} less {b}": mean(a) - mean(b) for a, b in itertools.pairwise(known)}


def _differences(rows: list[Row]) -> str:
    return "\n".join(
        f"{name}: {with_interval(values.tolist(), 3)}, above 0 in {np.sum(values > 0)} of "
        f"{len(values)} seeds"
        for name, values in differences(rows).items()
    )
