"""Tasks that restart one after another."""

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
    """A first memory: none of the tasks has restarted, and this is where they will."""
    return RestartingMemory(memory.task, memory.of_each, start, jnp.full_like(memory.task, -1))


def side_by_side(memory: TaskMemory, w: PyTree = None) -> TaskMemory:
    """The memory once all tasks have taken a step, or have restarted, together; from `w` then."""
    if not isinstance(memory, RestartingMemory):
        return memory
    start = memory.restart_from if w is None else memory.restart_from._replace(w=w)
    return restarting(memory, start)


def next_restarted(
    optimizer: BilevelOptimizer, state: BilevelState, each: Own, start: Start | None, every: int
) -> BilevelState:
    """After every `every`-th outer step, the state with the next task in turn at its start.

    All restart, and one of them is taken: a task is not looked up where they are spread over
    devices. `optimizer` tunes one task, `each` is what tasks have of their own, and `start`
    that of the episode.
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
