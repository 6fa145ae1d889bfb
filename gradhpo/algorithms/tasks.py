r"""Many tasks at once with hyperparameters in common: the meta-batch of meta-learning."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from gradhpo.algorithms.online import OnlineHypergradientOptimizer, compiled_estimate
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.outer import Estimate
from gradhpo.core.state import METRICS, BilevelState, Memory
from gradhpo.core.types import BatchStack, DrawnStack, LossFn, MetricDict
from gradhpo.utils.keys import fold_keys
from gradhpo.utils.settings import check_count
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_task_axis, check_tasks


@checked
class TaskBatched(BilevelOptimizer):
    r"""Runs any optimizer on `num_tasks` tasks side by side, with shared hyperparameters.

    Parameters, inner optimizer state, the optimizer's own memory and all batches carry a
    leading task axis; `init` broadcasts the parameters to all tasks. The hypergradient is the
    mean $g = \frac 1N \sum_{i=1}^{N} g_i$ over the $N$ = `num_tasks` tasks, as are the metrics.
    Where an episode ends ([`run`][gradhpo.run] with `steps_per_episode`), all tasks start again
    from one point, to which Reptile has moved by the mean of what they have learned.

    **Arguments:**

    - `optimizer`: any other optimizer; its `outer_optimizer` moves the hyperparameters.
    - `num_tasks`: how many tasks, at least 1.

    The state: `params` and `inner_opt_state` have the task axis, `hyperparams` do not, and
    `metadata["task"]` numbers the tasks. After a `run` of whole episodes all tasks are at the
    point that was meta-learned, so that any of them is it:
    `jax.tree.map(lambda x: x[0], eqx.filter(state.params, eqx.is_inexact_array))`.

    Batches: every array has the shape `[tasks, ...]`, in a `BatchStack`
    `[inner steps, tasks, ...]`. What has no axis (or in a `BatchStack` only that of the
    steps) is shared, PRNG keys folded with the number of the task.

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

    @property
    def outer_optimizer(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> optax.GradientTransformation | None:
        """That of the wrapped optimizer."""
        return self.optimizer.outer_optimizer

    @property
    def num_inner_steps(self) -> int:
        """Inner steps per `step`, of every task: those of `optimizer`."""
        return self.optimizer.num_inner_steps

    @property
    def _reads_ahead(self) -> bool:
        return self.optimizer._reads_ahead

    def estimate_theta(
        self,
        state: BilevelState,
        train_batches: BatchStack,
        val_batch: PyTree,
        train_loss_fn: LossFn,
        val_loss_fn: LossFn,
    ) -> BilevelState:
        """Fits the coefficient of every task of a wrapped `OnlineHypergradientOptimizer`.

        As [its own][gradhpo.OnlineHypergradientOptimizer.estimate_theta], on a
        `BatchStack` of `[inner steps, tasks, ...]` arrays.

        **Returns:** the state with a new `metadata["theta"]`, shape `[tasks]`.

        **Raises:** `TypeError` around any other optimizer.
        """
        if not isinstance(self.optimizer, OnlineHypergradientOptimizer):
            raise TypeError(
                f"TaskBatched(optimizer) has a {type(self.optimizer).__name__}, which has no theta "
                "to estimate; OnlineHypergradientOptimizer has"
            )
        return compiled_estimate(self, state, train_batches, val_batch, train_loss_fn, val_loss_fn)

    def _with_theta(
        self, state, train_batches, val_batch, train_loss_fn, val_loss_fn
    ) -> BilevelState:
        single: Any = self.optimizer
        losses = (train_loss_fn, val_loss_fn)
        fit = lambda state, train, val: _own(single._with_theta(state, train, val, *losses))
        return _with(state, self._over_tasks(fit, state, train_batches, val_batch))

    def _start(self, params, hyperparams, batch, key) -> BilevelState:
        keys = None if key is None else jax.random.split(key, self.num_tasks)
        examples, batch_of = self._per_task("init(batch=...)", batch)

        def of_task(number, examples, key):
            batch = batch_of(number, examples)
            return _own(self.optimizer._start(params, hyperparams, batch, key))

        numbers = jnp.arange(self.num_tasks, dtype=jnp.int32)
        state = self.optimizer._start(params, hyperparams, None, None)
        state = _with(state, jax.vmap(of_task)(numbers, examples, keys))
        return state.update(metadata={"task": numbers})

    def _solve(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn) -> Estimate:
        losses = (train_loss_fn, val_loss_fn)
        solve = lambda state, train, val: self.optimizer._solve(state, train, val, *losses)
        every = self._over_tasks(solve, state, train_batch, val_batch)
        return Estimate(
            z=every.z,
            memory=every.memory,
            examples=every.examples,
            metrics=every.metrics,
            hypergradient=_mean(every.hypergradient),
            train_loss=_mean(every.train_loss),
            val_loss=_mean(every.val_loss),
        )

    def _seen(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn) -> list[bool]:
        losses, seen = (train_loss_fn, val_loss_fn), []

        def look(state, train, val):
            seen[:] = self.optimizer._seen(state, train, val, *losses)
            return ()

        self._over_tasks(look, state, train_batch, val_batch)  # traced once for all tasks
        return seen

    def _outer_loss(self, state, train_batch, val_batch, train_loss_fn, val_loss_fn) -> Array:
        losses = (train_loss_fn, val_loss_fn)
        loss = lambda state, train, val: self.optimizer._outer_loss(state, train, val, *losses)
        return _mean(self._over_tasks(loss, state, train_batch, val_batch))

    def _begin_episode(
        self, state, train_batch, val_batch, train_loss_fn, val_loss_fn, num_steps
    ) -> BilevelState:
        losses = (train_loss_fn, val_loss_fn)
        begin = lambda state, train, val: _own(
            self.optimizer._begin_episode(state, train, val, *losses, num_steps)
        )
        return _with(state, self._over_tasks(begin, state, train_batch, val_batch))

    def _restart(self, state, start, reptile_rate) -> BilevelState:
        w, s, memory = self._mapped(state)
        together, start = jax.tree.map(lambda x: jnp.broadcast_to(_mean(x), x.shape), (w, start))

        def of_task(own, start):
            state_of_task = _with(_without_memory(state), own)
            return _own(self.optimizer._restart(state_of_task, start, reptile_rate))

        return _with(state, jax.vmap(of_task)((together, s, memory), start))

    def _param_norm(self, w) -> Array:
        return _mean(jax.vmap(self.optimizer._param_norm)(w))

    def _scalars(self, memory) -> MetricDict:
        memory = self._of_tasks(memory)
        return _mean(jax.vmap(self.optimizer._scalars)(memory)) if memory else {}

    def _remarks(self, before, metrics, num_tasks=1) -> str:
        return self.optimizer._remarks(before, metrics, self.num_tasks)

    def _over_tasks(
        self, function: Callable, state: BilevelState, train_batch: PyTree, val_batch: PyTree
    ) -> Any:
        """`function(state, train_batch, val_batch)` of every task, results stacked."""
        train, train_of = self._per_task("train_batch", train_batch)
        val, val_of = self._per_task("val_batch", val_batch)

        def of_task(number, own, train, val):
            state_of_task = _with(_without_memory(state), own)
            return function(state_of_task, train_of(number, train), val_of(number, val))

        numbers = state.metadata.get("task")
        check_tasks(None if numbers is None else numbers.shape, self.num_tasks)
        return jax.vmap(of_task)(numbers, self._mapped(state), train, val)

    def _mapped(self, state: BilevelState) -> "_Own":
        """What each task has of its own, tasks first."""
        w, s, memory = _own(state)
        return w, s, self._of_tasks(memory)

    def _of_tasks(self, memory: Memory) -> Memory:
        """Without what users have put into `metadata` themselves."""
        has_axis = lambda x: eqx.is_array(x) and x.shape[:1] == (self.num_tasks,)
        return {k: v for k, v in memory.items() if all(map(has_axis, jax.tree.leaves(v)))}

    def _per_task(self, name: str, batch: PyTree) -> tuple[PyTree, Callable[[Array, PyTree], Any]]:
        """What of a batch to map over (tasks first), and how to make a task's batch of its part."""
        if isinstance(batch, DrawnStack):

            def drawn_for(number, nothing):
                def draw(t):
                    arrays, batch_of = self._per_task(name, batch.draw(t))
                    return batch_of(number, jax.tree.map(lambda x: x[number], arrays))

                return dataclasses.replace(batch, draw=draw)

            return None, drawn_for
        if isinstance(batch, BatchStack):
            arrays, shared = eqx.partition(batch.batches, lambda x: np.ndim(x) > 1)
            check_task_axis(arrays, name, self.num_tasks, axis=1)
            rebuild = lambda number, of_task: BatchStack(
                eqx.combine(of_task, fold_keys(shared, number))
            )
            return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays), rebuild
        arrays, shared = eqx.partition(batch, lambda x: eqx.is_array(x) and x.ndim > 0)
        check_task_axis(arrays, name, self.num_tasks, axis=0)
        return arrays, lambda number, of_task: eqx.combine(of_task, fold_keys(shared, number))


def _mean(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)


_Own: TypeAlias = tuple[PyTree, PyTree, Memory]  # parameters, inner optimizer state, memory


def _own(state: BilevelState) -> _Own:
    return eqx.filter(state.params, eqx.is_inexact_array), state.inner_opt_state, state.memory


def _without_memory(state: BilevelState) -> BilevelState:
    return dataclasses.replace(state, metadata={name: state.metadata[name] for name in METRICS})


def _with(state: BilevelState, own: _Own) -> BilevelState:
    w, inner_opt_state, memory = own
    return state.update(
        params=eqx.combine(w, state.params), inner_opt_state=inner_opt_state, metadata=memory
    )
