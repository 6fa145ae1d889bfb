"""Metrics that losses return with their values, on their way into the metadata of a state."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from gradhpo.core.memory import entries_of
from gradhpo.core.metadata import Metadata, placed_nan
from gradhpo.core.state import BilevelState
from gradhpo.utils.placement import beside
from gradhpo.utils.trees import accumulation_dtype


class Measured(eqx.Module):
    """A loss with its metrics, passed through an algorithm as one value.

    `jnp.asarray(value)` is the loss alone.
    """

    loss: Array
    aux: dict[str, Array]

    def __getitem__(self, index: Any) -> "Measured":
        return jax.tree.map(lambda x: x[index], self)

    def __jax_array__(self) -> Array:
        return self.loss


Loss: TypeAlias = Array | Measured
"""A loss as algorithms carry it."""


def measured(loss: Array, aux: dict[str, Array]) -> Any:
    """A loss as algorithms carry it: alone, if it has no metrics."""
    return Measured(loss, aux) if aux else loss


def loss_of(value: Any) -> Any:
    """The loss alone."""
    return value.loss if isinstance(value, Measured) else value


def aux_of(*values: Any) -> dict[str, Any]:
    """The metrics of losses."""
    found: dict[str, Any] = {}
    for value in values:
        found |= value.aux if isinstance(value, Measured) else {}
    return found


def with_aux(state: BilevelState, aux: Mapping[str, Any]) -> BilevelState:
    """A state with metrics that the losses returned; they are never inputs of a step."""
    added = Metadata(aux, aux=frozenset(aux))
    return dataclasses.replace(state, metadata=state.metadata | added) if aux else state


def without_aux(state: Any) -> Any:
    """A state without them, the same for any losses; anything else unchanged."""
    if not isinstance(state, BilevelState) or not state.metadata.aux:
        return state
    return dataclasses.replace(state, metadata=state.metadata.without(state.metadata.aux))


def not_measured(state: BilevelState, names: Iterable[str]) -> BilevelState:
    """A state with these metrics as `nan`."""
    dtype, shape = accumulation_dtype(state.params), state.metadata["rejected"].shape
    return with_aux(state, {name: placed_nan(dtype, shape) for name in names})


def with_same_metrics(state: BilevelState, given: BilevelState) -> BilevelState:
    """A new state with the metric names of the given one, if a user's program carries it."""
    aux, wanted = state.metadata.aux, given.metadata.aux
    if aux == wanted or not isinstance(given.step, Tracer):
        return state
    if aux - wanted:
        raise ValueError(
            f"the losses return metrics, {', '.join(sorted(aux - wanted))}, and inside your "
            "own scan, jit or vmap the state must have their names from the start: make it with "
            "optimizer.init(params, hyperparams, losses=losses, batch=batch, val_batch=val_batch)"
        )
    return not_measured(state, wanted - aux)


def check_free(aux: Mapping[str, Any], state: BilevelState) -> None:
    """No note and no entry of the algorithm's memory has the name of one of these metrics."""
    for name in aux:
        if name in state.metadata:
            raise ValueError(
                f"a loss returns the metric {name}, and the state has a note of that name: remove "
                "the note, dataclasses.replace(state, metadata=state.metadata.without("
                f"[{name!r}])), or rename one of them"
            )
        if name in entries_of(state.memory):
            raise ValueError(
                f"a loss returns the metric {name}, but the algorithm keeps an entry of that name "
                "in its memory: rename the metric"
            )


def with_aux_of_steps(tree: PyTree, metrics: Mapping[str, np.ndarray], first: int) -> PyTree:
    """States in a tree with the metrics that losses returned at their steps.

    Row 0 of `metrics` is the step after `first`.
    """

    def again(x: Any) -> Any:
        if not isinstance(x, BilevelState):
            return x
        row = int(x.step) - first - 1
        if not all(0 <= row < len(values) for values in metrics.values()):
            return x
        found = {name: jnp.asarray(values[row]) for name, values in metrics.items()}
        return with_aux(x, beside(found, x.params))

    return _over_states(again, tree)


def without_aux_in(tree: PyTree) -> PyTree:
    """States in a tree without such metrics."""
    return _over_states(without_aux, tree)


def _over_states(function: Any, tree: PyTree) -> PyTree:
    return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, BilevelState))
