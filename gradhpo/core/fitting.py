"""Estimates from a whole episode on request, outside `run`."""

from collections.abc import Callable

from jaxtyping import PyTree

from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import BatchStack
from gradhpo.core.inputs import Inputs, LossFunctions, both_losses
from gradhpo.core.state import BilevelState
from gradhpo.core.types import LossFn
from gradhpo.utils.conversion import as_batch
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.processes import check_shared
from gradhpo.utils.typecheck import checked


def fit_memory(
    optimizer: BilevelOptimizer,
    state: BilevelState,
    train_batches: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn | LossFunctions,
    val_loss_fn: LossFn | None,
    name: str = "fit_memory",
) -> BilevelState:
    """What `run` does before an episode for an algorithm that reads ahead. Compiled.

    `name` is the public method's, for messages.
    """
    train_batches, val_batch = (
        as_batch(train_batches, "train_batches"),
        as_batch(val_batch, "val_batch"),
    )
    check_shared(state, train_batches=train_batches, val_batch=val_batch)
    losses = both_losses(name, train_loss_fn, val_loss_fn)
    return _fit_memory(state, optimizer, train_batches, val_batch, *losses)


@compiled
@checked
def _fit_memory(
    state: BilevelState,
    optimizer: BilevelOptimizer,
    train_batches: BatchStack,
    val_batch: PyTree,
    train_loss_fn: Callable,
    val_loss_fn: Callable,
) -> BilevelState:
    losses = LossFunctions(train_loss_fn, val_loss_fn)
    return optimizer._fit(Inputs(state, train_batches, val_batch, losses))
