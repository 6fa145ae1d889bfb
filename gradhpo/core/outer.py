"""The one outer update: the hyperparameters follow, and non-finite results are refused."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from gradhpo.core.inner import Carry
from gradhpo.core.inner_optimizer import cast_like, explained
from gradhpo.core.state import BilevelState, Memory
from gradhpo.core.types import LossFn, MetricDict, RealScalarLike
from gradhpo.utils.gradients import accumulation_dtype, tree_l2_norm


class Estimate(eqx.Module):
    """What an algorithm returns: the inner problem advanced, and the hypergradient."""

    z: Carry
    memory: Memory
    hypergradient: PyTree
    train_loss: Array
    val_loss: Array
    # Memory made of the user's examples: a missing value or a mask in them is no failure.
    examples: Memory = eqx.field(default_factory=dict)
    # The algorithm's own metrics: scalars that tell of a refused step as well.
    metrics: MetricDict = eqx.field(default_factory=dict)


def advance(
    optimizer: Any,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
    lr_hyper: RealScalarLike | None,
) -> BilevelState:
    """The outer step of a `BilevelOptimizer`, for use inside a larger compiled program."""
    estimate = optimizer._solve(state, train_batch, val_batch, train_loss_fn, val_loss_fn)
    return accept(state, estimate, optimizer.outer_optimizer, lr_hyper, optimizer._param_norm)


def accept(
    state: BilevelState,
    estimate: Estimate,
    outer_optimizer: optax.GradientTransformation | None,
    lr_hyper: RealScalarLike | None,
    param_norm: Callable[[PyTree], Array],
) -> BilevelState:
    """The state after a step whose inner part is done."""
    hyperparams, outer_opt_state = _outer_update(
        outer_optimizer, state, estimate.hypergradient, lr_hyper
    )
    w, inner_opt_state = estimate.z
    old_w, frozen = eqx.partition(state.params, eqx.is_inexact_array)
    memory_of = lambda names: {name: state.metadata[name] for name in names}
    old_memory = memory_of(estimate.memory)

    old = (old_w, state.inner_opt_state, state.outer_opt_state, old_memory)
    new = (w, inner_opt_state, outer_opt_state, estimate.memory)
    accepted = _finite((estimate.hypergradient, hyperparams)) & _finite(new, old)
    keep = lambda x, y: jnp.where(accepted, x, y)
    w, inner_opt_state, outer_opt_state, memory = jax.tree.map(keep, new, old)
    memory |= jax.tree.map(keep, estimate.examples, memory_of(estimate.examples))
    hyperparams = jax.tree.map(keep, hyperparams, state.hyperparams)
    dtype = accumulation_dtype(state.params)
    metrics = {
        "train_loss": estimate.train_loss,
        "val_loss": estimate.val_loss,
        "hypergrad_norm": tree_l2_norm(estimate.hypergradient),
        "param_norm": param_norm(w),
        "hyperparam_norm": tree_l2_norm(hyperparams),
        "rejected": state.metadata["rejected"] + (~accepted).astype(dtype),
    }
    return state.update(
        params=eqx.combine(w, frozen),
        hyperparams=hyperparams,
        inner_opt_state=inner_opt_state,
        outer_opt_state=outer_opt_state,
        step=state.step + 1,
        metadata=memory
        | estimate.metrics
        | {name: value.astype(dtype) for name, value in metrics.items()},
    )


def follow(state: BilevelState, estimate: Estimate) -> BilevelState:
    """The inner problem advanced; hyperparameters and metrics stay, and nothing is refused."""
    w, inner_opt_state = estimate.z
    return state.update(
        params=eqx.combine(w, state.params),
        inner_opt_state=inner_opt_state,
        metadata=estimate.memory | estimate.examples | estimate.metrics,
    )


def _outer_update(
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


def _finite(new: PyTree, unless_as_in: PyTree | None = None) -> Bool[Array, ""]:
    """Whether all numbers are finite, or else are those of the other tree.

    Parameters may hold an infinity on purpose (an attention mask), and so may optimizer
    states (a best value so far).
    """
    trees = (new,) if unless_as_in is None else (new, unless_as_in)
    fine = jax.tree.map(
        lambda x, *old: jnp.all(jnp.isfinite(x) if not old else jnp.isfinite(x) | (x == old[0])),
        *(eqx.filter(tree, eqx.is_inexact_array) for tree in trees),
    )
    return jnp.all(jnp.stack([jnp.asarray(True), *jax.tree.leaves(fine)]))
