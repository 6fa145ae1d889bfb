"""Suboptimality of the value function over time, compared with benchopt's benchmark_bilevel."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.bilevel import PROBLEM, Both, both
from benchmarks.peers.environment import PeerError


SEEDS = (1, 2, 3, 4, 5)
RATES = {"step_size": 0.1, "outer_ratio": 0.2}  # of every method
BUDGET = 4_000  # batch gradients
CHUNKS = 60  # after each, the outer variable is noted
BATCH, INNER = 64, 10
TARGETS = (1e-1, 1e-2)
OURS, THEIRS = "gradhpo", "benchopt"
TEN = {"n_inner_steps": INNER}


class Method(NamedTuple):
    """A method, and the cost of one outer step in batch gradients (a product counts two)."""

    label: str
    name: str
    cost: int
    ours: dict[str, Any]
    theirs: dict[str, Any] | None = None

    @property
    def chunk(self) -> int:
        return max(1, round(BUDGET / self.cost / CHUNKS))

    @property
    def chunks(self) -> int:
        return round(BUDGET / self.cost / self.chunk)


def multipliers(steps: int, growth: float) -> list[float]:
    """1, then growing as in the benchmark's F2SA."""
    return [1.0, *(1 + growth * np.cumsum(np.arange(1, steps) ** (-1 / 7))).tolist()]


TWO = {"inner_steps": INNER}
METHODS = [
    Method("SOBA", "soba", 4, {"exponents": (0.5, 0.5)}, {}),
    Method("AmIGO", "amigo", 3 * INNER + 3, TWO, TEN),
    Method("stocBiO", "stocbio", 3 * INNER + 3, TWO, TEN | {"n_shia_steps": INNER}),
    Method(
        "F2SA", "f2sa", 3 * INNER + 3,
        {**TWO, "exponents": (4 / 7, 4 / 7), "multipliers": multipliers(600, 0.1)},
        TEN | {"lmbda0": 1.0, "delta_lmbda": 0.01},
    ),
    Method("BOME", "bome", INNER + 3, TWO),
    # Five products and the mixed derivative, each on all batches of a step.
    Method(
        "implicit, CG(5)", "cg", 13 * INNER + 1,
        {**TWO, "products": 5, "curvature_batches": INNER},
    ),
    Method("NHGD, dense", "nhgd", INNER + 3, TWO),
]  # fmt: skip


class Run(NamedTuple):
    seconds: np.ndarray
    above: np.ndarray  # relative suboptimality at these times
    cost: float  # batch gradients between two times

    @property
    def level(self) -> float:
        """The final level: the median over the last tenth."""
        last = self.above[-max(1, len(self.above) // 10) :]
        return float(np.median(last)) if np.isfinite(last).all() else float("inf")

    def reached(self, target: float) -> tuple[float, float]:
        """Seconds and gradients until it first falls below; infinite if it never does."""
        below = np.flatnonzero(self.above <= target)
        if not len(below):
            return float("inf"), float("inf")
        return float(self.seconds[below[0]]), float((below[0] + 1) * self.cost)


def run(programs: Both, program: str, method: Method, seed: int) -> Run:
    request = {
        "name": method.name, "seed": seed, "chunks": method.chunks, "chunk": method.chunk,
    }  # fmt: skip
    if program == OURS:
        settings = method.ours | RATES
        found = programs.ours.ask("timed", batch_size=BATCH, settings=settings, **request)
    else:
        parameters = {**(method.theirs or {}), **RATES, "batch_size": BATCH}
        found = programs.theirs.ask("timed", parameters=parameters, **request)
    above = programs.value.above(found["outer"])
    above = np.where(np.isfinite(above), above, np.inf)
    return Run(np.asarray(found["seconds"]), above, method.cost * method.chunk)


def shown(values: Iterable[float], digits: str) -> str:
    middle = statistics.median(values)
    return format(middle, digits) if np.isfinite(middle) else "-"


def line(runs: list[Run]) -> str:
    cells = [shown((x.seconds[-1] for x in runs), "8.2f"), shown((x.level for x in runs), "9.0e")]
    for target in TARGETS:
        seconds, gradients = zip(*(x.reached(target) for x in runs), strict=True)
        cells += [f"{shown(seconds, '.2f'):>9}", f"{shown(gradients, '.0f'):>8}"]
    return "".join(cells)


def print_method(programs: Both, method: Method) -> None:
    beside = [OURS] if method.theirs is None else [OURS, THEIRS]
    runs: dict[str, list[Run]] = {program: [] for program in beside}
    for seed in SEEDS:
        for program in beside if seed % 2 else beside[::-1]:
            runs[program].append(run(programs, program, method, seed))
    for program in beside:
        label = f"{method.label}, {program}"
        print(f"    {label:26}{line(runs[program])}", flush=True)


def print_suboptimality() -> None:
    n, p, q = (PROBLEM[name] for name in ("n_samples_inner", "dim_inner", "dim_outer"))
    sizes = f"{p} inner, {q} outer variables"
    print(f"\nThe simulated quadratic of benchopt/benchmark_bilevel: {sizes},")
    print(
        f"{n} terms in each loss, batches of {BATCH}, float32; {INNER} inner steps (SOBA: 1). How"
    )
    print(
        "far h(x) = f(x, z*(x)) lies above its minimum, relative to the start: level after", BUDGET
    )
    print("gradients of a batch (a product is two), and when it first falls below 0.1 and 0.01.")
    medians = f"Medians of {len(SEEDS)} seeds, seconds without compilation"
    inner, outer = RATES["step_size"], RATES["step_size"] / RATES["outer_ratio"]
    print(f"{medians}; inner rate {inner}, outer rate {outer} for all.")
    print("-: not in most seeds")
    below = "".join(f"{f'{x:.0e}: s':>9}{'grad.':>8}" for x in TARGETS)
    print(f"    {'':26}{'s':>8}{'level':>9}{below}")
    try:
        with both(x64=False) as programs:
            for method in METHODS:
                print_method(programs, method)
    except PeerError as reason:
        print(f"    {reason}"[:100])
