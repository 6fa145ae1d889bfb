"""How a user's loss is called, and what it may return."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.inner_optimizer import cast_like
from gradhpo.utils.structure import where_they_differ
from gradhpo.utils.validation import check_scalar


def called(function: Callable, params: PyTree, hyperparams: PyTree, batch: PyTree, r: Any) -> Any:
    """`function(params, hyperparams, batch)`, and with a running state if there is one.

    On a copy of it: `eqx.nn.State` may be used once.
    """
    if r is None:
        return function(params, hyperparams, batch)
    return function(params, hyperparams, batch, jax.tree.map(lambda x: x, r))


class Result(NamedTuple):
    """What a loss, a gradient or an update returned, and the new running state."""

    value: Any
    r: PyTree


def with_state(name: str, what: str, returned: Any, r: PyTree) -> Result:
    """The result of a function that returns a new running state, where there is one."""
    if r is None:
        return Result(returned, None)
    fits = isinstance(returned, tuple) and len(returned) == 2
    if not fits or jax.tree.structure(returned[1]) != jax.tree.structure(r):
        differs = f", not a {type(returned).__name__}"
        if fits:
            differs = f"\n{where_they_differ(returned[1], r)}"
        raise ValueError(
            f"{name} got a model state, as the state has one, and must return ({what}, "
            f"new_model_state), the second with the structure of the first{differs}"
        )
    value, new = returned
    if list(map(_kind, jax.tree.leaves(new))) != list(map(_kind, jax.tree.leaves(r))):
        raise ValueError(
            f"{name} must return a model state of the shapes and kinds that it got\n"
            f"{where_they_differ(new, r)}"
        )
    return Result(value, cast_like(new, r))


def _kind(x: Any) -> tuple:
    """Shape and dtype, but for the width of a floating-point number."""
    dtype = jnp.result_type(x)
    return jnp.shape(x), "float" if jnp.issubdtype(dtype, jnp.floating) else dtype


def validation_value(returned: Any, r: PyTree) -> Array:
    """The loss alone: a validation loss may return the running state as well, which is dropped."""
    if r is not None and isinstance(returned, tuple) and len(returned) == 2:
        value, second = returned
        if jax.tree.structure(second) == jax.tree.structure(r):
            returned = value
    check_scalar(returned, "val_loss_fn")
    return returned  # pyright: ignore[reportReturnType]
