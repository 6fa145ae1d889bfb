r"""The start of an inner training, if the hyperparameters act there: $z_0(\lambda)$.

They may act in the inner optimizer's `init`, $s_0 = \mathrm{init}(w_0, \lambda)$, or in the initial
parameters of an episode, $w_0 = \mathtt{start\_fn}(\mathtt{key}, \lambda)$. If they act in neither
(`phi.fresh` is `None`), every function does nothing, at no cost.
"""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import PyTree

from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_optimizer import init_inner_state
from gradhpo.core.inner_state import InnerState
from gradhpo.utils.programs import readings
from gradhpo.utils.trees import random_like, tree_zeros_like


def started(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> InnerState:
    """The z that inner steps start from at these hyperparameters: recomputed where z is fresh."""
    if phi.fresh is None:
        return z

    def anew():
        w = _initial_w(phi, z.w, hyperparams)
        return w, init_inner_state(phi.inner_optimizer, w, hyperparams)

    w, s = jax.lax.cond(phi.fresh, anew, lambda: (z.w, z.s))
    return z._replace(w=w, s=s)


def pull_start(phi: InnerUpdate, z: InnerState, hyperparams: PyTree, bar: InnerState) -> PyTree:
    r"""Pulls a cotangent back through the start of training, to the hyperparameters.

    $\bar z_0\,\partial z_0/\partial\lambda$ where z is fresh, otherwise 0. `z` is where the inner
    steps start, and `bar` a cotangent on its floating-point part; the result is a tree like the
    hyperparameters.
    """
    nothing = tree_zeros_like(hyperparams)
    if phi.fresh is None:
        return nothing
    pull = lambda: jax.vjp(lambda h: _inexact(phi, z, h), hyperparams)[1]((bar.w, bar.s))[0]
    return jax.lax.cond(phi.fresh, pull, lambda: nothing)


def push_start(
    phi: InnerUpdate, z: InnerState, hyperparams: PyTree, direction: PyTree
) -> tuple[PyTree, PyTree]:
    r"""Pushes a direction of the hyperparameters forward through the start of training.

    $\partial z_0/\partial\lambda\cdot v$ where z is fresh, otherwise 0: for $w$ and $s$.
    `direction` is a tree like the hyperparameters.
    """
    nothing = tree_zeros_like(eqx.filter((z.w, z.s), eqx.is_inexact_array))
    if phi.fresh is None:
        return nothing
    push = lambda: jax.jvp(lambda h: _inexact(phi, z, h), (hyperparams,), (direction,))[1]
    return jax.lax.cond(phi.fresh, push, lambda: nothing)


def act_at_start(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> bool:
    """Whether the hyperparameters act on a part of $z_0$ that a step then reads.

    By a derivative, unless the method takes none.
    """
    constant = isinstance(phi.inner_optimizer, optax.GradientTransformation | None)
    if phi.start is None and constant:
        return False
    start = lambda h: _inexact(phi, z, h)
    act = lambda f: readings(f, hyperparams, by_derivative=phi.differentiated).by()
    if not any(jax.tree.leaves(act(start))):
        return False
    read = _read_by_a_step(phi, z, hyperparams)
    start = lambda h: eqx.filter(_inexact(phi, z, h), read)
    return any(jax.tree.leaves(act(start)))


def acting_at_start(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> PyTree:
    """Marks the entries of the hyperparameters that act in $z_0$: a tree of bool arrays.

    From one product with random cotangents at random values, computed while tracing.
    """
    if phi.fresh is None:
        return jax.tree.map(lambda x: np.zeros(x.shape, bool), hyperparams)
    random = np.random.default_rng(0)
    read = _read_by_a_step(phi, z, hyperparams)
    with jax.ensure_compile_time_eval():
        w, hyperparams = random_like((z.w, hyperparams), random)
        if phi.start is not None:  # its key is known only when the program runs
            start = dataclasses.replace(phi.start, key=jax.random.key(0))
            phi = dataclasses.replace(phi, start=start)
        start = lambda h: eqx.filter(_inexact(phi, InnerState(w), h), read)
        made, pull = jax.vjp(start, hyperparams)
        (hyper_bar,) = pull(random_like(made, random))
        return jax.tree.map(lambda x: np.asarray(x != 0), hyper_bar)  # NaN counts


def _read_by_a_step(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> tuple[PyTree, PyTree]:
    """Marks the leaves of $w$ and $s$ that a step reads: a schedule overwrites what `init` left."""
    inexact, rest = eqx.partition(z.s, eqx.is_inexact_array)
    after = lambda s: phi.step(z._replace(s=eqx.combine(s, rest)), hyperparams, 0)[0]
    read = readings(after, inexact, by_derivative=phi.differentiated)
    return jax.tree.map(lambda x: True, z.w), read.by()


def _inexact(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> tuple[PyTree, PyTree]:
    w = _initial_w(phi, z.w, hyperparams)
    s = init_inner_state(phi.inner_optimizer, w, hyperparams)
    return w, eqx.filter(s, eqx.is_inexact_array)


def _initial_w(phi: InnerUpdate, w: PyTree, hyperparams: PyTree) -> PyTree:
    return w if phi.start is None else phi.start(hyperparams, w)
