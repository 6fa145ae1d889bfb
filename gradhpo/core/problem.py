"""The problem of one outer step: Φ and the validation loss on their data, checked."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from gradhpo.core.checks import (
    arguments_of,
    check_batches,
    check_keys,
    check_stops,
    check_trained,
    check_validation,
    result_of,
    trace_loss,
)
from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_state import InnerState, differentiated
from gradhpo.core.inputs import Inputs
from gradhpo.core.losses import called, train_result, val_result
from gradhpo.core.measured import Loss, measured
from gradhpo.core.start import act_at_start
from gradhpo.core.state import inner_state
from gradhpo.core.types import GradFn, InnerOptimizer, InnerSolver, LossFn, UpdateFn
from gradhpo.utils.foreign import NO_DERIVATIVE, is_custom_vjp, is_recomputed
from gradhpo.utils.freezing import not_trained
from gradhpo.utils.programs import bytes_computed, contains, inputs_read, readings
from gradhpo.utils.validation import check_arity


# Bytes of intermediate values of a training loss. Above this, second-derivative products do not
# share the gradient's activations. Where the layers are a `lax.scan`, an exact hypergradient then
# takes half the memory and a fifth more flops; elsewhere the compiler finds the same program.
_LARGE = 2**28


class Validation(eqx.Module):
    """The validation loss on the batch of one outer step."""

    val_loss_fn: LossFn
    frozen: PyTree
    val_batch: PyTree
    metrics: tuple[str, ...] = eqx.field(static=True, default=())  # of the loss
    reads_state: bool = eqx.field(static=True, default=False)  # the loss depends on z.r

    def loss(self, z: InnerState, hyperparams: PyTree) -> Array:
        """The validation loss at the parameters and the running state of `z`."""
        return self.evaluate(z, hyperparams)[0]

    def measured(self, z: InnerState, hyperparams: PyTree) -> Loss:
        """The validation loss, as `Measured` if it has metrics."""
        return measured(*self.evaluate(z, hyperparams))

    def evaluate(self, z: InnerState, hyperparams: PyTree) -> tuple[Array, dict[str, Array]]:
        """The validation loss, and metrics."""
        return val_result(self.returned(z, hyperparams), z.r)

    def returned(self, z: InnerState, hyperparams: PyTree) -> Any:
        """What the user's loss returns."""
        params = eqx.combine(z.w, self.frozen)
        return called(self.val_loss_fn, params, hyperparams, self.val_batch, z.r)

    def value_and_grads(
        self, z: InnerState, hyperparams: PyTree
    ) -> tuple[Loss, InnerState, PyTree]:
        r"""The validation loss, its derivative by z (not by s), and the direct term.

        The derivative is $\alpha$. The loss is `Measured` if it has metrics beside it.
        """
        at, evaluate = self.of_differentiated(z)
        both = jax.value_and_grad(evaluate, argnums=(0, 1), has_aux=True)
        (loss, aux), (alpha, direct) = both(at, hyperparams)
        return measured(loss, aux), alpha, direct

    def alpha(self, z: InnerState, hyperparams: PyTree) -> InnerState:
        """The derivative of the validation loss by z alone."""
        at, evaluate = self.of_differentiated(z)
        return jax.grad(evaluate, has_aux=True)(at, hyperparams)[0]

    def of_differentiated(self, z: InnerState) -> tuple[InnerState, Callable]:
        """The variables of the derivative, and loss and metrics as a function of them."""
        of_r, rest = differentiated(z.r)
        full = lambda at: at._replace(r=eqx.combine(at.r, rest))
        return InnerState(z.w, None, of_r), lambda at, h: self.evaluate(full(at), h)


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
        """The user's functions in it, which warnings refer to."""
        phi = self.phi
        rule = phi.inner_solver or phi.update_fn or phi.grad_fn or phi.inner_optimizer
        return [phi.train_loss_fn, self.validation.val_loss_fn, rule]


def make_problem(
    inner_optimizer: InnerOptimizer | None,
    grad_fn: GradFn | None,
    update_fn: UpdateFn | None,
    inner_solver: InnerSolver | None,
    inputs: Inputs,
    num_steps: int,
    passes_loss: bool,
    differentiates: bool = True,
    differentiates_validation: bool = True,
) -> Problem:
    r"""The problem of `num_steps` inner steps, after checking batches and losses.

    `differentiates`: whether the method differentiates the training gradient;
    `differentiates_validation`: whether it differentiates the validation loss.

    Runs while tracing, once per compilation.
    """
    check_batches(inputs, num_steps)
    state, losses = inputs.state, inputs.losses
    rules = {"grad_fn": grad_fn, "update_fn": update_fn, "inner_solver": inner_solver}
    for name, function in rules.items():
        if function is not None:
            check_arity(function, name, arguments_of(state.model_state))
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
        differentiated=differentiates,
        passes_loss=passes_loss,
        start=inputs.start,
        inner_solver=inner_solver,
    )
    validation = Validation(losses.val_loss, frozen, inputs.val_batch)
    names: dict[str, tuple[str, ...]] = {}

    def of_training(returned: Any) -> tuple[Any, PyTree]:
        loss, r, aux = train_result(returned, z.r)
        names["train"] = tuple(aux)
        return loss, r

    def of_validation(returned: Any) -> tuple[Any, None]:
        loss, aux = val_result(returned, z.r)
        names["val"] = tuple(aux)
        return loss, None

    at = z._replace(s=None), hyperparams
    call = lambda z, h: phi.returned(z, h, 0)
    given = call, of_training, inputs.train_batch
    program = trace_loss("train", losses.train_loss, *given, *at)
    given = validation.returned, of_validation, inputs.val_batch
    val_program = trace_loss("val", losses.val_loss, *given, *at)
    of_state = slice(after_w := len(jax.tree.leaves(z.w)), after_w + len(jax.tree.leaves(z.r)))
    reads = inputs_read(val_program, by_derivative=True)
    validation = dataclasses.replace(
        validation, metrics=names["val"], reads_state=any(reads[of_state])
    )
    symmetric = grad_fn is None and not contains(result_of(program, 0), is_custom_vjp)
    reads_state = False
    of_r, rest = differentiated(z.r)
    if jax.tree.leaves(of_r) and not grad_fn is update_fn is None:
        rule = phi.gradient_and_state if update_fn is None else phi.updated_by_hand
        new = lambda r: rule(z._replace(r=eqx.combine(r, rest)), hyperparams, 0)[0]
        reads_state = any(jax.tree.leaves(readings(new, of_r, by_derivative=differentiates).by()))
    elif jax.tree.leaves(of_r):
        reads_state = any(inputs_read(result_of(program, 0), by_derivative=True)[of_state])
    if grad_fn is update_fn is inner_solver is None:
        check_trained(program, val_program, phi, z, hyperparams)
    if differentiates:
        check_stops(phi, program, z, hyperparams)
    if differentiates_validation:
        check_validation(losses.val_loss, val_program, z, hyperparams)
    if num_steps > 1 or inputs.repeats:
        check_keys(phi, z, hyperparams)
    fresh = state.fresh if act_at_start(phi, z, hyperparams) else None
    phi = dataclasses.replace(
        phi,
        symmetric=symmetric,
        recomputes=contains(program, is_recomputed) or bytes_computed(program) > _LARGE,
        metrics=names["train"],
        reads_state=reads_state,
        fresh=fresh,
    )
    return Problem(phi, validation, z, hyperparams)


def not_differentiable(problem: Problem) -> str:
    """Which function lacks the derivative that every method takes; "" if all have it."""
    phi, validation, z, hyperparams = problem

    def fails(function: Callable, *arguments: PyTree) -> bool:
        try:
            jax.eval_shape(function, *arguments)
        except NO_DERIVATIVE:
            return True
        return False

    if fails(validation.value_and_grads, z, hyperparams):
        return "val_loss_fn"
    step_fails = fails(lambda w: phi.step(z._replace(w=w), hyperparams, 0)[0].w, z.w)
    if phi.update_fn is phi.grad_fn is None:
        return "train_loss_fn" if step_fails else ""
    own = "update_fn" if phi.grad_fn is None else "grad_fn"
    return "" if step_fails else own  # it takes a derivative itself
