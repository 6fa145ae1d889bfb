r"""The running state at the inner optimum, where it has settled: $r = R(w, \lambda, r)$."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.extend import (
    InnerState,
    InnerUpdate,
    Problem,
    accumulation_dtype,
    cast_like,
    choose_solver,
    solve_system,
    tree_dot,
    tree_zeros_like,
    warn_once,
)


class ThroughState(NamedTuple):
    """Cotangents on w and the hyperparameters, including effects on validation through r.

    `change` is the change of the validation loss if r settled, to first order.
    """

    w: PyTree
    hyperparams: PyTree
    failed: Array
    change: Array


def through_state(
    phi: InnerUpdate,
    z: InnerState,
    hyperparams: PyTree,
    t: ArrayLike,
    alpha: InnerState,
    direct: PyTree,
) -> ThroughState:
    r"""Adds $q\,\partial R/\partial w$ to $\alpha_w$, $q\,\partial R/\partial\lambda$ to `direct`.

    With $q = \alpha_r (I - \partial R/\partial r)^{-1}$, on the batch of step `t`.
    """
    if not jax.tree.leaves(alpha.r):
        nothing = jnp.zeros((), accumulation_dtype(alpha.w))
        return ThroughState(alpha.w, direct, jnp.zeros((), bool), nothing)
    wide = accumulation_dtype(alpha.r)
    new, pull = phi.state_vjp(z, hyperparams, t)
    widened = lambda tree: jax.tree.map(lambda x: x.astype(wide), tree)

    def product(v):
        _, (_, by_r) = pull(cast_like(v, alpha.r))
        return jax.tree.map(jnp.subtract, v, widened(by_r))

    q, failed, _ = solve_system(
        product,
        widened(alpha.r),
        choose_solver(None, alpha.r, symmetric=False),
        symmetric=False,
        guess=tree_zeros_like(widened(alpha.r)),
        shift=jnp.zeros((), wide),
    )
    by_w, (by_hyperparams, _) = pull(cast_like(q, alpha.r))
    add = lambda x, y: jax.tree.map(jnp.add, x, y)
    left = jax.tree.map(jnp.subtract, new, eqx.filter(z.r, eqx.is_inexact_array))
    change = tree_dot(q, widened(left))
    return ThroughState(add(alpha.w, by_w), add(direct, by_hyperparams), failed, change)


def warn_if_training_reads_it(name: str, problem: Problem) -> None:
    """Warns of what the formula leaves out if the training loss reads the running state."""
    if problem.phi.reads_state:
        warn_once(
            f"{name} holds the model state constant in the training loss, which reads it: the "
            "hypergradient leaves out how training follows the model state (a target network, "
            "running statistics that normalise). UnrolledOptimizer differentiates through it",
            *problem.functions(),
        )
