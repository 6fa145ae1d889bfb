"""The compiled programs behind the public methods of an optimizer, and how they are called."""

from collections.abc import Callable
from typing import Any

from jax.core import Tracer
from jaxtyping import Array, Bool, PyTree

from gradhpo.core.inner_state import InnerState
from gradhpo.core.inputs import inputs_of
from gradhpo.core.measured import without_aux
from gradhpo.core.outer_step import OuterStep
from gradhpo.core.state import BilevelState
from gradhpo.core.types import RealScalarLike
from gradhpo.core.vanishing import warn_of_zeros
from gradhpo.utils.conversion import as_batch
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.processes import check_shared
from gradhpo.utils.tracing import count_trace, num_traces, record_trace
from gradhpo.utils.trees import scaled_norm_and_moving
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import refuse_text


def call(
    program: Callable[..., tuple[Any, Array]],
    optimizer: OuterStep,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: Callable,
    val_loss_fn: Callable,
    *more: Any,
) -> Any:
    """The result of a compiled call, after the checks that every call needs.

    A function, not a method: looking up a method makes an Equinox module, in 50 us.
    """
    train_batch = as_batch(train_batch, "train_batch")
    val_batch = as_batch(val_batch, "val_batch")
    check_shared(state, train_batch=train_batch, val_batch=val_batch)
    given = without_aux(state), train_batch, val_batch, train_loss_fn, val_loss_fn
    traces = num_traces()
    try:
        made, moving = program(optimizer, *given, *more)
    except TypeError as error:
        refuse_text(error, train_batch=train_batch, val_batch=val_batch)
        raise
    if num_traces() != traces and not isinstance(moving, Tracer):
        warn_of_zeros(optimizer, inputs_of(*given), moving)
    return made


# Shapes are checked innermost, while tracing, so that a compiled call pays nothing for it.


@compiled
@checked
def step(
    optimizer: OuterStep,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: Callable,
    val_loss_fn: Callable,
    lr_hyper: RealScalarLike | None,
) -> tuple[BilevelState, Bool[Array, "*members leaves"]]:
    """The next state, and which hyperparameters have a hypergradient that is not 0."""
    inputs = inputs_of(state, train_batch, val_batch, train_loss_fn, val_loss_fn)
    record_trace(
        "step", optimizer, state, inputs.losses, train_batch=train_batch, val_batch=val_batch
    )
    made = optimizer._advance(inputs, lr_hyper)
    return made.state, made.moving


@compiled
@checked
def compute_hypergradient(
    optimizer: OuterStep,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: Callable,
    val_loss_fn: Callable,
) -> tuple[PyTree, Bool[Array, " leaves"]]:
    """The hypergradient, and which of its leaves are not 0."""
    count_trace()
    inputs = inputs_of(state, train_batch, val_batch, train_loss_fn, val_loss_fn)
    hypergradient = optimizer._solve(inputs).hypergradient
    return hypergradient, scaled_norm_and_moving(hypergradient)[1]


@compiled
def restart(
    state: BilevelState, optimizer: OuterStep, start: InnerState, reptile_rate: Array
) -> BilevelState:
    """The state at the start of the next episode."""
    return optimizer._restart(state, start, reptile_rate)
