"""Follows estimators along a horizon of inner steps, with the hyperparameters held fixed."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import BatchStack, DrawnStack, batch_of_step
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.measured import loss_of
from gradhpo.core.problem import Problem
from gradhpo.core.state import BilevelState, with_inner_state
from gradhpo.core.types import MetricDict
from gradhpo.core.wrapper import algorithm_of, same_wrappers
from gradhpo.diagnostics.cost import Program, on_device
from gradhpo.utils.conversion import as_batch
from gradhpo.utils.freezing import carried
from gradhpo.utils.processes import check_shared
from gradhpo.utils.settings import check_tunes
from gradhpo.utils.validation import batches_explained, check_single_batch


@dataclasses.dataclass(frozen=True)
class Case:
    """The start, the data and the horizon: everything that all estimators share.

    Programs are functions of `(optimizer, start, train_batch, val_batch, ...)`; `start` is the
    state of the optimizer at the start of an episode.
    """

    state: BilevelState
    train_batch: PyTree
    val_batch: PyTree
    losses: LossFunctions
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
                f"train_batch is a list of {len(train_batch)}: for one batch per inner step write "
                "gradhpo.BatchStack.of(train_batch); a single batch of several arrays is a tuple"
            )
        check_single_batch(train_batch, "train_batch")
        check_single_batch(val_batch, "val_batch")
        train, val = as_batch(train_batch, "train_batch"), as_batch(val_batch, "val_batch")
        if isinstance(train_batch, BatchStack):
            num_steps = train_batch.num_steps
        else:
            num_steps = max(optimizer.num_inner_steps for optimizer in optimizers.values())
        for optimizer in optimizers.values():
            check_tunes(optimizer)
        check_horizon(optimizers, num_steps)
        check_shared(state, train_batch=train, val_batch=val)
        train, val = on_device((train, val))
        return cls(state, train, val, losses, num_steps)

    def inputs(
        self, start: BilevelState, train_batch: PyTree, val_batch: PyTree, first: Any = 0
    ) -> Inputs:
        """For use inside a program, starting at inner step `first`."""
        return Inputs(start, drawn(train_batch, first), val_batch, self.losses)

    def start(self, optimizer: BilevelOptimizer) -> BilevelState:
        """The state of another optimizer at the start of this case."""
        return optimizer._adopt(self.state, keep_memory=True)

    def compile(
        self, function: Callable, optimizer: BilevelOptimizer, *more: PyTree, start: Any = None
    ) -> Program:
        start = self.start(optimizer) if start is None else start
        with self._explained():
            return Program(function, optimizer, start, self.train_batch, self.val_batch, *more)

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return batches_explained(train_batch=self.train_batch, val_batch=self.val_batch)

    def estimate(self, optimizer: BilevelOptimizer) -> Program:
        """`at_end`, starting where `run` would start the episode."""
        start = self.begun(optimizer)(self.start(optimizer))
        return self.compile(self.at_end, optimizer, start=start)

    def begun(self, optimizer: BilevelOptimizer) -> Callable[..., BilevelState]:
        """A function of a start, and of other batches of the same kind, that begins the episode."""
        if not optimizer.reads_ahead:  # there is nothing to compile
            return lambda start, *batches: self.begin(optimizer, start, *self._or(batches))
        program = self.compile(self.begin, optimizer)
        return lambda start, *batches: eqx.combine(
            program(optimizer, start, *self._or(batches)), start
        )

    def _or(self, batches: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        return batches or (self.train_batch, self.val_batch)

    def begin(
        self,
        optimizer: BilevelOptimizer,
        start: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
    ) -> BilevelState:
        """What `run` does at the start of an episode with this number of inner steps."""
        start = start.update(step=jnp.zeros_like(start.step))
        inputs = self.inputs(start, train_batch, val_batch)
        return optimizer._begin_episode(inputs, self.num_steps // optimizer.num_inner_steps)

    def at_end(
        self,
        optimizer: BilevelOptimizer,
        start: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
    ) -> tuple[PyTree, Array, MetricDict]:
        """The optimizer's results at the end of the horizon.

        Its hypergradient, the validation loss, and its own metrics (residuals of a solver).
        """
        per_step = optimizer.num_inner_steps
        arrays, static = carried(start)

        def body(carry: PyTree, k: Array):
            state = eqx.combine(carry[0], static)
            inputs = self.inputs(state, train_batch, val_batch, k * per_step)
            estimate = optimizer._solve(inputs)
            # The inner problem continues; nothing is refused.
            state = with_inner_state(state, estimate.z).update(memory=estimate.memory)
            arrays, _ = carried(state)
            # For a population the sum, as in `_outer_loss`.
            val_loss = jnp.sum(loss_of(estimate.val_loss))
            return (arrays, estimate.hypergradient), val_loss

        steps = jnp.arange(self.num_steps // per_step, dtype=jnp.int32)
        (arrays, hypergradient), val_losses = jax.lax.scan(body, (arrays, start.hyperparams), steps)
        end = eqx.combine(arrays, static)
        return hypergradient, val_losses[-1], optimizer._scalars(end.memory)

    def train(self, optimizer: BilevelOptimizer) -> Program:
        """The validation loss after the inner steps of one `step`."""
        along = lambda optimizer, *at: optimizer._outer_loss(self.inputs(*at))
        return self.compile(along, optimizer)

    def seen(self, optimizer: BilevelOptimizer) -> list[bool]:
        """For each leaf of the hyperparameters, whether the optimizer can see it."""
        at = (self.start(optimizer), self.train_batch, self.val_batch)
        with self._explained():
            return optimizer._seen(self.inputs(*at))

    def problem(
        self,
        optimizer: BilevelOptimizer,
        start: BilevelState,
        train_batch: PyTree,
        val_batch: PyTree,
    ) -> Problem:
        """For use inside a program; for an optimizer on one inner problem."""
        inputs = self.inputs(start, train_batch, val_batch)
        with self._explained():
            return algorithm_of(optimizer)._problem(inputs)


def drawn(train_batch: PyTree, first: Any = 0) -> DrawnStack:
    """The batches from inner step `first` on, even if a `step` takes only some of them."""
    return DrawnStack(lambda t: batch_of_step(train_batch, first + t))


def check_optimizers(optimizers: Mapping[str, BilevelOptimizer]) -> BilevelOptimizer:
    """The first of the optimizers, if they can be compared."""
    if not optimizers:
        raise ValueError("optimizers is empty; pass a dict of name to optimizer")
    taken = {"reference", "training alone"} & set(optimizers)
    if taken:
        raise ValueError(f"optimizers has the name {taken.pop()!r}, which the report reserves")
    first = next(iter(optimizers.values()))
    others = [name for name, optimizer in optimizers.items() if not same_wrappers(first, optimizer)]
    if others:
        around = {name: _around(optimizer) for name, optimizer in optimizers.items()}
        raise ValueError(
            f"optimizers are for different numbers of inner problems, {around}: wrap all of them "
            "the same way, or none"
        )
    return first


def check_horizon(optimizers: Mapping[str, BilevelOptimizer], num_steps: int) -> None:
    """Checks that every optimizer takes a whole number of its steps."""
    for name, optimizer in optimizers.items():
        if num_steps % optimizer.num_inner_steps:
            raise ValueError(
                f"the optimizer {name!r} takes {optimizer.num_inner_steps} inner steps per step, "
                f"which do not divide the horizon of {num_steps}: pass a multiple of "
                f"{optimizer.num_inner_steps} (the length of a BatchStack, or num_steps)"
            )


def check_one_problem(name: str, optimizer: BilevelOptimizer) -> None:
    """Refuses several inner problems, for diagnostics that look into one."""
    if optimizer is not algorithm_of(optimizer):
        raise TypeError(
            f"{name}(optimizer={type(optimizer).__name__}(...)) would look at several inner "
            "problems: pass the optimizer that it wraps, with the state and the batches of "
            "one of them"
        )


def _around(optimizer: BilevelOptimizer) -> str:
    """The wrapper around the algorithm, for a message."""
    if optimizer is algorithm_of(optimizer):
        return "one"
    settings = {
        field.name: getattr(optimizer, field.name)
        for field in dataclasses.fields(optimizer)
        if isinstance(getattr(optimizer, field.name), (int, float))
    }
    return f"{type(optimizer).__name__} with {settings}"
