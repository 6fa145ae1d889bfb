"""Implicit differentiation by jaxopt: `root_vjp` at the optimum, solvers with `implicit_diff`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxopt
from implicit_programs import (
    CYCLE,
    INNER_TOLERANCE,
    LINEAR_TOLERANCE,
    MOST_PRODUCTS,
    MOST_STEPS,
    PRODUCTS,
    Problem,
    Program,
    serve_programs,
    solve_by_hand,
    tune_by_hand,
)
from jaxopt.implicit_diff import root_vjp
from jaxopt.linear_solve import solve_cg, solve_gmres, solve_normal_cg
from penalised_losses import Batch


def counted(product: Callable, like: jax.Array) -> Callable:
    """Counts the transpose too: half of the products of the normal equations."""
    if not PRODUCTS.wanted:
        return product
    transpose = lambda v: jax.linear_transpose(product, like)(v)[0]
    forth, back = PRODUCTS.counted(product), PRODUCTS.counted(transpose)
    linear = lambda function: lambda _, v: function(v)
    return lambda v: jax.custom_derivatives.linear_call(linear(forth), linear(back), (), v)


def linear_solver(problem: Problem, how: str) -> Callable:
    if how == "default":
        solve = solve_normal_cg
    elif problem.losses.step is None:
        solve = functools.partial(solve_cg, tol=LINEAR_TOLERANCE, maxiter=MOST_PRODUCTS)
    else:
        solve = functools.partial(
            solve_gmres, tol=LINEAR_TOLERANCE, maxiter=MOST_PRODUCTS // CYCLE, restart=CYCLE
        )
    return lambda product, b: solve(counted(product, b), b)


def inner_solver(problem: Problem, how: str) -> jaxopt.LBFGS | jaxopt.ProximalGradient:
    settings = {
        "maxiter": MOST_STEPS,
        "tol": INNER_TOLERANCE,
        "implicit_diff_solve": linear_solver(problem, how),
    }
    if problem.losses.step is None:
        return jaxopt.LBFGS(problem.losses.train, **settings)
    # The smooth part has no hyperparameter.
    smooth = lambda w, batch: problem.losses.train(w, None, batch)
    return jaxopt.ProximalGradient(smooth, jaxopt.prox.prox_elastic_net, **settings)


def penalties_of_prox(h: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    l1, l2 = (jnp.broadcast_to(jnp.exp(x), w.shape) for x in h)
    return l1, l2 / l1  # the operator expects l2 relative to l1


def derive(problem: Problem, how: str) -> Program:
    losses, solve = problem.losses, linear_solver(problem, how)

    def optimality(w, h, batch: Batch):
        if losses.step is None:
            return jax.grad(losses.train)(w, h, batch)
        if how == "default":
            solver = inner_solver(problem, how)
            return solver.optimality_fun(w, penalties_of_prox(h, w), batch)
        return losses.step(w, h, batch) - w

    def hypergradient(w, h, train, val):
        alpha, direct = jax.grad(losses.val, (0, 1))(w, h, val)
        by_h, _ = root_vjp(optimality, w, (h, train), alpha, solve)
        return {"hypergradient": direct + by_h}

    return Program(hypergradient, problem.optimum, problem.h, problem.train, problem.val)


def solved(problem: Problem, how: str) -> Callable:
    solver = inner_solver(problem, "same")

    def solve(w, h, train):
        settings = h if problem.losses.step is None else penalties_of_prox(h, w)
        w, state = solver.run(w, settings, train)
        return w, state.iter_num

    return solve


serve_programs(
    derive=derive,
    solve=lambda problem, how: solve_by_hand(problem, solved(problem, how)),
    tune=lambda problem, how: tune_by_hand(problem, solved(problem, how)),
)
