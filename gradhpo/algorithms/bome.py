r"""BOME: parameters and hyperparameters descend together, held near the inner optimum."""

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
    setting,
    tree_dot,
)


class BOMEMemory(Memory):
    r"""What [`BOMEOptimizer`][gradhpo.BOMEOptimizer] carries over: a metric.

    - `multiplier`: $\lambda_p$ of the last step, shape `()`.
    """

    multiplier: Array


@checked
class BOMEOptimizer(Algorithm):
    r"""BOME, "bilevel optimization made easy": no second derivative of anything.

    `inner_steps` steps of the inner optimizer, with a fresh state, lead from the parameters $z$ to
    $z_T$. It only measures how far $z$ is from the inner optimum, and is then discarded:

    $$q(z, \lambda) = L_{\mathrm{train}}(z, \lambda) - L_{\mathrm{train}}(z_T, \lambda),\qquad
    \lambda_p = \frac{\max(c\,\|\nabla q\|^2 - \langle\nabla L_{\mathrm{val}}, \nabla q\rangle,\ 0)}
    {\|\nabla q\|^2},$$

    with $z_T$ held constant, gradients with respect to $(z, \lambda)$ together, and $c$ =
    `control`. Then both move along $\nabla L_{\mathrm{val}} + \lambda_p \nabla q$: the parameters
    by *one* update of the inner optimizer (whose own state is kept), the hyperparameters by the
    outer one. $\lambda_p$ is the smallest multiplier that makes $q$ fall at the rate
    $c\,\|\nabla q\|^2$; where $\nabla q = 0$ it is 0.

    Its fixed point inherits the error of $z_T$: with few `inner_steps` or a small inner rate it
    misses the solution (on the quadratic of our tests, with an inner rate of 0.1, by 0.18 with 10
    steps and by 0.04 with 100). $q$ and its gradients use the last batch. An inner step costs one
    gradient, and the outer step three more.

    `state.params` is $z$, which the validation loss pulls on too: finish training with
    [`FixedOptimizer`][gradhpo.FixedOptimizer]. The method follows a joint direction for both, not
    an estimate of the hypergradient: away from the inner optimum the two have little in common. The
    inner optimizer's state in `state` advances once per `step`. The method sees hyperparameters
    that move the optimum. A model state is used as it is: the effect of hyperparameters on it is
    left out.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`; required. Transformations that need the loss
        (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Choose its rate close to
        the inner one: the ratio of the two directions is part of the method. Default `None`:
        gradient descent with the `lr_hyper` of each `step`.
    - `inner_steps`: steps to $z_T$ per `step`, at least 1; default 10.
    - `control`: $c$, positive, shape `()`, default 0.5.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters: another way
        to compute the gradient of the training loss. The loss is still needed for its derivative
        with respect to the hyperparameters. With a [model state](../how_to/running_state.md),
        `grad_fn` takes it as a fourth argument and also returns the new one. Default `None`.
    - `update_fn`: refused, since it has no loss; leave it `None`.

    The memory, `state.memory`, holds a metric: `multiplier`, the $\lambda_p$ of the last step.

    **Raises:** `ValueError` for an `update_fn`, no `inner_optimizer`, `control <= 0`, or
    `inner_steps < 1`; `TypeError` for an optimizer that is not an optax transformation, or a
    function that is not callable.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.BOMEOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Liu et al., *BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach*,
        NeurIPS 2022, arXiv:2209.08709.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    inner_steps: int = eqx.field(static=True, default=10)
    control: Float[Array, ""] = eqx.field(converter=setting, default=0.5)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "inner_steps"

    def __check_init__(self):
        check_setting("control", self.control, lambda x: x > 0, "positive")
        check_has_loss("BOMEOptimizer", self.update_fn)

    @property
    def sees(self) -> Sees:
        """The optimum."""
        return "optimum"

    @property
    def differentiates_gradient(self) -> bool:
        """False."""
        return False

    @property
    def may_be_zero(self) -> bool:
        """True: the multiplier is 0 where the validation gradient alone lowers q fast enough."""
        return True

    def init_memory(
        self, z: InnerState, hyperparams: PyTree, batch: PyTree, key: Array | None
    ) -> BOMEMemory:
        """A metric of 0."""
        return BOMEMemory(jnp.zeros((), accumulation_dtype(z.w)))

    def estimate(self, problem: Problem, memory: BOMEMemory) -> Estimate:
        phi, validation, z, hyperparams = problem
        warn_of_model_state("BOMEOptimizer", problem)
        last, wide = self.inner_steps - 1, accumulation_dtype(z.w)
        trial, _, _ = phi.rollout(phi.with_fresh_state(z, hyperparams), hyperparams, 0, last + 1)
        train_loss, q_of_z, of_z, r = phi.value_and_grads(z, hyperparams, last)
        of_trial = jax.grad(phi.train_loss, argnums=1)(trial, hyperparams, last)
        q_of_hyperparams = jax.tree.map(jnp.subtract, of_z, of_trial)
        _, alpha, direct = validation.value_and_grads(z, hyperparams)

        of_both = q_of_z, q_of_hyperparams
        square = tree_dot(of_both, of_both).astype(wide)
        slope = tree_dot((alpha.w, direct), of_both).astype(wide)
        needed = jnp.maximum(self.control.astype(wide) * square - slope, 0)
        multiplier = jnp.where(square > 0, needed / jnp.where(square > 0, square, 1), 0)

        def combined(x, q):
            return (x.astype(wide) + multiplier * q.astype(wide)).astype(x.dtype)

        direction = jax.tree.map(combined, alpha.w, q_of_z)
        hypergradient = jax.tree.map(combined, direct, q_of_hyperparams)
        z, _, _ = phi.step_and_gradient(z, hyperparams, last, (train_loss, direction, r))
        val_loss = validation.measured(z, hyperparams)
        return Estimate(z, hypergradient, train_loss, val_loss, BOMEMemory(multiplier))
