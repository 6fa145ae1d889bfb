"""What a population does for each of its members."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradhpo.core.inner_state import InnerState, Start
from gradhpo.core.inputs import Inputs
from gradhpo.core.outer import Estimate
from gradhpo.core.refusal import Attempt
from gradhpo.core.state import BilevelState
from gradhpo.core.types import Declared, MetricDict, RealScalarLike
from gradhpo.core.wrapper import Wrapper
from gradhpo.utils.placement import entry
from gradhpo.wrappers.exploiting import copied
from gradhpo.wrappers.members import (
    Member,
    PopulationMemory,
    memory_of,
    numbered,
    part_of,
    with_part,
)


class EachMember(Wrapper):
    """The wrapped optimizer, mapped over members with their own states and hyperparameters."""

    if TYPE_CHECKING:
        num_members = Declared[int]()
    else:
        num_members: eqx.AbstractVar[int]

    def _each(self, function: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        """`function` of the inputs of every member, with results stacked."""
        state, start = inputs.state, inputs.start
        memory = memory_of(state.memory, self.num_members)

        def of_one(own: Member, r: PyTree) -> Any:
            begins = None if start is None else dataclasses.replace(start, r=r)
            return function(dataclasses.replace(inputs.at(with_part(state, own)), start=begins))

        own = part_of(state, memory.of_each)
        return jax.vmap(of_one)(own, None if start is None else start.r)

    def _member(self, state: BilevelState, number: Any) -> BilevelState:
        own = part_of(state, memory_of(state.memory, self.num_members).of_each)
        return with_part(state, jax.tree.map(lambda x: entry(x, number), own))

    def finite_part(self, memory: PopulationMemory) -> PyTree:
        """The finite part of every member's memory."""
        return self.optimizer.finite_part(memory.of_each)

    def after_refusal(self, old: PopulationMemory, new: PopulationMemory) -> PopulationMemory:
        """The memory that `optimizer` keeps for every member."""
        select = jax.vmap(self.optimizer.after_refusal, axis_size=self.num_members)
        return dataclasses.replace(new, of_each=select(old.of_each, new.of_each))

    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """The remarks of `optimizer`, over all members."""
        before = {name: jnp.mean(x) for name, x in before.items()}
        mean = lambda x: np.mean(x, axis=1) if np.ndim(x) == 2 else x
        means = {name: mean(x) for name, x in metrics.items()}
        return self.optimizer.remarks(before, means, copies * self.num_members)

    def _attempt(self, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Attempt:
        attempt = lambda inputs: self.optimizer._attempt(inputs, lr_hyper)
        made: Attempt = self._each(attempt, inputs)
        return made._replace(estimate=self._of_all(made.estimate, inputs))

    def _solve(self, inputs: Inputs) -> Estimate:
        return self._of_all(self._each(self.optimizer._solve, inputs), inputs)

    def _of_all(self, estimate: Estimate, inputs: Inputs) -> Estimate:
        memory = memory_of(inputs.state.memory, self.num_members)
        memory = dataclasses.replace(memory, of_each=estimate.memory)
        return dataclasses.replace(estimate, memory=memory)

    def _restart(
        self, state: BilevelState, start: InnerState, reptile_rate: Float[Array, ""]
    ) -> BilevelState:
        origin = memory_of(state.memory, self.num_members).origin
        restart = lambda state, start: self.optimizer._restart(state, start, reptile_rate)
        return self._restarted(state, restart, copied(start, origin))

    def _restart_at(self, state: BilevelState, start: Start) -> BilevelState:
        restart = lambda state, r: self.optimizer._restart_at(
            state, dataclasses.replace(start, r=r)
        )
        return self._restarted(state, restart, start.r)

    def _restarted(
        self, state: BilevelState, restart: Callable[..., BilevelState], start: PyTree
    ) -> BilevelState:
        memory = memory_of(state.memory, self.num_members)

        def of_one(own: Member, start: PyTree) -> Member:
            new = restart(with_part(state, own), start)
            return part_of(new, new.memory)

        own = jax.vmap(of_one)(part_of(state, memory.of_each), start)
        own_number = numbered(self.num_members)
        memory = dataclasses.replace(memory, origin=own_number, of_each=own.memory)
        return with_part(state, own, memory)

    def _begin_episode(self, inputs: Inputs, num_steps: int) -> BilevelState:
        begin = lambda inputs: self.optimizer._begin_episode(inputs, num_steps).memory
        state = self._with_memories(inputs, begin)
        begins = state.step % num_steps == 0
        origin = jnp.where(begins, numbered(self.num_members), state.memory.origin)
        return state.update(memory=dataclasses.replace(state.memory, origin=origin))

    def _fit(self, inputs: Inputs) -> BilevelState:
        return self._with_memories(inputs, lambda inputs: self.optimizer._fit(inputs).memory)

    def _with_memories(self, inputs: Inputs, function: Callable[[Inputs], Any]) -> BilevelState:
        memory = memory_of(inputs.state.memory, self.num_members)
        of_each = self._each(function, inputs)
        return inputs.state.update(memory=dataclasses.replace(memory, of_each=of_each))

    def _seen(self, inputs: Inputs) -> list[bool]:
        return self._of_any(self.optimizer._seen, inputs)

    def _recomputes(self, inputs: Inputs) -> bool:
        return self._of_any(self.optimizer._recomputes, inputs)

    def _of_any(self, look: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        """What is found while tracing, once for all members."""
        found = []

        def trace(inputs: Inputs) -> tuple[()]:
            found.append(look(inputs))
            return ()

        self._each(trace, inputs)
        return found[0]

    def _outer_loss(self, inputs: Inputs) -> Array:
        """The sum: a member's hyperparameters change its own loss alone."""
        return jnp.sum(self._each(self.optimizer._outer_loss, inputs))

    def _outer_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        own = part_of(state, None)
        respond = lambda own, g: self.optimizer._outer_response(with_part(state, own), g)
        return jax.vmap(respond)(own, gradient)

    def _inner_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        own = part_of(state, None)
        respond = lambda own, g: self.optimizer._inner_response(with_part(state, own), g)
        return jax.vmap(respond)(own, gradient)

    def _function_response(self, state: BilevelState, batch: PyTree) -> tuple[PyTree, bool]:
        moves = []

        def respond(own: Member) -> PyTree:
            member = with_part(state, own)
            made, is_move = self.optimizer._function_response(member, batch)
            moves.append(is_move)
            return made

        return jax.vmap(respond)(part_of(state, None)), moves[0]

    def _param_norm(self, w: PyTree) -> Array:
        return jax.vmap(self.optimizer._param_norm)(w)
