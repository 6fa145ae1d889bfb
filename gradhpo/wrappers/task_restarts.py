"""Tasks that restart in turn."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inner_state import InnerState, Start
from gradhpo.core.state import BilevelState
from gradhpo.wrappers.task_memory import RestartingMemory, TaskMemory
from gradhpo.wrappers.task_states import Own, own_of_one, state_of_all, state_of_one


def restarting(memory: TaskMemory, start: InnerState) -> RestartingMemory:
    """The first memory: no task has restarted yet, and all will restart from `start`."""
    return RestartingMemory(memory.task, memory.of_each, start, jnp.full_like(memory.task, -1))


def side_by_side(memory: TaskMemory, w: PyTree = None) -> TaskMemory:
    """The memory after a step of all tasks, or after all of them have restarted, from `w`."""
    if not isinstance(memory, RestartingMemory):
        return memory
    start = memory.restart_from if w is None else memory.restart_from._replace(w=w)
    return restarting(memory, start)


def next_restarted(
    optimizer: BilevelOptimizer, state: BilevelState, each: Own, start: Start | None, every: int
) -> BilevelState:
    """The state after an outer step; every `every` steps, the next task in turn restarts.

    All tasks restart, and one of them is selected: indexing one would move tasks that are spread
    over devices. `optimizer` tunes one task, `each` are the tasks' own parts, and `start` is the
    start of the episode.
    """
    memory = state.memory
    assert isinstance(memory, RestartingMemory)

    def restarted() -> tuple[InnerState, PyTree, Array]:
        turn = (state.step // every - 1) % memory.task.shape[0]

        def of_one(number: Array, own: Own) -> Own:
            old = state_of_one(state, own)
            if start is None:
                new = optimizer._restart(old, memory.restart_from, jnp.zeros(()))
            else:
                new = optimizer._restart_at(old, start.folded(state.step).of_one(number))
            choose = lambda x, y: jnp.where(number == turn, x, y)
            own, new = own_of_one(old, apart=False), own_of_one(new, apart=False)
            return jax.tree.map(choose, new, own)

        new = jax.vmap(of_one)(memory.task, each)
        return new.z, new.memory, jnp.where(memory.task == turn, state.step, memory.restarted_at)

    kept = lambda: (each.z, each.memory, memory.restarted_at)
    z, of_each, restarted_at = jax.lax.cond(state.step % every == 0, restarted, kept)
    memory = dataclasses.replace(memory, restarted_at=restarted_at)
    return state_of_all(state, Own(z, of_each), memory)
