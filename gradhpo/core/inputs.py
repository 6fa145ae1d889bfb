"""The inputs of a step: losses, and the state and batches that they are evaluated on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from gradhpo.core.inner_state import Start
from gradhpo.core.state import BilevelState
from gradhpo.utils.typecheck import checked


@checked
class LossFunctions(eqx.Module):
    r"""The training loss and the validation loss of a bilevel problem.

    $w_T(\lambda)$ is the result of training on $L_{\mathrm{train}}$ for $T$ inner steps.

    **Arguments:**

    - `train_loss`: `(params, hyperparams, batch) -> scalar`, minimised by the inner
        optimizer over the parameters.
    - `val_loss`: `(params, hyperparams, batch) -> scalar`, minimised by the outer
        optimizer over the hyperparameters.

    Either may return `(scalar, metrics)`, where `metrics` is a dict of scalars such as
    `{"accuracy": accuracy}`: they appear in the history, the logs and the state's metadata as
    `train_accuracy` (of the last inner step, before its update) and `val_accuracy` (at $w_T$). They
    affect no derivative. All inner steps compute them: use [`Monitor`][gradhpo.Monitor] for metrics
    that cost more than an accuracy. Wrap the arguments of a function that JAX cannot differentiate
    (a callback) in `jax.lax.stop_gradient`.

    If the state has a `model_state`, both take it as their fourth argument; `train_loss` returns
    `(scalar, new_model_state)` or `(scalar, (new_model_state, metrics))`. A second result with the
    structure of the model state is taken as the model state, so a dict of metrics needs other keys.

    **Raises:** `TypeError` for a loss that is not a function.

    ```python
    losses = gradhpo.LossFunctions(
        train_loss=lambda params, hyperparams, batch: jnp.sum(params**2 * hyperparams),
        val_loss=lambda params, hyperparams, batch: jnp.sum((params - batch) ** 2),
    )
    ```
    """

    train_loss: Callable
    val_loss: Callable


class Inputs(eqx.Module):
    """State, batches and losses of one `step`, passed as one object."""

    state: BilevelState
    train_batch: PyTree
    val_batch: PyTree
    losses: LossFunctions
    start: Start | None = None  # of the episode, if `run` has a start_fn
    repeats: bool = eqx.field(static=True, default=False)  # the next step gets the same batches
    continues: bool = eqx.field(static=True, default=False)  # most steps begin where the last ended

    def at(self, state: BilevelState, **batches: Any) -> "Inputs":
        """The same inputs with another state, and with other batches if given."""
        return dataclasses.replace(self, state=state, **batches)


def inputs_of(
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: Callable,
    val_loss_fn: Callable,
) -> Inputs:
    """The inputs, from the arguments of `step`."""
    return Inputs(state, train_batch, val_batch, LossFunctions(train_loss_fn, val_loss_fn))


def both_losses(call: str, train_loss_fn: Any, val_loss_fn: Any) -> tuple[Any, Any]:
    """The two losses of a call that takes both, or one `LossFunctions` in their place."""
    write = (
        f"write {call}(..., train_loss_fn, val_loss_fn), or "
        f"{call}(..., gradhpo.LossFunctions(train_loss, val_loss))"
    )
    if isinstance(train_loss_fn, LossFunctions):
        if val_loss_fn is not None:
            raise TypeError(
                f"{call} got LossFunctions, which hold both losses, followed by "
                f"{val_loss_fn!r}: {write}; pass later arguments by name, lr_hyper=0.1"
            )
        return train_loss_fn.train_loss, train_loss_fn.val_loss
    if val_loss_fn is None:
        raise TypeError(f"{call} got no val_loss_fn: {write}")
    if isinstance(val_loss_fn, LossFunctions):
        raise TypeError(f"{call} got LossFunctions as val_loss_fn: {write}")
    return train_loss_fn, val_loss_fn
