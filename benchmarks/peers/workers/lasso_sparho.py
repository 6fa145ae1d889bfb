"""The Lasso by sparho: `implicit_forward`, and searches by `grad_search` and `hoag_search`."""

from collections.abc import Callable

import numpy as np
import sparho
from lasso_programs import OUTER_RATE, Split, serve_searches
from sparho.adapters import CelerLasso, SklearnLasso, SklearnWeightedLasso


CLOSE = 1e-14  # tolerance of the inner solver and of CG when comparing hypergradients


def problem_of(split: Split) -> sparho.Problem:
    """Both halves; the criterion selects its part."""
    penalty = sparho.WeightedL1() if split.many else sparho.L1()
    x, y = np.vstack([split.x, split.u]), np.concatenate([split.y, split.v])
    return sparho.Problem(sparho.SquaredLoss(), penalty, np.asfortranarray(x), y)


def criterion_of(split: Split) -> sparho.HeldOutMSE:
    n, m = len(split.x), len(split.u)
    return sparho.HeldOutMSE(np.arange(n), np.arange(n, n + m))


def solver_of(split: Split, how: str, **tolerance: float) -> Callable:
    if how == "celer":
        return CelerLasso(**tolerance)
    return SklearnWeightedLasso(**tolerance) if split.many else SklearnLasso(**tolerance)


def penalty_of(split: Split) -> float | np.ndarray:
    return np.exp(split.h) if split.many else float(np.exp(split.h))


def closely(*arguments, **keywords):
    return sparho.implicit_forward(*arguments, **keywords, tol=CLOSE)


def derive(split: Split, how: str) -> Callable[[], dict]:
    """At the given solution."""
    whole, penalty = problem_of(split), penalty_of(split)
    x, y, u, v = split.x, split.y, split.u, split.v
    train = sparho.Problem(whole.datafit, whole.penalty, x, y)
    active = np.flatnonzero(split.w).astype(np.int32)
    solved = sparho.SolverResult(coef=split.w, active_set=active, dual_gap=0.0, n_iter=0)
    from_all = sparho.implicit_forward if how == "default" else closely

    def program() -> dict:
        alpha = 2 * u.T @ (u @ split.w - v) / len(u)
        return {"hypergradient": from_all(train, penalty, solved, alpha) * penalty}

    return program


def solve(split: Split, how: str) -> Callable[[], dict]:
    """From zero weights."""
    problem, criterion, penalty = problem_of(split), criterion_of(split), penalty_of(split)
    solver = solver_of(split, how, tol=CLOSE)

    def program() -> dict:
        found = criterion.value_and_hypergrad(problem, penalty, solver, closely)
        return {"hypergradient": found.hypergrad * penalty}

    return program


def search(split: Split, how: str) -> Callable[[], dict]:
    """`how`: `descent` at a fixed rate, or the solver inside HOAG."""
    problem, criterion, penalty = problem_of(split), criterion_of(split), penalty_of(split)
    solver = solver_of(split, how)

    def program() -> dict:
        given = {"solver": solver, "criterion": criterion, "n_iter": split.steps}
        if how == "descent":
            given["solver"] = solver_of(split, how, tol=1e-10)
            found = sparho.grad_search(problem, penalty, **given, lr=OUTER_RATE, tol=0.0)
        else:
            found = sparho.hoag_search(problem, penalty, **given)
        values = [record.value for record in found.history]
        last = np.log(found.history[-1].hyperparam)
        best = np.log(found.best_hyperparam)
        return {
            "h": last, "best": best, "loss": min(values), "steps": len(values),
            "descent": how == "descent",
        }  # fmt: skip

    return program


serve_searches(derive=derive, solve=solve, search=search)
