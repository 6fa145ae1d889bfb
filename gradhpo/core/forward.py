r"""Forward mode through one inner step."""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, PyTree

from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_optimizer import init_inner_state
from gradhpo.core.inner_state import InnerState, differentiated
from gradhpo.core.measured import Loss
from gradhpo.utils.trees import random_like


Push: TypeAlias = Callable[[InnerState, PyTree], InnerState]


def infinite_at_rest(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> bool:
    """Whether the derivative of an optimizer's update is infinite at the optimizer's first state.

    There (square roots of 0), a tangent of exactly 0 becomes NaN; reverse mode never meets it.
    Found from one product at random values, computed while tracing; assumed if the update depends
    on other traced values, as Sophia's does on the batch.
    """
    if phi.inner_optimizer is None:
        return False
    with jax.ensure_compile_time_eval():
        gradient, w, at = random_like((z.w, z.w, hyperparams), np.random.default_rng(0))

        def product(gradient, w, hyperparams):
            s = init_inner_state(phi.inner_optimizer, w, hyperparams)
            inexact, rest = eqx.partition((w, s), eqx.is_inexact_array)

            def update(inexact):
                w, s = eqx.combine(inexact, rest)
                evaluation = jnp.zeros(()), gradient, z.r
                at = InnerState(w, s, z.r)
                new, _, _ = phi.step_and_gradient(at, hyperparams, 0, evaluation)
                return eqx.filter((new.w, new.s), eqx.is_inexact_array)

            zero = jax.tree.map(jnp.zeros_like, inexact)
            moved = jax.tree.leaves(jax.jvp(update, (inexact,), (zero,))[1])
            return jnp.stack([jnp.any(jnp.isnan(x)) for x in moved]).any()

        found = jax.jit(product)(gradient, w, at)
    return True if isinstance(found, Tracer) else bool(found)


def push_step(
    phi: InnerUpdate,
    z: InnerState,
    hyperparams: PyTree,
    t: ArrayLike,
    want_loss: ArrayLike = True,
    *,
    from_rest: bool = False,
) -> tuple[InnerState, Loss, Push]:
    r"""One inner step, with a function that pushes tangents through it.

    Returns `(z', loss, push)`, where `push(z_dot, hyper_dot)` is $A_t \dot z + B_t \dot\lambda$.
    `z_dot` is a tree like the floating-point part of $z$. With `from_rest` (for an optimizer that
    is `infinite_at_rest`), a $\dot z$ of exactly 0 contributes nothing, for any $A_t$.
    """
    inexact, rest = eqx.partition(z, eqx.is_inexact_array)
    if not from_rest:

        def step(inexact, hyperparams):
            new, loss = phi.step(eqx.combine(inexact, rest), hyperparams, t, want_loss)
            new_inexact, new_rest = eqx.partition(new, eqx.is_inexact_array)
            return new_inexact, (new_rest, loss)

        # Linearized once: all tangents share the primal.
        new, push, (new_rest, loss) = jax.linearize(step, inexact, hyperparams, has_aux=True)
        return eqx.combine(new, new_rest), loss, push

    def evaluate(w, r, hyperparams):
        z = InnerState(w, None, eqx.combine(r, rest.r))
        if phi.grad_fn is not None:
            loss = phi.loss_if(want_loss, z, hyperparams, t)
            gradient, new_r = phi.gradient_and_state(z, hyperparams, t)
        else:
            loss, gradient, new_r = phi.loss_and_gradient(z, hyperparams, t)
        new_r, r_rest = differentiated(new_r)
        return (gradient, new_r), (loss, r_rest)

    def update(evaluated, inexact, hyperparams):
        gradient, new_r = evaluated
        evaluation = loss, gradient, eqx.combine(new_r, r_rest)
        z = eqx.combine(inexact, rest)
        new, _, _ = phi.step_and_gradient(z, hyperparams, t, evaluation)
        return eqx.partition(new, eqx.is_inexact_array)

    at = z.w, inexact.r, hyperparams
    evaluated, push_gradient, (loss, r_rest) = jax.linearize(evaluate, *at, has_aux=True)
    at = evaluated, inexact, hyperparams
    new, push_update, new_rest = jax.linearize(update, *at, has_aux=True)
    at_z = lambda evaluated, hyperparams: update(evaluated, inexact, hyperparams)
    _, push_from_rest, _ = jax.linearize(at_z, evaluated, hyperparams, has_aux=True)

    def push(z_dot: InnerState, hyper_dot: PyTree) -> InnerState:
        evaluated_dot = push_gradient(z_dot.w, z_dot.r, hyper_dot)
        moving = push_update(evaluated_dot, z_dot, hyper_dot)
        resting = push_from_rest(evaluated_dot, hyper_dot)
        at_rest = _is_zero(z_dot)
        return jax.tree.map(lambda x, y: jnp.where(at_rest, y, x), moving, resting)

    return eqx.combine(new, new_rest), loss, push


def _is_zero(tree: PyTree) -> Bool[Array, ""]:
    return jnp.stack([jnp.all(x == 0) for x in jax.tree.leaves(tree)]).all()
