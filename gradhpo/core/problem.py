"""The problem of one outer step: Φ and the validation loss on their data, checked."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.extend.core import Jaxpr
from jaxtyping import Array, PyTree

from gradhpo.core.batches import BatchStack, DrawnStack
from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_state import InnerState
from gradhpo.core.inputs import Inputs
from gradhpo.core.start import act_at_start
from gradhpo.core.state import inner_state
from gradhpo.core.types import GradFn, InnerOptimizer, LossFn, UpdateFn
from gradhpo.utils.detached import DETACHED
from gradhpo.utils.foreign import NO_DERIVATIVE, STOP_GRADIENT
from gradhpo.utils.freezing import not_trained
from gradhpo.utils.keys import looks_like_a_key
from gradhpo.utils.programs import (
    contains_custom_vjp,
    draws_with,
    inputs_read,
    stops_a_function_of,
)
from gradhpo.utils.tracing import visible_leaves
from gradhpo.utils.validation import (
    THE_WHOLE_TREE,
    check_arity,
    check_scalar,
    check_single_batch,
    leaf_names,
)
from gradhpo.utils.warn import place_of, warn_once


class Validation(eqx.Module):
    """The validation loss on the batch of one outer step."""

    val_loss_fn: LossFn
    frozen: PyTree
    val_batch: PyTree

    def loss(self, w: PyTree, hyperparams: PyTree) -> Any:
        """The result of the user's loss, which `make_problem` checks to be a scalar."""
        return self.val_loss_fn(eqx.combine(w, self.frozen), hyperparams, self.val_batch)

    def value_and_grads(self, w: PyTree, hyperparams: PyTree) -> tuple[Array, PyTree, PyTree]:
        r"""$L_{val}$, its derivative $\alpha$ by the parameters, and the direct term."""
        value, (alpha, direct) = jax.value_and_grad(self.loss, argnums=(0, 1))(w, hyperparams)
        return value, alpha, direct


class Problem(NamedTuple):
    r"""What an algorithm receives: everything about one `step`.

    - `phi`: $\Phi$, the inner update on the training data.
    - `validation`: the validation loss on its batch.
    - `z`: the $(w, s, r)$ to start from.
    - `hyperparams`: $\lambda$.
    """

    phi: InnerUpdate
    validation: Validation
    z: InnerState
    hyperparams: PyTree

    def functions(self) -> list[Any]:
        """The user's functions in it, which a warning is about."""
        phi = self.phi
        rule = phi.update_fn or phi.grad_fn or phi.inner_optimizer
        return [phi.train_loss_fn, self.validation.val_loss_fn, rule]


def make_problem(
    inner_optimizer: InnerOptimizer | None,
    grad_fn: GradFn | None,
    update_fn: UpdateFn | None,
    inputs: Inputs,
    num_steps: int,
    passes_loss: bool,
    differentiates: bool = True,
) -> Problem:
    r"""The problem of `num_steps` inner steps, after checking batches and losses.

    `differentiates`: whether the method differentiates the training gradient.

    Runs while tracing, once per compilation.
    """
    _check_batches(inputs, num_steps)
    state, losses = inputs.state, inputs.losses
    for name, function in (("grad_fn", grad_fn), ("update_fn", update_fn)):
        if function is not None:
            check_arity(function, name, "params, hyperparams, batch")
    frozen = not_trained(state.params)
    z, hyperparams = inner_state(state), state.hyperparams
    phi = InnerUpdate(
        inner_optimizer=inner_optimizer,
        grad_fn=grad_fn,
        update_fn=update_fn,
        train_loss_fn=losses.train_loss,
        frozen=frozen,
        train_batch=inputs.train_batch,
        symmetric=True,
        passes_loss=passes_loss,
        start=inputs.start,
    )
    validation = Validation(losses.val_loss, frozen, inputs.val_batch)
    at = z.w, hyperparams
    on_batch = lambda w, h: phi.train_loss(w, h, 0)
    program = _trace_loss("train", losses.train_loss, on_batch, inputs.train_batch, *at)
    of_validation = _trace_loss("val", losses.val_loss, validation.loss, inputs.val_batch, *at)
    symmetric = grad_fn is None and not contains_custom_vjp(program)
    if grad_fn is update_fn is None:
        _check_trained(program, of_validation, phi, z, hyperparams)
    of_w = [True] * len(jax.tree.leaves(z.w)) + [False] * len(jax.tree.leaves(hyperparams))
    if differentiates:
        _check_stops(phi, program, of_w, z.w, hyperparams)
    if stops_a_function_of(of_validation, of_w, (STOP_GRADIENT, DETACHED)):
        warn_once(
            f"val_loss_fn ({place_of(losses.val_loss)}) stops the gradient of something that "
            "depends on the parameters (jax.lax.stop_gradient or gradhpo.detach): the "
            "hypergradient leaves out what hyperparameters do to it. A validation loss is "
            "differentiated once: leave the stop out of it"
        )
    if num_steps > 1 or inputs.repeats:
        _check_keys(phi, z, hyperparams)
    fresh = state.fresh if act_at_start(phi, z, hyperparams) else None
    phi = dataclasses.replace(phi, symmetric=symmetric, fresh=fresh)
    return Problem(phi, validation, z, hyperparams)


def _check_stops(
    phi: InnerUpdate, of_loss: Jaxpr, of_w: list[bool], w: PyTree, hyperparams: PyTree
) -> None:
    """What is stopped as a function of the parameters is missing in later derivatives."""
    found = "of something that depends on the parameters"
    compare = "gradhpo.check_hypergradient shows whether it matters"
    if phi.grad_fn is phi.update_fn is None:
        if stops_a_function_of(of_loss, of_w):
            warn_once(
                f"train_loss_fn ({place_of(phi.train_loss_fn)}) stops the gradient {found} "
                "(jax.lax.stop_gradient), so its second derivatives are wrong, and so may be the "
                "hypergradient: write gradhpo.detach(x), which the training gradient treats as a "
                f"constant too. {compare}"
            )
        return
    by_hand = phi.update_fn is not None
    name, function = ("update_fn", phi.update_fn) if by_hand else ("grad_fn", phi.grad_fn)
    rule = phi.updated_by_hand if by_hand else phi.gradient
    try:
        program = jax.make_jaxpr(lambda w, h: rule(w, h, 0))(w, hyperparams).jaxpr
    except NO_DERIVATIVE:
        return  # it takes one itself, of what has none: explained where the step is taken
    if stops_a_function_of(program, of_w, (STOP_GRADIENT, DETACHED)):
        warn_once(
            f"{name} ({place_of(function)}) stops the gradient {found} (jax.lax.stop_gradient, or "
            "gradhpo.detach outside of jax.grad), so its derivatives are wrong, and so may be the "
            "hypergradient: what it computes outside of jax.grad needs no stop, so leave that out; "
            "in a loss that it differentiates, write gradhpo.detach(x) in place of stop_gradient. "
            f"{compare}"
        )


def _check_trained(
    of_training: Jaxpr,
    of_validation: Jaxpr,
    phi: InnerUpdate,
    z: InnerState,
    hyperparams: PyTree,
) -> None:
    """What validation reads is trained: running statistics of another framework are not."""
    names = leaf_names(z.w)
    trained = inputs_read(of_training, by_derivative=True)
    read = inputs_read(of_validation, by_derivative=False)
    # The hyperparameters come after them.
    candidates = [i for i in range(len(names)) if read[i] and not trained[i]]
    untrained = [names[i] for i in candidates if not _follows_others(i, phi, z, hyperparams)]
    if untrained:
        shown = ", ".join(untrained[:5]) + (", ..." if len(untrained) > 5 else "")
        warn_once(
            f"val_loss_fn reads params {shown}, and train_loss_fn has no derivative by them: they "
            "keep their first values, but for the inner optimizer's weight decay. Running "
            "statistics of a BatchNorm are not parameters; freeze what should stay constant: "
            "gradhpo.partition(model, where, frozen=), or gradhpo.frozen"
        )


def _follows_others(leaf: int, phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> bool:
    """Whether the optimizer moves a leaf of the parameters by others, as an average of them."""
    new = lambda w: jax.tree.leaves(phi.step(z._replace(w=w), hyperparams, 0)[0].w)[leaf]
    reads = jax.tree.leaves(visible_leaves(new, z.w))
    return any(here for i, here in enumerate(reads) if i != leaf)


def _check_keys(phi: InnerUpdate, z: InnerState, hyperparams: PyTree) -> None:
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
                "jax.random.PRNGKey, which is not folded with the number of the inner step: all of "
                "them draw the same random numbers. Make it with jax.random.key, which is, or pass "
                "a BatchStack with a key for each inner step"
            )


def _check_batches(inputs: Inputs, num_steps: int) -> None:
    train_batch, val_batch = inputs.train_batch, inputs.val_batch
    if isinstance(train_batch, BatchStack) and train_batch.num_steps != num_steps:
        raise ValueError(
            f"train_batch is a BatchStack of {train_batch.num_steps} batches, but the optimizer "
            f"takes {num_steps} inner steps per step: stack {num_steps} batches, or pass one batch "
            "(not a BatchStack) to reuse it for every inner step"
        )
    if isinstance(val_batch, BatchStack):
        raise ValueError("val_batch is a BatchStack; pass one batch: validation is done once")
    check_single_batch(train_batch, "train_batch")
    check_single_batch(val_batch, "val_batch")


def _trace_loss(
    which: str, function: LossFn, on_batch: Callable, batch: PyTree, w: PyTree, hyperparams: PyTree
) -> Jaxpr:
    """The traced program of a loss, after checking its arity and its output."""
    name = f"{which}_loss_fn"
    remedy = "; a loss fn(model, batch) becomes one of these by gradhpo.model_loss(fn)"
    check_arity(function, name, "params, hyperparams, batch", remedy)

    def checked(w, hyperparams):
        try:
            loss = on_batch(w, hyperparams)
        except (TypeError, AttributeError) as error:
            if batch is not None:
                raise
            raise TypeError(
                f"{which}_batch ({which}_data in run) is None, and {name} fails with that "
                f"({error}): pass the batch that it reads"
            ) from error
        check_scalar(loss, name)
        return loss

    return jax.make_jaxpr(checked)(w, hyperparams).jaxpr


def not_differentiable(problem: Problem) -> str:
    """Which function lacks the derivative that every method takes; "" if all have it."""
    phi, validation, z, hyperparams = problem

    def fails(function: Callable, *arguments: PyTree) -> bool:
        try:
            jax.eval_shape(function, *arguments)
        except NO_DERIVATIVE:
            return True
        return False

    if fails(validation.value_and_grads, z.w, hyperparams):
        return "val_loss_fn"
    step_fails = fails(lambda w: phi.step(z._replace(w=w), hyperparams, 0)[0].w, z.w)
    if phi.update_fn is phi.grad_fn is None:
        return "train_loss_fn" if step_fails else ""
    own = "update_fn" if phi.grad_fn is None else "grad_fn"
    return "" if step_fails else own  # it takes a derivative itself
