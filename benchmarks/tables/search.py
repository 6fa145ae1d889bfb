"""Architecture search by gradient: its collapse to operations without parameters, and remedies."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.intervals import paired, with_interval
from benchmarks.rows import Kept, Row, measured, taken
from benchmarks.tables.search_network import BATCH, EDGES, OPERATIONS, TRAIN, VAL
from benchmarks.tables.search_runs import (
    ALONG,
    CHUNK,
    DECAY,
    EXACT,
    FIRST,
    GROWTH,
    IMPLICIT,
    RETRAINED,
    SECOND,
    WINDOW,
    Search,
    num_free,
    retrained,
    searched,
)


SEEDS = (0, 1, 2, 3, 4)
WATCHED = (FIRST, SECOND)  # their curvature is measured, and they are also stopped by it
DECAYED = "decay x 10"
SEARCHES = {
    FIRST: Search(FIRST),
    SECOND: Search(SECOND),
    IMPLICIT: Search(IMPLICIT),
    EXACT: Search(EXACT),
    f"first order, {DECAYED}": Search(FIRST, decay=10 * DECAY),
    "first order, sigmoids": Search(FIRST, sigmoids=1.0),
    "first order, auxiliary skip": Search(FIRST, auxiliary=1.0),
    "first order, penalty": Search(FIRST, penalty=0.5),
}
# The expensive ones have fewer seeds.
SEEDS_OF = dict.fromkeys(SEARCHES, SEEDS) | {IMPLICIT: SEEDS[:3], EXACT: SEEDS[:1]}
SAME = {f"{operation} on every edge": operation * EDGES for operation in "3as"}
NUM_RANDOM = len(ALONG)  # as many training runs as along one search
Chosen = Mapping[int, str]  # an architecture for each seed


def random_architectures(seed: int) -> list[str]:
    drawn = np.random.default_rng(1_000 + seed).integers(
        0, len(OPERATIONS) - 1, (NUM_RANDOM, EDGES)
    )
    return ["".join(OPERATIONS[i] for i in row) for row in drawn]


class Rows:
    """Searches, and training runs of what they found, from the file or measured now."""

    def __init__(
        self,
        seeds_of: Mapping[str, Sequence[int]],
        file: Path | Kept | None,
        along: tuple[int, ...] = ALONG,
        steps: int = RETRAINED,
    ):
        self.seeds_of, self.along = seeds_of, along
        self.seeds = sorted({seed for seeds in seeds_of.values() for seed in seeds})
        settings = [{"search": name, "seed": x} for name in seeds_of for x in seeds_of[name]]
        search = lambda x: searched(SEARCHES[x["search"]], x["seed"], along, x["search"] in WATCHED)
        found = measured(settings, search, file)
        self.searches = {(row["search"], row["seed"]): row for row in found}
        wanted = {(x, seed) for seed in self.seeds for x in random_architectures(seed)}
        wanted |= {(x, seed) for seed in self.seeds for x in SAME.values()}
        for row in found:
            of_row = {*row["architectures"].values(), row.get("stopped", "")} - {""}
            wanted |= {(x, row["seed"]) for x in of_row}
        settings = [{"architecture": x, "seed": seed} for x, seed in sorted(wanted)]
        train = lambda x: retrained(x["architecture"], x["seed"], steps)
        trained = measured(settings, train, file)
        self.trainings = {(row["architecture"], row["seed"]): row for row in trained}

    @property
    def all(self) -> list[Row]:
        return [*self.searches.values(), *self.trainings.values()]

    def of(self, name: str) -> dict[int, Row]:
        return {seed: self.searches[name, seed] for seed in self.seeds_of[name]}

    def after(self, name: str, step: int) -> Chosen:
        return {seed: row["architectures"][str(step)] for seed, row in self.of(name).items()}

    def stopped(self, name: str) -> Chosen:
        return {seed: row["stopped"] for seed, row in self.of(name).items()}

    def best(self, choices: Mapping[int, Sequence[str]]) -> Chosen:
        """For each seed, the choice with the best validation accuracy once trained."""
        score = lambda seed, x: self.trainings[x, seed]["validation"]
        return {seed: max(of, key=partial(score, seed)) for seed, of in choices.items()}

    def accuracies(self, chosen: Chosen, of: str = "test") -> list[float]:
        return [100 * self.trainings[x, seed][of] for seed, x in chosen.items()]

    def line(self, label: str, chosen: Chosen) -> str:
        free = with_interval([num_free(x) for x in chosen.values()], 1)
        accuracy = with_interval(self.accuracies(chosen), 1)
        return f"    {label:36}{free:>11}{accuracy:>13}  {' '.join(chosen.values())}"


def print_search(quick: bool = False, file: Path | Kept | None = None) -> None:
    """Rows that the file has are not measured again."""
    if quick:
        rows = Rows({FIRST: (0,), "first order, sigmoids": (0,)}, None, (5, 10), 10)
    else:
        rows = Rows(SEEDS_OF, file)
    print(f"\nscikit-learn's digits: {TRAIN} images to train, {VAL} to validate, the other")
    print(f"{1797 - TRAIN - VAL:,} to test; {EDGES} edges, each one of 3 x 3 and 1 x 1 convolution")
    print("(3, 1), and, without parameters, 3 x 3 mean (a), smoothing (i) and skip (s).")
    print(f"One inner step on {BATCH} images per outer step (3 where it says 3), float32.")
    print(f"Each architecture is trained from scratch for {RETRAINED} steps, on the training set.")
    print(f"{len(rows.seeds)} seeds (split and start), or as many as architectures are shown:")
    print(f"mean ± 95 % interval; free edges: those without parameters, of {EDGES}.")
    print(f"\n    {'':36}{'free edges':>11}{'test, %':>13}  architecture of each seed")
    for name in rows.seeds_of:
        for step in rows.along:
            print(rows.line(f"{name}, {step:,}", rows.after(name, step)))
    _print_differences(rows)
    _print_chosen(rows)
    _print_baselines(rows)
    print(f"\n{taken(rows.all)}")


def _print_differences(rows: Rows) -> None:
    """Differences between the last architectures, over the seeds shared with the first search."""
    last = lambda name: rows.after(name, rows.along[-1])
    test = lambda name: dict(zip(last(name), rows.accuracies(last(name)), strict=True))
    print(f"\n  Test accuracy at the end less that of {FIRST}, seed by seed")
    for name in [x for x in rows.seeds_of if x != FIRST]:
        print(f"    {name:36}{paired(test(name), test(FIRST), 1):>24}")


def _print_chosen(rows: Rows) -> None:
    print(
        f"\n  Chosen on the way: stopped by the largest eigenvalue (every {CHUNK} steps) where its"
    )
    print(f"  mean over {WINDOW} is less than {GROWTH} of that {WINDOW} later; or the best on")
    print(f"  validation, once trained, of those after {', '.join(map(str, rows.along))} steps")
    for name in [x for x in rows.seeds_of if x in WATCHED]:
        print(rows.line(f"{name}, stopped", rows.stopped(name)))
        of = rows.of(name)
        choices = {seed: list(row["architectures"].values()) for seed, row in of.items()}
        print(rows.line(f"{name}, best", rows.best(choices)))
        print(f"        stopped after {', '.join(str(row['stop']) for row in of.values())} steps")
        values = np.array([row["curvatures"] for row in of.values()])
        quarters = np.array_split(values, min(4, values.shape[1]), axis=1)
        shown = ", ".join(f"{np.median(x):.2g}" for x in quarters)
        print(f"        eigenvalue, median of seeds and of each quarter of the search: {shown}")


def _print_baselines(rows: Rows) -> None:
    print("\n  Without a search")
    for label, architecture in SAME.items():
        print(rows.line(label, dict.fromkeys(rows.seeds, architecture)))
    drawn = {seed: random_architectures(seed) for seed in rows.seeds}
    print(rows.line("one random", {seed: x[0] for seed, x in drawn.items()}))
    print(rows.line(f"best of {NUM_RANDOM} random", rows.best(drawn)))
