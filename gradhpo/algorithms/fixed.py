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
    check_count,
    checked,
)


@checked
class FixedOptimizer(Algorithm):
    r"""Trains and leaves the hyperparameters unchanged.

    It offers everything that [`run`][gradhpo.run] does, without tuning: the untuned baseline on the
    same batches, a warm-up before another optimizer takes over with its
    [`adopt`][gradhpo.BilevelOptimizer.adopt], the final training with tuned hyperparameters.

    **Arguments:**

    - `inner_optimizer`, `grad_fn`, `update_fn`: as for [`FOOptimizer`][gradhpo.FOOptimizer].
    - `inner_steps`: inner steps per `step`, at least 1; default 1. The validation loss is computed
        once per `step`.

    There is no outer optimizer, `lr_hyper` is refused, and the metric `hypergrad_norm` is 0.

    **Raises:** `ValueError` for `inner_steps < 1`; `TypeError` from `compute_hypergradient`.

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

    def __check_init__(self):
        check_count("inner_steps", self.inner_steps)

    @property
    def outer_optimizer(self) -> None:
        """None: nothing is tuned."""
        return None

    @property
    def num_inner_steps(self) -> int:
        """Inner steps per `step`: `inner_steps`."""
        return self.inner_steps

    @property
    def tunes(self) -> bool:
        """False."""
        return False

    @property
    def passes_loss(self) -> bool:
        """True: the inner update is not differentiated."""
        return True

    @property
    def derivatives(self) -> str:
        """First derivatives only."""
        return "first derivatives of the training loss"

    def with_num_steps(self, num_steps: int) -> "FixedOptimizer":
        """The same optimizer with other `inner_steps`."""
        return FixedOptimizer(
            self.inner_optimizer,
            inner_steps=num_steps,
            grad_fn=self.grad_fn,
            update_fn=self.update_fn,
        )

    def estimate(self, problem: Problem, memory: None) -> Estimate:
        phi, validation, z, hyperparams = problem
        z, train_loss, _ = phi.rollout(z, hyperparams, 0, self.inner_steps)
        nothing = jax.tree.map(jnp.zeros_like, hyperparams)
        return Estimate(z, nothing, train_loss, validation.measured(z, hyperparams))
