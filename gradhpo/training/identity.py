"""What tells one run from another, for the checkpoints of both."""

import contextlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.state import BilevelState
from gradhpo.data.feed import Feed
from gradhpo.utils.description import described


def identity(
    optimizer: BilevelOptimizer, state: BilevelState, feed: Feed, **settings: Any
) -> dict[str, Any]:
    """Optimizer, settings, starting point and data, as far as they can be told, as JSON."""
    weights = eqx.filter(state.params, eqx.is_inexact_array)
    inner = getattr(optimizer, "inner_optimizer", None)
    return {
        "optimizer": described(optimizer),
        **{name: described(value) for name, value in settings.items()},
        "state.step": int(state.step),
        "state.params": described(weights),
        "state.hyperparams": described(state.hyperparams),
        "the update of inner_optimizer": _moves(
            inner, state.hyperparams, state.inner_opt_state, weights
        ),
        "the update of outer_optimizer": _moves(
            optimizer.outer_optimizer, None, state.outer_opt_state, state.hyperparams
        ),
        **feed.described(),
    }


def _moves(rule: Any, hyperparams: PyTree, opt_state: PyTree, params: PyTree) -> Any:
    """What an optimizer makes of a gradient of 1: a rate or a decay is hidden in its functions."""
    if rule is None:
        return None
    # Some need more than a gradient, or have an axis of tasks: those cannot be told.
    with contextlib.suppress(Exception):
        return described(_of_ones(rule, hyperparams, opt_state, params))


@eqx.filter_jit
def _of_ones(rule: Any, hyperparams: PyTree, opt_state: PyTree, params: PyTree) -> PyTree:
    if not isinstance(rule, optax.GradientTransformation):
        rule = rule(hyperparams)
    return rule.update(jax.tree.map(jnp.ones_like, params), opt_state, params)[0]
