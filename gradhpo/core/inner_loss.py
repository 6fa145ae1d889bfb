"""What an inner step evaluates: the training loss, and the gradient that its optimizer takes."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.batches import batch_of_step, is_same_each_step
from gradhpo.core.inner_rule import gradient_by
from gradhpo.core.inner_state import InnerState, Start
from gradhpo.core.losses import Evaluation, called, train_result
from gradhpo.core.measured import Loss, measured
from gradhpo.core.types import GradFn, InnerOptimizer, InnerSolver, LossFn, UpdateFn


class InnerLoss(eqx.Module):
    """The fields of `InnerUpdate`, and the part of it that evaluates and changes nothing."""

    inner_optimizer: InnerOptimizer | None
    grad_fn: GradFn | None
    update_fn: UpdateFn | None
    train_loss_fn: LossFn
    frozen: PyTree
    train_batch: PyTree
    symmetric: bool = eqx.field(static=True)
    recomputes: bool = eqx.field(static=True, default=False)  # products recompute activations
    metrics: tuple[str, ...] = eqx.field(static=True, default=())  # of the training loss
    reads_state: bool = eqx.field(static=True, default=False)  # the training loss reads z.r
    differentiated: bool = eqx.field(static=True, default=True)  # so is the training gradient
    # Whether `z.s` is what the optimizer's `init` made at these hyperparameters, shape `()`; `None`
    # if no hyperparameters act there, nor in `start`, which makes the parameters of an episode.
    # core/start.py has the consequences.
    fresh: Array | None = None
    start: Start | None = None
    # Takes the place of all inner steps; `update_fn` is then the equation that it solves.
    inner_solver: InnerSolver | None = None
    # Whether `step` also gives the loss to optax. `vjp` never does: the derivative would miss that
    # the loss depends on w and the hyperparameters.
    passes_loss: bool = eqx.field(static=True, default=False)

    def batch(self, t: ArrayLike) -> PyTree:
        """The batch of inner step `t`."""
        return batch_of_step(self.train_batch, t)

    @property
    def repeats_batch(self) -> bool:
        """Whether the batch is the same for all inner steps."""
        return is_same_each_step(self.train_batch)

    def evaluate(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Evaluation:
        """The training loss, the new running state, and metrics."""
        return train_result(self.returned(z, hyperparams, t), z.r)

    def returned(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Any:
        """What the user's loss returns."""
        params = eqx.combine(z.w, self.frozen)
        return called(self.train_loss_fn, params, hyperparams, self.batch(t), z.r)

    def train_loss(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Any:
        """The training loss."""
        return self.evaluate(z, hyperparams, t).loss

    def gradient(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> PyTree:
        """The inner optimizer's input: the training gradient, or what `grad_fn` returns."""
        return self.gradient_and_state(z, hyperparams, t)[0]

    def gradient_and_state(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[PyTree, PyTree]:
        """The gradient, and the new running state."""
        if self.grad_fn is None:
            gradient, (r, _) = jax.grad(self._of_w(z, hyperparams, t), has_aux=True)(z.w)
            return gradient, r
        params, batch = eqx.combine(z.w, self.frozen), self.batch(t)
        return gradient_by(self.grad_fn, params, z.w, hyperparams, batch, z.r)

    def _of_w(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Callable:
        """`evaluate` as a function of the parameters: `(loss, (new running state, metrics))`."""

        def evaluate(w: PyTree) -> tuple[Any, tuple[PyTree, dict[str, Array]]]:
            loss, r, aux = self.evaluate(z._replace(w=w), hyperparams, t)
            return loss, (r, aux)

        return evaluate

    def loss_if(self, wanted: ArrayLike, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Loss:
        """The loss, computed only if it is wanted, otherwise `nan`."""
        compute = lambda: self._loss_alone(z, hyperparams, t)
        nan = lambda like: jnp.full(like.shape, jnp.nan, like.dtype)
        skip = lambda: jax.tree.map(nan, jax.eval_shape(compute))
        return jax.lax.cond(wanted, compute, skip)

    def loss_and_gradient(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[Loss, PyTree, PyTree]:
        """The loss, the inner optimizer's input, and the new running state."""
        if self.grad_fn is None:
            of_w = self._of_w(z, hyperparams, t)
            (loss, (r, aux)), gradient = jax.value_and_grad(of_w, has_aux=True)(z.w)
            return measured(loss, aux), gradient, r
        loss = self._loss_alone(z, hyperparams, t)
        return loss, *self.gradient_and_state(z, hyperparams, t)

    def value_and_grads(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[Loss, PyTree, PyTree, PyTree]:
        """As `loss_and_gradient`, with the loss's hyperparameter derivative after the gradient.

        It is the derivative of the training loss even with a `grad_fn`.
        """
        if self.grad_fn is not None:
            by_hyperparams = jax.grad(self.train_loss, argnums=1)(z, hyperparams, t)
            loss, gradient, r = self.loss_and_gradient(z, hyperparams, t)
            return loss, gradient, by_hyperparams, r

        def evaluate(w: PyTree, hyperparams: PyTree) -> tuple[Any, tuple[PyTree, dict[str, Array]]]:
            loss, r, aux = self.evaluate(z._replace(w=w), hyperparams, t)
            return loss, (r, aux)

        both = jax.value_and_grad(evaluate, argnums=(0, 1), has_aux=True)
        (loss, (r, aux)), gradients = both(z.w, hyperparams)
        return measured(loss, aux), *gradients, r

    def _loss_alone(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Loss:
        """The loss as a metric: never differentiated, so it need not be differentiable."""
        loss, _, aux = self.evaluate(*jax.lax.stop_gradient((z, hyperparams)), t)
        return measured(loss, aux)
