"""What makes greedy and the exact hypergradient differ in `cleaning`: one change at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.intervals import with_interval
from benchmarks.rows import Kept, Row, measured, taken
from benchmarks.tables import cleaning_cosines
from benchmarks.tables.cleaning_runs import (
    EXACT,
    GREEDY,
    HORIZON,
    MOMENTUM,
    NONE,
    START,
    row_of,
)
from gradhpo.utils.tables import aligned


NOISE, SEEDS = 0.5, range(3)


class Change(NamedTuple):
    """What differs from the runs of `cleaning`."""

    label: str
    scale: float = 1.0  # of the training loss, that is, of the learning rate
    normalised: bool = False
    horizon: int = HORIZON
    momentum: float = MOMENTUM


AS_IT_IS = Change("as in cleaning")
CHANGES = {
    AS_IT_IS: (GREEDY, EXACT, NONE),
    Change("weights with a mean of 0.5", normalised=True): (GREEDY, EXACT),
    Change("a quarter of the rate", scale=0.25): (NONE, GREEDY, EXACT),
    Change("horizon of 100", horizon=100): (EXACT, GREEDY),
    Change("four times the rate", scale=4.0): (NONE, GREEDY, EXACT),
    Change("no momentum, twice the rate", scale=2.0, momentum=0.0): (NONE, GREEDY, EXACT),
}
QUICK = [(AS_IT_IS, EXACT)]


def settings(quick: bool = False) -> list[dict[str, Any]]:
    """One for each row, all changes of a seed together."""
    pairs = [(change, method) for change, methods in CHANGES.items() for method in methods]
    return [
        {"noise": NOISE, "seed": seed, "method": method, "again": True, **_named(change)}
        for seed in (SEEDS[:1] if quick else SEEDS)
        for change, method in (QUICK if quick else pairs)
    ]


def _named(change: Change) -> dict[str, Any]:
    return {name: value for name, value in change._asdict().items() if name != "label"}


def print_cleaning_why(quick: bool = False, file: Path | Kept | None = None) -> None:
    rows = measured(settings(quick), row_of, file)
    seeds = SEEDS[:1] if quick else SEEDS
    cosines = measured(cleaning_cosines.settings(NOISE, seeds), cleaning_cosines.cosines_of, file)
    count = len({row["seed"] for row in rows})
    print(
        f"\nWhat makes the difference in cleaning, noise {NOISE}: mean over {count} seed(s) and "
        "95 % interval, accuracies in %\n"
    )
    print(aligned(table(rows)))
    print(f"\n{LEGEND}\n\nThe mean weight along the way, and the validation accuracy in %\n")
    print(aligned(ways(rows)))
    cleaning_cosines.print_cosines(cosines)
    print(f"\n{taken([*rows, *cosines])}")


LEGEND = f"""\
validation, test: after {HORIZON} x 200 inner steps; best: the highest validation accuracy so far
rate: the mean weight at the end, relative to the start, times the scale of the loss
again: test accuracy after as many steps from the same start and at the same rate, with the weights
as they ended, and with these at a mean of {START}; best: its highest validation accuracy on the way
A longer horizon has fewer outer steps, each longer in proportion."""


def table(rows: Sequence[Row]) -> list[list[str]]:
    head = [
        "",
        "",
        "seeds",
        "validation",
        "best",
        "test",
        "AUROC",
        "weight, right",
        "wrong",
        "rate",
    ]
    shown = [[*head, "again", "at 0.5", "best"]]
    for change, method, of in _groups(rows):
        percent = [
            with_interval([row[x] for row in of], 1, 100) for x in ("val", "best_val", "test")
        ]
        weights = [with_interval([row[x] for row in of]) for x in ("right", "wrong")]
        rate = np.mean([change.scale * row["mean_weights"][-1] / START for row in of])
        if change.normalised:
            rate = change.scale
        names = "again_test", "again_normalised_test", "again_normalised_best"
        again = [_percent(of, name) for name in names]
        auroc = with_interval([row["auroc"] for row in of], 3)
        shown.append(
            [change.label, method, f"{len(of)}", *percent, auroc, *weights, f"{rate:.2f} ×", *again]
        )
    return shown


def _percent(rows: Sequence[Row], name: str) -> str:
    return with_interval([row[name] for row in rows], 1, 100)


def ways(rows: Sequence[Row]) -> list[list[str]]:
    """At five points of the way, the mean over seeds."""
    at = range(0, 21, 5)
    parts = [f"{5 * i} %" for i in at]
    shown = [["", "", *(f"weight, {part}" for part in parts), *parts]]
    for change, method, of in _groups(rows):
        mean = {
            name: np.mean([row[name] for row in of], axis=0)
            for name in ("mean_weights", "val_accuracys")
        }
        weights = [f"{mean['mean_weights'][i]:.3f}" for i in at]
        accuracies = [f"{100 * mean['val_accuracys'][i]:.0f}" for i in at]
        shown.append([change.label, method, *weights, *accuracies])
    return shown


def _groups(rows: Sequence[Row]) -> list[tuple[Change, str, list[Row]]]:
    found = []
    for change, methods in CHANGES.items():
        named = _named(change)
        for method in methods:
            of = [r for r in rows if r["method"] == method and named.items() <= r.items()]
            if of:
                found.append((change, method, of))
    return found
