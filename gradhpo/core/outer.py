"""The one outer update: the hyperparameters follow their hypergradient."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from gradhpo.core.inner import InnerState
from gradhpo.core.inner_optimizer import cast_like, explained
from gradhpo.core.state import BilevelState
from gradhpo.core.types import RealScalarLike
from gradhpo.utils.validation import strong


class Estimate(eqx.Module):
    r"""What an algorithm returns: the inner problem advanced, and the hypergradient at its end.

    - `z`: the $(w, s, r)$ after the inner steps.
    - `hypergradient`: a tree like the hyperparameters.
    - `train_loss`, `val_loss`: at the last inner step, before its update; and at the end.
    - `memory`: the algorithm's memory after the step, of one structure for ever.
    """

    z: InnerState
    hypergradient: PyTree
    train_loss: Array
    val_loss: Array
    memory: PyTree = None


def init_outer_state(
    outer_optimizer: optax.GradientTransformation | None, hyperparams: PyTree
) -> PyTree:
    """The outer optimizer's state; `()` where there is none."""
    if outer_optimizer is None:
        return ()
    return jax.tree.map(strong, outer_optimizer.init(hyperparams))


def outer_update(
    outer_optimizer: optax.GradientTransformation | None,
    state: BilevelState,
    hypergradient: PyTree,
    lr_hyper: RealScalarLike | None,
) -> tuple[PyTree, PyTree]:
    """New hyperparameters and outer optimizer state."""
    if lr_hyper is not None:
        updates, outer_opt_state = _scaled(hypergradient, -jnp.asarray(lr_hyper)), ()
    else:
        assert outer_optimizer is not None  # `step` and `run` ask for one of the two
        with explained("outer"):
            updates, outer_opt_state = outer_optimizer.update(
                hypergradient, state.outer_opt_state, state.hyperparams
            )
    hyperparams = optax.apply_updates(state.hyperparams, updates)
    hyperparams = cast_like(hyperparams, state.hyperparams, "the outer update")
    return hyperparams, cast_like(outer_opt_state, state.outer_opt_state)


def _scaled(tree: PyTree, factor: Array) -> PyTree:
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)
