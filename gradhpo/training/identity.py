"""What distinguishes one run from another, for the checkpoints of both."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.state import BilevelState, inner_state
from gradhpo.data.sources import Feed
from gradhpo.utils.description import described
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.freezing import frozen_part


def identity(
    optimizer: BilevelOptimizer, state: BilevelState, feed: Feed, **settings: Any
) -> dict[str, Any]:
    """Optimizer, settings, starting point and data, as far as they can be compared, as JSON."""
    weights = inner_state(state).w
    return {
        "optimizer": described(optimizer),
        **{name: described(value) for name, value in settings.items()},
        "state.step": int(state.step),
        "state.params": described(weights),
        "the frozen part of state.params": described(jax.tree.leaves(frozen_part(state.params))),
        "state.hyperparams": described(state.hyperparams),
        "the update of inner_optimizer": _response(_inner_response, optimizer, state, weights),
        "the update of outer_optimizer": _response(
            _outer_response, optimizer, state, state.hyperparams
        ),
        **feed.described(),
    }


def _response(
    update: Callable, optimizer: BilevelOptimizer, state: BilevelState, like: PyTree
) -> Any:
    """What an optimizer makes of a gradient of 1: a rate or a decay is hidden in its functions."""
    # Some need more than a gradient: they cannot be compared.
    with contextlib.suppress(Exception):
        return described(update(optimizer, state, jax.tree.map(jnp.ones_like, like)))


@compiled
def _inner_response(optimizer: BilevelOptimizer, state: BilevelState, gradient: PyTree) -> PyTree:
    return optimizer._inner_response(state, gradient)


@compiled
def _outer_response(optimizer: BilevelOptimizer, state: BilevelState, gradient: PyTree) -> PyTree:
    rule = optimizer.outer_optimizer
    if rule is None:
        return None
    return rule.update(gradient, state.outer_opt_state, state.hyperparams)[0]
