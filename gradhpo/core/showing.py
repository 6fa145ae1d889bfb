"""How a state prints: what it holds, with small hyperparameters by value."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from gradhpo.core.types import METRICS
from gradhpo.utils.keys import is_key
from gradhpo.utils.validation import THE_WHOLE_TREE, leaf_names


# Longer arrays are shown by their shape, and further hyperparameters by their number.
_MOST_NUMBERS, _MOST_LEAVES = 6, 10
_METRICS = ("train_loss", "val_loss", "hypergrad_norm", "rejected")


def shown(
    params: PyTree, hyperparams: PyTree, step: Any, metadata: Mapping[str, Any], memory: PyTree
) -> str:
    """A few lines, for models of any size."""
    leaves = [x for x in jax.tree.leaves(params) if eqx.is_inexact_array(x)]
    aux = getattr(metadata, "aux", frozenset())
    names = [*_METRICS, *sorted(aux)]
    metrics = {name: metadata[name] for name in names if name in metadata}
    count = sum(x.size for x in leaves)
    lines = [
        f"step={_value(step)}",
        f"params: {_many(count, 'number')} in {_many(len(leaves), 'array')}",
        f"hyperparams: {_by_value(hyperparams)}",
        ", ".join(f"{name}={_value(x)}" for name, x in metrics.items()),
    ]
    notes = {name: x for name, x in metadata.items() if name not in (*METRICS, *aux)}
    if notes:
        lines.append(f"notes: {_by_value(notes)}")
    if memory is not None:
        lines.append(f"memory: {type(memory).__name__}")
    inside = ",\n  ".join(lines)
    return f"BilevelState(\n  {inside},\n)"


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _by_value(tree: PyTree) -> str:
    leaves = jax.tree.leaves(tree)
    names = [name.removeprefix(THE_WHOLE_TREE).removeprefix(".") for name in leaf_names(tree)]
    values = map(_value, leaves)
    parts = [f"{name}={x}" if name else x for name, x in zip(names, values, strict=True)]
    more = len(parts) - _MOST_LEAVES
    return ", ".join(parts[:_MOST_LEAVES] + ([f"and {more} more"] if more > 0 else []))


def _value(x: Any) -> str:
    """The numbers of a small array that is at hand; otherwise its dtype and shape."""
    if not eqx.is_array(x):
        return repr(x)
    kind = eqx.tree_pformat(x)
    if isinstance(x, Tracer) or is_key(x) or x.size > _MOST_NUMBERS:
        return kind
    if isinstance(x, jax.Array) and (x.is_deleted() or not x.is_fully_addressable):
        return kind
    exact = x.dtype.kind in "biu"
    x = np.asarray(x) if exact else np.asarray(x, float)  # bfloat16 is of no kind that prints
    if x.shape == ():
        return str(x.item()) if exact else f"{x.item():.5g}"
    return np.array2string(x, precision=4, separator=", ").replace("\n", "")
