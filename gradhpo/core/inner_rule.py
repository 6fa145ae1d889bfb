"""The rules that change parameters: optax, `grad_fn`, `update_fn`, and a solver of the whole."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from gradhpo.core.inner_optimizer import cast_like, explained, gradient_for, resolve
from gradhpo.core.losses import Result, called, with_state
from gradhpo.core.types import GradFn, InnerOptimizer, InnerSolver, UpdateFn
from gradhpo.utils.foreign import takes_objective
from gradhpo.utils.freezing import like_trained
from gradhpo.utils.gradients import undifferentiable
from gradhpo.utils.structure import where_they_differ


def updated_by_optax(
    inner_optimizer: InnerOptimizer,
    gradient: PyTree,
    s: PyTree,
    w: PyTree,
    hyperparams: PyTree,
    objective: Callable[[PyTree], Any],
    **of_loss: Any,
) -> tuple[PyTree, PyTree]:
    """`(w', s')`. Sophia's use of the objective is differentiated, like everything here."""
    transformation = resolve(inner_optimizer, hyperparams)
    if takes_objective(s):
        of_loss["obj_fn"] = objective
    with explained():
        update = optax.with_extra_args_support(transformation).update
        updates, new_s = update(gradient_for(s, gradient), s, w, **of_loss)
    new_w = optax.apply_updates(w, updates)
    return cast_like(new_w, w, "the inner update"), cast_like(new_s, s)


def gradient_by(
    grad_fn: GradFn, params: PyTree, w: PyTree, hyperparams: PyTree, batch: PyTree, r: PyTree
) -> Result:
    """What `grad_fn` returns, for the trained part `w` of the params."""
    given = called(grad_fn, params, hyperparams, batch, r)
    returned, r = with_state("grad_fn", "gradient", given, r)
    gradient = like_trained(w, returned)
    if not _have_same_shapes(gradient, w):
        alone = _alone("gradient", returned, w, {1: ", not (value, gradient)"})
        raise ValueError(
            f"grad_fn must return a gradient of the structure and shapes of the params{alone}\n"
            f"{where_they_differ(gradient, w)}"
        )
    return Result(cast_like(gradient, w), r)


def updated_by_hand(
    update_fn: UpdateFn, params: PyTree, w: PyTree, hyperparams: PyTree, batch: PyTree, r: PyTree
) -> Result:
    """What `update_fn` returns, for the trained part `w` of the params.

    What it returns for frozen leaves is ignored: most rules treat all arrays the same way.
    """
    given = called(update_fn, params, hyperparams, batch, r)
    return _new_params("update_fn", given, params, w, r)


def function_response(
    function: GradFn | UpdateFn, params: PyTree, hyperparams: PyTree, batch: PyTree, r: PyTree
) -> PyTree:
    """The floating-point part of what a user's rule returns, without the running state."""
    made = called(function, params, hyperparams, batch, r)
    return eqx.filter(made if r is None else made[0], eqx.is_inexact_array)


# What is not differentiated, where something would have to be.
NOT_DIFFERENTIATED = (
    "inner_solver is called and not differentiated, so there is no path of inner steps: the "
    "derivative of its solution comes from the equation that it solves. Finite differences need no "
    "derivative (gradhpo.finite_difference_hypergradient); for a path, use an inner_optimizer with "
    "as many inner steps as it needs"
)


def solved_by(
    inner_solver: InnerSolver,
    params: PyTree,
    w: PyTree,
    hyperparams: PyTree,
    batch: PyTree,
    r: PyTree,
) -> Result:
    """What `inner_solver` returns, for the trained part `w` of the params, as a constant.

    It may be anything that JAX can call, a callback too: no derivative enters it.
    """
    given = params, hyperparams, batch, r
    numbers, rest = eqx.partition(given, eqx.is_inexact_array)
    held = eqx.combine(jax.lax.stop_gradient(numbers), rest)
    found = _new_params("inner_solver", called(inner_solver, *held), params, w, r, exactly=True)
    # With its arguments, since a derivative would go to them.
    return undifferentiable((jax.lax.stop_gradient(found), numbers), NOT_DIFFERENTIATED)[0]


def _new_params(
    name: str, given: Any, params: PyTree, w: PyTree, r: PyTree, *, exactly: bool = False
) -> Result:
    """What a user's rule returned: new params, and the running state."""
    returned, r = with_state(name, "params", given, r)
    new = like_trained(w, returned)
    if not _have_same_shapes(new, w):
        alone = _alone("new params", returned, w, {})
        raise ValueError(
            f"{name} must return params of the structure and shapes that it got{alone}\n"
            f"{where_they_differ(new, w)}"
        )
    if exactly and jax.tree.map(jnp.result_type, new) != jax.tree.map(jnp.result_type, w):
        raise ValueError(
            f"{name} must return params of the dtypes that it got: convert them there, "
            f"jnp.asarray(x, params.dtype)\n{where_they_differ(new, w)}"
        )
    rest, constant = (
        jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array, inverse=True))
        for tree in (returned, params)
    )
    if any(x is not y for x, y in zip(rest, constant, strict=True)):
        raise ValueError(
            f"{name} changes a leaf of params that is not a floating-point array (a counter?); "
            "such leaves must stay constant: make it a float, or keep it out of params"
        )
    return Result(cast_like(new, w), r)


def _have_same_shapes(tree: PyTree, w: PyTree) -> bool:
    return jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, w)


def _alone(what: str, returned: Any, w: PyTree, instead: dict[int, str]) -> str:
    """What to return if one of several things that were returned fits."""
    for number, part in enumerate(returned if isinstance(returned, (tuple, list)) else ()):
        if _have_same_shapes(like_trained(w, part), w):
            return f": return the {what} alone{instead.get(number, '')}"
    return ""
