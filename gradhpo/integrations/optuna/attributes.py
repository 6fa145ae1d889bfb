"""What a trial keeps of a run, as JSON of bounded size: learned hyperparameters, their schedule.

Optuna's databases store each attribute as `TEXT`, at most 65,535 bytes in MySQL.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.utils.keys import is_key
from gradhpo.utils.lineage import lineage, lowest_at_the_end


NUMBERS = 16  # of a leaf that is kept in full
POINTS = 50  # of a schedule
BYTES = 32_000  # of an attribute
LEFT_OUT = "left out"  # how many entries there was no room for


def leaf_name(path: tuple[Any, ...]) -> str:
    """As `run` records it, without the prefix: `layers.0.decay`, or `hyperparams` for one leaf."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "hyperparams"


def learned(hyperparams: PyTree) -> dict[str, Any]:
    """Every leaf by its name: small ones in full, the others as shape, mean, least and largest."""
    leaves = jax.tree_util.tree_leaves_with_path(hyperparams)
    arrays = ((path, leaf) for path, leaf in leaves if eqx.is_array(leaf) and not is_key(leaf))
    return _bounded((leaf_name(path), _leaf(leaf)) for path, leaf in arrays)


def schedule(metrics: Mapping[str, np.ndarray], last_step: int) -> dict[str, Any]:
    """Scalar hyperparameters after some steps, evenly spread, the first and the last among them."""
    length = len(metrics["val_loss"])
    rows = np.unique(np.linspace(0, length - 1, min(POINTS, length)).round().astype(int))
    columns = {
        name.removeprefix("hyperparams."): values
        for name, values in metrics.items()
        if name.split(".")[0] == "hyperparams" and values.ndim == 1
    }
    steps = {"step": (rows + last_step - length + 1).tolist()}
    return _bounded((name, _numbers(values[rows])) for name, values in columns.items()) | steps


def _leaf(leaf: Array | np.ndarray) -> Any:
    if leaf.size <= NUMBERS:
        return _numbers(leaf)
    values = np.asarray(leaf, np.float64)
    said = {"mean": np.mean(values), "min": np.min(values), "max": np.max(values)}
    return {"shape": list(leaf.shape)} | {name: _numbers(x) for name, x in said.items()}


def _numbers(values: Any) -> Any:
    """Nested lists of numbers, with None for those that JSON lacks."""
    values = np.asarray(values)
    exact = values.astype(bool if values.dtype == bool else np.float64)  # of bfloat16, too
    finite = lambda x: x if math.isfinite(x) else None
    return jax.tree.map(finite, exact.tolist())


def _bounded(entries: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    kept, size, left_out = {}, 0, 0
    for name, entry in entries:
        more = len(json.dumps({name: entry}))
        if size + more > BYTES:
            left_out += 1
        else:
            kept[name], size = entry, size + more
    return kept | ({LEFT_OUT: left_out} if left_out else {})


def of_best_member(
    hyperparams: PyTree, metrics: Mapping[str, np.ndarray]
) -> tuple[int, PyTree, dict[str, np.ndarray]]:
    """A population's best member: its number, its hyperparameters, and their history."""
    loss = metrics["val_loss"]
    nobody = np.tile(np.arange(loss.shape[1]), (len(loss), 1))
    parent = metrics.get("parent", nobody)
    number = lowest_at_the_end(parent, loss)
    line, steps = lineage(parent, number), np.arange(len(loss))
    along = lambda x: x[steps, line] if x.ndim == 2 else x
    names = [name for name in metrics if name.split(".")[0] == "hyperparams"]
    columns = {name: along(metrics[name]) for name in (*names, "val_loss")}
    return number, jax.tree.map(lambda x: x[number], hyperparams), columns
