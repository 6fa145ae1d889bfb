"""The results of `budget.py`: tables, intervals over seeds, and the picture."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from benchmarks.intervals import half_interval
from benchmarks.peers.budget_problems import Problem
from benchmarks.peers.environment import ROOT


FITS = (1, 3, 10, 30)
TIMES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
STYLE = ROOT / "docs" / "figures.mplstyle"
SHOWN = {
    "gradhpo": "gradhpo",
    "  retrained": "gradhpo, retrained",
    "random search": "random search",
    "  all alike": "random search, all alike",
    "Optuna's TPE": "Optuna's TPE",
}
REFERENCES = ("untuned", "val. set alone")  # single fits


class Curve(NamedTuple):
    """One search with one seed: the budget spent and the losses reached after each evaluation."""

    fits: np.ndarray
    seconds: np.ndarray
    losses: np.ndarray  # on validation data
    test_losses: np.ndarray  # of the same models
    accuracies: np.ndarray  # on test data; `nan` for regression


class Results(NamedTuple):
    problem: Problem
    rows: dict[str, list[Curve] | str]  # a curve for each seed, or why there is none
    compiled: tuple[float, float]  # seconds of the first fit, and of gradhpo's first
    difference: float | None  # the largest, relative, between plain training and gradhpo's losses


class Mean(NamedTuple):
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __str__(self) -> str:
        middle, low, high = (f"{x:.3f}" if x < 10 else f"{x:.3g}" for x in self)
        return f"{middle} ({low}-{high})"


def geometric(values: np.ndarray) -> Mean:
    """Geometric means and intervals, over the first axis."""
    logs = np.log(values)
    middle, half = logs.mean(axis=0), half_interval(logs)
    return Mean(np.exp(middle), np.exp(middle - half), np.exp(middle + half))


def percent(accuracies: np.ndarray) -> str:
    return f"{100 * accuracies.mean():.1f} ± {100 * half_interval(accuracies):.1f} %"


def reached(
    curves: list[Curve], axis: str, budget: float, what: str = "losses"
) -> np.ndarray | str:
    """Every seed's value once `budget` has been spent."""
    spent = [getattr(curve, axis) for curve in curves]
    if max(each[0] for each in spent) > budget:
        return "-"
    if min(each[-1] for each in spent) < budget:
        return "ended"
    at = [np.searchsorted(each, budget, side="right") - 1 for each in spent]
    return np.asarray([getattr(curve, what)[i] for curve, i in zip(curves, at, strict=True)])


def print_budgets(
    head: str, rows: dict[str, list[Curve] | str], axis: str, budgets: tuple, what: str = "losses"
) -> None:
    show = percent if what == "accuracies" else geometric
    print(f"  {head:17}" + "".join(f"{budget:>20}" for budget in budgets))
    for name in SHOWN:
        if isinstance(curves := rows.get(name, []), str):
            print(f"  {name:17}{curves}"[:100])
        elif curves:
            found = [reached(curves, axis, budget, what) for budget in budgets]
            cells = [x if isinstance(x, str) else str(show(x)) for x in found]
            print(f"  {name:17}" + "".join(f"{cell:>20}" for cell in cells))


def print_ends(rows: dict[str, list[Curve] | str]) -> None:
    widths = (3, 8, 9, 20, 20, 18)
    heads = ("fits", "seconds", "a fit, s", "validation", "test loss", "test accuracy")
    fitted = lambda cells: "".join(f"{cell!s:>{w}}" for cell, w in zip(cells, widths, strict=True))
    line = lambda name, cells: print(f"  {name:17}{fitted(cells)}".rstrip())
    line("at the end", heads)
    for name in (*SHOWN, *REFERENCES):
        if isinstance(curves := rows.get(name, []), str) or not curves:
            continue
        last = lambda what: np.asarray([getattr(curve, what)[-1] for curve in curves])
        accuracies = last("accuracies")
        cells = (
            f"{last('fits').min()}",
            f"{np.median(last('seconds')):.2f}",
            f"{np.median(last('seconds') / last('fits')):.3f}",
            geometric(last("losses")),
            geometric(last("test_losses")),
            "" if np.isnan(accuracies).any() else percent(accuracies),
        )
        line(name, cells)


def print_pairs(rows: dict[str, list[Curve] | str]) -> None:
    """Compares within seeds, at the end of the shorter search: splits differ in difficulty."""
    whose = "  retrained" if "  retrained" in rows else "gradhpo"
    print(
        f"  validation loss of {whose.strip()} over that of others, within seeds, "
        "when the first of both ends"
    )
    ours = rows[whose]
    for name in list(SHOWN)[2:]:
        if isinstance(curves := rows.get(name, []), str) or not curves:
            continue
        found = []
        for axis, unit in (("fits", "fits"), ("seconds", "s")):
            end = min(getattr(curve, axis)[-1] for curve in (*ours, *curves))
            pair = [reached(each, axis, end) for each in (ours, curves)]
            if not any(isinstance(losses, str) for losses in pair):
                found.append(f"{geometric(pair[0] / pair[1])} at {end:.3g} {unit}")
        print(f"    {name.strip():14} " + ", ".join(found))


def print_problem(results: Results) -> None:
    problem, rows, (fit, ours), difference = results
    print(f"\n  {problem.title} ({problem.space})")
    print(f"  gradhpo: {problem.recipe}")
    print(
        f"  a fit: {problem.steps} steps; the first, with compilation: {fit:.1f} s, "
        f"gradhpo's first: {ours:.1f} s"
    )
    if difference is not None:
        print(f"  plain training gives its losses; largest relative difference: {difference:.1g}")
    print_budgets("validation, fits", rows, "fits", FITS)
    ended = min(curve.seconds[-1] for curve in rows["gradhpo"])
    beyond = max(4, int(np.searchsorted(TIMES, ended)) + 1)  # include gradhpo's end
    print_budgets("validation, s", rows, "seconds", TIMES[beyond - 4 : beyond])
    if problem.accuracy is None:
        print_budgets("test loss, fits", rows, "fits", FITS, "test_losses")
    else:
        print_budgets("test accuracy", rows, "fits", FITS, "accuracies")
    print_ends(rows)
    print_pairs(rows)


def over(curves: list[Curve], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Budgets at which every seed has a value, and the losses there, [seeds, budgets]."""
    spent = [getattr(curve, axis) for curve in curves]
    first, last = max(each[0] for each in spent), min(each[-1] for each in spent)
    every = np.unique(np.concatenate(spent))
    budgets = every[(first <= every) & (every <= last)]
    if not budgets.size:  # one seed ended before another began: the run is too short to draw
        return budgets, np.empty((len(curves), 0))
    return budgets, np.stack([reached(curves, axis, b) for b in budgets], axis=1)


def save_figure(results: list[Results], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.style.context(STYLE):
        figure, grid = plt.subplots(
            2, len(results), figsize=(12, 6.5), layout="constrained", sharey="col"
        )
        for column, (problem, rows, *_) in zip(grid.T, results, strict=True):
            for axes, axis in zip(column, ("fits", "seconds"), strict=True):
                for i, name in enumerate(SHOWN):
                    if isinstance(curves := rows.get(name, []), str) or not curves:
                        continue
                    budgets, losses = over(curves, axis)
                    if not budgets.size:
                        continue
                    mean, style = geometric(losses), "--" if name.startswith(" ") else "-"
                    color = f"C{i}"
                    axes.step(
                        budgets, mean.middle, style, color=color, where="post", label=SHOWN[name]
                    )
                    axes.fill_between(
                        budgets, mean.low, mean.high, step="post", color=color, alpha=0.15, lw=0
                    )
                axes.set(xscale="log", yscale="log")
            column[0].set(title=problem.title, xlabel="model fits (inner steps / steps of a fit)")
            column[1].set(xlabel="seconds, compilation aside")
        for axes in grid[:, 0]:
            axes.set_ylabel("validation loss")
        handles = {line.get_label(): line for axes in grid[0] for line in axes.get_lines()}
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=len(handles),
            title='the lowest so far; for "gradhpo, retrained" that of each look by itself',
        )  # fmt: skip
        figure.savefig(path, dpi=100)
        plt.close(figure)
