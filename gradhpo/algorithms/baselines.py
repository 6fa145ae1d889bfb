r"""The two cheapest estimates: the direct term alone, and one inner step."""

import jax
import jax.numpy as jnp
import optax

from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    Problem,
    Sees,
    UpdateFn,
    checked,
)


@checked
class FOOptimizer(Algorithm):
    r"""First order: the direct derivative of the validation loss, and nothing through training.

    Takes one inner step, then $g = \partial L_{\mathrm{val}}/\partial\lambda\,(w_1)$ with the
    parameters held fixed. It sees only hyperparameters that appear in the validation loss itself.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. It may need the
        loss (`optax.lbfgs`, `optax.polyak_sgd`).
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`; `TypeError` for an optimizer that is not an optax transformation,
    or a function that is not callable. While tracing, `ValueError` if no hyperparameter appears in
    the validation loss.

    ```python
    loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    optimizer = gradhpo.FOOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(jnp.ones(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, loss, loss)
    ```

    ??? cite "Reference"

        The $\xi = 0$ form of Liu et al., *DARTS: Differentiable Architecture Search*,
        ICLR 2019, arXiv:1806.09055, equation 7.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    @property
    def num_inner_steps(self) -> int:
        """1: this method takes one inner step per `step`."""
        return 1

    @property
    def sees(self) -> Sees:
        """The validation loss alone."""
        return "validation"

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        phi, validation, z, hyperparams = problem
        z, train_loss = phi.step(z, hyperparams, 0)
        val_loss, _, direct = validation.value_and_grads(z, hyperparams)
        return Estimate(z, direct, train_loss, val_loss)


@checked
class OneStepOptimizer(Algorithm):
    r"""One step: exact differentiation through the inner step just taken.

    $g = \partial L_{\mathrm{val}}/\partial\lambda + \alpha_1 B_1$ with
    $\alpha_1 = \partial L_{\mathrm{val}}/\partial w\,(w_1)$ and
    $B_1 = \partial\Phi/\partial\lambda$ at that step, including the inner optimizer's state and
    settings.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. Transformations
        that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`; `TypeError` for an optimizer that is not an optax transformation,
    or a function that is not callable.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.OneStepOptimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        Luketina et al., *Scalable Gradient-Based Tuning of Continuous Regularization
        Hyperparameters*, ICML 2016, arXiv:1511.06727.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    @property
    def num_inner_steps(self) -> int:
        """1: this method takes one inner step per `step`."""
        return 1

    @property
    def sees(self) -> Sees:
        """The last update."""
        return "last update"

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        phi, validation, z, hyperparams = problem
        z, train_loss, pull = phi.vjp(z, hyperparams, 0)
        val_loss, alpha, direct = validation.value_and_grads(z, hyperparams)
        _, through_update = pull(alpha)
        hypergradient = jax.tree.map(jnp.add, direct, through_update)
        return Estimate(z, hypergradient, train_loss, val_loss)
