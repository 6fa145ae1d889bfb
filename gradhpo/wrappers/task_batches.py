"""Divides a batch of all tasks into one for each task."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradhpo.core.batches import BatchStack, DrawnStack
from gradhpo.utils.keys import fold_keys


def per_task(
    name: str, batch: PyTree, num_tasks: int
) -> tuple[PyTree, Callable[[Array, PyTree], Any]]:
    """What to map over in a batch (tasks first), and how to rebuild a task's batch."""
    if isinstance(batch, DrawnStack):

        def drawn_for(number, nothing):
            def draw(t):
                arrays, batch_of = per_task(name, batch.draw(t), num_tasks)
                return batch_of(number, jax.tree.map(lambda x: x[number], arrays))

            return dataclasses.replace(batch, draw=draw)

        return None, drawn_for
    if isinstance(batch, BatchStack):
        arrays, shared = eqx.partition(batch.batches, lambda x: np.ndim(x) > 1)
        _check_task_axis(arrays, name, num_tasks, axis=1)
        rebuild = lambda number, of_task: BatchStack(
            eqx.combine(of_task, fold_keys(shared, number))
        )
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays), rebuild
    arrays, shared = eqx.partition(batch, lambda x: eqx.is_array(x) and x.ndim > 0)
    _check_task_axis(arrays, name, num_tasks, axis=0)
    return arrays, lambda number, of_task: eqx.combine(of_task, fold_keys(shared, number))


def _check_task_axis(tree: PyTree, name: str, num_tasks: int, *, axis: int) -> None:
    """Checks that every array of a batch has one entry per task."""
    layout = "[tasks, ...]" if axis == 0 else "[inner steps, tasks, ...]"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.shape[axis] != num_tasks:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {leaf.shape}; TaskBatched with "
                f"num_tasks={num_tasks} needs {layout}, with {num_tasks} at axis {axis}"
            )
