r"""$\Phi$: the one differentiable inner update, and its pullback.

An inner step takes $z = (w, s)$, parameters and optimizer state, to
$z' = \Phi(z, \lambda; D_t)$. Here $w$ is the floating-point part of the user's params; the
rest of them (functions, integer arrays) is constant through training and kept aside.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, PyTree

from gradhpo.core.inner_optimizer import (
    cast_like,
    explained,
    keeps_last_evaluation,
    resolve,
    with_evaluation,
)
from gradhpo.core.types import InnerOptimizer, LossFn, UpdateFn, batch_of_step, is_same_each_step
from gradhpo.utils.gradients import linearize_gradient, tree_zeros_like


Carry: TypeAlias = tuple[PyTree, PyTree]  # (w, s)


class InnerUpdate(eqx.Module):
    r"""$\Phi$ on the training data of one outer step.

    Built inside the compiled step by `core.problem.bind`; lives no longer.
    Inner steps are numbered from `t = 0`.
    """

    inner_optimizer: InnerOptimizer | None
    update_fn: UpdateFn | None
    train_loss_fn: LossFn
    frozen: PyTree
    train_batch: PyTree
    symmetric: bool = eqx.field(static=True)
    # Whether `step` gives optax the loss as well. `vjp` never does: a derivative of what optax
    # makes of the loss would miss its dependence on w and the hyperparameters.
    passes_loss: bool = eqx.field(static=True, default=False)

    def batch(self, t: ArrayLike) -> PyTree:
        """$D_t$."""
        return batch_of_step(self.train_batch, t)

    def train_loss(self, w: PyTree, hyperparams: PyTree, t: ArrayLike) -> Any:
        """What the user's loss returns, which `bind` checks to be a scalar."""
        return self.train_loss_fn(eqx.combine(w, self.frozen), hyperparams, self.batch(t))

    def step(
        self, z: Carry, hyperparams: PyTree, t: ArrayLike, want_loss: ArrayLike = True
    ) -> tuple[Carry, Array]:
        """`(z', training loss before the update)`.

        The loss costs nothing beside its gradient. Beside an `update_fn` it is extra work,
        done only where `want_loss`; elsewhere it is `nan`.
        """
        if self.update_fn is not None:
            w, s = z
            compute = lambda: self.train_loss(w, hyperparams, t)
            skip = lambda: jnp.full_like(jax.eval_shape(compute), jnp.nan)
            return (
                (self._updated_by_hand(w, hyperparams, t), s),
                jax.lax.cond(want_loss, compute, skip),
            )
        new_z, loss, _ = self.step_and_gradient(z, hyperparams, t)
        return new_z, loss

    def step_and_gradient(
        self,
        z: Carry,
        hyperparams: PyTree,
        t: ArrayLike,
        evaluation: tuple[Array, PyTree] | None = None,
    ) -> tuple[Carry, Array, PyTree]:
        """`(z', loss, training gradient)`; only with an `inner_optimizer`.

        `evaluation` is the loss and its gradient where they are known already.
        """
        w, s = z
        if evaluation is None:
            evaluation = jax.value_and_grad(self.train_loss)(w, hyperparams, t)
        loss, gradient = evaluation
        of_loss = {}
        if self.passes_loss:
            value_fn = lambda w: self.train_loss(w, hyperparams, t)
            of_loss = {"value": loss, "grad": gradient, "value_fn": value_fn}
        return self._updated_by_optax(gradient, s, w, hyperparams, of_loss), loss, gradient

    def vjp(
        self, z: Carry, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[Carry, Array, Callable[..., tuple[PyTree, PyTree, PyTree]]]:
        r"""`(z', loss, pull)`, where `pull(w_bar, s_bar)` is $(\bar w, \bar s, \bar\lambda)$.

        First the optimizer's own update is transposed, which is element-wise and carries
        what reaches $\lambda$ through it; that leaves a cotangent on the training gradient,
        whose two second-derivative products come from one linearization, shared with the
        gradient that the step needs anyway. `s_bar=None` means zero.
        """
        w, s = z
        if self.update_fn is not None:
            new_w, pull_by_hand = jax.vjp(
                lambda w, h: self._updated_by_hand(w, h, t), w, hyperparams
            )
            loss = self.train_loss(w, hyperparams, t)

            def pull_without_state(w_bar, s_bar=None):
                w_out, hyper_out = pull_by_hand(w_bar)
                return w_out, s_bar, hyper_out

            return (new_w, s), loss, pull_without_state

        loss, gradient, second_derivatives = linearize_gradient(
            lambda w, h: self.train_loss(w, h, t), w, hyperparams, symmetric=self.symmetric
        )
        s_inexact, s_rest = eqx.partition(s, eqx.is_inexact_array)

        def optimizer_update(gradient, s_inexact, w, hyperparams):
            new_w, new_s = self._updated_by_optax(
                gradient, eqx.combine(s_inexact, s_rest), w, hyperparams
            )
            new_inexact, new_rest = eqx.partition(new_s, eqx.is_inexact_array)
            return (new_w, new_inexact), new_rest

        (new_w, new_inexact), pull_optimizer, new_rest = jax.vjp(
            optimizer_update, gradient, s_inexact, w, hyperparams, has_aux=True
        )

        def pull(w_bar, s_bar=None):
            s_bar = tree_zeros_like(new_inexact) if s_bar is None else s_bar
            gradient_bar, s_out, w_direct, hyper_direct = pull_optimizer((w_bar, s_bar))
            w_mixed, hyper_mixed = second_derivatives(gradient_bar)
            return (
                jax.tree.map(jnp.add, w_direct, w_mixed),
                s_out,
                jax.tree.map(jnp.add, hyper_direct, hyper_mixed),
            )

        return (new_w, eqx.combine(new_inexact, new_rest)), loss, pull

    def optimizer_vjp(
        self, gradient: PyTree, z: Carry, hyperparams: PyTree, w_bar: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Cotangents on the gradient and on the hyperparameters, through optax alone."""
        w, s = z
        _, pull = jax.vjp(lambda g, h: self._updated_by_optax(g, s, w, h)[0], gradient, hyperparams)
        return pull(w_bar)

    def optimality(
        self, w: PyTree, hyperparams: PyTree, t: ArrayLike
    ) -> tuple[PyTree, Callable[[PyTree], tuple[PyTree, PyTree]]]:
        r"""What vanishes at the inner optimum, and the products with its derivatives.

        $F = \nabla_w L_{train}$, or $F = w - \Phi(w, \lambda)$ beside an `update_fn`; with it
        $v \mapsto (v^\top \partial F/\partial w,\; v^\top \partial F/\partial\lambda)$.
        """
        if self.update_fn is None:
            _, gradient, products = linearize_gradient(
                lambda w, h: self.train_loss(w, h, t), w, hyperparams, symmetric=self.symmetric
            )
            return gradient, products
        (new_w, _), _, pull = self.vjp((w, ()), hyperparams, t)

        def minus_pulled(v):
            by_w, _, by_hyperparams = pull(v)
            return jax.tree.map(jnp.subtract, v, by_w), jax.tree.map(jnp.negative, by_hyperparams)

        return jax.tree.map(jnp.subtract, w, new_w), minus_pulled

    def rollout(
        self,
        z: Carry,
        hyperparams: PyTree,
        first: ArrayLike,
        num_steps: int,
        *,
        keep: Callable[[Carry], PyTree] = lambda z: None,
        loss_at: int | None = None,
    ) -> tuple[Carry, Array, PyTree]:
        """Inner steps from number `first` on: `(z', last loss, kept)`.

        Stacks in `kept` what `keep` takes of the z before each step. The loss of no steps is
        `nan`. Beside an `update_fn` the loss is computed at step `loss_at` alone, by default
        the last.
        """
        if num_steps == 0:
            return z, jnp.asarray(jnp.nan), None

        wanted = first + num_steps - 1 if loss_at is None else loss_at
        z, evaluated = self._evaluated(z, hyperparams, first)

        def body(z, t):
            if evaluated:
                search = z[1][-1]
                last = (search.value, search.grad)
                new_z, loss, _ = self.step_and_gradient(z, hyperparams, t, last)
            else:
                new_z, loss = self.step(z, hyperparams, t, want_loss=t == wanted)
            return new_z, (loss, keep(z))

        z, (losses, before) = jax.lax.scan(body, z, first + jnp.arange(num_steps))
        return z, losses[-1], before

    def _evaluated(self, z: Carry, hyperparams: PyTree, t: ArrayLike) -> tuple[Carry, bool]:
        """`z` with the loss at `w` in its line search, and whether every step finds it there.

        The search has evaluated the parameters that it ends at: half of the work of most steps.
        The first evaluation is always made, since hyperparameters and batch have changed.
        """
        w, s = z
        reusable = self.passes_loss and is_same_each_step(self.train_batch)
        if not (reusable and keeps_last_evaluation(s)):
            return z, False
        loss, gradient = jax.value_and_grad(self.train_loss)(w, hyperparams, t)
        if loss.dtype != s[-1].value.dtype:
            return z, False
        return (w, with_evaluation(s, loss, gradient)), True

    def _updated_by_optax(self, gradient, s, w, hyperparams, of_loss: Any = ()) -> Carry:
        assert self.inner_optimizer is not None
        transformation = resolve(self.inner_optimizer, hyperparams)
        with explained():
            update = optax.with_extra_args_support(transformation).update
            updates, new_s = update(gradient, s, w, **dict(of_loss))
        new_w = optax.apply_updates(w, updates)
        return cast_like(new_w, w, "the inner update"), cast_like(new_s, s)

    def _updated_by_hand(self, w, hyperparams, t) -> PyTree:
        assert self.update_fn is not None
        params = eqx.combine(w, self.frozen)
        returned = self.update_fn(params, hyperparams, self.batch(t))
        new, rest = eqx.partition(returned, eqx.is_inexact_array)
        if jax.tree.map(jnp.shape, new) != jax.tree.map(jnp.shape, w):
            raise ValueError(
                "update_fn must return params of the structure and shapes that it was given:\n"
                f"  {eqx.tree_pformat(w)}\nbut it returned\n  {eqx.tree_pformat(new)}"
            )
        frozen = eqx.filter(params, eqx.is_inexact_array, inverse=True)
        if any(x is not y for x, y in zip(*map(jax.tree.leaves, (rest, frozen)), strict=True)):
            raise ValueError(
                "update_fn changes a leaf of params that is not a floating-point array (a "
                "counter?); such leaves stay as they are: keep it as a float, or out of params"
            )
        return cast_like(new, w)
