r"""$\Phi$, evaluated: the inner steps of training.

An inner step takes $z = (w, s, r)$, the parameters, optimizer state and running state of the model,
to $z' = \Phi(z, \lambda; D_t)$. Here $w$ is the floating-point part of the user's params, without
frozen leaves; the rest of them (functions, integer arrays, what is frozen) is constant during
training and kept separately.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.inner_loss import InnerLoss
from gradhpo.core.inner_optimizer import init_inner_state
from gradhpo.core.inner_rule import solved_by, updated_by_hand, updated_by_optax
from gradhpo.core.inner_state import InnerState
from gradhpo.core.losses import Result
from gradhpo.core.measured import Loss, Measured, loss_of
from gradhpo.utils.foreign import (
    forget_secants,
    last_evaluation,
    searches_along_lines,
    with_evaluation,
)
from gradhpo.utils.gradients import undifferentiable


_LINE_SEARCH = (
    "a hypergradient cannot be differentiated through a line search, as in optax.lbfgs: the "
    "derivative would depend on the rounding errors that end the search. Use gradient descent as "
    "inner_optimizer, optax.sgd(0.1), with as many inner steps as it needs"
)


class InnerStep(InnerLoss):
    """The part of `InnerUpdate` that takes inner steps."""

    def with_fresh_state(self, z: InnerState, hyperparams: PyTree) -> InnerState:
        """`z` with the optimizer state that `init` makes at its parameters."""
        return z._replace(s=init_inner_state(self.inner_optimizer, z.w, hyperparams))

    def at_new_hyperparams(self, z: InnerState, num_steps: int) -> InnerState:
        """The z that `num_steps` inner steps start from once the hyperparameters have moved.

        L-BFGS remembers differences of gradients; the first would be between two different losses.
        """
        if self.passes_loss and num_steps > 1:
            return z._replace(s=forget_secants(z.s))
        return z

    def step(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike, want_loss: ArrayLike = True
    ) -> tuple[InnerState, Loss]:
        """`(z', training loss before the update)`, the loss as `Measured` if it has metrics.

        It comes free with its gradient. With a `grad_fn` or an `update_fn` it is extra work,
        done only if `want_loss`; otherwise it is `nan`. With an `inner_solver` it is the loss at
        the solution.
        """
        if self.inner_solver is not None:
            new = self.solved(z, hyperparams, t)
            return new, self.loss_if(want_loss, new, hyperparams, t)
        if self.update_fn is not None:
            new_w, r = self.updated_by_hand(z, hyperparams, t)
            return z._replace(w=new_w, r=r), self.loss_if(want_loss, z, hyperparams, t)
        evaluation = self._evaluated_by_hand(z, hyperparams, t, want_loss)
        new_z, loss, _ = self.step_and_gradient(z, hyperparams, t, evaluation)
        return new_z, loss

    def _evaluated_by_hand(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike, want_loss: ArrayLike
    ) -> tuple[Loss, PyTree, PyTree] | None:
        """With a `grad_fn`, what a step starts with, and the loss only if it is wanted."""
        if self.grad_fn is None or self.passes_loss:
            return None
        loss = self.loss_if(want_loss, z, hyperparams, t)
        return loss, *self.gradient_and_state(z, hyperparams, t)

    def step_and_gradient(
        self,
        z: InnerState,
        hyperparams: PyTree,
        t: ArrayLike,
        evaluation: tuple[Loss, PyTree, PyTree] | None = None,
    ) -> tuple[InnerState, Loss, PyTree]:
        """`(z', loss, gradient)`; only with an `inner_optimizer`.

        `evaluation` is the loss, its gradient and the new running state, if already known.
        """
        if evaluation is None:
            evaluation = self.loss_and_gradient(z, hyperparams, t)
        loss, gradient, r = evaluation
        of_loss = {}
        if self.passes_loss:
            value_fn = lambda w: self.train_loss(z._replace(w=w), hyperparams, t)
            of_loss = {"value": loss_of(loss), "grad": gradient, "value_fn": value_fn}
        new_w, new_s = self._updated_by_optax(gradient, z, hyperparams, t, of_loss)
        return InnerState(new_w, new_s, r), loss, gradient

    def rollout(
        self,
        z: InnerState,
        hyperparams: PyTree,
        first: ArrayLike,
        num_steps: int,
        *,
        keep: Callable[[InnerState], PyTree] = lambda z: None,
        loss_at: int | None = None,
    ) -> tuple[InnerState, Loss, PyTree]:
        """Inner steps from number `first` on: `(z', last loss, kept)`.

        `kept` stacks what `keep` takes from the z before each step. The loss of zero steps is
        `nan`. With an `update_fn` the loss is computed only at step `loss_at`, by default the last.
        """
        if num_steps == 0:
            return z, jnp.asarray(jnp.nan), None

        wanted = first + num_steps - 1 if loss_at is None else loss_at
        z, evaluated = self._evaluated(z, hyperparams, first)

        def body(z, t):
            if evaluated:
                last = last_evaluation(z.s)
                assert last is not None
                new_z, loss, _ = self.step_and_gradient(z, hyperparams, t, (*last, z.r))
            else:
                new_z, loss = self.step(z, hyperparams, t, want_loss=t == wanted)
            return new_z, (loss, keep(z))

        z, (losses, before) = jax.lax.scan(body, z, first + jnp.arange(num_steps))
        if searches_along_lines(z.s):
            z = undifferentiable(z, _LINE_SEARCH)
        return z, losses[-1], before

    def rollout_with_gradients(
        self,
        z: InnerState,
        hyperparams: PyTree,
        num_steps: int,
        add: Callable[[PyTree, InnerState, PyTree, Array], PyTree],
        total: PyTree,
    ) -> tuple[InnerState, Loss, PyTree]:
        """Inner steps from number 0 on: `(z', last loss, total)`.

        Each sets `total = add(total, z, gradient, t)`, with the gradient that it takes at z anyway.
        With an `update_fn` that is the gradient of the loss, and extra work.
        """
        z, evaluated = self._evaluated(z, hyperparams, 0)

        def body(carried, t):
            z, total = carried
            last = last_evaluation(z.s) if evaluated else None
            wanted = t == num_steps - 1
            if last is not None:
                new_z, loss, gradient = self.step_and_gradient(z, hyperparams, t, (*last, z.r))
            elif self.update_fn is None:
                given = self._evaluated_by_hand(z, hyperparams, t, wanted)
                new_z, loss, gradient = self.step_and_gradient(z, hyperparams, t, given)
            else:
                loss, gradient, _ = self.loss_and_gradient(z, hyperparams, t)
                new_z, _ = self.step(z, hyperparams, t, want_loss=False)
            return (new_z, add(total, z, gradient, t)), loss

        (z, total), losses = jax.lax.scan(body, (z, total), jnp.arange(num_steps))
        if searches_along_lines(z.s):
            z = undifferentiable(z, _LINE_SEARCH)
        return z, losses[-1], total

    def _evaluated(
        self, z: InnerState, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[InnerState, bool]:
        """`z` with the loss at `w` in its line search, and whether every step finds it there.

        The search has evaluated the parameters that it ends at: half of the work of most steps. The
        first evaluation is always made, since hyperparameters and batch have changed. The search
        does not hold the loss's metrics or running state.
        """
        reusable = self.passes_loss and self.repeats_batch and z.r is None
        last = last_evaluation(z.s) if reusable else None
        if last is None:
            return z, False
        loss, gradient, _ = self.loss_and_gradient(z, hyperparams, t)
        if isinstance(loss, Measured) or loss.dtype != last[0].dtype:
            return z, False
        return z._replace(s=with_evaluation(z.s, loss, gradient)), True

    def _updated_by_optax(
        self,
        gradient: PyTree,
        z: InnerState,
        hyperparams: PyTree,
        t: ArrayLike,
        of_loss: Any = (),
    ) -> tuple[PyTree, PyTree]:
        """`of_loss` must not be differentiated. Sophia's objective is, like everything here."""
        assert self.inner_optimizer is not None
        objective = lambda w: self.train_loss(z._replace(w=w), hyperparams, t)
        given = gradient, z.s, z.w, hyperparams, objective
        return updated_by_optax(self.inner_optimizer, *given, **dict(of_loss))

    def solved(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> InnerState:
        """The parameters and running state that `inner_solver` returns, as constants."""
        assert self.inner_solver is not None
        params, batch = eqx.combine(z.w, self.frozen), self.batch(t)
        w, r = solved_by(self.inner_solver, params, z.w, hyperparams, batch, z.r)
        return z._replace(w=w, r=r)

    def updated_by_hand(self, z: InnerState, hyperparams: PyTree, t: ArrayLike) -> Result:
        """The parameters by `update_fn`, and the new running state."""
        assert self.update_fn is not None
        params, batch = eqx.combine(z.w, self.frozen), self.batch(t)
        return updated_by_hand(self.update_fn, params, z.w, hyperparams, batch, z.r)
