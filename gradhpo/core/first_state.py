"""The state at step 0, from what a user passes to `init`."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from gradhpo.core.batches import BatchStack
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.measured import aux_of, not_measured
from gradhpo.core.outer_step import OuterStep
from gradhpo.core.partition import check_disjoint
from gradhpo.core.state import BilevelState
from gradhpo.utils.conversion import as_batch
from gradhpo.utils.placement import beside
from gradhpo.utils.validation import (
    check_has_model_state,
    check_single_batch,
    native,
    prepare_hyperparams,
    prepare_model_state,
    prepare_params,
    strong,
)


def first_state(
    optimizer: OuterStep,
    make: Callable[..., BilevelState],
    params: PyTree,
    hyperparams: PyTree,
    model_state: PyTree,
    batch: PyTree,
    key: Array | None,
    losses: LossFunctions | None,
    val_batch: PyTree,
) -> BilevelState:
    """Checks and converts the arguments of `init`; `make` is the optimizer's `_init_state`."""
    check_single_batch(batch, "init(batch=...)")
    if isinstance(batch, BatchStack):
        raise TypeError("init(batch=...) is a BatchStack; pass one batch of it, stack.at(0)")
    params, hyperparams = jax.tree.map(native, (params, hyperparams))
    check_disjoint(params, hyperparams)
    check_has_model_state(params, model_state)
    params, hyperparams = prepare_params(params), prepare_hyperparams(hyperparams)
    model_state = prepare_model_state(model_state)
    batch = as_batch(batch, "init(batch=...)")
    batch = jax.tree.map(lambda x: strong(x) if eqx.is_array_like(x) else x, batch)
    state = make(params, hyperparams, model_state, batch, key)
    state = beside(state, state)
    if losses is None:
        return state
    inputs = Inputs(state, batch, as_batch(val_batch, "init(val_batch=...)"), losses)
    found = eqx.filter_eval_shape(lambda inputs: optimizer._solve(inputs), inputs)
    return not_measured(state, aux_of(found.train_loss, found.val_loss))
