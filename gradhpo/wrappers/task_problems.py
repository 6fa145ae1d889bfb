"""The wrapped optimizer, mapped over all tasks."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.inputs import Inputs
from gradhpo.core.state import BilevelState, inner_state
from gradhpo.core.types import Declared, MetricDict
from gradhpo.core.wrapper import Wrapper
from gradhpo.wrappers.task_batches import per_task
from gradhpo.wrappers.task_memory import TaskMemory, memory_of
from gradhpo.wrappers.task_states import (
    Own,
    check_outer_states,
    own_of_each,
    start_of,
    state_of_one,
)


class TaskProblems(Wrapper):
    """The private half of `TaskBatched`."""

    if TYPE_CHECKING:
        num_tasks = Declared[int]()
        average = Declared[str]()
        restart_every = Declared[int | None]()
    else:
        num_tasks: eqx.AbstractVar[int]
        average: eqx.AbstractVar[str]
        restart_every: eqx.AbstractVar[int | None]

    @property
    def _apart(self) -> bool:
        """Whether every task has its own outer optimizer state."""
        return self.average == "updates"

    def _seen(self, inputs: Inputs) -> list[bool]:
        return self._of_any(self.optimizer._seen, inputs)

    def _recomputes(self, inputs: Inputs) -> bool:
        return self._of_any(self.optimizer._recomputes, inputs)

    def _of_any(self, look: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        """What is found while tracing, once for all tasks."""
        found = []

        def trace(inputs: Inputs) -> tuple[()]:
            found.append(look(inputs))
            return ()

        self._over_tasks(trace, inputs)
        return found[0]

    def _outer_loss(self, inputs: Inputs) -> Array:
        return mean(self._over_tasks(self.optimizer._outer_loss, inputs))

    def _begin_episode(self, inputs: Inputs, num_steps: int) -> BilevelState:
        begin = lambda inputs: self.optimizer._begin_episode(inputs, num_steps).memory
        return self._with_memories(inputs, begin)

    def _fit(self, inputs: Inputs) -> BilevelState:
        return self._with_memories(inputs, lambda inputs: self.optimizer._fit(inputs).memory)

    def _with_memories(self, inputs: Inputs, function: Callable[[Inputs], Any]) -> BilevelState:
        of_each = self._over_tasks(function, inputs)
        memory = dataclasses.replace(self._memory(inputs.state), of_each=of_each)
        return inputs.state.update(memory=memory)

    def _inner_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        respond = lambda z, g: self.optimizer._inner_response(state_of_one(state, Own(z, None)), g)
        return jax.vmap(respond)(inner_state(state), gradient)

    def _function_response(self, state: BilevelState, batch: PyTree) -> tuple[PyTree, bool]:
        batches, batch_of = per_task("train_batch", batch, self.num_tasks)
        moves = []

        def respond(number, z, own_batch):
            task = state_of_one(state, Own(z, None))
            made, is_move = self.optimizer._function_response(task, batch_of(number, own_batch))
            moves.append(is_move)
            return made

        numbers = jnp.arange(self.num_tasks, dtype=jnp.int32)
        return jax.vmap(respond)(numbers, inner_state(state), batches), moves[0]

    def _param_norm(self, w: PyTree) -> Array:
        return mean(jax.vmap(self.optimizer._param_norm)(w))

    def _scalars(self, memory: TaskMemory) -> MetricDict:
        of_each = memory_of(memory, self.num_tasks).of_each
        return mean(jax.vmap(self.optimizer._scalars)(of_each)) if jax.tree.leaves(of_each) else {}

    def _over_tasks(self, function: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        """`function` of the inputs of every task, with results stacked."""
        state, memory = inputs.state, self._memory(inputs.state)
        train, train_of = per_task("train_batch", inputs.train_batch, self.num_tasks)
        val, val_of = per_task("val_batch", inputs.val_batch, self.num_tasks)

        def of_one(number, own, train, val):
            batches = {"train_batch": train_of(number, train), "val_batch": val_of(number, val)}
            start = start_of(inputs.start, number, own.restarted_at)
            return function(inputs.at(state_of_one(state, own), start=start, **batches))

        return jax.vmap(of_one)(memory.task, self._own_of_each(state), train, val)

    def _memory(self, state: BilevelState) -> TaskMemory:
        return memory_of(state.memory, self.num_tasks, self.restart_every is not None)

    def _own_of_each(self, state: BilevelState) -> Own:
        memory = self._memory(state)
        if self._apart:
            check_outer_states(state, self.outer_optimizer, self.num_tasks)
        return own_of_each(state, memory, self._apart)


def mean(tree: PyTree) -> PyTree:
    """The mean over all tasks."""
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
