r"""F2SA: a hypergradient from two training runs, one of which also descends the validation loss."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gradhpo.algorithms.first_order import check_has_loss, warn_of_model_state
from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    InnerState,
    Memory,
    Problem,
    Sees,
    UpdateFn,
    accumulation_dtype,
    check_setting,
    checked,
    setting_or_schedule,
)


class PenaltyMemory(Memory):
    r"""What [`PenaltyOptimizer`][gradhpo.PenaltyOptimizer] carries over.

    - `penalised`: $y$ with its own inner optimizer's state and model state, as `w`, `s` and `r`.
    - `steps_taken`: on which a schedule depends; shape `()`.
    """

    penalised: InnerState
    steps_taken: Array


@checked
class PenaltyOptimizer(Algorithm):
    r"""F2SA, the fully first-order method: no second derivative of anything.

    Beside the parameters $z$, which descend $L_{\mathrm{train}}$, it keeps a second copy $y$, which
    descends $L_{\mathrm{train}} + L_{\mathrm{val}}/\lambda_p$ by an inner optimizer of the same
    kind, on the same batches. After `inner_steps` steps of both,

    $$g = \frac{\partial L_{\mathrm{val}}}{\partial\lambda}(y) + \lambda_p \Bigl(
    \frac{\partial L_{\mathrm{train}}}{\partial\lambda}(y) -
    \frac{\partial L_{\mathrm{train}}}{\partial\lambda}(z)\Bigr),\qquad \lambda_p =
    \mathtt{penalty},$$

    with the training losses on the last batch. If both have converged, this is the derivative of
    the penalised problem, which differs from the hypergradient at the optimum by a term
    proportional to $1/\lambda_p$. A large penalty has a price: $y - z$ shrinks as the penalty
    grows, so convergence errors, batch noise and rounding (in float32) are amplified. An inner step
    costs three gradients (two of the training loss and one of the validation loss), and the
    hypergradient three more; nothing is differentiated twice, so it works where second derivatives
    do not exist or do not fit into memory.

    `state.params` is $z$, and the metric `val_loss` is measured there. $y$ starts from the
    parameters at the start of every episode. The method sees hyperparameters that move the optimum.
    A model state is used as it is at $z$ and at $y$: the effect of hyperparameters on it is left
    out.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`; required. Transformations that need the loss
        (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `penalty`: $\lambda_p$, positive, shape `()`, default 10; or a schedule, a function of the
        number of steps taken, such as `optax.linear_schedule(1.0, 100.0, 1_000)`. A new number does
        not recompile; a new schedule does.
    - `inner_steps`: inner steps of $z$ and of $y$ per `step`, at least 1; default 1.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters: another way
        to compute the gradient of the training loss. The loss is still needed for its derivative
        with respect to the hyperparameters. With a [model state](../how_to/running_state.md),
        `grad_fn` takes it as a fourth argument and also returns the new one. Default `None`.
    - `update_fn`: refused, since it has no loss; leave it `None`.

    **Raises:** `ValueError` for an `update_fn`, no `inner_optimizer`, `penalty <= 0`, or
    `inner_steps < 1`; `TypeError` for an optimizer that is not an optax transformation, or a
    function that is not callable.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.PenaltyOptimizer(
        optax.sgd(0.1), optax.sgd(0.1), penalty=100.0, inner_steps=10
    )
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Kwon et al., *A Fully First-Order Method for Stochastic Bilevel Optimization*, ICML 2023,
        arXiv:2301.10945.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    penalty: Float[Array, ""] | Callable = eqx.field(converter=setting_or_schedule, default=10.0)
    inner_steps: int = eqx.field(static=True, default=1)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "inner_steps"

    def __check_init__(self):
        if not callable(self.penalty):
            check_setting("penalty", self.penalty, lambda x: x > 0, "positive")
        check_has_loss("PenaltyOptimizer", self.update_fn)

    @property
    def sees(self) -> Sees:
        """The optimum."""
        return "optimum"

    @property
    def differentiates_gradient(self) -> bool:
        """False."""
        return False

    @property
    def suspect(self) -> str:
        """The second copy of the parameters."""
        return "the penalised copy of the parameters diverges: its loss has a larger curvature"

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> PenaltyMemory:
        """The second copy starts from the parameters."""
        return PenaltyMemory(z, jnp.zeros((), jnp.int32))

    def restart_memory(
        self, memory: PenaltyMemory, z: InnerState, hyperparams: PyTree
    ) -> PenaltyMemory:
        """The second copy starts again with the parameters."""
        return PenaltyMemory(z, memory.steps_taken)

    def after_refusal(self, old: PenaltyMemory, new: PenaltyMemory) -> PenaltyMemory:
        """A refused step counts."""
        return PenaltyMemory(old.penalised, new.steps_taken)

    def estimate(self, problem: Problem, memory: PenaltyMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        warn_of_model_state("PenaltyOptimizer", problem)
        wide = accumulation_dtype(z.w)
        penalty = self.penalty(memory.steps_taken) if callable(self.penalty) else self.penalty
        penalty = jnp.asarray(penalty, wide)

        def penalised(gradient, alpha):
            return (gradient.astype(wide) + alpha.astype(wide) / penalty).astype(gradient.dtype)

        def body(carry, t):
            z, y = carry
            z, train_loss = phi.step(z, hyperparams, t)
            loss, gradient, r = phi.loss_and_gradient(y, hyperparams, t)
            alpha = validation.alpha(y, hyperparams)
            gradient = jax.tree.map(penalised, gradient, alpha.w)
            y, _, _ = phi.step_and_gradient(y, hyperparams, t, (loss, gradient, r))
            return (z, y), train_loss

        steps = jnp.arange(self.inner_steps)
        (z, y), train_losses = jax.lax.scan(body, (z, memory.penalised), steps)
        by_hyperparams = lambda loss, at: jax.grad(loss, argnums=1)(at, hyperparams)
        train_loss = lambda z, h: phi.train_loss(z, h, self.inner_steps - 1)
        direct = by_hyperparams(validation.loss, y)
        of_y, of_z = (by_hyperparams(train_loss, at) for at in (y, z))

        def combined(direct, of_y, of_z):
            return direct + (penalty * (of_y.astype(wide) - of_z.astype(wide))).astype(direct.dtype)

        hypergradient = jax.tree.map(combined, direct, of_y, of_z)
        val_loss = validation.measured(z, hyperparams)
        memory = PenaltyMemory(y, memory.steps_taken + 1)
        return Estimate(z, hypergradient, train_losses[-1], val_loss, memory)
