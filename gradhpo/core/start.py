r"""Hyperparameters that act in the inner optimizer's `init`: $s_0 = \mathrm{init}(w_0, \lambda)$.

If there are none (`phi.fresh` is `None`), every function does nothing, at no cost.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from gradhpo.core.inner import InnerState, InnerUpdate
from gradhpo.core.inner_optimizer import init_inner_state
from gradhpo.utils.tracing import visible_leaves
from gradhpo.utils.trees import tree_zeros_like


def started(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> InnerState:
    """The z that inner steps start from at these hyperparameters: with `init` where z is fresh."""
    fresh = phi.fresh
    if fresh is None:
        return z
    s = init_inner_state(phi.inner_optimizer, z.w, hyperparams)
    choose = lambda new, old: jnp.where(fresh, new, old)
    return z._replace(s=jax.tree.map(choose, s, z.s))


def pull_start(phi: InnerUpdate, z: InnerState, hyperparams: PyTree, s_bar: PyTree) -> PyTree:
    r"""$\bar s_0\,\partial\mathrm{init}/\partial\lambda$ where z is fresh, otherwise 0.

    `z` is where the inner steps start, and `s_bar` a cotangent on the floating-point part of its
    `s`; the result is a tree like the hyperparameters.
    """
    fresh = phi.fresh
    if fresh is None:
        return tree_zeros_like(hyperparams)
    (hyper_bar,) = jax.vjp(lambda h: _inexact_s(phi, z, h), hyperparams)[1](s_bar)
    return jax.tree.map(lambda x: jnp.where(fresh, x, 0), hyper_bar)


def push_start(phi: InnerUpdate, z: InnerState, hyperparams: PyTree, direction: PyTree) -> PyTree:
    r"""$\partial\mathrm{init}/\partial\lambda\cdot v$ where z is fresh, otherwise 0; like $s$.

    `direction` is a tree like the hyperparameters.
    """
    fresh = phi.fresh
    if fresh is None:
        return tree_zeros_like(eqx.filter(z.s, eqx.is_inexact_array))
    _, tangent = jax.jvp(lambda h: _inexact_s(phi, z, h), (hyperparams,), (direction,))
    return jax.tree.map(lambda x: jnp.where(fresh, x, 0), tangent)


def act_in_init(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> bool:
    """Whether `init` has a derivative by the hyperparameters that a step then reads."""
    optimizer = phi.inner_optimizer
    if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
        return False
    init = lambda h: _inexact_s(phi, z, h)
    if not any(jax.tree.leaves(visible_leaves(init, hyperparams))):
        return False
    read = _read_by_a_step(phi, z, hyperparams)
    init = lambda h: eqx.filter(_inexact_s(phi, z, h), read)
    return any(jax.tree.leaves(visible_leaves(init, hyperparams)))


def acting_in_init(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> PyTree:
    """Marks the entries of the hyperparameters that act in `init`: a tree of bool arrays.

    From one product with random cotangents at random values, computed while tracing.
    """
    if phi.fresh is None:
        return jax.tree.map(lambda x: np.zeros(x.shape, bool), hyperparams)
    random = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(random.uniform(0.1, 0.9, x.shape), x.dtype)
    read = _read_by_a_step(phi, z, hyperparams)
    with jax.ensure_compile_time_eval():
        w, hyperparams = jax.tree.map(draw, (z.w, hyperparams))
        init = lambda h: eqx.filter(_inexact_s(phi, InnerState(w), h), read)
        s, pull = jax.vjp(init, hyperparams)
        (hyper_bar,) = pull(jax.tree.map(draw, s))
        return jax.tree.map(lambda x: np.asarray(x != 0), hyper_bar)  # NaN counts


def _read_by_a_step(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> PyTree:
    """Marks the leaves of $s$ that a step reads: a schedule overwrites what `init` left there."""
    inexact, rest = eqx.partition(z.s, eqx.is_inexact_array)
    after = lambda s: phi.step(z._replace(s=eqx.combine(s, rest)), hyperparams, 0)[0]
    return visible_leaves(after, inexact)


def _inexact_s(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> PyTree:
    s = init_inner_state(phi.inner_optimizer, z.w, hyperparams)
    return eqx.filter(s, eqx.is_inexact_array)
