"""Training at fixed hyperparameters: the baseline, the warm-up and the end of a tuned run."""

import equinox as eqx
import jax
import jax.numpy as jnp

from gradhpo.extend import (
    Algorithm,
    Estimate,
    GradFn,
    InnerOptimizer,
    Problem,
    UpdateFn,
    checked,
)


@checked
class FixedOptimizer(Algorithm):
    r"""Trains and leaves the hyperparameters unchanged.

    Gives everything that [`run`][gradhpo.run] offers, without tuning: the untuned baseline on the
    same batches, a warm-up before another optimizer takes over with
    [`adopt`][gradhpo.BilevelOptimizer.adopt], the final training with tuned hyperparameters.

    **Arguments:**

    - `inner_optimizer`: an optax transformation for the parameters, or a function
        `hyperparams -> transformation`. Default `None`: pass `update_fn` instead. It may need the
        loss (`optax.lbfgs`, `optax.polyak_sgd`).
    - `inner_steps`: inner steps per `step`, at least 1; default 1. The validation loss is computed
        once per `step`.
    - `grad_fn`: `(params, hyperparams, batch) -> gradient`, a tree like the parameters, which
        replaces the gradient of the training loss (DP-SGD, SAM, semi-gradients); the loss is then
        only a metric. Default `None`.
    - `update_fn`: `(params, hyperparams, batch) -> params`, one inner step, which replaces
        `inner_optimizer`. Default `None`. With a [model state](../how_to/running_state.md),
        `grad_fn` and `update_fn` take it as a fourth argument and also return the new one.

    There is no outer optimizer, `lr_hyper` is refused, and the metric `hypergrad_norm` is 0.

    **Raises:** `ValueError` for both or neither of `inner_optimizer` and `update_fn`, a `grad_fn`
    without an `inner_optimizer`, or `inner_steps < 1`; `TypeError` for an optimizer that is not an
    optax transformation, or a function that is not callable. `compute_hypergradient` raises
    `TypeError`.

    ```python
    train_loss = lambda w, h, batch: jnp.sum((w - h) ** 2)
    val_loss = lambda w, h, batch: jnp.sum((w - 1.0) ** 2)
    losses = gradhpo.LossFunctions(train_loss, val_loss)
    warm_up = gradhpo.FixedOptimizer(optax.adam(0.1, eps_root=1e-16))
    tuning = gradhpo.OneStepOptimizer(optax.adam(0.1, eps_root=1e-16), optax.adam(0.01))
    state = warm_up.init(jnp.zeros(3), jnp.zeros(3))
    state, _ = gradhpo.run(warm_up, state, losses, None, None, num_steps=30, progress=False)
    state = tuning.adopt(state)  # with the moments of Adam
    state, history = gradhpo.run(tuning, state, losses, None, None, num_steps=50, progress=False)
    ```
    """

    inner_optimizer: InnerOptimizer | None = None
    inner_steps: int = eqx.field(static=True, default=1, kw_only=True)
    grad_fn: GradFn | None = eqx.field(default=None, kw_only=True)
    update_fn: UpdateFn | None = eqx.field(default=None, kw_only=True)

    steps_field = "inner_steps"

    @property
    def outer_optimizer(self) -> None:
        """None: nothing is tuned."""
        return None

    @property
    def tunes(self) -> bool:
        """False."""
        return False

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        phi, validation, z, hyperparams = problem
        z, train_loss, _ = phi.rollout(z, hyperparams, 0, self.inner_steps)
        nothing = jax.tree.map(jnp.zeros_like, hyperparams)
        return Estimate(z, nothing, train_loss, validation.measured(z, hyperparams))
