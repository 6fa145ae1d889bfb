"""Estimators followed along a horizon of inner steps, the hyperparameters held still."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.algorithms.tasks import TaskBatched
from gradhpo.algorithms.unrolled import UnrolledOptimizer
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.outer import follow
from gradhpo.core.problem import Problem, bind
from gradhpo.core.state import BilevelState
from gradhpo.core.types import (
    BatchStack,
    DrawnStack,
    LossFn,
    LossFunctions,
    MetricDict,
    batch_of_step,
)
from gradhpo.diagnostics.cost import Program, on_device
from gradhpo.utils.validation import check_single_batch, numbers_as_arrays


# What a method that does not work on a problem raises while it is traced, compiled or run.
FAILURES = (TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError)
# Above this many bytes of inner states the exact hypergradient keeps checkpoints instead.
_MOST_BYTES_KEPT = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """Where to start, on what data, and how far: all that is the same for every estimator.

    Programs are functions of `(optimizer, start, train_batch, val_batch, ...)`, `start` being the
    state of the optimizer at the start of an episode.
    """

    state: BilevelState
    train_batch: PyTree
    val_batch: PyTree
    train_loss: LossFn
    val_loss: LossFn
    num_steps: int

    @classmethod
    def create(
        cls,
        state: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
        losses: LossFunctions,
        optimizers: Mapping[str, BilevelOptimizer],
    ) -> "Case":
        """The horizon is the length of a stack, or the inner steps of the longest optimizer."""
        if isinstance(train_batch, list):
            raise TypeError(
                f"train_batch is a list of {len(train_batch)} batches: write BatchStack.of(batches)"
            )
        check_single_batch(train_batch, "train_batch")
        check_single_batch(val_batch, "val_batch")
        if isinstance(train_batch, BatchStack):
            num_steps = train_batch.num_steps
        else:
            num_steps = max(optimizer.num_inner_steps for optimizer in optimizers.values())
        check_horizon(optimizers, num_steps)
        train_batch, val_batch = on_device(numbers_as_arrays((train_batch, val_batch)))
        return cls(state, train_batch, val_batch, losses.train_loss, losses.val_loss, num_steps)

    def compile(
        self, function: Callable, optimizer: BilevelOptimizer, *more: PyTree, start: Any = None
    ) -> Program:
        start = start_of_episode(optimizer, self.state) if start is None else start
        return Program(function, optimizer, start, self.train_batch, self.val_batch, *more)

    def estimate(self, optimizer: BilevelOptimizer) -> Program:
        """`follow`, from where `run` would begin the episode (theta fitted beforehand)."""
        start = start_of_episode(optimizer, self.state)
        if optimizer._reads_ahead:  # else nothing worth a compilation
            start = eqx.combine(self.compile(self.begin, optimizer, start=start)(), start)
        else:
            start = self.begin(optimizer, start, self.train_batch, self.val_batch)
        return self.compile(self.follow, optimizer, start=start)

    def begin(
        self,
        optimizer: BilevelOptimizer,
        start: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
    ) -> BilevelState:
        """What `run` does where an episode of so many inner steps begins."""
        count = self.num_steps // optimizer.num_inner_steps
        return optimizer._begin_episode(
            start, drawn(train_batch), val_batch, self.train_loss, self.val_loss, count
        )

    def follow(
        self,
        optimizer: BilevelOptimizer,
        start: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
    ) -> tuple[PyTree, Array, MetricDict]:
        """What the optimizer has at the end of the horizon.

        Its hypergradient, the validation loss, and its own metrics (residuals of a solver, theta).
        """
        per_step, losses = optimizer.num_inner_steps, (self.train_loss, self.val_loss)
        arrays, static = eqx.partition(start, eqx.is_array)

        def body(carry: PyTree, k: Array):
            state = eqx.combine(carry[0], static)
            batches = drawn(train_batch, k * per_step), val_batch
            estimate = optimizer._solve(state, *batches, *losses)
            arrays = eqx.filter(follow(state, estimate), eqx.is_array)
            return (arrays, estimate.hypergradient), estimate.val_loss

        steps = jnp.arange(self.num_steps // per_step, dtype=jnp.int32)
        (arrays, hypergradient), val_losses = jax.lax.scan(body, (arrays, start.hyperparams), steps)
        end = eqx.combine(arrays, static)
        return hypergradient, val_losses[-1], optimizer._scalars(end.memory)

    def train(self, optimizer: BilevelOptimizer) -> Program:
        """The validation loss after the inner steps of one `step`."""
        losses = (self.train_loss, self.val_loss)
        along = lambda optimizer, start, train_batch, val_batch: optimizer._outer_loss(
            start, drawn(train_batch), val_batch, *losses
        )
        return self.compile(along, optimizer)

    def seen(self, optimizer: BilevelOptimizer) -> list[bool]:
        """For each leaf of the hyperparameters whether the optimizer can see it."""
        start, losses = start_of_episode(optimizer, self.state), (self.train_loss, self.val_loss)
        return optimizer._seen(start, drawn(self.train_batch), self.val_batch, *losses)

    def problem(self, optimizer, start, train_batch, val_batch) -> Problem:
        """For use inside a program; of an optimizer for one inner problem."""
        losses = (self.train_loss, self.val_loss)
        batches = (drawn(train_batch), val_batch)
        return bind(optimizer, start, *batches, *losses, differentiated=False)

    def exact(self, like: Any) -> Any:
        """The exact hypergradient of the horizon, with the inner update of an optimizer."""
        if isinstance(like, TaskBatched):
            return dataclasses.replace(like, optimizer=self.exact(like.optimizer))
        kept = eqx.filter((self.state.params, self.state.inner_opt_state), eqx.is_inexact_array)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
        return UnrolledOptimizer(
            like.inner_optimizer,
            update_fn=like.update_fn,
            unroll_steps=self.num_steps,
            checkpoints="sqrt" if size * self.num_steps > _MOST_BYTES_KEPT else None,
        )


def drawn(train_batch: PyTree, first: Any = 0) -> DrawnStack:
    """The batches from inner step `first` on, also where a `step` takes only some of them."""
    return DrawnStack(lambda t: batch_of_step(train_batch, first + t))


def start_of_episode(optimizer: BilevelOptimizer, state: BilevelState) -> BilevelState:
    """A state of this optimizer with the parameters and the inner optimizer state of `state`.

    What of its memory the state has already (a theta, a distilled batch) is kept.
    """
    one = lambda x: x[0] if eqx.is_inexact_array(x) else x
    tasks = isinstance(optimizer, TaskBatched)
    params = jax.tree.map(one, state.params) if tasks else state.params
    fresh = optimizer._start(params, state.hyperparams, None, None)
    kept = {
        name: state.metadata[name]
        for name, value in fresh.metadata.items()
        if name in state.metadata and _described(state.metadata[name]) == _described(value)
    }
    return fresh.update(
        params=state.params,
        inner_opt_state=state.inner_opt_state,
        metadata=state.metadata | fresh.metadata | kept,
    )


@contextlib.contextmanager
def reference_explained(given: bool) -> Iterator[None]:
    """Says what to pass where the default reference does not exist."""
    try:
        yield
    except FAILURES as error:
        if given:
            raise
        raise ValueError(
            "the default reference, the exact hypergradient, cannot be had here; pass "
            "reference=an optimizer (compare_hypergradients also takes an array: "
            f"gradhpo.finite_difference_hypergradient(...)). {type(error).__name__}: {error}"
        ) from error


def check_optimizers(optimizers: Mapping[str, BilevelOptimizer]) -> BilevelOptimizer:
    """The first of them, if they can be compared."""
    if not optimizers:
        raise ValueError("optimizers is empty; pass a dict of name to optimizer")
    taken = {"reference", "training alone"} & set(optimizers)
    if taken:
        raise ValueError(f"optimizers has the name {taken.pop()!r}, which a report needs itself")
    tasks = {
        name: optimizer.num_tasks if isinstance(optimizer, TaskBatched) else None
        for name, optimizer in optimizers.items()
    }
    if len(set(tasks.values())) > 1:
        raise ValueError(
            f"optimizers have different numbers of tasks, {tasks}: wrap all of them in "
            "TaskBatched(optimizer, num_tasks), or none"
        )
    return next(iter(optimizers.values()))


def check_horizon(optimizers: Mapping[str, BilevelOptimizer], num_steps: int) -> None:
    """Every optimizer takes a whole number of its steps."""
    for name, optimizer in optimizers.items():
        if num_steps % optimizer.num_inner_steps:
            raise ValueError(
                f"the optimizer {name!r} takes {optimizer.num_inner_steps} inner steps per step, "
                f"which do not divide the horizon of {num_steps}: pass a multiple of "
                f"{optimizer.num_inner_steps} (the length of a BatchStack, or num_steps)"
            )


def check_one_problem(name: str, optimizer: BilevelOptimizer) -> None:
    """Some diagnostics look into one inner problem."""
    if isinstance(optimizer, TaskBatched):
        raise TypeError(
            f"{name}(optimizer=TaskBatched(...)) would look into {optimizer.num_tasks} inner "
            "problems at once: pass the optimizer that it wraps, with the state and the batches of "
            "one task"
        )


def _described(tree: PyTree) -> Any:
    arrays = eqx.filter(tree, eqx.is_array)
    return jax.tree.structure(arrays), [(x.shape, x.dtype) for x in jax.tree.leaves(arrays)]
