"""Hypergradients of data cleaning by hypertorch (whose package is called hypergrad)."""

from collections.abc import Callable

import hypergrad
from cleaning import MOMENTUM, RATE, Cleaning, peak_mib
from torch import Tensor
from worker import serve_methods


def momentum(problem: Cleaning) -> hypergrad.DifferentiableOptimizer:
    return hypergrad.Momentum(lambda params, _: problem.train_loss(params), RATE, MOMENTUM)


def outer_loss(problem: Cleaning) -> Callable:
    return lambda params, _: problem.val_loss(params[:6])


def unrolled(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
    assert optimizer == "sgd"

    def hypergradient() -> Tensor:
        update = momentum(problem)  # a new one: it holds the last loss, and so the whole graph
        z = update.get_opt_params(problem.start())
        for _ in range(steps):
            z = update(z, [problem.log_odds], create_graph=True)
        (found,) = hypergrad.reverse_unroll(
            z, [problem.log_odds], outer_loss(problem), set_grad=False
        )
        return found

    return hypergradient


def reverse(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
    assert optimizer == "sgd"

    def hypergradient() -> Tensor:
        update = momentum(problem)  # a new one: it holds the last loss, and so the whole graph
        history = [update.get_opt_params(problem.start())]
        for _ in range(steps):
            z = [x.detach().requires_grad_() for x in history[-1]]
            history.append(update(z, [problem.log_odds], create_graph=False))
        (found,) = hypergrad.reverse(
            history, [problem.log_odds], steps * [update], outer_loss(problem), set_grad=False
        )
        return found

    return hypergradient


def neumann(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
    """`steps` inner steps, then implicit differentiation by a series of 20 terms."""
    assert optimizer == "sgd"

    def hypergradient() -> Tensor:
        update = momentum(problem)
        descent = hypergrad.GradientDescent(lambda params, _: problem.train_loss(params), RATE)
        z = update.get_opt_params(problem.start())
        for _ in range(steps):
            z = update(z, [problem.log_odds], create_graph=False)
            z = [x.detach().requires_grad_() for x in z]
        (found,) = hypergrad.fixed_point(
            z[:6], [problem.log_odds], 20, descent, outer_loss(problem), tol=0.0, set_grad=False
        )
        return found

    return hypergradient


serve_methods(Cleaning, {"unrolled": unrolled, "reverse": reverse, "neumann": neumann}, peak_mib)
