"""Implicit differentiation by Optimistix: `ImplicitAdjoint`, and its parts."""

from collections.abc import Callable

import equinox as eqx
import jax
import lineax as lx
import optimistix as optx
from counted_solver import counted, same_solver
from implicit_programs import (
    INNER_TOLERANCE,
    MOST_STEPS,
    Problem,
    Program,
    serve_programs,
    solve_by_hand,
    tune_by_hand,
)


def linear_solver(problem: Problem, how: str) -> lx.AbstractLinearSolver:
    if how == "default":
        return optx.ImplicitAdjoint().linear_solver
    return counted(same_solver(symmetric=problem.losses.step is None))


def tags(problem: Problem, how: str) -> frozenset:
    positive = how != "default" and problem.losses.step is None
    return frozenset({lx.positive_semidefinite_tag} if positive else ())


def optimality_of_loss(w, _, inputs):
    return jax.grad(inputs.train_loss)(w, inputs.h, inputs.batch)


def optimality_of_step(w, _, inputs):
    return inputs.step(w, inputs.h, inputs.batch) - w


class Inputs(eqx.Module):
    w: jax.Array
    h: jax.Array
    batch: object
    train_loss: Callable = eqx.field(static=True)
    step: Callable | None = eqx.field(static=True)


def given(inputs):
    return inputs.w, None


def derive(problem: Problem, how: str) -> Program:
    """`ImplicitAdjoint` wraps `implicit_jvp` around a solver; here there is no solver."""
    losses = problem.losses
    optimality = optimality_of_loss if losses.step is None else optimality_of_step
    tagged, solver = tags(problem, how), linear_solver(problem, how)

    def hypergradient(w, h, train, val):
        def val_loss(h):
            inputs = Inputs(jax.lax.stop_gradient(w), h, train, losses.train, losses.step)
            solution, _ = optx.internal.implicit_jvp(given, optimality, inputs, tagged, solver)
            return losses.val(solution, h, val)

        return {"hypergradient": jax.grad(val_loss)(h)}

    return Program(hypergradient, problem.optimum, problem.h, problem.train, problem.val)


def solved(problem: Problem, how: str) -> Callable:
    losses = problem.losses
    tolerances = {"rtol": INNER_TOLERANCE, "atol": INNER_TOLERANCE}
    settings = {
        "max_steps": MOST_STEPS,
        "adjoint": optx.ImplicitAdjoint(linear_solver(problem, "same")),
        "tags": tags(problem, "same"),
    }

    def solve(w, h, train):
        arguments = (h, train)
        if how == "Newton":
            gradient = lambda w, args: jax.grad(losses.train)(w, *args)
            solver = optx.Newton(**tolerances, linear_solver=lx.Cholesky())
            solution = optx.root_find(gradient, solver, w, arguments, **settings)
        elif losses.step is None:
            loss = lambda w, args: losses.train(w, *args)
            solver = optx.LBFGS(**tolerances)
            solution = optx.minimise(loss, solver, w, arguments, **settings)
        else:
            step = lambda w, args: losses.step(w, *args)
            solver = optx.FixedPointIteration(**tolerances)
            solution = optx.fixed_point(step, solver, w, arguments, **settings)
        return solution.value, solution.stats["num_steps"]

    return solve


serve_programs(
    derive=derive,
    solve=lambda problem, how: solve_by_hand(problem, solved(problem, how)),
    tune=lambda problem, how: tune_by_hand(problem, solved(problem, how)),
)
