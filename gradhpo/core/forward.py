r"""Forward mode through one inner step."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, PyTree

from gradhpo.core.inner import InnerState, InnerUpdate


Push: TypeAlias = Callable[[InnerState, PyTree], InnerState]


def push_step(
    phi: InnerUpdate, z: InnerState, hyperparams: PyTree, t: ArrayLike, want_loss: ArrayLike = True
) -> tuple[InnerState, Array, Push]:
    r"""`(z', loss, push)`, where `push(z_dot, hyper_dot)` is $A_t \dot z + B_t \dot\lambda$.

    `z_dot` is a tree like the floating-point part of $z$. A $\dot z$ of exactly 0 contributes
    nothing, also where $A_t$ is infinite: at the state that an optimizer starts from (square roots
    of 0), where reverse mode never looks.
    """
    inexact, rest = eqx.partition(z, eqx.is_inexact_array)
    if phi.update_fn is not None:

        def by_hand(inexact, hyperparams):
            new, loss = phi.step(eqx.combine(inexact, rest), hyperparams, t, want_loss)
            new_inexact, new_rest = eqx.partition(new, eqx.is_inexact_array)
            return new_inexact, (new_rest, loss)

        new, push, (new_rest, loss) = jax.linearize(by_hand, inexact, hyperparams, has_aux=True)
        return eqx.combine(new, new_rest), loss, push

    def evaluate(w, hyperparams):
        if phi.grad_fn is not None:
            loss = phi.loss_if(want_loss, w, hyperparams, t)
            return phi.gradient(w, hyperparams, t), loss
        loss, gradient = phi.loss_and_gradient(w, hyperparams, t)
        return gradient, loss

    def update(gradient, inexact, hyperparams):
        evaluation = (loss, gradient)
        z = eqx.combine(inexact, rest)
        new, _, _ = phi.step_and_gradient(z, hyperparams, t, evaluation)
        return eqx.partition(new, eqx.is_inexact_array)

    # Each linearized once: all tangents share the primal.
    gradient, push_gradient, loss = jax.linearize(evaluate, z.w, hyperparams, has_aux=True)
    new, push_update, new_rest = jax.linearize(update, gradient, inexact, hyperparams, has_aux=True)
    at_z = lambda gradient, hyperparams: update(gradient, inexact, hyperparams)
    _, push_from_rest, _ = jax.linearize(at_z, gradient, hyperparams, has_aux=True)

    def push(z_dot: InnerState, hyper_dot: PyTree) -> InnerState:
        gradient_dot = push_gradient(z_dot.w, hyper_dot)
        moving = push_update(gradient_dot, z_dot, hyper_dot)
        resting = push_from_rest(gradient_dot, hyper_dot)
        at_rest = _is_zero(z_dot)
        return jax.tree.map(lambda x, y: jnp.where(at_rest, y, x), moving, resting)

    return eqx.combine(new, new_rest), loss, push


def _is_zero(tree: PyTree) -> Bool[Array, ""]:
    return jnp.stack([jnp.all(x == 0) for x in jax.tree.leaves(tree)]).all()
