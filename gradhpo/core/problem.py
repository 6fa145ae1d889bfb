"""The problem of one outer step: Φ and the validation loss on their data, checked."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import optax
from jax.extend.core import Jaxpr
from jaxtyping import Array, PyTree

from gradhpo.core.inner import Carry, InnerUpdate
from gradhpo.core.inner_optimizer import forget_secants, init_inner_state
from gradhpo.core.state import BilevelState
from gradhpo.core.types import BatchStack, LossFn
from gradhpo.utils.tracing import contains_custom_vjp, visible_leaves
from gradhpo.utils.typecheck import warn_once
from gradhpo.utils.validation import (
    check_arity,
    check_same_structure,
    check_scalar,
    check_single_batch,
    leaf_names,
    strong,
)


# Where a method finds the hyperparameters: in the validation loss alone; also in the condition
# for the inner optimum; or in how the last inner update changes the parameters; also in what
# earlier updates leave in the optimizer's state; or (by evaluating updates instead of
# differentiating them) in whatever has an effect.
Sees: TypeAlias = Literal["validation", "optimum", "last update", "updates", "everything"]


class Validation(eqx.Module):
    """The validation loss on the batch of one outer step."""

    val_loss_fn: LossFn
    frozen: PyTree
    val_batch: PyTree

    def loss(self, w: PyTree, hyperparams: PyTree) -> Any:
        """What the user's loss returns, which `bind` checks to be a scalar."""
        return self.val_loss_fn(eqx.combine(w, self.frozen), hyperparams, self.val_batch)

    def value_and_grads(self, w: PyTree, hyperparams: PyTree) -> tuple[Array, PyTree, PyTree]:
        r"""$L_{val}$, its derivative $\alpha$ by the parameters, and the direct term."""
        value, (alpha, direct) = jax.value_and_grad(self.loss, argnums=(0, 1))(w, hyperparams)
        return value, alpha, direct


class Problem(NamedTuple):
    r"""$\Phi$, the validation loss, and the $z = (w, s)$ and $\lambda$ to start from."""

    phi: InnerUpdate
    validation: Validation
    z: Carry
    hyperparams: PyTree


def bind(
    optimizer: Any,
    state: BilevelState,
    train_batch: PyTree,
    val_batch: PyTree,
    train_loss_fn: LossFn,
    val_loss_fn: LossFn,
    *,
    differentiated: bool = True,
    num_steps: int | None = None,
) -> Problem:
    r"""The problem that a state, two batches and two losses make, after the checks at the door.

    `optimizer` is an `Algorithm`; runs while tracing, once for each compilation. Unless
    `differentiated`, what the method can see does not matter. `num_steps` is how many inner
    steps will be taken, if not those of a `step`.
    """
    steps = optimizer.num_inner_steps if num_steps is None else num_steps
    if isinstance(train_batch, BatchStack) and train_batch.num_steps != steps:
        raise ValueError(
            f"train_batch is a BatchStack of {train_batch.num_steps} batches, but the optimizer "
            f"takes {steps} inner steps per step: stack {steps} batches, or pass one batch (not "
            "a BatchStack) to reuse it for every inner step"
        )
    if isinstance(val_batch, BatchStack):
        raise ValueError("val_batch is a BatchStack; pass one batch: validation is done once")
    check_single_batch(train_batch, "train_batch")
    check_single_batch(val_batch, "val_batch")
    w, frozen = eqx.partition(state.params, eqx.is_inexact_array)
    hyperparams, s = state.hyperparams, state.inner_opt_state
    made_here = "Make the state with this optimizer's init(params, hyperparams)."
    if optimizer.update_fn is not None:
        check_arity(optimizer.update_fn, "update_fn", "params, hyperparams, batch")
    check_same_structure(
        s,
        eqx.filter_eval_shape(init_inner_state, optimizer.inner_optimizer, w, hyperparams),
        "state.inner_opt_state",
        made_here,
    )
    check_same_structure(
        state.outer_opt_state,
        eqx.filter_eval_shape(init_outer_state, optimizer.outer_optimizer, hyperparams),
        "state.outer_opt_state",
        made_here,
    )
    memory = eqx.filter_eval_shape(optimizer._init_memory, (w, s), hyperparams, None, None)
    check_same_structure(
        {name: state.metadata.get(name) for name in memory}, memory, "state.metadata", made_here
    )
    # Those that see updates by their derivative would miss what optax makes of the loss.
    passes_loss = optimizer._sees not in ("last update", "updates")
    if passes_loss and optimizer.num_inner_steps > 1:
        s = forget_secants(s)
    phi = InnerUpdate(
        inner_optimizer=optimizer.inner_optimizer,
        update_fn=optimizer.update_fn,
        train_loss_fn=train_loss_fn,
        frozen=frozen,
        train_batch=train_batch,
        symmetric=True,
        passes_loss=passes_loss,
    )
    validation = Validation(val_loss_fn=val_loss_fn, frozen=frozen, val_batch=val_batch)
    program = _trace_loss(
        "train_loss_fn", train_loss_fn, lambda w, h: phi.train_loss(w, h, 0), w, hyperparams
    )
    _trace_loss("val_loss_fn", val_loss_fn, validation.loss, w, hyperparams)
    phi = dataclasses.replace(phi, symmetric=not contains_custom_vjp(program))
    problem = Problem(phi, validation, (w, s), hyperparams)
    if differentiated:
        _check_visible(type(optimizer).__name__, optimizer._sees, problem)
    return problem


def init_outer_state(
    outer_optimizer: optax.GradientTransformation | None, hyperparams: PyTree
) -> PyTree:
    """The outer optimizer's state; `()` where there is none."""
    if outer_optimizer is None:
        return ()
    return jax.tree.map(strong, outer_optimizer.init(hyperparams))


def _trace_loss(
    name: str, function: LossFn, on_batch: Callable, w: PyTree, hyperparams: PyTree
) -> Jaxpr:
    """The traced program of a loss, once its arity and its output are what they must be."""
    remedy = "; a loss fn(model, batch) becomes one of these by gradhpo.model_loss(fn)"
    check_arity(function, name, "params, hyperparams, batch", remedy)

    def checked(w, hyperparams):
        loss = on_batch(w, hyperparams)
        check_scalar(loss, name)
        return loss

    return jax.make_jaxpr(checked)(w, hyperparams).jaxpr


def _check_visible(name: str, sees: Sees, problem: Problem) -> None:
    """Names the hyperparameters whose hypergradient by this method is identically 0."""
    seen = seen_by(sees, problem)
    if all(seen):
        return
    names = leaf_names(problem.hyperparams)
    # What each unseen leaf acts through, found only now: most programs never get here.
    through = {kind: seen_by(kind, problem) for kind in _SEEN_BY}
    w, _ = problem.z
    of_weights = lambda w: problem.validation.loss(w, problem.hyperparams)
    blind = not any(jax.tree.leaves(visible_leaves(of_weights, w)))
    groups: dict[str, list[str]] = {}
    for leaf, here, *elsewhere in zip(names, seen, *through.values(), strict=True):
        if not here:
            kinds: list[Sees] = [k for k, there in zip(_SEEN_BY, elsewhere, strict=True) if there]
            groups.setdefault(_why(sees, kinds, blind), []).append(leaf)
    if not any(seen):
        whys = (f"{', '.join(leaves)}: {why}" for why, leaves in groups.items())
        raise ValueError(f"{name} sees none of the hyperparameters. {'; '.join(whys)}")
    for why, leaves in groups.items():
        warn_once(f"{name} gives a hypergradient of 0 for hyperparams {', '.join(leaves)}: {why}")


# The methods that see what acts so; the widest last.
_SEEN_BY: dict[Sees, str] = {
    "optimum": "implicit differentiation",
    "last update": "one step, T1-T2, greedy, HyperDistill",
    "updates": "unrolling, DrMAD and forward mode",
}


def _why(sees: Sees, acts_through: Sequence[Sees], blind: bool) -> str:
    """Why a leaf is not seen, and what would see it; `blind` validation sees no parameter."""
    if blind:
        return "the validation loss depends on neither the parameters nor on them"
    why = {
        "validation": "the validation loss does not depend on them, and this method looks nowhere "
        "else",
        "optimum": "the optimum of the training loss does not depend on them (settings of the "
        "inner optimizer change the way to it; a weight decay belongs into the loss)",
        "last update": "they act on later updates alone, through the optimizer's state",
    }
    if not acts_through or sees not in why:
        return (
            "neither the validation loss nor the inner update depends on them, or they do where "
            "a derivative is cut off: stop_gradient, round, argmax, a cast to integers"
        )
    return f"{why[sees]}; {', '.join(_SEEN_BY[kind] for kind in acts_through)} see them"


def seen_by(sees: Sees, problem: Problem) -> list[bool]:
    """For each leaf of the hyperparameters whether a method that looks there can see it."""
    phi, validation, z, hyperparams = problem
    w, _ = z
    by_derivative = sees != "everything"
    found = lambda function, tree: jax.tree.leaves(
        visible_leaves(function, tree, by_derivative=by_derivative)
    )
    directly = found(lambda h: validation.loss(w, h), hyperparams)
    if sees == "validation" or all(directly):
        return directly
    by_weights = found(lambda w: validation.loss(w, hyperparams), w)
    if not any(by_weights):
        return directly
    if sees == "optimum":
        inner = lambda h: phi.optimality(w, h, 0)[0]
    else:
        result = (lambda z: z[0]) if sees == "last update" else (lambda z: z)
        inner = lambda h: result(phi.step(z, h, 0, want_loss=False)[0])
    return [a or b for a, b in zip(directly, found(inner, hyperparams), strict=True)]
