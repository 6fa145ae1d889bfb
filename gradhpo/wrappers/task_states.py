"""Divides the state of all tasks into one for each task."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from gradhpo.core.inner_state import InnerState, Start
from gradhpo.core.outer import init_outer_state
from gradhpo.core.state import BilevelState, inner_state, with_inner_state
from gradhpo.utils.structure import check_same_structure
from gradhpo.wrappers.task_memory import RestartingMemory, TaskMemory


class Own(NamedTuple):
    """What a task does not share; for all tasks, with a leading task axis."""

    z: InnerState
    memory: Any
    outer_opt_state: PyTree = None  # `None`: all share one
    restarted_at: Array | None = None  # `None`: they restart together


def own_of_each(state: BilevelState, memory: TaskMemory, apart: bool) -> Own:
    """The parts of all tasks. `apart`: each has its own outer optimizer state."""
    restarted_at = memory.restarted_at if isinstance(memory, RestartingMemory) else None
    outer = state.outer_opt_state if apart else None
    return Own(inner_state(state), memory.of_each, outer, restarted_at)


def check_outer_states(
    state: BilevelState, outer_optimizer: optax.GradientTransformation | None, num_tasks: int
) -> None:
    """Checks that every task has its own outer optimizer state."""
    made = lambda _: init_outer_state(outer_optimizer, state.hyperparams)
    expected = eqx.filter_eval_shape(jax.vmap(made), jnp.arange(num_tasks, dtype=jnp.int32))
    remedy = (
        'With average="updates", TaskBatched keeps one for every task. Make the state with this '
        "optimizer's init(params, hyperparams), or take over that of another optimizer with "
        "adopt(state)."
    )
    check_same_structure(state.outer_opt_state, expected, "state.outer_opt_state", remedy)


def own_of_one(state: BilevelState, apart: bool) -> Own:
    """The own part of one task's state."""
    return Own(inner_state(state), state.memory, state.outer_opt_state if apart else None)


def state_of_one(state: BilevelState, own: Own) -> BilevelState:
    """The state of one task, as the wrapped optimizer takes it."""
    alone = own.restarted_at
    outer = state.outer_opt_state if own.outer_opt_state is None else own.outer_opt_state
    return dataclasses.replace(
        with_inner_state(state, own.z),
        outer_opt_state=outer,
        memory=own.memory,
        fresh=state.fresh if alone is None else state.fresh | (alone >= 0),
    )


def state_of_all(state: BilevelState, own: Own, memory: TaskMemory) -> BilevelState:
    """The state of all tasks, with the memory that they share; as `fresh` as the given state."""
    outer = state.outer_opt_state if own.outer_opt_state is None else own.outer_opt_state
    return dataclasses.replace(
        with_inner_state(state, own.z),
        outer_opt_state=outer,
        memory=dataclasses.replace(memory, of_each=own.memory),
        fresh=state.fresh,
    )


def start_of(start: Start | None, number: Array, restarted_at: Array | None) -> Start | None:
    """The start of a task: the start of the episode, or the step at which it restarted in turn."""
    if start is None:
        return None
    if restarted_at is not None:
        key = jnp.where(restarted_at >= 0, start.folded(restarted_at).key, start.key)
        start = dataclasses.replace(start, key=key)
    return start.of_one(number)
