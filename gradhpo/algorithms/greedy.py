r"""Generalized greedy: one-step hypergradients of every inner step, discounted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    Problem,
    Sees,
    UpdateFn,
    accumulation_dtype,
    cast_like,
    check_setting,
    checked,
    setting,
)


@checked
class GreedyOptimizer(Algorithm):
    r"""Generalized greedy hypergradients, in memory independent of the horizon.

    $$g = \frac{\partial L_{\mathrm{val}}}{\partial\lambda}(w_T) + \sum_{t=1}^{T} \gamma^{T-t}\,
    \alpha_t B_t,\qquad \alpha_t = \frac{\partial L_{\mathrm{val}}}{\partial w}(w_t),$$

    the exact sum with each $\alpha_T A_T\cdots A_{t+1}$ replaced by $\gamma^{T-t}\alpha_t$: each
    inner step is judged by the validation gradient right after it. It is computed in one forward
    scan, $h \leftarrow \gamma h + \alpha_t B_t$, with one product and one validation gradient per
    step.

    It works well if parameters carry over from `step` to `step` and the validation gradient turns
    slowly. If that gradient turns within the horizon (a long `unroll_steps` from a starting point
    far from any minimum, restarted each time), the sum can point uphill: shorten the horizon, lower
    `gamma`, or compare with [`UnrolledOptimizer`][gradhpo.UnrolledOptimizer].

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. Transformations
        that need the loss (`optax.lbfgs`, `optax.polyak_sgd`) are refused.
    - `outer_optimizer`: an optax transformation for the hyperparameters. Default `None`: gradient
        descent with the `lr_hyper` of each `step`.
    - `unroll_steps`: inner steps $T$ per `step`, at least 1; default 1.
    - `gamma`: the discount $\gamma \in [0, 1]$, shape `()`, default 0.9. At 0 only the last step
        counts; at 1 all steps count equally.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, `unroll_steps < 1`, or `gamma` outside [0, 1]; `TypeError` for an
    optimizer that is not an optax transformation, or a function that is not callable.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    optimizer = gradhpo.GreedyOptimizer(optax.sgd(0.1), optax.sgd(0.1), unroll_steps=10)
    state = optimizer.init(jnp.zeros(3), jnp.zeros(3))
    state = optimizer.step(state, None, None, train_loss, val_loss)
    ```

    ??? cite "Reference"

        *Generalized Greedy Gradient-Based Hyperparameter Optimization*, submission 6297 to
        ICLR 2025, equation 6.
    """

    inner_optimizer: InnerOptimizer | None = None
    outer_optimizer: optax.GradientTransformation | None = None
    unroll_steps: int = eqx.field(static=True, default=1)
    gamma: Float[Array, ""] = eqx.field(converter=setting, default=0.9)
    grad_fn: GradFn | None = None
    update_fn: UpdateFn | None = None

    steps_field = "unroll_steps"

    def __check_init__(self):
        check_setting("gamma", self.gamma, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")

    @property
    def sees(self) -> Sees:
        """The last update."""
        return "last update"

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        phi, validation, z, hyperparams = problem
        # The sum has many small terms: in bfloat16 it would stall.
        wide = accumulation_dtype(hyperparams)
        gamma = self.gamma.astype(wide)

        def add(total, term):
            return jax.tree.map(lambda h, x: gamma * h + x.astype(wide), total, term)

        def body(carry, t):
            z, total = carry
            z, _, pull = phi.vjp(z, hyperparams, t)
            alpha = validation.alpha(z, hyperparams)
            return (z, add(total, pull(alpha)[1])), None

        zero = jax.tree.map(lambda x: jnp.zeros_like(x, wide), hyperparams)
        last = self.unroll_steps - 1
        carry = (z, zero)
        if last:
            carry, _ = jax.lax.scan(body, carry, jnp.arange(last))
        # The last step is separate: it alone needs both losses and the direct term.
        z, total = carry
        z, train_loss, pull = phi.vjp(z, hyperparams, last)
        val_loss, alpha, direct = validation.value_and_grads(z, hyperparams)
        total = add(total, pull(alpha)[1])
        hypergradient = jax.tree.map(lambda x, h: x.astype(wide) + h, direct, total)
        hypergradient = cast_like(hypergradient, hyperparams)
        return Estimate(z, hypergradient, train_loss, val_loss)
