r"""Many tasks in parallel with shared hyperparameters: the meta-batch of meta-learning."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import BatchStack
from gradhpo.core.fitting import fit_memory
from gradhpo.core.inner_state import InnerState, Start
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.outer import (
    Estimate,
    averaged_outer_response,
    averaged_update,
    outer_response,
)
from gradhpo.core.outer_step import Advance, advanced, attempted
from gradhpo.core.refusal import Attempt
from gradhpo.core.state import BilevelState
from gradhpo.core.types import LossFn, MetricDict, RealScalarLike
from gradhpo.utils.freezing import trained
from gradhpo.utils.settings import check_count
from gradhpo.utils.trees import tree_lerp
from gradhpo.utils.typecheck import checked
from gradhpo.wrappers.task_batches import per_task
from gradhpo.wrappers.task_memory import TaskMemory, memory_of
from gradhpo.wrappers.task_problems import TaskProblems, mean
from gradhpo.wrappers.task_restarts import next_restarted, restarting, side_by_side
from gradhpo.wrappers.task_states import (
    own_of_each,
    own_of_one,
    state_of_all,
    state_of_one,
)


@checked
class TaskBatched(TaskProblems):
    r"""Runs any optimizer on `num_tasks` tasks in parallel, with shared hyperparameters.

    Parameters, inner optimizer state, the optimizer's own memory and all batches have a leading
    task axis; `init` broadcasts the parameters to all tasks. The hypergradient is the mean
    $g = \frac 1N \sum_{i=1}^{N} g_i$ over the $N$ = `num_tasks` tasks, and so are the metrics. At
    the end of an episode ([`run`][gradhpo.run] with `steps_per_episode`), all tasks restart from a
    common point, to which Reptile has moved by the mean of what they have learned.

    **Arguments:**

    - `optimizer`: any other optimizer; its `outer_optimizer` updates the hyperparameters.
    - `num_tasks`: how many tasks, at least 1.
    - `average`: what is averaged over the tasks. `"hypergradients"`, the default: one update by
        their mean. `"updates"`: every task has its own outer optimizer state, which turns $g_i$
        into an update $u_i$, and the hyperparameters move by the mean,
        $\lambda \leftarrow \lambda + \frac 1N \sum_i u_i$. With an outer Adam, all tasks then have
        the same weight, and the variance of a step falls with $N$. It costs N outer states. If
        $u_i$ is linear in $g_i$ (SGD, `lr_hyper`), both are the same.
    - `restart_every`: after every `restart_every` outer steps one task restarts, each in turn:
        after step $s$ (`state.step`), refused or not, task
        $(s/\mathtt{restart\_every} - 1) \bmod N$. So there are models of every age, up to
        `num_tasks * restart_every` steps. The task starts again from the parameters that `init` was
        given, or from which all tasks last restarted together
        ([`restart`][gradhpo.BilevelOptimizer.restart], episodes of `run`). With a `start_fn`, `run`
        makes new ones; `steps_per_episode=num_steps` then leaves no other restarts. Inner optimizer
        state, model state and the memory of the episode are reset; metrics and outer optimizer
        state stay. Default `None`: no task restarts alone.

    The state: `params` and `inner_opt_state` have the task axis, `hyperparams` do not;
    `memory.task` numbers the tasks, and `memory.of_each` is the memory of `optimizer`, tasks first
    (`state.get_metric("theta")` finds its entries). `outer_opt_state` has the axis if updates are
    averaged. Frozen leaves are shared. One non-finite task refuses the step for all. After a `run`
    of whole episodes all tasks are at the meta-learned point, so you can take any of them:
    `of_task(state, 0).params`, or as a model `of_task(state, 0).model`.

    Batches: every array has the shape `[tasks, ...]`, in a `BatchStack`
    `[inner steps, tasks, ...]`. Leaves without an axis (or in a `BatchStack` with only the axis of
    the steps) are shared, and PRNG keys are folded with the number of the task.

    **Raises:** `TypeError` for another `average`; `ValueError` for `num_tasks < 1`,
    `restart_every < 1` or a `TaskBatched` in a `TaskBatched`; while tracing, for an array in a
    batch without the task axis, or a state of other tasks, or made with another `average` or
    without `restart_every` ([`adopt`][gradhpo.BilevelOptimizer.adopt] takes over the former).

    ```python
    loss = lambda w, h, batch: jnp.mean((w * batch[0] + h - batch[1]) ** 2)
    optimizer = gradhpo.TaskBatched(
        gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.adam(0.1)), num_tasks=4
    )
    state = optimizer.init(jnp.ones(()), jnp.zeros(()))
    x, y = jnp.ones((4, 10)), jnp.zeros((4, 10))  # ten examples for each of four tasks
    state = optimizer.step(state, (x, y), (x, y), loss, loss)
    assert state.params.shape == (4,) and state.hyperparams.shape == ()
    assert optimizer.of_task(state, 3).params.shape == ()

    steadier = gradhpo.TaskBatched(
        optimizer.optimizer, num_tasks=4, average="updates", restart_every=10
    )
    state = steadier.init(jnp.ones(()), jnp.zeros(()))
    for _ in range(10):
        state = steadier.step(state, (x, y), (x, y), loss, loss)
    assert state.outer_opt_state[0].mu.shape == (4,)
    assert state.params[0] == 1 != state.params[1]  # task 0 has just restarted
    ```

    ??? cite "Reference"

        Reptile: Nichol et al., *On First-Order Meta-Learning Algorithms*, 2018,
        arXiv:1803.02999; with hypergradients as in Lee et al., ICLR 2022, arXiv:2110.02508.
        Averaged updates and restarts in turn: Calian et al., *DataRater: Meta-Learned Dataset
        Curation*, 2025, arXiv:2505.17895.
    """

    optimizer: BilevelOptimizer
    num_tasks: int = eqx.field(static=True)
    average: Literal["hypergradients", "updates"] = eqx.field(static=True, default="hypergradients")
    restart_every: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_count("num_tasks", self.num_tasks)
        if self.restart_every is not None:
            check_count("restart_every", self.restart_every)
        if isinstance(self.optimizer, TaskBatched):
            raise ValueError("TaskBatched(optimizer) got a TaskBatched; one task axis is enough")
        if self.optimizer.num_members is not None:
            name = type(self.optimizer).__name__
            raise ValueError(
                f"TaskBatched(optimizer) got a {name}, whose members have their own "
                f"hyperparameters: write {name}(TaskBatched(optimizer, num_tasks), num_members)"
            )

    def estimate_theta(
        self,
        state: BilevelState,
        train_batches: BatchStack,
        val_batch: PyTree,
        train_loss_fn: LossFn | LossFunctions,
        val_loss_fn: LossFn | None = None,
    ) -> BilevelState:
        """Fits the coefficient of every task of a wrapped `OnlineHypergradientOptimizer`.

        Calls [its own method][gradhpo.OnlineHypergradientOptimizer.estimate_theta] for every task.

        **Arguments:**

        - `state`, `train_batches`: where training starts, and a [`BatchStack`][gradhpo.BatchStack]
            of `[inner steps, tasks, ...]` arrays.
        - `val_batch`: any pytree of arrays `[tasks, ...]`.
        - `train_loss_fn`, `val_loss_fn`: `(params, hyperparams, batch) -> scalar`, or one
            [`LossFunctions`][gradhpo.LossFunctions] in place of both.

        **Returns:** the state with a new `memory.of_each.theta`, shape `[tasks]`.

        **Raises:** `TypeError` if it wraps any other optimizer, `train_batches` is not a
        `BatchStack`, or a loss has other arguments or outputs; `ValueError` for a loss that is not
        a real scalar, or a state of another optimizer.
        """
        losses = train_loss_fn, val_loss_fn
        return fit_memory(self, state, train_batches, val_batch, *losses, "estimate_theta")

    def of_task(self, state: BilevelState, number: int) -> BilevelState:
        """The state of one task, as the wrapped `optimizer` takes it.

        Its metrics are shared by all tasks, and so is its outer optimizer state unless updates are
        averaged.

        **Arguments:** `state`: from this optimizer; `number`: of the task, counted from 0.

        **Raises:** `ValueError` for a number without a task, or a state of other tasks.
        """
        each = self._own_of_each(state)
        if not 0 <= number < self.num_tasks:
            raise ValueError(
                f"of_task(number={number}): the {self.num_tasks} tasks are numbered from 0 to "
                f"{self.num_tasks - 1}"
            )
        return state_of_one(state, jax.tree.map(lambda x: x[number], each))

    def finite_part(self, memory: TaskMemory) -> PyTree:
        """The finite part of every task's memory."""
        return self.optimizer.finite_part(memory.of_each)

    def after_refusal(self, old: TaskMemory, new: TaskMemory) -> TaskMemory:
        """The memories that `optimizer` keeps: one refused task refuses the step for all."""
        select = jax.vmap(self.optimizer.after_refusal, axis_size=self.num_tasks)
        return dataclasses.replace(old, of_each=select(old.of_each, new.of_each))

    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """The remarks of `optimizer`, over all tasks."""
        return self.optimizer.remarks(before, metrics, copies * self.num_tasks)

    def _init_state(
        self,
        params: PyTree,
        hyperparams: PyTree,
        model_state: PyTree,
        batch: PyTree,
        key: Array | None,
    ) -> BilevelState:
        keys = None if key is None else jax.random.split(key, self.num_tasks)
        examples, batch_of = per_task("init(batch=...)", batch, self.num_tasks)

        def own(number, examples, key):
            batch = batch_of(number, examples)
            state = self.optimizer._init_state(params, hyperparams, model_state, batch, key)
            return own_of_one(state, self._apart)

        numbers = jnp.arange(self.num_tasks, dtype=jnp.int32)
        state = self.optimizer._init_state(params, hyperparams, model_state, None, None)
        with jax.debug_nans(False):  # metrics that are not measured yet are NaN
            each = jax.vmap(own)(numbers, examples, keys)
        memory = TaskMemory(numbers, each.memory)
        if self.restart_every is not None:
            memory = restarting(memory, InnerState(trained(params), r=model_state))
        return state_of_all(state, each, memory)

    def _adopt(self, state: BilevelState, *, keep_memory: bool) -> BilevelState:
        memory = memory_of(state.memory, self.num_tasks, self.restart_every is not None)
        each = own_of_each(state, memory, apart=False)._replace(restarted_at=None)
        adopt = lambda own: self.optimizer._adopt(state_of_one(state, own), keep_memory=keep_memory)
        new = jax.vmap(lambda own: own_of_one(adopt(own), self._apart))(each)
        of_first = adopt(jax.tree.map(lambda x: x[0], each))
        if self.restart_every is None:
            memory = TaskMemory(memory.task, memory.of_each)
        return state_of_all(of_first, new, memory if keep_memory else side_by_side(memory))

    def _attempt(self, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Attempt:
        if not (self._apart and self.tunes) or lr_hyper is not None:
            return attempted(self, inputs, lr_hyper)
        every = self._over_tasks(self.optimizer._solve, inputs)
        new = averaged_update(self.outer_optimizer, inputs.state, every.hypergradient)
        return Attempt(self._estimate(every, inputs.state), *new)

    def _advance(self, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Advance:
        made = advanced(self, inputs.state, self._attempt(inputs, lr_hyper))
        if self.restart_every is None:
            return made
        own, every = self._own_of_each(made.state), self.restart_every
        state = next_restarted(self.optimizer, made.state, own, inputs.start, every)
        return made._replace(state=state)

    def _outer_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        if not self._apart:
            return outer_response(self.outer_optimizer, state, gradient)
        return averaged_outer_response(self.outer_optimizer, state, gradient, None)

    def _solve(self, inputs: Inputs) -> Estimate:
        return self._estimate(self._over_tasks(self.optimizer._solve, inputs), inputs.state)

    def _estimate(self, every: Estimate, state: BilevelState) -> Estimate:
        """The estimate of all tasks from the estimates of each."""
        memory = dataclasses.replace(self._memory(state), of_each=every.memory)
        return Estimate(
            z=every.z,
            hypergradient=mean(every.hypergradient),
            train_loss=mean(every.train_loss),
            val_loss=mean(every.val_loss),
            memory=side_by_side(memory),
        )

    def _restart(
        self, state: BilevelState, start: InnerState, reptile_rate: Float[Array, ""]
    ) -> BilevelState:
        each, lead = self._own_of_each(state), (self.num_tasks,)
        of_all_tasks = lambda tree: jax.tree.map(
            lambda x: jnp.broadcast_to(x, lead + x.shape), tree
        )
        old, w = mean((start.w, each.z.w))
        each = each._replace(z=each.z._replace(w=of_all_tasks(w)))

        def restart(own, start):
            new = self.optimizer._restart(state_of_one(state, own), start, reptile_rate)
            return own_of_one(new, apart=False)

        each = jax.vmap(restart)(each, start._replace(w=of_all_tasks(old)))
        memory = side_by_side(self._memory(state), tree_lerp(old, w, reptile_rate))
        return state_of_all(state, each, memory).update(fresh=True)

    def _restart_at(self, state: BilevelState, start: Start) -> BilevelState:
        memory = self._memory(state)

        def restart(number, own):
            new = self.optimizer._restart_at(state_of_one(state, own), start.of_one(number))
            return own_of_one(new, apart=False)

        each = jax.vmap(restart)(memory.task, self._own_of_each(state))
        return state_of_all(state, each, side_by_side(memory)).update(fresh=True)
