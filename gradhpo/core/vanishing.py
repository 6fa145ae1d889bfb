"""Reports a hypergradient of exactly 0 for a visible hyperparameter, with the reason."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.inputs import Inputs
from gradhpo.core.interface import InnerProblems
from gradhpo.core.state import BilevelState
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.freezing import is_frozen
from gradhpo.utils.placement import placed
from gradhpo.utils.processes import numbers
from gradhpo.utils.validation import leaf_names
from gradhpo.utils.warn import warn_once, without_warnings


WHY_ZERO = (
    "there is a stop_gradient, a gradhpo.detach outside of jax.grad, a rounding or a comparison on "
    "the way, a unit is dead, or nothing "
    "in these batches depends on them. gradhpo.check_hypergradient compares with differences"
)


def vanished(optimizer: InnerProblems, inputs: Inputs, moving: np.ndarray) -> list[int]:
    """Which leaves have a hypergradient of 0 although the method sees them."""
    if optimizer.may_be_zero or np.all(moving):
        return []
    with without_warnings():
        seen = _seen(optimizer, inputs)
    return [i for i, here in enumerate(seen) if here and not moving[i]]


@compiled
def _seen(optimizer: InnerProblems, inputs: Inputs) -> list[bool]:
    return optimizer._seen(inputs)  # found while tracing, so once for each program


@compiled
def _hypergradient(optimizer: InnerProblems, inputs: Inputs) -> PyTree:
    return optimizer._solve(inputs).hypergradient


@compiled
def _any_moves(x: Array) -> Array:
    return jnp.any(x != 0)


@compiled
def _moved(x: Array, noise: Array) -> Array:
    return x + noise * jnp.maximum(1, jnp.abs(x))


def warn_of_zeros(optimizer: InnerProblems, inputs: Inputs, moving: ArrayLike) -> list[int]:
    """Warns about leaves whose hypergradient is 0 here and also nearby, and returns them.

    For example, a penalty has no derivative at parameters of 0, but has one a step away.
    """
    every = numbers(moving)  # [leaves], or [members, leaves]
    moved = np.asarray(np.any(every.reshape(-1, every.shape[-1]), axis=0))
    zeros = vanished(optimizer, inputs, moved)
    if not zeros:
        return []
    with without_warnings():
        beside = jax.tree.leaves(_hypergradient(optimizer, inputs.at(_beside(inputs.state))))
    zeros = [i for i in zeros if not _any_moves(beside[i])]
    if zeros:
        losses = inputs.losses.train_loss, inputs.losses.val_loss
        own = [x for x in jax.tree.leaves(optimizer) if callable(x)]
        warn_once(explain_zeros(optimizer, inputs.state, zeros), *losses, *own)
    return zeros


def explain_zeros(optimizer: InnerProblems, state: BilevelState, leaves: Sequence[int]) -> str:
    """Which hypergradients are 0, and why."""
    names = leaf_names(state.hyperparams)
    return (
        f"{type(optimizer).__name__}: the hypergradient of hyperparams "
        f"{', '.join(names[i] for i in leaves)} is exactly 0: {WHY_ZERO}"
    )


def _beside(state: BilevelState) -> BilevelState:
    """A nearby state: parameters and hyperparameters moved by a hundredth."""
    random = np.random.default_rng(1)

    def move(x):
        if not eqx.is_inexact_array(x):
            return x
        noise = np.asarray(0.01 * random.normal(size=x.shape)).astype(x.dtype)
        return _moved(x, placed(noise, x.sharding))

    given = state.params, state.hyperparams, state.model_state
    params, hyperparams, model_state = jax.tree.map(move, given, is_leaf=is_frozen)
    return state.update(params=params, hyperparams=hyperparams, model_state=model_state)
