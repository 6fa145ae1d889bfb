"""Few-shot regression of sine waves as in HyperDistill's appendix G, with every method.

The networks, the tasks and the training come from `examples/meta_learning_sinusoid.py`. Here
are the other methods of the paper's table and the exact hypergradient, after the same number of
episodes, and their validation losses in each quarter of it.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gradhpo
from benchmarks.intervals import paired, with_interval
from benchmarks.rows import Kept, Row, measured, taken
from examples import meta_learning_sinusoid as example
from gradhpo.utils.tables import aligned


SEEDS, EPISODES = 5, 250
TRIED, TRIED_SEED = 100, 100  # episodes of one setting of the series, and a seed of its own
INNER, OUTER, STEPS = example.INNER_OPTIMIZER, example.OUTER_OPTIMIZER, example.INNER_STEPS
MOMENTS = {"each step": 1, "at the end": STEPS}  # when the series is taken, and inner steps
TERMS, STEP_SIZES = 5, (0.01, 0.003, 0.001, 0.0003)


class Method(NamedTuple):
    """A row of the table, and the mean squared error that the paper reports for it."""

    optimizer: Any
    published: str = ""


def neumann(step_size: float, inner_steps: int) -> gradhpo.ImplicitOptimizer:
    series = gradhpo.Neumann(TERMS, step_size)
    return gradhpo.ImplicitOptimizer(INNER, OUTER, linear_solver=series, inner_steps=inner_steps)


OURS = "HyperDistill"
SERIES = {
    f"Neumann IFT, {when}, {size:g}": Method(neumann(size, steps), ".502")
    for when, steps in MOMENTS.items()
    for size in STEP_SIZES
}
METHODS = {
    OURS: Method(example.OPTIMIZERS["HyperDistill"], ".327 ± .052"),
    "first order": Method(example.OPTIMIZERS["first order"], ".567"),
    "one step": Method(example.OPTIMIZERS["one step"], ".670"),
    "DrMAD": Method(gradhpo.DrMADOptimizer(INNER, OUTER, unroll_steps=STEPS), "1.086"),
    "exact": Method(gradhpo.UnrolledOptimizer(INNER, OUTER, unroll_steps=STEPS)),
}


def print_sinusoid(quick: bool = False, file: Path | Kept | None = None) -> None:
    seeds, episodes, tried = (1, 4, 4) if quick else (SEEDS, EPISODES, TRIED)
    names = ["HyperDistill", "DrMAD"] if quick else list(METHODS)
    tuned = [] if quick else rows_of(list(SERIES), [TRIED_SEED], tried, file)
    chosen = [best([row for row in tuned if when in row["method"]]) for when in MOMENTS if tuned]
    rows = rows_of([*names, *chosen], range(seeds), episodes, file)
    print(
        "\nSine waves known at ten points (appendix G of HyperDistill's paper): mean squared error"
        f"\non 1,000 new tasks after {STEPS} steps, mean of {seeds} seeds and its 95 % interval."
        f"\n{episodes} episodes of {STEPS} steps, ten tasks at a time, for every method; inner SGD"
        "\nwith momentum 0.9 and rate 0.01, outer Adam at 0.001. Methods that look at a whole"
        "\nepisode update the hyperparameters once in it, the others at every inner step"
    )
    print(
        "Ours, where the paper is silent: relu, Reptile at 0.1 for the last layer, gamma 0.99,"
        "\nHyperDistill's theta fitted every 50 episodes; amplitudes 0.1 to 5, phases 0 to pi\n"
    )
    print(_table(rows))
    print(
        "\nerror: of the seeds that did not diverge, and its difference seed by seed; validation"
        "\nloss: mean at the end of an episode of ten tasks and a quarter of the episodes, median"
        "\nof seeds; updates: of the hyperparameters"
    )
    if tuned:
        print(_tuning(tuned, tried))
    print(f"\n{taken([*tuned, *rows])}")


def rows_of(
    names: Sequence[str],
    seeds: Sequence[int] | range,
    episodes: int,
    file: Path | Kept | None = None,
) -> list[Row]:
    """Seeds of one method follow each other, so that they share a compiled program."""
    settings = [
        {"method": name, "seed": seed, "episodes": episodes} for name in names for seed in seeds
    ]
    return measured(settings, _row, file)


def best(rows: Sequence[Row]) -> str:
    """The setting with the lowest validation loss in the last quarter."""
    loss = lambda row: np.nan_to_num(row["validation"][-1], nan=np.inf)
    return min(rows, key=loss)["method"]


def _row(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    optimizer = (METHODS | SERIES)[setting["method"]].optimizer
    with warnings.catch_warnings():
        # Of refused steps and of series that diverge: the table has what they lead to.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = example.meta_learn(optimizer, setting["episodes"], setting["seed"])
    return {
        "error": float(found.errors[-1]),
        "start": float(found.errors[0]),
        "validation": [float(np.mean(x)) for x in np.array_split(found.curve, 4)],
        "updates": setting["episodes"] * STEPS // optimizer.num_inner_steps,
        "theta": found.theta,
    }


def ended(rows: Sequence[Row], method: str) -> dict[int, float]:
    """Errors of the seeds of a method that did not diverge."""
    errors = {row["seed"]: row["error"] for row in rows if row["method"] == method}
    return {seed: x for seed, x in errors.items() if np.isfinite(x)}


def _table(rows: Sequence[Row]) -> str:
    quarters = [f"{part}/4" for part in range(2, 5)]
    head = [
        "",
        "error",
        f"less {OURS}",
        "diverged",
        "published",
        "updates",
        "theta",
        "validation loss 1/4",
    ]
    table = [[*head, *quarters]]
    names = list(dict.fromkeys(row["method"] for row in rows))
    mean = lambda name: np.mean(list(ended(rows, name).values()) or np.inf)
    for name in sorted(names, key=mean):
        runs = [row for row in rows if row["method"] == name]
        finite, theta = ended(rows, name), np.mean([row["theta"] for row in runs])
        table.append([
            name,
            with_interval(list(finite.values()), 3) if finite else "-",
            "" if name == OURS else paired(finite, ended(rows, OURS), 3),
            f"{len(runs) - len(finite)} of {len(runs)}",
            (METHODS | SERIES)[name].published or "-",
            f"{runs[0]['updates']:,}",
            "-" if np.isnan(theta) else f"{theta:.2f}",
            *(f"{np.median([row['validation'][k] for row in runs]):.3g}" for k in range(4)),
        ])  # fmt: skip
    return aligned(table)


def _tuning(rows: Sequence[Row], episodes: int) -> str:
    lines = [f"{row['method'][13:]:20}{row['validation'][-1]:9.3g}" for row in rows]
    return (
        f"\nThe Neumann series has {TERMS} terms, taken at each step or at the end of an episode."
        "\nIts rates above have the lowest validation loss in the last quarter of "
        f"{episodes} episodes,\nwith a seed of their own:\n  " + "\n  ".join(lines)
    )
