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
    r"""First order: the direct term, $g = \partial L_{\mathrm{val}}/\partial\lambda\,(w_1)$.

    One inner step, then the derivative of the validation loss with the parameters held fixed. It
    sees only hyperparameters that appear in the validation loss itself; if none does, tracing
    raises `ValueError`.

    **Arguments:**

    - `inner_optimizer`: an optax transformation, or a function of the hyperparameters that returns
        one. Optimizers that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) get its `value`,
        `grad` and `value_fn` from this class, from
        [`ImplicitOptimizer`][gradhpo.ImplicitOptimizer], and from
        [`T1T2Optimizer`][gradhpo.T1T2Optimizer] with `perturb="hyperparams"`; the other algorithms
        differentiate the inner update and refuse them.
    - `outer_optimizer`: an optax transformation for the hyperparameters; `None` (the default)
        means plain gradient descent with the `lr_hyper` given to `step`.
    - `grad_fn`: replaces the gradient of the training loss that `inner_optimizer` takes,
        `(params, hyperparams, batch) -> gradient`, a tree like the parameters: clipped per example
        (DP-SGD), taken at another point (SAM), a semi-gradient. The training loss is then only a
        metric.
    - `update_fn`: replaces `inner_optimizer`, `(params, hyperparams, batch) -> params`.
        With a [model state](../how_to/running_state.md) both take it as fourth argument, and return
        the new one as well.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, or a
    `grad_fn` without an `inner_optimizer`; `TypeError` if one of them is neither an optax
    transformation nor a function. The same holds for all optimizers.

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
    r"""One step, exact: $g = \partial L_{\mathrm{val}}/\partial\lambda + \alpha_1 B_1$.

    $\alpha_1 = \partial L_{\mathrm{val}}/\partial w\,(w_1)$ and
    $B_1 = \partial\Phi/\partial\lambda$ at the step just taken, including the inner optimizer's
    state and settings.

    **Arguments:** as for [`FOOptimizer`][gradhpo.FOOptimizer], with the same errors.

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
