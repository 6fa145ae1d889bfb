r"""Many tasks in parallel with shared hyperparameters: the meta-batch of meta-learning."""

from collections.abc import Callable, Mapping
from typing import Any

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
from gradhpo.core.outer import Estimate
from gradhpo.core.outer_step import OneOuterStep
from gradhpo.core.state import BilevelState, inner_state, with_inner_state, with_memory
from gradhpo.core.types import LossFn, MetricDict
from gradhpo.core.wrapper import Wrapper
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.wrappers.task_batches import per_task
from gradhpo.wrappers.task_memory import TaskMemory, memory_of


@checked
class TaskBatched(OneOuterStep, Wrapper):
    r"""Runs any optimizer on `num_tasks` tasks in parallel, with shared hyperparameters.

    Parameters, inner optimizer state, the optimizer's own memory and all batches have a leading
    task axis; `init` broadcasts the parameters to all tasks. The hypergradient is the mean
    $g = \frac 1N \sum_{i=1}^{N} g_i$ over the $N$ = `num_tasks` tasks, and so are the metrics. At
    the end of an episode ([`run`][gradhpo.run] with `steps_per_episode`), all tasks restart from a
    common point, to which Reptile has moved by the mean of what they have learned.

    **Arguments:**

    - `optimizer`: any other optimizer; its `outer_optimizer` updates the hyperparameters.
    - `num_tasks`: how many tasks, at least 1.

    The state: `params` and `inner_opt_state` have the task axis, `hyperparams` do not;
    `memory.task` numbers the tasks, and `memory.of_each` is the memory of `optimizer`, tasks first
    (`state.get_metric("theta")` finds its entries). Frozen leaves are shared. After a `run` of
    whole episodes all tasks are at the meta-learned point, so you can take any of them:
    `of_task(state, 0).params`, or as a model `of_task(state, 0).model`.

    Batches: every array has the shape `[tasks, ...]`, in a `BatchStack`
    `[inner steps, tasks, ...]`. Leaves without an axis (or in a `BatchStack` with only the axis of
    the steps) are shared, and PRNG keys are folded with the number of the task.

    **Raises:** `ValueError` for `num_tasks < 1` or a `TaskBatched` in a `TaskBatched`; while
    tracing, for an array in a batch without the task axis, or a state of other tasks.

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
    ```

    ??? cite "Reference"

        Reptile: Nichol et al., *On First-Order Meta-Learning Algorithms*, 2018,
        arXiv:1803.02999; with hypergradients as in Lee et al., ICLR 2022, arXiv:2110.02508.
    """

    optimizer: BilevelOptimizer
    num_tasks: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_tasks", self.num_tasks)
        if isinstance(self.optimizer, TaskBatched):
            raise ValueError("TaskBatched(optimizer) got a TaskBatched; one task axis is enough")
        if self.optimizer.num_members is not None:
            name = type(self.optimizer).__name__
            raise ValueError(
                f"TaskBatched(optimizer) got a {name}, whose members have hyperparameters of their "
                f"own: write {name}(TaskBatched(optimizer, num_tasks), num_members)"
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

        Works like [its own method][gradhpo.OnlineHypergradientOptimizer.estimate_theta], on a
        `BatchStack` of `[inner steps, tasks, ...]` arrays.

        **Returns:** the state with a new `memory.of_each.theta`, shape `[tasks]`.

        **Raises:** `TypeError` if it wraps any other optimizer.
        """
        losses = train_loss_fn, val_loss_fn
        return fit_memory(self, state, train_batches, val_batch, *losses, "estimate_theta")

    def of_task(self, state: BilevelState, number: int) -> BilevelState:
        """The state of one task, as the wrapped `optimizer` takes it.

        Its metrics and outer optimizer state are shared by all tasks.

        **Arguments:** `state`: from this optimizer; `number`: of the task, counted from 0.

        **Raises:** `ValueError` for a number without a task, or a state of other tasks.
        """
        memory = memory_of(state.memory, self.num_tasks)
        if not 0 <= number < self.num_tasks:
            raise ValueError(
                f"of_task(number={number}): the {self.num_tasks} tasks are numbered from 0 to "
                f"{self.num_tasks - 1}"
            )
        of_each = inner_state(state), memory.of_each
        return _of_task(state, *jax.tree.map(lambda x: x[number], of_each))

    def finite_part(self, memory: TaskMemory) -> PyTree:
        """As for `optimizer`."""
        return self.optimizer.finite_part(memory.of_each)

    def after_refusal(self, old: TaskMemory, new: TaskMemory) -> TaskMemory:
        """As for `optimizer`: one refused task refuses the step for all."""
        return TaskMemory(old.task, self.optimizer.after_refusal(old.of_each, new.of_each))

    def remarks(
        self, before: MetricDict, metrics: Mapping[str, np.ndarray], copies: int = 1
    ) -> str:
        """As for `optimizer`, over all tasks."""
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

        def of_task(number, examples, key):
            batch = batch_of(number, examples)
            return _own(self.optimizer._init_state(params, hyperparams, model_state, batch, key))

        numbers = jnp.arange(self.num_tasks, dtype=jnp.int32)
        state = self.optimizer._init_state(params, hyperparams, model_state, None, None)
        with jax.debug_nans(False):  # metrics that are not measured yet are NaN
            z, of_each = jax.vmap(of_task)(numbers, examples, keys)
        state = with_inner_state(state, z).update(fresh=True)
        return with_memory(state, TaskMemory(numbers, of_each))

    def _adopt(self, state: BilevelState, *, keep_memory: bool) -> BilevelState:
        memory = memory_of(state.memory, self.num_tasks)
        own = inner_state(state), memory.of_each

        def adopt(z, memory):
            return self.optimizer._adopt(_of_task(state, z, memory), keep_memory=keep_memory)

        z, of_each = jax.vmap(lambda *own: _own(adopt(*own)))(*own)
        of_first = adopt(*jax.tree.map(lambda x: x[0], own))
        adopted = with_inner_state(of_first, z).update(fresh=of_first.fresh)
        return with_memory(adopted, TaskMemory(memory.task, of_each))

    def _solve(self, inputs: Inputs) -> Estimate:
        every: Estimate = self._over_tasks(self.optimizer._solve, inputs)
        return Estimate(
            z=every.z,
            hypergradient=_mean(every.hypergradient),
            train_loss=_mean(every.train_loss),
            val_loss=_mean(every.val_loss),
            memory=TaskMemory(memory_of(inputs.state.memory, self.num_tasks).task, every.memory),
        )

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
        return _mean(self._over_tasks(self.optimizer._outer_loss, inputs))

    def _begin_episode(self, inputs: Inputs, num_steps: int) -> BilevelState:
        begin = lambda inputs: self.optimizer._begin_episode(inputs, num_steps).memory
        return self._with_memories(inputs, begin)

    def _fit(self, inputs: Inputs) -> BilevelState:
        return self._with_memories(inputs, lambda inputs: self.optimizer._fit(inputs).memory)

    def _with_memories(self, inputs: Inputs, function: Callable[[Inputs], Any]) -> BilevelState:
        of_each = self._over_tasks(function, inputs)
        task = memory_of(inputs.state.memory, self.num_tasks).task
        return inputs.state.update(memory=TaskMemory(task, of_each))

    def _restart(
        self, state: BilevelState, start: InnerState, reptile_rate: Float[Array, ""]
    ) -> BilevelState:
        z, memory = inner_state(state), memory_of(state.memory, self.num_tasks)
        averaged = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(_mean(x), x.shape), tree)
        w, start = averaged(z.w), start._replace(w=averaged(start.w))

        def of_task(z, memory, start):
            return _own(self.optimizer._restart(_of_task(state, z, memory), start, reptile_rate))

        z, of_each = jax.vmap(of_task)(z._replace(w=w), memory.of_each, start)
        memory = TaskMemory(memory.task, of_each)
        return with_inner_state(state, z).update(memory=memory, fresh=True)

    def _restart_at(self, state: BilevelState, start: Start) -> BilevelState:
        memory = memory_of(state.memory, self.num_tasks)

        def of_task(number, z, memory):
            at = _of_task(state, z, memory)
            return _own(self.optimizer._restart_at(at, start.of_one(number)))

        z, of_each = jax.vmap(of_task)(memory.task, inner_state(state), memory.of_each)
        memory = TaskMemory(memory.task, of_each)
        return with_inner_state(state, z).update(memory=memory, fresh=True)

    def _inner_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        respond = lambda z, g: self.optimizer._inner_response(_of_task(state, z, None), g)
        return jax.vmap(respond)(inner_state(state), gradient)

    def _function_response(self, state: BilevelState, batch: PyTree) -> tuple[PyTree, bool]:
        batches, batch_of = per_task("train_batch", batch, self.num_tasks)
        moves = []

        def respond(number, z, of_task):
            task = _of_task(state, z, None)
            made, is_move = self.optimizer._function_response(task, batch_of(number, of_task))
            moves.append(is_move)
            return made

        numbers = jnp.arange(self.num_tasks, dtype=jnp.int32)
        return jax.vmap(respond)(numbers, inner_state(state), batches), moves[0]

    def _param_norm(self, w: PyTree) -> Array:
        return _mean(jax.vmap(self.optimizer._param_norm)(w))

    def _scalars(self, memory: TaskMemory) -> MetricDict:
        of_each = memory_of(memory, self.num_tasks).of_each
        return _mean(jax.vmap(self.optimizer._scalars)(of_each)) if jax.tree.leaves(of_each) else {}

    def _over_tasks(self, function: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        """`function` of the inputs of every task, with results stacked."""
        state, memory = inputs.state, memory_of(inputs.state.memory, self.num_tasks)
        train, train_of = per_task("train_batch", inputs.train_batch, self.num_tasks)
        val, val_of = per_task("val_batch", inputs.val_batch, self.num_tasks)

        def of_task(number, z, memory, train, val):
            batches = {"train_batch": train_of(number, train), "val_batch": val_of(number, val)}
            start = None if inputs.start is None else inputs.start.of_one(number)
            return function(inputs.at(_of_task(state, z, memory), start=start, **batches))

        return jax.vmap(of_task)(memory.task, inner_state(state), memory.of_each, train, val)


def _mean(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)


def _own(state: BilevelState) -> tuple[InnerState, Any]:
    return inner_state(state), state.memory


def _of_task(state: BilevelState, z: InnerState, memory: Any) -> BilevelState:
    return with_memory(with_inner_state(state, z).update(fresh=state.fresh), memory)
