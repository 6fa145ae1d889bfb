"""What methods that take first derivatives alone cannot take, and what they leave out."""

import equinox as eqx
import jax

from gradhpo.extend import Problem, UpdateFn, warn_once


def check_has_loss(name: str, update_fn: UpdateFn | None) -> None:
    """They compare training losses, which an update by hand does not show."""
    if update_fn is not None:
        raise ValueError(
            f"{name} compares values and gradients of the training loss, and an update_fn has "
            "none: pass inner_optimizer=optax.sgd(0.1) instead (with a grad_fn, if that is how "
            "the gradient is computed)"
        )


def warn_of_model_state(name: str, problem: Problem) -> None:
    """The derivative of the model state takes a second derivative of the loss."""
    if jax.tree.leaves(eqx.filter(problem.z.r, eqx.is_inexact_array)):
        warn_once(
            f"{name} takes the model state as it is: the hypergradient leaves out what "
            "hyperparameters do to it (running statistics, a target network). "
            "UnrolledOptimizer differentiates through it",
            *problem.functions(),
        )
