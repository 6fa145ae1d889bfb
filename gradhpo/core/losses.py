"""How a user's loss is called, and what it may return."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.inner_optimizer import cast_like
from gradhpo.core.types import METRICS
from gradhpo.utils.structure import where_they_differ
from gradhpo.utils.validation import check_scalar


def called(function: Callable, params: PyTree, hyperparams: PyTree, batch: PyTree, r: Any) -> Any:
    """`function(params, hyperparams, batch)`, and with a running state if there is one.

    It gets a copy: `eqx.nn.State` may be used only once.
    """
    if r is None:
        return function(params, hyperparams, batch)
    return function(params, hyperparams, batch, jax.tree.map(lambda x: x, r))


class Result(NamedTuple):
    """What a user's function returned, and the new running state."""

    value: Any
    r: PyTree


class Evaluation(NamedTuple):
    """What a training loss returned; `aux` are its metrics, by their names in the history."""

    loss: Any
    r: PyTree
    aux: dict[str, Array]


_METRICS_WITH_STATE = "With metrics, return (loss, (new_model_state, {'accuracy': accuracy}))"


def with_state(name: str, what: str, returned: Any, r: PyTree) -> Result:
    """The result of a function that returns a new running state, where there is one."""
    if r is None:
        return Result(returned, None)
    fits = isinstance(returned, tuple) and len(returned) == 2
    if not fits or jax.tree.structure(returned[1]) != jax.tree.structure(r):
        metrics = f"\n{_METRICS_WITH_STATE}" if what == "loss" else ""
        differs = f", not a {type(returned).__name__}"
        if isinstance(returned, tuple):
            differs += f" of {len(returned)}"
        if fits:
            differs = f"\n{where_they_differ(returned[1], r)}"
        raise ValueError(
            f"{name} got a model state, so it must return ({what}, new_model_state), with the "
            f"structure of the state that it got{differs}{metrics}"
        )
    value, new = returned
    if list(map(_kind, jax.tree.leaves(new))) != list(map(_kind, jax.tree.leaves(r))):
        raise ValueError(
            f"{name} must return a model state of the shapes and kinds that it got\n"
            f"{where_they_differ(new, r)}"
        )
    return Result(value, cast_like(new, r))


def _kind(x: Any) -> tuple:
    """Shape and dtype, ignoring the width of floating-point numbers."""
    dtype = jnp.result_type(x)
    return jnp.shape(x), "float" if jnp.issubdtype(dtype, jnp.floating) else dtype


def train_result(returned: Any, r: PyTree) -> Evaluation:
    """What a training loss returned: `loss` or `(loss, aux)`.

    With a running state: `(loss, new)` or `(loss, (new, aux))`.
    """
    aux: Any = None
    if _is_pair(returned):
        value, second = returned
        if r is None:
            returned, aux = value, second
        elif not _is_like(second, r) and _is_pair(second) and _is_like(second[0], r):
            returned, aux = (value, second[0]), second[1]
    result = with_state("train_loss_fn", "loss", returned, r)
    check_scalar(result.value, "train_loss_fn", "" if r is None else _METRICS_WITH_STATE)
    return Evaluation(*result, _metrics("train", aux))


def val_result(returned: Any, r: PyTree) -> tuple[Array, dict[str, Array]]:
    """What a validation loss returned: `loss` or `(loss, aux)`.

    A running state, returned as a training loss does, is dropped.
    """
    aux: Any = None
    if _is_pair(returned):
        returned, aux = returned
        if r is not None and _is_like(aux, r):
            aux = None
        elif r is not None and _is_pair(aux) and _is_like(aux[0], r):
            aux = aux[1]
    check_scalar(returned, "val_loss_fn")
    return returned, _metrics("val", aux)


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2


def _is_like(x: Any, r: PyTree) -> bool:
    return jax.tree.structure(x) == jax.tree.structure(r)


def _metrics(which: str, aux: Any) -> dict[str, Array]:
    """The metrics of a loss, by their names in the history."""
    if aux is None:
        return {}
    name = f"{which}_loss_fn"
    if not isinstance(aux, dict) or not all(isinstance(key, str) for key in aux):
        kind = "an array" if eqx.is_array(aux) else f"a {type(aux).__name__}"
        raise TypeError(
            f"{name} returned a loss and {kind}: only a dict of scalar metrics may follow the "
            "loss, return loss, {'accuracy': accuracy}; running state goes into "
            "init(model_state=...)"
        )
    metrics = {}
    for key, value in aux.items():
        kind = f"a {type(value).__name__}"
        if eqx.is_array_like(value):
            kind = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
        if not eqx.is_array_like(value) or jnp.shape(value) != ():
            raise ValueError(
                f"{name} returned {key!r}, {kind}, as a metric: metrics are scalars of shape (), "
                "such as a mean over the examples. To record an array at every step, use "
                "run(record=...)"
            )
        if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
            raise ValueError(f"{name} returned the metric {key!r}, which is complex")
        if not key:
            raise ValueError(f"{name} returned a metric without a name, {{'': ...}}: give it one")
        if f"{which}_{key}" in METRICS:
            raise ValueError(
                f"{name} returned the metric {key!r}, which would be called {which}_{key}, as a "
                "metric that every step has: choose another name"
            )
        metrics[f"{which}_{key}"] = as_number(value)
    return metrics


def as_number(x: Any) -> Array:
    """A floating-point array, of flags and counts too."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float)
