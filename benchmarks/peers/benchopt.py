"""Checks for the same iterates as the solvers of benchopt's benchmark_bilevel."""

from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.bilevel import COMMIT, PROBLEM, both
from benchmarks.peers.environment import PeerError


STEPS, INNER = 50, 10
SHARED = (4 / 7, 4 / 7, 4 / 7, 1 / 7)  # F2SA: the exponent of one inner rate in place of two
RATE = {"step_size": 0.1, "outer_ratio": 1.0}
SMALL = {"step_size": 0.01, "outer_ratio": 1.0}  # the benchmark's own for F2SA
TEN = {"n_inner_steps": INNER}
FALLING = {"exponents": (4 / 7, 4 / 7)}
NOTES = """\
  In f2sa.py the inner variable descends lambda * g + f with a rate that falls as k^(-5/7), and its
  copy descends g with one that falls as k^(-4/7). PenaltyOptimizer descends g + f / lambda and g
  with one inner optimizer. So the exponents of both are set to 4/7, and `rate / lambda` divides the
  first rate by lambda, which turns one form into the other. Nothing else of theirs is changed. In
  amigo.py the adjoint has the opposite sign."""


class Row(NamedTuple):
    """One of their solvers with its parameters, and our settings."""

    label: str
    name: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    changes: dict[str, Any] | None = None


ROWS = [
    Row("SOBA", "soba", RATE, {**RATE, "exponents": (0.5, 0.5)}),
    Row("AmIGO", "amigo", RATE | TEN, {**RATE, "inner_steps": INNER}),
    Row("stocBiO", "stocbio", RATE | TEN | {"n_shia_steps": 10}, RATE | {"inner_steps": INNER}),
    Row("BOME", "bome", RATE | TEN, {**RATE, "inner_steps": INNER}),
    Row(
        "F2SA, lambda = 1", "f2sa", SMALL | TEN | {"lmbda0": 1.0, "delta_lmbda": 0.0},
        {**SMALL, "inner_steps": INNER, **FALLING}, {"exponents": SHARED},
    ),
    Row(
        "F2SA, lambda from 1, rate / lambda", "f2sa",
        SMALL | TEN | {"lmbda0": 1.0, "delta_lmbda": 0.1},
        {**SMALL, "inner_steps": INNER, **FALLING}, {"exponents": SHARED, "divide": True},
    ),
    Row(
        "F2SA, lambda from 1, theirs as it is", "f2sa",
        SMALL | TEN | {"lmbda0": 1.0, "delta_lmbda": 0.1},
        {**SMALL, "inner_steps": INNER, **FALLING},
    ),
]  # fmt: skip


def farthest(found: dict[str, Any], other: dict[str, Any], name: str) -> float:
    return float(np.max(np.abs(np.asarray(found[name]) - np.asarray(other[name]))))


def print_benchopt() -> None:
    size = f"{PROBLEM['dim_inner']} inner, {PROBLEM['dim_outer']} outer variables"
    print(f"\nThe simulated quadratic of benchopt/benchmark_bilevel, {COMMIT[:8]}: {size},")
    print(
        "all data, float64. The largest difference of any coordinate between its solver and gradhpo"
    )
    print(f"over {STEPS} outer steps, of {INNER} inner ones each (SOBA: 1), and how far they move")
    print(f"    {'':38}   inner   outer    moved")
    try:
        with both(x64=True) as programs:
            for row in ROWS:
                request = {"name": row.name, "steps": STEPS}
                theirs = programs.theirs.ask(
                    "iterates", parameters=row.theirs, changes=row.changes or {}, **request
                )
                settings = dict(row.ours)
                if row.name == "f2sa":
                    settings["multipliers"] = theirs["multipliers"]
                ours = programs.ours.ask("iterates", settings=settings, **request)
                inner, outer = (farthest(ours, theirs, name) for name in ("inner", "outer"))
                moved = np.max(np.abs(np.asarray(ours["outer"][-1]) - programs.value.start))
                print(f"    {row.label:38}{inner:8.0e}{outer:8.0e}{moved:9.2f}", flush=True)
    except PeerError as reason:
        print(f"    {reason}"[:100])
        return
    print(NOTES)
