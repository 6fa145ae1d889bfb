"""Searches for a schedule: what each of them tries, and the rows of what comes of it."""

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.rows import Kept, Row, measured
from benchmarks.tables import schedule_training as training
from benchmarks.tables.schedule_training import NAMES, Schedule


RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
MOMENTA = (0.0, 0.5, 0.9, 0.95)
DECAYS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3)
GRID = list(itertools.product(RATES, MOMENTA, DECAYS))
WINDOWS = (5, 5, 5)  # of rates, momenta and weight decays
OURS = "forward mode 5/5/5"


class Size(NamedTuple):
    """How long a table is."""

    seeds: int
    steps: int
    outer_steps: int
    random: int

    @property
    def alike(self) -> int:
        """Training runs of an outer run: one more than outer steps, for the last schedule."""
        return self.outer_steps + 1


WHOLE = Size(seeds=5, steps=10_000, outer_steps=10, random=100)
QUICK = Size(seeds=1, steps=200, outer_steps=3, random=100)


def cosine(peak: float, momentum: float, decay: float, steps: int) -> Schedule:
    """From the peak rate to 0, a new rate in every step."""
    shape = (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    return {"rate": peak * shape, "momentum": [momentum], "decay": [decay]}


def in_windows(schedule: Schedule, windows: int) -> Schedule:
    """The mean rate of each window instead of its rates."""
    return {**schedule, "rate": schedule["rate"].reshape(windows, -1).mean(axis=1)}


def at_random(count: int, windows: tuple[int, int, int], seed: int) -> list[Schedule]:
    """From the range of the grid: uniform in momentum and in the logarithms of the others."""
    random = np.random.default_rng([seed, 1])
    log = lambda values, n: np.exp(random.uniform(np.log(values[0]), np.log(values[-1]), n))
    rates, momenta, decays = windows
    return [
        {
            "rate": log(RATES, rates),
            "momentum": random.uniform(MOMENTA[0], MOMENTA[-1], momenta),
            "decay": log(DECAYS[1:], decays),
        }
        for _ in range(count)
    ]


def schedules_of(method: str, seed: int, size: Size) -> list[Schedule]:
    """What a search without derivatives tries, in its order."""
    if method == "random":
        return at_random(size.random, WINDOWS, seed)
    if method == "constant":
        return [{k: [x] for k, x in zip(NAMES, point, strict=True)} for point in GRID]
    smooth = [cosine(*point, size.steps) for point in GRID]
    return smooth if method == "cosine" else [in_windows(x, WINDOWS[0]) for x in smooth]


METHODS = (OURS, "constant", "cosine", "random", "stairs")


def measure(wanted: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Validation losses and test accuracies of all that one method tries, and its CPU seconds."""
    seed, method = wanted["seed"], wanted["method"]
    problem = training.problem_of(seed)
    started = time.process_time()
    row: dict[str, Any] = {}
    if method == OURS:
        given = problem, size.steps, size.outer_steps
        tried, along = training.outer_run(WINDOWS, *given)
        row = {"schedules": [{k: _short(x[k]) for k in NAMES} for x in tried]}
        row |= {"cpu": round(time.process_time() - started, 1), "along": _short(along)}
    else:
        tried = schedules_of(method, seed, size)
    # Once more without derivatives, for the test set and the last schedule.
    val_losses, accuracies = training.trained(tried, problem, size.steps)
    row.setdefault("cpu", round(time.process_time() - started, 1))
    return row | {"val_losses": _short(val_losses), "accuracies": _short(accuracies)}


def _short(values: Any) -> list[float]:
    return [float(f"{x:.6g}") for x in np.asarray(values)]


def rows_of(size: Size, file: Path | Kept | None = None) -> dict[str, list[Row]]:
    """For each method its rows, one per seed."""
    settings = [
        {"method": method, "seed": seed, "steps": size.steps, "outer_steps": size.outer_steps}
        for method in METHODS
        for seed in range(size.seeds)
    ]
    rows = measured(settings, lambda wanted: measure(wanted, size), file)
    return {method: [row for row in rows if row["method"] == method] for method in METHODS}
