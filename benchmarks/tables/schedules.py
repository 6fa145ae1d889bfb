"""Schedules over 10^4 steps: forward mode with sharing beside grids, cosine and random search.

Micaelli and Storkey, Gradient-based Hyperparameter Optimization Over Long Horizons, NeurIPS 2021.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.intervals import half_interval, with_interval
from benchmarks.rows import Kept, Row, taken
from benchmarks.tables.schedule_search import (
    GRID,
    OURS,
    QUICK,
    RATES,
    WHOLE,
    Size,
    rows_of,
    schedules_of,
)
from benchmarks.tables.schedule_training import Schedule
from gradhpo.utils.tables import aligned


class Line(NamedTuple):
    """A search: which training runs of a method it chooses among, and what it pays for."""

    name: str
    method: str
    among: list[list[int]]  # for each seed
    runs: int


def lines_of(rows: Mapping[str, list[Row]], size: Size) -> list[Line]:
    """The lines of the table, in its order."""
    every = lambda method, n=None: [list(range(len(row["val_losses"])))[:n] for row in rows[method]]
    best = [
        _best(row, among) for row, among in zip(rows["constant"], every("constant"), strict=True)
    ]
    peaks = [[i for i, x in enumerate(GRID) if x[1:] == GRID[b][1:]] for b in best]
    points = len(GRID)
    lines = [
        Line("constant, grid of 100", "constant", every("constant"), points),
        Line("cosine from the best constant", "cosine", [[b] for b in best], points + 1),
        Line("cosine, its own peak rate of 5", "cosine", peaks, points + len(RATES)),
        Line("cosine, grid of 100 of its own", "cosine", every("cosine"), points),
        Line("the same in five stairs", "stairs", every("stairs"), points),
    ]
    for n in (size.alike, size.random):
        lines.append(Line(f"random, {n} schedules", "random", every("random", n), n))
    lines.append(Line(OURS, OURS, every(OURS), size.alike))
    last = [[size.outer_steps]] * size.seeds
    lines.append(Line("  its last schedule", OURS, last, size.alike))
    return lines


def _best(row: Row, among: Sequence[int]) -> int:
    return min(among, key=lambda i: row["val_losses"][i])


def chosen(rows: Mapping[str, list[Row]], line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Validation loss and test accuracy, for each seed, of the training that a search chooses."""
    pairs = list(zip(rows[line.method], line.among, strict=True))
    value = lambda name: np.array([row[name][_best(row, among)] for row, among in pairs])
    return value("val_losses"), value("accuracies")


def regrets(rows: Mapping[str, list[Row]], method: str) -> np.ndarray:
    """Best loss so far minus the best constant's, `[seeds, outer steps + 1]`."""
    losses = np.array([row["val_losses"] for row in rows[method]])
    constant = np.array([min(row["val_losses"]) for row in rows["constant"]])
    return np.minimum.accumulate(losses, axis=1) - constant[:, None]


def print_schedules(quick: bool = False, file: Path | Kept | None = None) -> None:
    """Rows that the file has are not measured again."""
    size = QUICK if quick else WHOLE
    rows = rows_of(size, file)
    print(
        f"\nSchedules of learning rate, momentum and weight decay over {size.steps:,} steps; MNIST"
        f"\nin 7 x 7 pixels, 2,000 digits to train on, 1,000 to validate, 2,000 to test; a network"
        f"\n49-16-10; mean and 95 % t-interval over {size.seeds} seeds.\n"
    )
    print(_table(rows, size))
    print(
        "\nregret: validation loss minus that of the best constant of the grid, seed by seed."
        "\nover ours: validation loss minus that of forward mode 5/5/5, seed by seed."
        "\ninner steps: of all runs, those for a search that another one starts from included;"
        f"\n{size.outer_steps * size.steps:,} of forward mode's carry derivatives."
        "\nCPU: seconds of one core for these runs, in the median over seeds; grids and random"
        "\nsearch train a hundred at once, forward mode trains one."
    )
    print("\nRegret of forward mode's best schedule so far, after each outer step:\n")
    print(_outer_runs(rows))
    print("\nIts schedules with the lowest validation loss (decay in 1e-4):\n")
    print(_learned(rows[OURS]))
    print("\nLargest rate / (1 - momentum) of the schedule that each search finds:\n")
    print(_effective(rows, size))
    away = [np.subtract(row["along"], row["val_losses"][:-1]) for row in rows[OURS]]
    worst = np.max(np.abs(away))
    print(f"\nlargest difference of a loss in an outer run and in plain training: {worst:.0e}")
    print(f"assumptions: {ASSUMPTIONS}\n")
    print(taken([row for of_method in rows.values() for row in of_method]))


ASSUMPTIONS = """batch 32, tanh, float32; one split, start and order of batches per seed, the same
in all runs (the paper's program draws a new split in every outer step); the hypergradient is
that of the mean over all validation digits, which is its mean over batches of equal size; signs of
it, steps of 0.1, 0.1 and 3e-4 from 0, halved where a sign flips, at rest for each number by itself
below 5 % (the program stops when all are); numbers are kept at 0 or above, momenta below 0.99;
entries of gradients are clipped to 3 as in the program, Hessian products are not."""


def _table(rows: Mapping[str, list[Row]], size: Size) -> str:
    head = ["", "validation loss", "regret", "over ours", "test accuracy, %", "inner steps", "CPU"]
    table, lines = [head], lines_of(rows, size)
    constant, _ = chosen(rows, lines[0])
    ours, _ = chosen(rows, next(line for line in lines if line.name == OURS))
    for line in lines:
        losses, accuracies = chosen(rows, line)
        table.append([
            line.name,
            with_interval(losses.tolist(), 4),
            with_interval((losses - constant).tolist(), 4),
            with_interval((losses - ours).tolist(), 4),
            with_interval(accuracies.tolist(), 2, 100.0),
            f"{line.runs * size.steps:,}",
            f"{line.runs * np.median([_seconds_each(row) for row in rows[line.method]]):.0f}",
        ])  # fmt: skip
    return aligned(table)


def _seconds_each(row: Row) -> float:
    """CPU seconds of each run of a row."""
    return row["cpu"] / len(row["val_losses"])


def _outer_runs(rows: Mapping[str, list[Row]]) -> str:
    of_steps = regrets(rows, OURS).T
    table = [["outer steps", *(f"{k}" for k in range(len(of_steps)))]]
    table.append(["regret", *(f"{np.mean(x):.4f}" for x in of_steps)])
    table.append(["±", *(f"{half_interval(x):.4f}" for x in of_steps)])
    return aligned(table)


def largest_effective(schedule: Schedule) -> float:
    """The largest rate / (1 - momentum) of a window: the step that a constant gradient leads to."""
    windows = len(schedule["momentum"])
    return max(
        np.max(part) / (1 - momentum)
        for part, momentum in zip(
            np.array_split(np.asarray(schedule["rate"]), windows), schedule["momentum"], strict=True
        )
    )


def best_schedules(rows: Mapping[str, list[Row]], method: str, size: Size) -> list[Schedule]:
    """The schedule with the lowest validation loss of each seed."""
    best = [_best(row, range(len(row["val_losses"]))) for row in rows[method]]
    if method == OURS:
        return [row["schedules"][i] for row, i in zip(rows[method], best, strict=True)]
    return [
        schedules_of(method, row["seed"], size)[i]
        for row, i in zip(rows[method], best, strict=True)
    ]


def _effective(rows: Mapping[str, list[Row]], size: Size) -> str:
    table = [["", *(f"seed {row['seed']}" for row in rows[OURS])]]
    for method in rows:
        found = best_schedules(rows, method, size)
        table.append([method, *(f"{largest_effective(x):.1f}" for x in found)])
    return aligned(table)


def _learned(rows: Sequence[Row]) -> str:
    table = [["seed", "outer step", "rate", "momentum", "decay"]]
    for row in rows:
        best = _best(row, range(len(row["val_losses"])))
        found = row["schedules"][best]
        in_full = lambda values, digits, scale=1: " ".join(
            f"{scale * x:.{digits}f}" for x in values
        )
        cells = [in_full(found["rate"], 2), in_full(found["momentum"], 2)]
        table.append([f"{row['seed']}", f"{best}", *cells, in_full(found["decay"], 1, 10_000)])
    return aligned(table)
