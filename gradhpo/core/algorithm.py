"""An optimizer of one inner problem: what all algorithms share on top of `BilevelOptimizer`."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.inner import Carry
from gradhpo.core.inner_optimizer import init_inner_state
from gradhpo.core.outer import Estimate
from gradhpo.core.problem import Problem, Sees, bind, init_outer_state, seen_by
from gradhpo.core.state import BilevelState, Memory
from gradhpo.core.types import InnerOptimizer, MetricDict, UpdateFn
from gradhpo.utils.gradients import tree_l2_norm, tree_lerp
from gradhpo.utils.settings import check_inner_rule
from gradhpo.utils.tracing import differentiation_explained


class Algorithm(BilevelOptimizer):
    """An algorithm supplies its memory and one method, `_estimate`.

    The memory is a dict that lives in `state.metadata`: made by `_init_memory`, renewed by
    `_restart_memory` at the start of an episode and by `_prepare` when the batches of that
    episode are known, advanced by `_estimate`.
    """

    inner_optimizer: eqx.AbstractVar[InnerOptimizer | None]
    outer_optimizer: eqx.AbstractVar[optax.GradientTransformation | None]
    update_fn: eqx.AbstractVar[UpdateFn | None]

    def __check_init__(self):
        check_inner_rule(type(self).__name__, self.inner_optimizer, self.update_fn)

    @property
    @abc.abstractmethod
    def _sees(self) -> Sees:
        """Where this method finds the hyperparameters."""

    @abc.abstractmethod
    def _init_memory(
        self, z: Carry, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> Memory:
        """The memory at step 0."""

    @abc.abstractmethod
    def _restart_memory(self, memory: Memory, w: PyTree) -> Memory:
        """What changes in it at the start of an episode from parameters `w`."""

    @abc.abstractmethod
    def _prepare(self, problem: Problem, memory: Memory, step: Array, num_steps: int) -> Memory:
        """What changes in it for an episode of `num_steps` steps; `step` counts those before."""

    @abc.abstractmethod
    def _estimate(self, problem: Problem, memory: Memory) -> Estimate:
        """Advances `z` by `num_inner_steps` and estimates the hypergradient at the end."""

    def _start(self, params, hyperparams, batch, key) -> BilevelState:
        w = eqx.filter(params, eqx.is_inexact_array)
        s = init_inner_state(self.inner_optimizer, w, hyperparams)
        state = BilevelState.create(
            params=params,
            hyperparams=hyperparams,
            inner_opt_state=s,
            outer_opt_state=init_outer_state(self.outer_optimizer, hyperparams),
        )
        return state.update(metadata=self._init_memory((w, s), hyperparams, batch, key))

    def _solve(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn) -> Estimate:
        problem = bind(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn)
        with differentiation_explained(type(self).__name__):
            return self._estimate(problem, state.memory)

    def _seen(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn) -> list[bool]:
        arguments = (state, train_batch, val_batch, train_loss_fn, val_loss_fn)
        return seen_by(self._sees, bind(self, *arguments, differentiated=False))

    def _outer_loss(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn) -> Array:
        phi, validation, z, hyperparams = bind(
            self, state, train_batch, val_batch, train_loss_fn, val_loss_fn, differentiated=False
        )
        (w, _), _, _ = phi.rollout(z, hyperparams, 0, self.num_inner_steps)
        return validation.loss(w, hyperparams)

    def _begin_episode(
        self, state, train_batch, val_batch, train_loss_fn, val_loss_fn, num_steps
    ) -> BilevelState:
        begins = state.step % num_steps == 0
        # Also here, and not only where the last episode ended: there may have been steps between.
        new = self._restart_memory(state.memory, state.params)
        old = {name: state.metadata[name] for name in new}
        begun = jax.tree.map(lambda x, y: jnp.where(begins, x, y), new, old)
        state = state.update(metadata=begun)
        if not self._reads_ahead:
            return state
        problem = bind(
            self, state, train_batch, val_batch, train_loss_fn, val_loss_fn,
            num_steps=num_steps * self.num_inner_steps,
        )  # fmt: skip
        return state.update(metadata=self._prepare(problem, state.memory, state.step, num_steps))

    def _restart(self, state, start, reptile_rate) -> BilevelState:
        w, frozen = eqx.partition(state.params, eqx.is_inexact_array)
        w = tree_lerp(start, w, reptile_rate)
        return state.update(
            params=eqx.combine(w, frozen),
            inner_opt_state=init_inner_state(self.inner_optimizer, w, state.hyperparams),
            metadata=self._restart_memory(state.memory, w),
        )

    def _param_norm(self, w) -> Array:
        return tree_l2_norm(w)

    def _scalars(self, memory) -> MetricDict:
        is_metric = lambda x: eqx.is_inexact_array(x) and x.shape == ()
        return {name: value for name, value in memory.items() if is_metric(value)}


class StepByStep(Algorithm):
    """An algorithm that learns nothing from an episode before it is run."""

    @property
    def _reads_ahead(self) -> bool:
        return False

    def _prepare(self, problem, memory, step, num_steps) -> Memory:
        return {}


class Memoryless(StepByStep):
    """An algorithm that carries nothing of its own from step to step."""

    def _init_memory(self, z, hyperparams, batch, key) -> Memory:
        return {}

    def _restart_memory(self, memory, w) -> Memory:
        return {}

    def _remarks(self, before, metrics, num_tasks=1) -> str:
        return ""
