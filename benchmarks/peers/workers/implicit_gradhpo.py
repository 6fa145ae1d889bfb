"""Implicit differentiation by gradhpo: `ImplicitOptimizer`.

It takes a fixed number of inner steps, which we search for first. Cold: the smallest number that
reaches the tolerance, in multiples of 50 (of 1 for L-BFGS). Warm: the smallest that reaches it in
all outer steps, to 6 % or 50 steps (10 for L-BFGS).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from counted_solver import counted, same_solver
from implicit_programs import (
    CYCLE,
    INNER_TOLERANCE,
    MOST_STEPS,
    PRODUCTS,
    Problem,
    Program,
    serve_programs,
)

import gradhpo
from gradhpo.solvers.conjugate import ConjugateGradients


MOMENTUM = 0.9
# Where the search begins and ends, in units of 50 inner steps (10 for L-BFGS) per outer step. If
# that is not enough, the table shows the error.
MANY_WARM, MOST_WARM = 64, 256
found: dict[tuple[str, str, str], int] = {}


def linear_solver(problem: Problem, how: str, beside: int) -> lx.AbstractLinearSolver | None:
    symmetric = problem.losses.step is None
    if how == "default" and not PRODUCTS.wanted:
        return None
    solver = default_solver(problem) if how == "default" else same_solver(symmetric=symmetric)
    # gradhpo solves by this where it is given lineax's: the same solver is counted as is timed.
    return counted(ConjugateGradients(solver) if symmetric else solver, beside)


def default_solver(problem: Problem) -> lx.AbstractLinearSolver:
    """The solver behind `linear_solver=None`, whose products cannot be counted from outside."""
    tolerance = float(jnp.finfo(problem.optimum.dtype).eps) ** (2 / 3)
    settings = {"rtol": tolerance, "atol": tolerance, "norm": gradhpo.tree_l2_norm}
    if problem.losses.step is None:
        return lx.CG(**settings, max_steps=100)
    # Also 100 products: the first of six cycles only evaluates the start.
    return lx.GMRES(**settings, max_steps=6, restart=CYCLE)


def check_default(problem: Problem, chosen: gradhpo.ImplicitOptimizer) -> None:
    """Raises `RuntimeError` if `default_solver` solves differently from `linear_solver=None`."""
    found = []
    for solver in (None, default_solver(problem)):
        solving = dataclasses.replace(chosen, linear_solver=solver)
        state = solving.init(problem.optimum, problem.h)
        state = stepped(problem, solving, state, problem.train, problem.val, 0.0)
        found.append([state.get_metric(x) for x in ("linear_iterations", "linear_residual")])
    if not np.allclose(*found, rtol=1e-2, atol=0):
        raise RuntimeError(f"not the default solver: iterations and residuals are {found}")


def optimizer(
    problem: Problem, how: str, inner_steps: int, beside: int = 1
) -> gradhpo.ImplicitOptimizer:
    """`beside`: products outside the solver; its start takes one."""
    losses, solver = problem.losses, linear_solver(problem, how, beside)
    settings = {"linear_solver": solver, "inner_steps": inner_steps}
    if losses.step is not None:
        return gradhpo.ImplicitOptimizer(update_fn=losses.step, **settings)
    if how == "L-BFGS":
        return gradhpo.ImplicitOptimizer(optax.lbfgs(), **settings)
    largest = problem.train.curvature

    def descent(h) -> optax.GradientTransformation:
        """Nesterov's, with the rate of each weight set by its penalty."""
        rates = 1 / (largest + jnp.exp(h))
        scaled = optax.stateless(lambda gradient, _: -rates * gradient)
        return optax.chain(scaled, optax.trace(MOMENTUM, nesterov=True))

    return gradhpo.ImplicitOptimizer(descent, **settings)


def derive(problem: Problem, how: str) -> Program:
    losses, chosen = problem.losses, optimizer(problem, how, 1)
    if how == "default" and PRODUCTS.wanted:
        check_default(problem, chosen)

    def hypergradient(w, h, train, val):
        # At least one inner step is required; at the optimum it changes nothing.
        state = chosen.init(w, h)
        g = chosen.compute_hypergradient(state, train, val, losses.train, losses.val)
        return {"hypergradient": g}

    return Program(hypergradient, problem.optimum, problem.h, problem.train, problem.val)


def reached(problem: Problem, inner_residual: jax.Array) -> bool:
    rate = 1.0 if problem.losses.step is None else 1 / problem.train.curvature
    return bool(inner_residual < INNER_TOLERANCE * rate)


def stepped(problem: Problem, chosen: gradhpo.ImplicitOptimizer, state, train, val, rate: float):
    losses = problem.losses
    return chosen.step(state, train, val, losses.train, losses.val, lr_hyper=rate)


def cold_steps(problem: Problem, how: str) -> int:
    # L-BFGS clears its memory at the start of a `step`, unless that is a single inner step.
    at_once = 1 if how == "L-BFGS" else 50
    chosen = optimizer(problem, how, at_once)
    state = chosen.init(jnp.zeros_like(problem.optimum), problem.h)
    for count in range(at_once, MOST_STEPS + 1, at_once):
        state = stepped(problem, chosen, state, problem.train, problem.val, 0.0)
        if reached(problem, state.get_metric("inner_residual")):
            return count
    raise RuntimeError(f"{MOST_STEPS} inner steps do not reach {INNER_TOLERANCE}")


def warm_steps(problem: Problem, how: str) -> int:
    unit = 10 if how == "L-BFGS" else 50

    def enough(units: int) -> bool:
        _, history = tuned(problem, how, units * unit)()
        return reached(problem, history["inner_residual"].max())

    # Each try compiles; seven are usually enough.
    few, many = 0, MANY_WARM
    while not enough(many):
        if many == MOST_WARM:
            return many * unit
        few, many = many, 2 * many
    while many - few > max(1, many // 16):
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many * unit


def inner_steps(
    task: str, problem: Problem, how: str, search: Callable[[Problem, str], int]
) -> int:
    key = task, problem.name, how
    if key not in found:
        found[key] = search(problem, how)
    return found[key]


def solve(problem: Problem, how: str) -> Program:
    count = inner_steps("solve", problem, how, cold_steps)
    chosen = optimizer(problem, how, count)

    def both(h, train, val):
        state = chosen.init(jnp.zeros_like(problem.optimum), h)
        state = stepped(problem, chosen, state, train, val, 1.0)
        return {"hypergradient": h - state.hyperparams, "w": state.params, "inner": count}

    return Program(both, problem.h, problem.train, problem.val)


def tuned(problem: Problem, how: str, count: int) -> Callable:
    # The linear system's residual, recorded in the history, takes one more product.
    chosen = optimizer(problem, how, count, beside=2)
    state = chosen.init(problem.optimum, problem.h)
    losses = gradhpo.LossFunctions(problem.losses.train, problem.losses.val)
    return lambda: gradhpo.run(
        chosen, state, losses, problem.train, problem.val, num_steps=problem.outer_steps,
        chunk_size=problem.outer_steps, lr_hyper=problem.outer_rate, progress=False,
    )  # fmt: skip


def tune(problem: Problem, how: str) -> Callable[[], dict]:
    count = inner_steps("tune", problem, how, warm_steps)
    go = tuned(problem, how, count)

    def program() -> dict:
        state, history = go()
        h = jax.block_until_ready(state.hyperparams)
        return {"h": h, "val_loss": history["val_loss"][-1], "inner": problem.outer_steps * count}

    return program


serve_programs(derive=derive, solve=solve, tune=tune)
