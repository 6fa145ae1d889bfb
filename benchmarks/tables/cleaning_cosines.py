"""How far the hypergradients of data cleaning point in the same direction, along greedy's way."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradhpo
from benchmarks.intervals import with_interval
from benchmarks.rows import Row
from benchmarks.tables.cleaning_data import TRAIN, Network, load_data
from benchmarks.tables.cleaning_runs import (
    EXACT,
    GREEDY,
    HORIZON,
    LAST,
    LINE,
    LOSSES,
    MOMENTUM,
    optimizer_of,
)
from gradhpo.utils.tables import aligned


AT = 0, 10, 50, 100, 199  # outer steps of greedy before the comparison
PAIRS = (LAST, GREEDY), (LAST, EXACT), (GREEDY, EXACT), (LINE, EXACT)


def settings(noise: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [{"cosines": True, "noise": noise, "seed": seed} for seed in seeds]


def cosines_of(wanted: Mapping[str, Any], at: Sequence[int] = AT) -> dict[str, list[float]]:
    """For each pair, the cosines of hypergradients of the same ten steps, after each of `at`."""
    data = load_data(wanted["noise"], wanted["seed"])
    methods = {name: optimizer_of(name, HORIZON, MOMENTUM) for name in (LAST, GREEDY, EXACT, LINE)}
    greedy = methods[GREEDY]
    state = greedy.init(Network(jax.random.key(wanted["seed"])), jnp.zeros(TRAIN, jnp.float32))
    train = data.train, jnp.float32(1)
    found: dict[str, list[float]] = {f"{one}, {other}": [] for one, other in PAIRS}
    for before, now in zip([0, *at], at, strict=False):
        if now > before:
            state, _ = gradhpo.run(
                greedy, state, LOSSES[False], train, data.val,
                num_steps=now - before, chunk_size=now - before, progress=False,
            )  # fmt: skip
        directions = {
            name: np.asarray(method.compute_hypergradient(state, train, data.val, LOSSES[False]))
            for name, method in methods.items()
        }
        for one, other in PAIRS:
            a, b = directions[one], directions[other]
            found[f"{one}, {other}"].append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    return found


def print_cosines(rows: Sequence[Row]) -> None:
    print(
        f"\nCosines of two hypergradients over the same {HORIZON} steps, after outer steps of "
        "greedy\n"
    )
    table = [["", "", *(f"after {at}" for at in AT)]]
    for one, other in PAIRS:
        name = f"{one}, {other}"
        means = [with_interval([row[name][i] for row in rows], 3) for i in range(len(AT))]
        table.append([one, other, *means])
    print(aligned(table))
