"""The one outer update: the hyperparameters follow their hypergradient."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from gradhpo.core.inner_optimizer import cast_like, explained, init_descent
from gradhpo.core.inner_state import InnerState
from gradhpo.core.measured import Loss, aux_of, loss_of
from gradhpo.core.problem import Problem
from gradhpo.core.state import BilevelState, inner_state
from gradhpo.core.types import RealScalarLike
from gradhpo.utils.structure import check_same_structure
from gradhpo.utils.warn import warn_once


class Estimate(eqx.Module):
    r"""What an algorithm returns: the inner problem advanced, and the hypergradient at its end.

    - `z`: the $(w, s, r)$ after the inner steps.
    - `hypergradient`: a tree like the hyperparameters.
    - `train_loss`, `val_loss`: at the last inner step, before its update; and at the end. Pass
        them as `problem` gives them, so that a loss's metrics come along (`jnp.asarray` of such a
        value is the loss alone).
    - `memory`: the algorithm's memory after the step, with the structure, shapes and dtypes that
        `init_memory` gave it.
    """

    z: InnerState
    hypergradient: PyTree
    train_loss: Loss
    val_loss: Loss
    memory: PyTree = None


def check_estimate(name: str, found: Any, state: BilevelState, problem: Problem) -> None:
    """Checks that the result of an algorithm's `estimate` can follow this state."""
    made = f"{name}.estimate returned"
    write = "return Estimate(z, hypergradient, train_loss, val_loss, memory)"
    if not isinstance(found, Estimate):
        raise TypeError(f"{made} a {type(found).__name__}: {write}")
    parts = (
        ("z", found.z, inner_state(state)),
        ("hypergradient", found.hypergradient, state.hyperparams),
        ("memory", found.memory, state.memory),
    )
    for part, value, like in parts:
        what, remedy = f"the {part} that {made}", f"To continue from there, {write}."
        check_same_structure(value, like, what, remedy)
    for part, value in (("train_loss", found.train_loss), ("val_loss", found.val_loss)):
        loss = loss_of(value)
        if not (eqx.is_inexact_array(loss) and loss.shape == ()):
            raise ValueError(f"{made} {part}={value}, which is not a scalar of shape (): {write}")
    measured = aux_of(found.train_loss, found.val_loss)
    lost = [x for x in (*problem.phi.metrics, *problem.validation.metrics) if x not in measured]
    if lost:
        warn_once(
            f"{made} losses without their metrics ({', '.join(lost)}): return the losses as "
            "phi.step(...) and validation.value_and_grads(...) give them",
            *problem.functions(),
        )


def init_outer_state(
    outer_optimizer: optax.GradientTransformation | None, hyperparams: PyTree
) -> PyTree:
    """The outer optimizer's state; `()` if there is none."""
    if outer_optimizer is None:
        return ()
    return init_descent(outer_optimizer, hyperparams)


def outer_update(
    outer_optimizer: optax.GradientTransformation | None,
    state: BilevelState,
    hypergradient: PyTree,
    lr_hyper: RealScalarLike | None,
) -> tuple[PyTree, PyTree]:
    """New hyperparameters and outer optimizer state."""
    if lr_hyper is not None:
        return _moved(state, _scaled(hypergradient, -jnp.asarray(lr_hyper)), ())
    return _moved(state, *outer_response(outer_optimizer, state, hypergradient))


def averaged_update(
    outer_optimizer: optax.GradientTransformation | None,
    state: BilevelState,
    hypergradients: PyTree,
) -> tuple[PyTree, PyTree]:
    """The same with the mean of the updates for several hypergradients and optimizer states."""
    return _moved(state, *averaged_outer_response(outer_optimizer, state, hypergradients, 0))


def outer_response(
    outer_optimizer: optax.GradientTransformation | None, state: BilevelState, hypergradient: PyTree
) -> tuple[PyTree, PyTree]:
    """The outer optimizer's update, and its next state."""
    assert outer_optimizer is not None  # `step` and `run` ask for one, or for a rate
    with explained("outer"):
        return outer_optimizer.update(hypergradient, state.outer_opt_state, state.hyperparams)


def averaged_outer_response(
    outer_optimizer: optax.GradientTransformation | None,
    state: BilevelState,
    hypergradients: PyTree,
    axis: int | None,
) -> tuple[PyTree, PyTree]:
    """The mean of the updates for several states; `axis=None`: for the same hypergradient."""

    def of_one(hypergradient: PyTree, outer_opt_state: PyTree) -> tuple[PyTree, PyTree]:
        one = dataclasses.replace(state, outer_opt_state=outer_opt_state)
        return outer_response(outer_optimizer, one, hypergradient)

    updates, new = jax.vmap(of_one, in_axes=(axis, 0))(hypergradients, state.outer_opt_state)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), updates), new


def _moved(state: BilevelState, updates: PyTree, outer_opt_state: PyTree) -> tuple[PyTree, PyTree]:
    hyperparams = optax.apply_updates(state.hyperparams, updates)
    hyperparams = cast_like(hyperparams, state.hyperparams, "the outer update")
    return hyperparams, cast_like(outer_opt_state, state.outer_opt_state)


def _scaled(tree: PyTree, factor: Array) -> PyTree:
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)
