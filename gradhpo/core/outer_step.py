"""One outer step, whose result is refused if it is not finite."""

import abc
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.inputs import Inputs
from gradhpo.core.interface import InnerProblems
from gradhpo.core.measured import aux_of, check_free, loss_of, with_aux
from gradhpo.core.outer import outer_response, outer_update
from gradhpo.core.refusal import Attempt, finite_parts, why_refused
from gradhpo.core.state import BilevelState, inner_state, with_inner_state, with_metrics
from gradhpo.core.types import Declared, RealScalarLike
from gradhpo.utils.dispatch import compiled
from gradhpo.utils.trees import accumulation_dtype, scaled_norm, scaled_norm_and_moving


class Advance(NamedTuple):
    """The result of a step.

    - `state`: the next state.
    - `moving`: for each leaf of the hyperparameters, whether its hypergradient is not 0, shape
        `[leaves]`; in a population `[members, leaves]`.
    - `hypergradient`: a tree like the hyperparameters, finite or not.
    """

    state: BilevelState
    moving: Array
    hypergradient: PyTree


class OuterStep(InnerProblems):
    """The private half of `BilevelOptimizer`."""

    if TYPE_CHECKING:
        outer_optimizer = Declared[optax.GradientTransformation | None]()
    else:
        outer_optimizer: eqx.AbstractVar[optax.GradientTransformation | None]
        """Takes the hypergradient; `None`: plain descent with the `lr_hyper` given to `step`."""

    @abc.abstractmethod
    def _attempt(self, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Attempt:
        """The result of a step, finite or not."""

    @abc.abstractmethod
    def _advance(self, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Advance:
        """One outer step, for use inside a compiled program. Refuses non-finite results.

        Takes a state without the metrics that losses return, and adds the metrics of this step.
        """

    @abc.abstractmethod
    def _outer_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        """The updates of the outer optimizer for a hypergradient, and its next state."""

    def _why_refused(self, inputs: Inputs, lr_hyper: ArrayLike | None) -> str:
        """Why a step on these inputs is refused, if its metrics do not show it."""
        return why_refused(jax.tree.map(np.asarray, _finite_parts(self, inputs, lr_hyper)))


class OneOuterStep(OuterStep):
    """The outer step of optimizers with one set of hyperparameters, and one outer optimizer."""

    def _attempt(self, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Attempt:
        return attempted(self, inputs, lr_hyper)

    def _advance(self, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Advance:
        return advanced(self, inputs.state, self._attempt(inputs, lr_hyper))

    def _outer_response(self, state: BilevelState, gradient: PyTree) -> tuple[PyTree, PyTree]:
        return outer_response(self.outer_optimizer, state, gradient)


def attempted(optimizer: OuterStep, inputs: Inputs, lr_hyper: RealScalarLike | None) -> Attempt:
    """`_attempt` for one set of hyperparameters, by one outer update."""
    state, estimate = inputs.state, optimizer._solve(inputs)
    if not optimizer.tunes:
        return Attempt(estimate, state.hyperparams, state.outer_opt_state)
    new = outer_update(optimizer.outer_optimizer, state, estimate.hypergradient, lr_hyper)
    return Attempt(estimate, *new)


def advanced(optimizer: OuterStep, state: BilevelState, attempt: Attempt) -> Advance:
    """`_advance` for one set of hyperparameters, after its attempt."""
    estimate = attempt.estimate
    norm, moving = scaled_norm_and_moving(estimate.hypergradient)
    accepted = jnp.stack(jax.tree.leaves(finite_parts(optimizer, state, attempt))).all()
    keep = lambda x, y: x if x is y else jnp.where(accepted, x, y)
    z = jax.tree.map(keep, estimate.z, inner_state(state))
    outer_opt_state = jax.tree.map(keep, attempt.outer_opt_state, state.outer_opt_state)
    hyperparams = jax.tree.map(keep, attempt.hyperparams, state.hyperparams)
    refused = optimizer.after_refusal(state.memory, estimate.memory)
    rejected = state.metadata["rejected"]
    metrics = {
        "train_loss": loss_of(estimate.train_loss),
        "val_loss": loss_of(estimate.val_loss),
        "hypergrad_norm": norm,
        "param_norm": optimizer._param_norm(z.w),
        "hyperparam_norm": scaled_norm(hyperparams),
        "rejected": rejected + (~accepted).astype(rejected.dtype),
    }
    dtype = accumulation_dtype(state.params)
    state = with_inner_state(state, z).update(
        hyperparams=hyperparams,
        outer_opt_state=outer_opt_state,
        step=state.step + 1,
        memory=jax.tree.map(keep, estimate.memory, refused),
        fresh=state.fresh & ~accepted,
    )
    cast = lambda metrics: {name: x.astype(dtype) for name, x in metrics.items()}
    aux = aux_of(estimate.train_loss, estimate.val_loss)
    check_free(aux, state)
    state = with_aux(with_metrics(state, cast(metrics)), cast(aux))
    return Advance(state, moving, estimate.hypergradient)


@compiled
def _finite_parts(
    optimizer: OuterStep, inputs: Inputs, lr_hyper: ArrayLike | None
) -> dict[str, PyTree]:
    return finite_parts(optimizer, inputs.state, optimizer._attempt(inputs, lr_hyper))
