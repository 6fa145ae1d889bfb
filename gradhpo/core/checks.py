"""Checks of batches and losses while tracing."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
from jax.extend.core import Jaxpr
from jaxtyping import PyTree

from gradhpo.core.batches import BatchStack, DrawnStack
from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_state import InnerState
from gradhpo.core.inputs import Inputs
from gradhpo.core.types import LossFn
from gradhpo.utils.detached import DETACHED
from gradhpo.utils.foreign import NO_DERIVATIVE, STOP_GRADIENT
from gradhpo.utils.keys import looks_like_a_key
from gradhpo.utils.programs import draws_with, inputs_read, readings, stops_a_function_of
from gradhpo.utils.validation import (
    THE_WHOLE_TREE,
    check_arity,
    check_single_batch,
    leaf_names,
)
from gradhpo.utils.warn import place_of, warn_once


def check_stops(phi: InnerUpdate, of_training: Jaxpr, z: InnerState, hyperparams: PyTree) -> None:
    """Warns of stopped functions of the parameters, which are missing from later derivatives."""
    of_w = _trained(z, hyperparams)
    found = "of something that depends on the parameters"
    compare = "gradhpo.check_hypergradient shows whether it matters"
    if phi.grad_fn is phi.update_fn is None:
        if stops_a_function_of(result_of(of_training, 0), of_w):
            warn_once(
                f"train_loss_fn ({place_of(phi.train_loss_fn)}) stops the gradient {found} "
                "(jax.lax.stop_gradient), so its second derivatives are wrong, and perhaps the "
                "hypergradient: write gradhpo.detach(x) instead, which is also constant in the "
                f"training gradient. {compare}"
            )
        of_state = result_of(of_training, slice(1, None))
        if stops_a_function_of(of_state, of_w, (STOP_GRADIENT, DETACHED)):
            warn_once(
                f"train_loss_fn ({place_of(phi.train_loss_fn)}) stops the gradient {found} on the "
                "way to the new model state, so the hypergradient misses the effect of "
                "hyperparameters on it. The training gradient does not include it anyway: remove "
                "the stop. "
                f"{compare}"
            )
        return
    by_hand = phi.update_fn is not None
    name, function = ("update_fn", phi.update_fn) if by_hand else ("grad_fn", phi.grad_fn)
    rule = phi.updated_by_hand if by_hand else phi.gradient_and_state
    try:
        given = z._replace(s=None), hyperparams
        program = jax.make_jaxpr(lambda z, h: rule(z, h, 0))(*given).jaxpr
    except NO_DERIVATIVE:
        return  # it differentiates what has no derivative: explained where the step is taken
    if stops_a_function_of(program, of_w, (STOP_GRADIENT, DETACHED)):
        warn_once(
            f"{name} ({place_of(function)}) stops the gradient {found} (jax.lax.stop_gradient, or "
            "gradhpo.detach outside of jax.grad), so its derivatives are wrong, and perhaps the "
            "hypergradient: code outside of jax.grad needs no stop, so remove it; in a loss that "
            "it differentiates, replace stop_gradient by gradhpo.detach(x). "
            f"{compare}"
        )


def check_validation(
    val_loss_fn: LossFn, of_validation: Jaxpr, z: InnerState, hyperparams: PyTree
) -> None:
    """It is differentiated once, so that `detach` is a stop too."""
    of_w = _trained(z, hyperparams)
    if stops_a_function_of(of_validation, of_w, (STOP_GRADIENT, DETACHED)):
        warn_once(
            f"val_loss_fn ({place_of(val_loss_fn)}) stops the gradient of something that depends "
            "on the parameters (jax.lax.stop_gradient or gradhpo.detach), so the hypergradient "
            "misses the effect of hyperparameters on it. A validation loss is differentiated only "
            "once: remove the stop"
        )


def _trained(z: InnerState, hyperparams: PyTree) -> list[bool]:
    """Which inputs of a traced loss training changes: parameters and running state."""
    w, h, r = (len(jax.tree.leaves(tree)) for tree in (z.w, hyperparams, z.r))
    return [True] * (w + r) + [False] * h


def result_of(program: Jaxpr, which: int | slice) -> Jaxpr:
    """The program of one result of a traced function, or of several."""
    chosen = program.outvars[which] if isinstance(which, slice) else [program.outvars[which]]
    return program.replace(outvars=chosen, debug_info=program.debug_info.with_unknown_names())


def check_trained(
    of_training: Jaxpr,
    of_validation: Jaxpr,
    phi: InnerUpdate,
    z: InnerState,
    hyperparams: PyTree,
) -> None:
    """Warns of params that validation reads and training does not change, as foreign BatchNorms."""
    names = leaf_names(z.w)
    trained = inputs_read(result_of(of_training, 0), by_derivative=True)
    read = inputs_read(of_validation, by_derivative=False)
    # The hyperparameters come after them.
    candidates = [i for i in range(len(names)) if read[i] and not trained[i]]
    untrained = [names[i] for i in candidates if not _follows_others(i, phi, z, hyperparams)]
    if untrained:
        shown = ", ".join(untrained[:5]) + (", ..." if len(untrained) > 5 else "")
        warn_once(
            f"val_loss_fn reads params {shown}, and train_loss_fn has no derivative with respect "
            "to them: they keep their first values, apart from the inner optimizer's weight "
            "decay. Running statistics of a BatchNorm are not parameters; freeze what should stay "
            "constant: "
            "gradhpo.partition(model, where, frozen=), or gradhpo.frozen"
        )


def _follows_others(leaf: int, phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> bool:
    """Whether the optimizer moves a leaf of the parameters by others, as an average of them."""
    new = lambda w: jax.tree.leaves(phi.step(z._replace(w=w), hyperparams, 0)[0].w)[leaf]
    reads = jax.tree.leaves(readings(new, z.w, by_derivative=phi.differentiated).by())
    return any(here for i, here in enumerate(reads) if i != leaf)


def check_keys(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> None:
    """Inner steps on one batch draw different random numbers, as they do with typed keys."""
    if isinstance(phi.train_batch, BatchStack | DrawnStack):
        return
    keys, rest = eqx.partition(phi.train_batch, looks_like_a_key)
    names = leaf_names(keys)
    if not names:
        return

    def step(keys):
        batch = eqx.combine(keys, rest)
        return dataclasses.replace(phi, train_batch=batch).step(z, hyperparams, 0)[0]

    program = jax.make_jaxpr(step)(keys).jaxpr
    for name in names:
        if draws_with(program, [other == name for other in names]):
            warn_once(
                f"train_batch{name.removeprefix(THE_WHOLE_TREE)} is a key made by "
                "jax.random.PRNGKey, which is not folded with the inner step's number, so all "
                "inner steps draw the same random numbers: make it with jax.random.key, or pass "
                "a BatchStack with a key for each inner step"
            )


def check_batches(inputs: Inputs, num_steps: int) -> None:
    train_batch, val_batch = inputs.train_batch, inputs.val_batch
    if isinstance(train_batch, BatchStack) and train_batch.num_steps != num_steps:
        raise ValueError(
            f"train_batch is a BatchStack of {train_batch.num_steps} batches, but the optimizer "
            f"takes {num_steps} inner steps per step: stack {num_steps} batches, or pass one batch "
            "(not a BatchStack) to reuse it for every inner step"
        )
    if isinstance(val_batch, BatchStack):
        raise ValueError("val_batch is a BatchStack; pass one batch: a step validates once")
    check_single_batch(train_batch, "train_batch")
    check_single_batch(val_batch, "val_batch")


def arguments_of(r: PyTree) -> str:
    """What losses are called with."""
    return "params, hyperparams, batch" + ("" if r is None else ", model_state")


def trace_loss(
    which: str,
    function: LossFn,
    call: Callable,
    parse: Callable,
    batch: PyTree,
    z: InnerState,
    hyperparams: PyTree,
) -> Jaxpr:
    """The traced program of a loss, after checking its arity and its output.

    `call(z, hyperparams)` is what it returns, and `parse` the loss and the new r in that.

    Its inputs are the leaves of w, r and the hyperparameters; its results the loss and the new r.
    """
    name = f"{which}_loss_fn"
    remedy = (
        "; gradhpo.model_loss(fn) converts a loss fn(model, batch); with running state, "
        "init(params, hyperparams, model_state=...), losses take a fourth argument"
    )
    if z.r is not None:
        remedy = (
            "; the state has a model_state, which losses take as their fourth argument. "
            "gradhpo.model_loss(fn) converts a loss fn(model, batch, model_state)"
        )
    check_arity(function, name, arguments_of(z.r), remedy)

    def checked(z, hyperparams):
        try:
            returned = call(z, hyperparams)
        except (TypeError, AttributeError) as error:
            if batch is not None:
                raise
            raise TypeError(
                f"{which}_batch ({which}_data in run) is None, and {name} fails with it "
                f"({error}): pass the batch that it reads"
            ) from error
        return parse(returned)

    return jax.make_jaxpr(checked)(z, hyperparams).jaxpr
